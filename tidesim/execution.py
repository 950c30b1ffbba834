"""How the software runs a forward, and how long each part of it then takes on a machine.

A `Hardware` profile says what wires and chips can do. An `Execution` says how an engine uses them: pinned or pageable
copies, before the experts or in the background, one kernel for all experts or a loop, KV cache or not. `Costs`
puts model, machine and execution together and hands out durations.

Every duration is worked out in seconds, rounded once to whole nanoseconds, and only added from there on. So parts
add up exactly, and every simulator that uses these numbers can agree to the last nanosecond.

Times follow the roofline model (Williams, Waterman and Patterson, CACM 2009): the longer of bytes over bandwidth and
operations over rate. Launches are asynchronous, so launching the kernels of a part costs time only where it outlasts
them. Letters: L MoE layers, T rows routed in a forward, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tidesim.errors import BudgetError, InputError, nearest_name
from tidesim.hardware import Hardware, Link
from tidesim.moe import MoEConfig
from tidesim.residency import check_budgets, per_layer
from tidesim.workload import Context

Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

GIB = 2**30


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
    host : whether missed experts run on the host after the layer's device part ("serial") or beside it ("parallel").
    host_calls : whether the host is called, and rows are copied, once per missed "expert" or once per "layer".
    launch : cost of one op: "eager" is the host time of a framework op, "stream" that of a bare kernel launch.
    ops_per_layer : ops of an MoE layer outside its routed experts (attention, router, shared expert, combine).
    ops_per_dense_layer : ops of a layer without experts.
    ops_per_expert : ops of one routed expert in the loop.
    ops_per_forward : ops outside the layers (embedding, final norm, lm_head, sampling).
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
    launch: Literal["eager", "stream"]
    ops_per_layer: int
    ops_per_dense_layer: int
    ops_per_expert: int
    ops_per_forward: int

    @property
    def context(self) -> Context:
        """Context of the workloads that this engine runs: with a KV cache a forward routes just its own block."""
        return "block" if self.kv_cache else "full"


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
    launch="eager",
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
    launch="stream",
    ops_per_layer=30,
    ops_per_dense_layer=15,
    ops_per_expert=3,
    ops_per_forward=10,
)

EXECUTIONS = {preset.name: preset for preset in (_TIDE_AS_CODED, _OVERLAPPED)}


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


# --- time ---


class Costs:
    """Durations in whole nanoseconds of everything that one engine does on one machine.

    Parameters
    ----------
    max_rows : most rows that a forward routes; the tables reach that far.

    Attributes
    ----------
    loop_ns : [max_rows + 1], kernels of one resident expert run alone, by its rows; 0 for 0 rows.
    expert_launch_ns : launching the ops of one such expert.
    host_expert_ns : [max_rows + 1], one missed expert on the host, by its rows; 0 for 0 rows.
    host_layer_ns : [max_rows + 1], what a layer's host part costs besides its experts, by the rows that travel.
    promote_ns, evict_ns : one expert host to device, and out again (0 without write-back).
    promote_bytes, evict_bytes : bytes that go over the link for them (0 where nothing is copied).
    """

    def __init__(self, model: MoEConfig, hardware: Hardware, execution: Execution, max_rows: int) -> None:
        self.model = model
        self.hardware = hardware
        self.execution = execution
        self.max_rows = max_rows
        rows = np.arange(max_rows + 1)
        self.loop_ns = _table(self._loop_s(rows))
        self.expert_launch_ns = int(self._launch_ns(execution.ops_per_expert))
        self._grouped_bytes_ns, self._grouped_flops_ns = self._grouped_tables(max_rows)
        self._grouped_overhead_ns = int(_ns(hardware.device.grouped_overhead_s))
        self.host_expert_ns, self.host_layer_ns = self._host_tables(rows)
        self._copy_costs()

    # --- dense parts ---

    def layer_ns(self, tokens: Rows, context_tokens: Rows) -> tuple[Ints, Ints]:
        """Kernels of an MoE layer's dense part, and the launch time they do not hide; any shape of arguments.

        Dense part: norms, attention, router and shared expert over `tokens` rows that attend to each other and to
        `context_tokens` cached ones. Attention under a block-causal mask is computed in full, as the published
        code and PyTorch's masked kernels do.
        """
        model = self.model
        params = model.attention_params + model.router_params + model.shared_params
        kernel_ns = _ns(self._layer_s(params, tokens, context_tokens))
        return kernel_ns, _excess(kernel_ns, self._launch_ns(self.execution.ops_per_layer))

    def entry_ns(self, tokens: Rows, context_tokens: Rows) -> tuple[Ints, Ints]:
        """The same of what comes before the MoE layers: the embedding (rows read and written) and the dense layers."""
        model, num_dense = self.model, self.model.num_dense_layers
        params = model.attention_params + model.dense_mlp_params
        embedding_s = 2 * _wide(tokens) * model.hidden_bytes / self.hardware.device.bytes_per_s
        kernel_ns = _ns(embedding_s + num_dense * self._layer_s(params, tokens, context_tokens))
        return kernel_ns, _excess(kernel_ns, self._launch_ns(num_dense * self.execution.ops_per_dense_layer))

    def head_ns(self, tokens: Rows, logit_tokens: Rows) -> tuple[Ints, Ints]:
        """The same of what comes after the layers: lm_head over the rows that need logits, and sampling.

        A forward that needs no logits (prefill, commit) takes none of it. The ops of the whole forward that belong to
        no layer are counted here.
        """
        vocab, device = self.model.vocab_params, self.hardware.device
        flops = 2 * _wide(tokens if self.execution.logits == "all" else logit_tokens) * vocab
        kernel_ns = _ns(_roofline_s(2 * vocab, flops, device.bytes_per_s, device.flops_per_s))
        excess_ns = _excess(kernel_ns, self._launch_ns(self.execution.ops_per_forward))
        has_head = _wide(logit_tokens) > 0
        return np.where(has_head, kernel_ns, 0), np.where(has_head, excess_ns, 0)

    # --- routed experts on the device ---

    def experts_ns(self, loop_kernel_ns: int, num_active: int, num_rows: int) -> tuple[int, int]:
        """Kernels of a layer's resident experts, and the launch time they do not hide.

        `num_active` experts got `num_rows` rows between them; `loop_kernel_ns` is the sum of their `loop_ns`.
        A grouped kernel has its launch in its fixed part.
        """
        if not num_active:
            return 0, 0
        if self.execution.kernels == "loop":
            return loop_kernel_ns, max(0, num_active * self.expert_launch_ns - loop_kernel_ns)
        work_ns = max(int(self._grouped_bytes_ns[num_active]), int(self._grouped_flops_ns[num_rows]))
        return self._grouped_overhead_ns + work_ns, 0

    # --- how the figures come about ---

    def _layer_s(self, params: int, tokens: Rows, context_tokens: Rows) -> Floats:
        """Seconds of one layer whose weights are `params`: they and the cache are read once, at 2 bytes each."""
        model, device = self.model, self.hardware.device
        tokens, context_tokens = _wide(tokens), _wide(context_tokens)
        num_bytes = 2 * params + context_tokens * model.kv_bytes_per_token_layer
        flops = 2 * tokens * params + 4 * tokens * (context_tokens + tokens) * (model.num_heads * model.head_dim)
        return _roofline_s(num_bytes, flops, device.bytes_per_s, device.flops_per_s)

    def _launch_ns(self, num_ops: int) -> Ints:
        device = self.hardware.device
        op_s = device.eager_op_s if self.execution.launch == "eager" else device.kernel_launch_s
        return _ns(num_ops * op_s)

    def _loop_s(self, rows: Ints) -> Floats:
        model, device = self.model, self.hardware.device
        flops = 2 * rows * model.expert_params
        work_s = _roofline_s(model.expert_bytes, flops, device.bytes_per_s, device.flops_per_s)
        return 3 * device.gemm_overhead_s + work_s

    def _grouped_tables(self, max_rows: int) -> tuple[Ints, Ints]:
        """By experts touched, and by rows over all experts: the two sides of the grouped kernel's roofline."""
        model, device = self.model, self.hardware.device
        active, rows = np.arange(model.num_experts + 1), np.arange(max_rows * model.top_k + 1)
        bytes_ns = _ns(active * model.expert_bytes / device.experts_bytes_per_s)
        return bytes_ns, _ns(2 * rows * model.expert_params / device.grouped_flops_per_s)

    def _host_tables(self, rows: Ints) -> tuple[Ints, Ints]:
        """Host time per missed expert and per layer; the call and the copies of rows are in one or the other."""
        model, host = self.model, self.hardware.host
        flops = 2 * rows * model.expert_params
        work_s = _roofline_s(model.expert_bytes, flops, host.bytes_per_s, host.bf16_flops_per_s)
        call_s = host.call_overhead_s + self._rows_s(rows)
        if self.execution.host_calls == "expert":
            return _table(call_s + work_s), np.zeros_like(rows)
        return _table(work_s), _table(call_s)

    def _rows_s(self, rows: Ints) -> Floats:
        """Seconds to copy the hidden states of `rows` tokens to the host and back. They do not queue behind weights."""
        links = self.hardware.links
        if links is None:
            return np.zeros(len(rows))
        pinned = self.execution.is_pinned
        out, back = (links.d2h_pinned, links.h2d_pinned) if pinned else (links.d2h_pageable, links.h2d_pageable)
        num_bytes = rows * self.model.hidden_bytes
        return out.latency_s + num_bytes / out.bytes_per_s + back.latency_s + num_bytes / back.bytes_per_s

    def _copy_costs(self) -> None:
        """Copies of weights. Without links (unified memory) nothing is copied, and moves are free."""
        links, execution = self.hardware.links, self.execution
        self.promote_ns = self.evict_ns = self.promote_bytes = self.evict_bytes = 0
        if links is None:
            return
        # Write-back in the background keeps both directions busy at once.
        share = links.duplex_factor if execution.write_back and execution.copies == "background" else 1.0
        self.promote_ns = self._expert_copy_ns(links.h2d_pinned if execution.is_pinned else links.h2d_pageable, share)
        self.promote_bytes = self.model.expert_bytes
        if execution.write_back:
            # Unpinned, the evicted expert lands in memory that is allocated for it on the spot.
            self.evict_ns = self._expert_copy_ns(links.d2h_pinned if execution.is_pinned else links.d2h_fresh, share)
            self.evict_bytes = self.model.expert_bytes

    def _expert_copy_ns(self, link: Link, share: float) -> int:
        transfer_s = self.model.expert_bytes / (link.bytes_per_s * share)
        return int(_ns(self.execution.copies_per_expert * link.latency_s + transfer_s))


def _wide(rows: Rows) -> Ints:
    """As 64 bits: the operations of a forward do not fit 32."""
    return np.asarray(rows, np.int64)


def _roofline_s(num_bytes: Ints | int, flops: Ints, bytes_per_s: float, flops_per_s: float) -> Floats:
    seconds: Floats = np.maximum(num_bytes / bytes_per_s, flops / flops_per_s)
    return seconds


def _ns(seconds: Floats | float) -> Ints:
    """Whole nanoseconds, half to even as Python's `round`."""
    return np.rint(np.asarray(seconds) * 1e9).astype(np.int64)


def _table(seconds: Floats) -> Ints:
    """A table by number of rows, in ns: no rows, no time."""
    table = _ns(seconds)
    table[0] = 0
    return table


def _excess(kernel_ns: Ints, launch_ns: Ints) -> Ints:
    excess_ns: Ints = np.maximum(launch_ns - kernel_ns, 0)
    return excess_ns


# --- memory ---


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes on the device during a run.

    Parameters
    ----------
    experts : the slots of all layers; on a unified-memory machine every expert, as each is stored once.
    non_experts : everything else that has weights.
    kv_cache : keys and values of the longest sequence; 0 without a cache.
    transient : the larger of two peaks. Head: logits in bf16 and fp32 of every row that gets some, and fp32
        probabilities of a block. Experts: each routed row in and out and reordered in bf16, and weighted in fp32, as
        the published combine holds them at once.
    reserve : what is left for allocator and framework.
    """

    experts: int
    non_experts: int
    kv_cache: int
    transient: int
    reserve: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.experts + self.non_experts + self.kv_cache + self.transient + self.reserve


def device_memory(
    model: MoEConfig,
    hardware: Hardware,
    execution: Execution,
    budget: int | Sequence[int],
    max_tokens: int,
    reserve_bytes: int | None = None,
) -> DeviceMemory:
    """Bytes that a run needs on the device, with `budget` slots a layer (or one number for each layer).

    `max_tokens` is the longest sequence: its prompt and what is generated.
    `reserve_bytes` is by default the larger of 1.5 GiB and a tenth of the device's memory, the rule of the released
    TIDE code.
    """
    if reserve_bytes is None:
        reserve_bytes = max(3 * GIB // 2, hardware.device.memory_bytes // 10)
    slots = sum(per_layer(model.num_experts if hardware.is_unified else budget, model.num_layers, "budget"))
    head_rows = max_tokens if execution.logits == "all" else model.block_length
    head = model.vocab_size * (head_rows * (2 + 4) + model.block_length * 4)
    experts = max_tokens * model.top_k * model.hidden_size * (3 * 2 + 4)
    return DeviceMemory(
        experts=slots * model.expert_bytes,
        non_experts=model.non_expert_bytes,
        kv_cache=max_tokens * model.kv_bytes_per_token if execution.kv_cache else 0,
        transient=max(head, experts),
        reserve=reserve_bytes,
    )


def largest_budget(
    model: MoEConfig, hardware: Hardware, execution: Execution, max_tokens: int, reserve_bytes: int | None = None
) -> int:
    """The largest budget, the same in all layers, whose run fits the device. Raise BudgetError if not even 0 fits."""
    need = device_memory(model, hardware, execution, 0, max_tokens, reserve_bytes)
    room = hardware.device.memory_bytes - need.total
    if room < 0:
        raise BudgetError(f"{_figures(model, hardware, need)}; not even a budget of 0 fits, a larger device is needed.")
    if hardware.is_unified:
        return model.num_experts
    return min(model.num_experts, room // (model.num_layers * model.expert_bytes))


def check_memory(
    model: MoEConfig,
    hardware: Hardware,
    execution: Execution,
    budget: int | Sequence[int],
    max_tokens: int,
    reserve_bytes: int | None = None,
) -> DeviceMemory:
    """What `device_memory` says, if it fits.

    Raise BudgetError with every figure and the largest budget that fits, if a budget exceeds the number of experts,
    the device's memory is exceeded, or the experts of all layers exceed the host's memory (where they all have a home).
    """
    check_budgets(per_layer(budget, model.num_layers, "budget"), model.num_experts)
    need = device_memory(model, hardware, execution, budget, max_tokens, reserve_bytes)
    if need.total > hardware.device.memory_bytes:
        largest = largest_budget(model, hardware, execution, max_tokens, reserve_bytes)
        raise BudgetError(
            f"{_figures(model, hardware, need)}; the largest budget that fits is {largest} experts a layer."
        )
    all_experts = model.experts_bytes(model.num_experts)
    if not hardware.is_unified and all_experts > hardware.host.memory_bytes:
        raise BudgetError(
            f"the experts of {model.name} take {all_experts / GIB:.2f} GiB in all, and the host of {hardware.name} has "
            f"{hardware.host.memory_bytes / GIB:.2f} GiB; store them in fewer bits, or take a host with more memory."
        )
    return need


def _figures(model: MoEConfig, hardware: Hardware, need: DeviceMemory) -> str:
    parts = {
        "experts": need.experts,
        "other weights": need.non_experts,
        "KV cache": need.kv_cache,
        "transient peak": need.transient,
        "reserve": need.reserve,
    }
    listed = " + ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in parts.items())
    return (
        f"{model.name} needs {listed} = {need.total / GIB:.2f} GiB on the device, "
        f"and {hardware.name} has {hardware.device.memory_bytes / GIB:.2f} GiB"
    )
