"""Systems that share the misses between host and device: Fiddler, FreeToken, HybriMoE, KTransformers and DAOP.

Mode "coded" is what a system's public code does, "published" what its text says. Whatever changes the output (experts
replaced, put off, or computed on a guess) is left out: here the output never depends on placement. How these systems
run the host's part, beside the device's or after it, is a matter of `Execution`, not of the policy.
"""

from typing import Literal, get_args

import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.policies.composition import AfterPrefill, Composition, Guard, MostPopular, Refresh, first_ids
from tidesim.policies.interface import Policy
from tidesim.policies.pieces import LastActiveBefore, LastTurn, LowerId, Slot, SmoothedShare, ThisForward
from tidesim.policies.schedules import Balanced, Constants, LeastSum, Predicted, Tariff, TwoPointers
from tidesim.policies.splits import (
    ByKind,
    ByTokens,
    DropAll,
    KeepAll,
    OnHost,
    Split,
    StreamAndKeepTop,
    StreamLayer,
)
from tidesim.policies.victims import Lowest

Mode = Literal["coded", "published"]


def fiddler(popularity: npt.ArrayLike, mode: Mode = "coded", *, cpu_offload: bool = True) -> Policy:
    """Fiddler (arXiv 2402.07033): the most popular experts of the whole network; misses where cheaper.

    The placement never changes: the pairs of layer and expert that are most popular in all layers together, so that
    layers differ in how many they hold. A missed expert runs on the host if that costs less than its copy and its run
    on the device; ties: the device. The code tries all assignments of a layer's experts for the least sum of costs,
    though its comment speaks of the longer of both sides. The terms of a sum do not touch each other, so comparing
    expert by expert gives the same assignment. What is copied goes through room for one expert, in ascending ids, and
    is forgotten.

    Here the residents run before the first copy, all together; there they take turns with the copies, in order of
    their ids. Ties in popularity: the lower layer, then the lower id.

    Parameters
    ----------
    popularity : [L, E], how often each expert was routed to, for instance a workload's `counts.sum(axis=0)`.
    mode : "coded": 7 for each token on the host and 70 for a copy, whatever the machine, so that up to 9 tokens go to
        the host. "published": the profile's times, of which a run must have some.
    cpu_offload : whether the host computes at all; without, every miss is copied.
    """
    split: Split = LeastSum(_tariff(mode, 7, 70)) if cpu_offload else DropAll()
    start = MostPopular(popularity, across="network")
    by_routing = mode == "coded" or not cpu_offload
    return Composition(
        _named("fiddler", mode), start, split=split, scope="network", scratch=1, is_routing_only=by_routing
    )


def freetoken_offload(*, streams_prefill: bool = False) -> Policy:
    """FreeToken (arXiv 2608.16157) with backend "offload": every miss is fetched, in ascending ids, and stays.

    As coded. All layers share one pool of slots. The victim is who was used last longest ago, of whatever layer, but
    nobody who has rows in the layer that is running; where there is no such victim the expert is dropped after use.
    Use is counted in turns: one layer of one forward. Ties: the lowest slot. The first residents are ids 0..B-1 of each
    layer, in slots by layer and id, and count as never used.

    While the cache is filled with a prompt the original streams whole layers through slots of the pool, one or two at a
    time: experts that are absent cross the link, used or not, and residents are copied within the device. A pool
    that lends its slots for one forward is not modelled. By default such a forward is served like all others.

    Parameters
    ----------
    streams_prefill : stream it, through scratch memory of two layers besides the pool. A layer's stream begins when its
        router is done, not with the layer before as there.
    """
    return _freetoken("offload", KeepAll(), streams_prefill)


def freetoken_hybrid(*, streams_prefill: bool = False) -> Policy:
    """FreeToken with backend "hybrid": some misses are fetched and stay while the host computes the others.

    As coded, on the pool of `freetoken_offload` and with its parameter. Of M misses those F are fetched that make
    max(F * (1 - ρ), (M - F) * ρ) least, ρ being the link's share of what link and host together get through in a
    second: 1 / copy over 1 / copy + 1 / host, when either is the time that one expert's weights take. So copies and
    host end as close to each other as can be (`schedules.Balanced`); ties: the smaller F. Fetched first is who was
    routed to most recently before this forward, on the device or not; ties: the lower id. Without a profile
    at most one is fetched.

    ρ is measured there; here it follows from the profile. The project words it as PCIe over CPU bandwidth, but where
    that is above 1, neither 1 - ρ nor F = ρM, the optimum that it names, makes sense. It looks neither at an expert's
    tokens nor at fixed costs.
    """
    return _freetoken("hybrid", Balanced(LastActiveBefore()), streams_prefill, is_routing_only=False)


def freetoken_cpu(*, streams_prefill: bool = False) -> Policy:
    """FreeToken with backend "cpu": the host computes every miss, so the first residents stay for good.

    As coded, with the parameter of `freetoken_offload`.
    """
    return _freetoken("cpu", OnHost(), streams_prefill)


def _freetoken(backend: str, split: Split, streams_prefill: bool, *, is_routing_only: bool = True) -> Policy:
    return Composition(
        f"freetoken-{backend}",
        first_ids,
        split=ByKind(StreamLayer(with_residents=False), split) if streams_prefill else split,
        victims=Lowest(LastTurn(), Slot(), scope="network"),
        is_in_use_safe=True,
        scope="network",
        # One place for whom nobody's slot is free.
        scratch=1,
        scratch_layers=2 * streams_prefill,
        is_routing_only=is_routing_only,
    )


def hybrimoe(mode: Mode = "coded") -> Policy:
    """HybriMoE (arXiv 2504.05897): host and device take experts from two ends of a list, and the device's misses stay.

    The list has the hits and then the misses. The device takes from the front for 0.5 each, and 0.418 more for a miss;
    the host takes from the back for 1 a token, and 0.79 once; next is always who would be done first, ties: the device
    (`schedules.TwoPointers`; the order within hits and within misses is by tokens, most first, then the lower id).
    The device's misses are fetched and stay. The victim is the lowest smoothed score of its layer (each forward weighs
    as much as all before it), ties: the lower id; experts of this very forward are not excepted. The first residents
    are ids 0..B-1.

    The score is fed with the router's 2k best scores of the first token there. A workload holds no scores, so it is fed
    with each expert's share of the forward's routed pairs here, which for one token is the set of its k experts.

    Left out: the prefetch of the next layer (of size 0 in the project's own command), the preloading of the layer after
    the next behind a streamed one, and the paper's prefetch by impact.

    Parameters
    ----------
    mode : "coded": the list is for forwards of one token. All others run on the device, their misses in ascending
        ids through room for a whole layer, and nobody stays; so in block diffusion, where every forward has the tokens
        of a block, the first residents stay for good. "published": the list is for forwards of all kinds and sizes, as
        the paper shares prefills too: a denoise or commit forward of 32 tokens sends misses with few tokens to the
        host, and its own misses stay. The constants are the code's in both.
    """
    listed = TwoPointers(device=0.5, wait=0.418, host=1, call=0.79)
    return Composition(
        _named("hybrimoe", mode),
        first_ids,
        split=ByTokens(2, DropAll(), listed) if mode == "coded" else listed,
        victims=Lowest(SmoothedShare(0.5)),
        scratch_layers=1 if mode == "coded" else 0,
    )


def ktransformers_dynamic(threshold: int = 500) -> Policy:
    """KTransformers (kt-kernel in an SGLang fork) with dynamic update: a large forward chooses its layers' residents.

    As coded. A forward of at least `threshold` tokens, whatever it is for, streams every expert of the layer through
    room for a layer, residents once more among them. After it the layer's residents are those with most tokens
    in it, as many as before; ties: the lower id. Their copies came with the stream. In smaller forwards, and so
    in those of a block with a KV cache, the host computes all misses and nobody moves. The first residents are ids
    0..B-1 ("uniform", the default there).

    Streamed first are those that come to stay, then the others; there all go in ascending ids. What
    is put off to the next layer there ("deferral") changes the output, and is left out.

    Parameters
    ----------
    threshold : tokens; 500 by default as on the project's command line, its text names 1024 to 4096.
    """
    return Composition(
        "ktransformers-dynamic",
        first_ids,
        split=ByTokens(threshold, StreamAndKeepTop(), OnHost()),
        victims=Lowest(ThisForward(), LowerId()),
        scratch_layers=1,
    )


def daop(popularity: npt.ArrayLike, mode: Mode = "coded", host_cost: float = 5.0, copy_cost: float = 40.0) -> Policy:
    """DAOP (arXiv 2501.10375), the exact parts of it: swaps and a least sum while a prompt is read, then the host.

    Each layer begins with its most popular experts (as many in each there; here as the budgets say). A forward that
    fills the cache with a prompt first swaps: while the absent expert with most tokens of this forward has more than
    1.05 times as many as the resident one with fewest they change places, up to 8 times a layer. Then its misses run on
    the host or are copied through room for one expert, whichever costs less (ties: the device), and as
    in `fiddler` comparing expert by expert gives the least sum. In all other forwards the host computes every miss.
    With copies in the background the swaps count from the next forward on, as everywhere here.

    Left out, because they change the output: experts computed from the layer before on a guess, and the second expert
    of a token replaced by a resident one. Ties: among equal popularity, equally hot absent and equally cold resident
    experts the lower id goes first.

    Parameters
    ----------
    popularity : [L, E], how often each expert was routed to, for instance a workload's `counts.sum(axis=0)`.
    mode : "coded": constants. "published": the profile's times, of which a run must have some.
    host_cost, copy_cost : the constants: a token on the host, and a copy. The code has 5 and 40 for an A100, 8.5 and
        210 for an A6000 (both Mixtral), 3.5 and 30 for Phi.
    """
    split = ByKind(LeastSum(_tariff(mode, host_cost, copy_cost)), OnHost())
    counts = ThisForward()
    worthwhile = Guard(margin=0.05, is_strict=True, max_swaps=8)
    swaps = Refresh(AfterPrefill(), counts, Lowest(counts), worthwhile, is_pairwise=True)
    return Composition(
        _named("daop", mode),
        MostPopular(popularity),
        refresh=swaps,
        split=split,
        scratch=1,
        is_routing_only=mode == "coded",
    )


def _tariff(mode: Mode, host_cost: float, copy_cost: float) -> Tariff:
    """What a token on the host and a copy cost."""
    return Constants(host_cost, copy_cost) if mode == "coded" else Predicted()


def _named(name: str, mode: Mode) -> str:
    """What results call the policy `name` in this mode. Raise InputError if there is no such mode."""
    if mode not in get_args(Mode):
        raise InputError(f"mode(={mode!r}) must be {' or '.join(map(repr, get_args(Mode)))}.")
    return name if mode == "coded" else f"{name}-as-published"
