"""What an engine may do its own way, and the engines that are known: `EXECUTIONS`."""

from dataclasses import dataclass, replace
from typing import Literal

from tidesim.errors import InputError, nearest_name
from tidesim.hardware import Hardware
from tidesim.workload import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How an engine runs a forward.

    Parameters
    ----------
    name : what results call it.
    kv_cache : whether keys and values of finished blocks are kept; without, every forward routes the whole prefix.
    logits : rows that go through lm_head: the "block" being denoised, or "all" rows of the forward.
    is_pinned : whether expert weights are copied from and to pinned (page-locked) host memory.
    copies : "blocking" moves run after a layer's router and before its experts, and nothing runs beside them;
        "background" moves are queued after the layer's experts, on a copy engine that later forwards share.
    copies_per_expert : copies that one expert takes; each pays the link's latency.
    write_back : whether an evicted expert is copied to the host, though its weights never change.
    kernels : "loop" runs the resident experts one by one, "grouped" all of a layer in one kernel.
    fetched : how experts that come in the background run on a device with grouped kernels and asynchronous launches:
        each "alone" when it is there, or "together" with those whose copies are under way at once, so that beginning
        them hides behind the copies.
    host : whether missed experts run on the host after the layer's device part ("serial") or beside it ("parallel").
    host_calls : whether the host is called, and rows are copied, once per missed "expert" or once per "layer".
    activation_bytes : of each number of the hidden states that travel to the host and back.
    returns : what the host sends back when it is called for a layer: a "row" for each token, its missed experts summed,
        or a row for each missed "pair" of a token and an expert, so that the device sums them in its own order.
    launch : cost of one op: "eager" is the host time of a framework op, "stream" that of a bare kernel launch.
    is_async : whether launches run ahead of the kernels and so cost only where they outlast them; without, as where
        the device is a CPU, the cost of every op adds to its kernels.
    home : where experts that are not on the device live: in "host" memory, or on a "disk". From a disk a promotion is
        one read, and an expert that the host computes is read first; the device is then the memory that it is read to.
    ops_per_layer : ops of an MoE layer outside its routed experts (attention, router, shared expert, combine).
    ops_per_dense_layer : ops of a layer without experts.
    ops_per_expert : ops of one routed expert in the loop, or run alone because it was fetched.
    ops_per_forward : ops outside the layers (embedding, final norm, lm_head, sampling).
    graph_kernels_per_layer, graph_kernels_per_dense_layer, graph_kernels_per_forward : kernels besides these ops that
        the host begins many at a time, as a graph captured before; each takes what a bare launch does, if not longer.
        That is the device's own time, and the host begins the ops of a layer when it knows what came of its graph, so
        that they hide behind none of it.

    Raise ValueError if evicted experts were to be written back to a disk, which has them still.
    """

    name: str
    kv_cache: bool
    logits: Literal["block", "all"]
    is_pinned: bool
    copies: Literal["blocking", "background"]
    copies_per_expert: int
    write_back: bool
    kernels: Literal["loop", "grouped"]
    host: Literal["serial", "parallel"]
    host_calls: Literal["expert", "layer"]
    activation_bytes: int
    returns: Literal["row", "pair"]
    launch: Literal["eager", "stream"]
    is_async: bool
    home: Literal["host", "disk"]
    ops_per_layer: int
    ops_per_dense_layer: int
    ops_per_expert: int
    ops_per_forward: int
    fetched: Literal["alone", "together"] = "alone"
    graph_kernels_per_layer: int = 0
    graph_kernels_per_dense_layer: int = 0
    graph_kernels_per_forward: int = 0

    def __post_init__(self) -> None:
        if self.home == "disk" and self.write_back:
            raise ValueError(f"{self.name}: write_back(=True) must be False with home 'disk': its files never change.")

    @property
    def context(self) -> Context:
        """Context of the workloads that this engine runs: with a KV cache a forward routes just its own block."""
        return "block" if self.kv_cache else "full"

    def has_all_on_device(self, hardware: Hardware) -> bool:
        """Whether every expert is on the device whatever the budget: host and device share the memory they live in."""
        return hardware.is_unified and self.home == "host"


# Ops counted in github.com/ims-kdks/TIDE, model/modeling_llada2_moe.py, as one per kernel that PyTorch launches
# (views and reshapes without a copy are free). RMSNorm: cast, square, mean, add, rsqrt, multiply, cast, multiply = 8.
#   attention: qkv 1, q and k norms 16, rotary 2 x (3 multiply and add, negate, 2 concatenate) = 12, repeat k and v 2,
#     attention 1, contiguous 1, output 1 = 34
#   router: 2 casts, linear, sigmoid, bias; top-2, sum, top-k, zeros, scatter, expand, cast, not, fill, top-k;
#     gather, sum, add, divide, scale = 20
#   dispatch: zeros, scatter, sum, counts to host, sort, divide, gather = 7
#   combine: scatter, cast, weigh, sum, cast = 5
#   gated MLP: gate, SiLU, up, multiply, down = 5; the shared expert's is added: 6
#   layer: 2 norms 16, 2 residual adds 2; hence 34 + 20 + 7 + 5 + 6 + 18 = 90, and 34 + 5 + 18 = 57 for a dense layer
#   one routed expert: gated MLP 5, copy of its rows into the output 1 = 6
#   forward: mask test 2, embedding 1, attention mask 3, rotary tables 9, final norm 8, lm_head and cast 2, sampling 12
_TIDE_AS_CODED = Execution(
    name="tide-as-coded",
    kv_cache=False,
    logits="all",
    is_pinned=False,
    copies="blocking",
    copies_per_expert=3,
    write_back=True,
    kernels="loop",
    host="serial",
    host_calls="expert",
    activation_bytes=2,
    returns="row",
    launch="eager",
    is_async=True,
    home="host",
    ops_per_layer=90,
    ops_per_dense_layer=57,
    ops_per_expert=6,
    ops_per_forward=37,
)

# What an engine with fused kernels needs: each norm, rotary of q and of k, and each gated activation is one op.
#   attention: norm, qkv, q and k norms 2, rotary 2, cache writes 2, attention, output, residual add = 10
#   router: norm, linear, sigmoid, bias, group scores 2, group top-k, mask, top-k, gather, normalise = 11
#   shared expert 3; counts to host 2, gather 1; weighted sum, shared and residual add 3; hence 30 for an MoE layer
#   dense layer: attention 10, norm 1, gated MLP 3, residual add 1 = 15; one routed expert run alone: 3
#   forward: embedding, rotary table, final norm, lm_head, cast, softmax, best, threshold, select, write = 10
_OVERLAPPED = Execution(
    name="overlapped",
    kv_cache=True,
    logits="block",
    is_pinned=True,
    copies="background",
    copies_per_expert=1,
    write_back=False,
    kernels="grouped",
    host="parallel",
    host_calls="layer",
    activation_bytes=2,
    returns="row",
    launch="stream",
    is_async=True,
    home="host",
    ops_per_layer=30,
    ops_per_dense_layer=15,
    ops_per_expert=3,
    ops_per_forward=10,
)

# tidesim's own engine on an accelerator, in bf16. What lies between the routed experts of two layers is a graph; its
# kernels, counted in tidesim/engine/device_network.py (norms round before they multiply their weight, hence 2 each):
#   attention: norm 2, qkv 1, q and k norms 2, rotary 3, cache writes with their places 3, query by group 1,
#     attention 1, by row 1, output 1, residual add 1 = 16
#   router: norm 2, cast, linear, sigmoid, bias; top-2, sum, top-k; ones, scatter, clone and fill of the masked choice;
#     top-k, gather, sum, add, divide, scale = 19, and ids and weights put in place 2
#   gated MLP: gate and up 1, SiLU, multiply, down = 4; the shared expert's, with the cast of the routed sum and both
#     adds: 7; hence 16 + 21 + 7 = 44 for an MoE layer, and 16 + norm 2 + 4 + add 1 = 23 for a dense one
#   forward: embedding 1, rotary tables 8, mask 5, the last layer's adds are its own, final norm 2 = 16
# What the host begins or does one by one, in tidesim/engine/accelerator.py, offload.py, generate.py:
#   layer: graph 1, wait for the ids 1, counts and sort 2, indices 1, gather, weighted sum and its copy 3, policy and
#     books 2, stamps of time 4 = 14; a dense layer is in the graph of the first of them
#   one fetched expert: its copy and arrival 2, wait 1, its part of a group's indices and products 2 = 5
#   sampling: is a mask left 2, number of masks 2 (each a reduction and its copy to the host); mask token's logit 1,
#     softmax, best, gather = 3, confidences of masks 3, accept 9 (where too few are above the threshold), write 2,
#     masks left 2, number accepted 2 = 26
#   forward: tokens, positions, start 3, last graph 1, routing kept 2, lm_head and cast 2, sampling 26 = 34
# A prefill is not captured, as it comes once; it is charged as if it were.
_ENGINE = replace(
    _OVERLAPPED,
    name="engine",
    returns="pair",
    launch="eager",
    ops_per_layer=14,
    ops_per_dense_layer=0,
    ops_per_expert=5,
    ops_per_forward=34,
    fetched="together",
    graph_kernels_per_layer=44,
    graph_kernels_per_dense_layer=23,
    graph_kernels_per_forward=16,
)

# The same engine where CPU cores are the device: tidesim/engine/cpu_network.py and offload.py, one op for each step of
# compiled code (a layer is two calls of several steps) and for each small operation of PyTorch or NumPy.
#   attention: norm, qkv, keys and values rotated, queries rotated, attention, output, residual add = 7
#   router: norm, linear, choice = 3; shared expert: gate, up, activation, down, add = 5; residual add 1
#   routed experts, all but their kernel: counts, slots of the rows, sort, combine, the policy, the books = 6
#   hence 7 + 3 + 5 + 1 + 6 = 22, and 7 + norm 1 + gated MLP 4 + residual add 1 = 13 for a dense layer
#   forward: embedding and its cast 2, rotary tables 5, final norm 1, lm_head 1, sampling 26 = 35
_EMULATED = replace(
    _ENGINE,
    name="emulated",
    activation_bytes=4,
    is_async=False,
    fetched="alone",
    ops_per_layer=22,
    ops_per_dense_layer=13,
    ops_per_expert=6,
    ops_per_forward=35,
    graph_kernels_per_layer=0,
    graph_kernels_per_dense_layer=0,
    graph_kernels_per_forward=0,
)

# The same with experts in their files: the device's memory is the only one, and misses are read and then computed.
_DISK = replace(_EMULATED, name="disk", home="disk", host="serial")

# Other systems, as far as their public source says how they run; what each decides is in `tidesim.policies`. They were
# written for other networks, so nobody can count their ops on this one: engines of eager PyTorch modules take the
# counts of TIDE's released code (and its logits of all rows), engines with fused kernels those of `overlapped`. Weights
# are bf16 here, whatever they quantise. Where the source leaves something open, the comment says what is assumed.

# Fiddler (github.com/efeslab/fiddler, src/fiddler/mixtral.py): Mixtral in eager PyTorch with its cache of keys and
# values. A miss on the device is `load_state_dict` into one placeholder: three tensors, pageable, blocking, and dropped
# after use. The other misses follow expert by expert on the host, rows out and back for each: no overlap.
_FIDDLER = replace(_TIDE_AS_CODED, name="fiddler", kv_cache=True, write_back=False)

# mixtral-offloading (github.com/dvmazur/mixtral-offloading, src/expert_cache.py): an expert is one storage, hence one
# copy, in pinned memory. A swap copies the newcomer in and the victim out, on the stream that computes, so that neither
# runs beside a kernel or beside the other. Experts run one by one, all on the device.
_MIXTRAL_OFFLOADING = replace(
    _TIDE_AS_CODED, name="mixtral-offloading", kv_cache=True, is_pinned=True, copies_per_expert=1
)

# MoE-Infinity (github.com/TorchMoE/MoE-Infinity): a thread fetches from pinned memory on a stream of its own while
# others run the experts that are there, one by one; a victim is dropped. All on the device. Assumed: an expert is one
# copy, as its tensors lie together in the host's pool.
_MOE_INFINITY = replace(
    _TIDE_AS_CODED,
    name="moe-infinity",
    kv_cache=True,
    is_pinned=True,
    copies="background",
    copies_per_expert=1,
    write_back=False,
)

# KTransformers (kt-kernel in an SGLang fork): one fused kernel for the experts on the device, one task for the host
# that runs beside it and is joined at the end of the layer, its rows through pinned memory. Large forwards stream whole
# layers to scratch memory; assumed: from pinned memory, one copy for each expert, and nothing runs beside them.
_KTRANSFORMERS = replace(_OVERLAPPED, name="ktransformers", copies="blocking")

# llama.cpp (its block diffusion: pull request 17454): every step runs the whole sequence, without a cache of keys and
# values. Used experts of a host layer are copied out of a memory-mapped file, hence pageable, tensor by tensor, on the
# stream that computes. One kernel runs all of a layer's experts, on the device or, in small batches, on the host after
# everything before it. Assumed: activations in float32, and logits of all rows.
_LLAMA_CPP = replace(
    _OVERLAPPED,
    name="llama-cpp",
    kv_cache=False,
    logits="all",
    is_pinned=False,
    copies="blocking",
    copies_per_expert=3,
    host="serial",
    activation_bytes=4,
)

# FreeToken (github.com/FlashML-org/FreeToken, arXiv 2608.16157): the misses to fetch are copied from pinned memory, and
# then the device computes, while the host computes the other misses. Nothing is written back. Assumed: one copy for
# each expert; one kernel gathers them all there.
_FREETOKEN = replace(_OVERLAPPED, name="freetoken", copies="blocking")

_OURS = (_OVERLAPPED, _ENGINE, _EMULATED, _DISK)
_OTHERS = (_FIDDLER, _MIXTRAL_OFFLOADING, _MOE_INFINITY, _KTRANSFORMERS, _LLAMA_CPP, _FREETOKEN)
EXECUTIONS = {preset.name: preset for preset in (_TIDE_AS_CODED, *_OURS, *_OTHERS)}


def execution(name: str) -> Execution:
    """The preset called `name`. Raise InputError, with the nearest name, if there is none.

    Examples
    --------
    >>> execution("overlapped").copies
    'background'
    """
    if name not in EXECUTIONS:
        raise InputError(f"no execution {name!r}; {nearest_name(name, EXECUTIONS)}")
    return EXECUTIONS[name]
