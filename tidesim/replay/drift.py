"""How sets of residents drift: how much of one is replaced after so many steps, and what the old one would miss.

One compiled walk over the forwards, without a clock. Only the sets of the block that is being denoised are remembered,
and the forwards come stretch by stretch, so memory does not grow with the workload.

Letters: S sequences, A lags, L MoE layers, W words of a set of experts.
"""

from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.compiling import Whole, compiled, inlined
from tidesim.execution import Costs
from tidesim.paper_run import check_counts
from tidesim.policies import Policy, Shape
from tidesim.replay.bits import Words, ones, put, take, words_of
from tidesim.replay.prices import NO_PRICES, prices_of
from tidesim.replay.routing import NO_ROUTING, routing_of
from tidesim.replay.rules import SCRIPTED, observe, refresh, ruled, serve
from tidesim.replay.script import DROP, NO_DECISIONS, NO_SCRIPT, NOBODY, decide
from tidesim.windows import forget, spans
from tidesim.workload import ForwardKind, Workload

Ints = npt.NDArray[np.int64]

_DENOISE = int(ForwardKind.DENOISE)
_SEQUENCE, _BLOCK, _NUM_STEPS = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """What became of the sets of residents after 1..A denoising steps of their block, summed by sequence.

    Parameters
    ----------
    num_pairs : int64 [S, A], pairs of steps so far apart.
    replaced : int64 [S, A, L], residents after the later one that were none after the earlier one.
    missed : int64 [S, A, L], experts with rows in the later one that were no residents after the earlier one.
    late_ns : int64 [S, L], what the host takes for those that a set one step old misses, its calls included.
    """

    num_pairs: Ints
    replaced: Ints
    missed: Ints
    late_ns: Ints


class _Walk(NamedTuple):
    """State of a walk: `Drift`, and

    Parameters
    ----------
    resident : uint64 [L * W], who is on the device.
    kept : uint64 [A + 1, L * W], who was, after each of the last steps of the block: a ring.
    place : int64 [3], sequence and block of the last step, and steps of that block so far.
    """

    resident: Words
    kept: Words
    place: Ints
    num_pairs: Ints
    replaced: Ints
    missed: Ints
    late_ns: Ints


def drift_of(workload: Workload, policy: Policy, budgets: tuple[int, ...], costs: Costs, num_lags: int) -> Drift:
    """How the sets drift that `policy` holds with `budgets` slots; lags go from 1 to `num_lags`.

    A set is who is resident after a forward. Raise ValueError if the policy's moves are not possible, InputError if the
    counts of `workload` do not fit its tokens and top-k.
    """
    check_counts(workload)
    stretches, shape = spans(workload.counts.shape), Shape(workload.num_experts, budgets, costs)
    decisions = decide(workload, policy, shape, stretches, is_background=False)
    rule = ruled(decisions, workload.num_experts, int(workload.step.max(initial=0)) + 1)
    scripts = repeat(NO_SCRIPT, len(stretches)) if decisions.scripts is None else decisions.scripts
    prices = prices_of(workload, costs)
    resident = np.concatenate([words_of(ids, workload.num_experts) for ids in decisions.placement.experts])
    names, sequence = np.unique(workload.sequence, return_inverse=True)
    walk = _new_walk(resident, len(names), num_lags, workload.num_layers)
    for script, span in zip(scripts, stretches, strict=True):
        routing = routing_of(workload, span)
        forget(workload.counts)
        _walk(routing, prices.during(span), script, rule, sequence[span], workload.block[span], walk)
    return Drift(walk.num_pairs, walk.replaced, walk.missed, walk.late_ns)


def compile_now() -> None:
    """Compile the walk, unless that is on disk."""
    nobody = np.zeros(0, np.int64)
    walk = _new_walk(words_of((), 1), 1, 1, 1)
    _walk(NO_ROUTING, NO_PRICES, NO_SCRIPT, ruled(NO_DECISIONS, 1, 1), nobody, nobody.astype(np.int32), walk)


def _new_walk(resident: Words, S: int, A: int, L: int) -> _Walk:
    return _Walk(
        resident=resident,
        kept=np.zeros((A + 1, len(resident)), np.uint64),
        place=np.full(3, -1, np.int64),
        num_pairs=np.zeros((S, A), np.int64),
        replaced=np.zeros((S, A, L), np.int64),
        missed=np.zeros((S, A, L), np.int64),
        late_ns=np.zeros((S, L), np.int64),
    )


@compiled
def _walk(routing: Any, prices: Any, script: Any, ruled: Any, sequence: Any, block: Any, walk: Any) -> None:
    """Some forwards, the next ones."""
    L = walk.late_ns.shape[1]
    for forward in range(len(routing.tokens)):
        for layer in range(L):
            _decide(routing, script, ruled, walk, forward, forward * L + layer, layer)
        if routing.kind[forward] == _DENOISE:
            _compare(routing, prices, walk, sequence[forward], block[forward], forward)


@inlined
def _decide(routing: Any, script: Any, ruled: Any, walk: Any, forward: Whole, at: Whole, layer: Whole) -> None:
    """All moves of a layer of a forward."""
    if ruled.code == SCRIPTED:
        _move(script, script.first[at], script.first[at + 1], walk.resident)
    else:
        W = routing.active.shape[1]
        here = walk.resident[layer * W : layer * W + W]
        observe(ruled, routing, here, at, layer)
        _move(ruled.moves, 0, refresh(ruled, routing, here, forward, at, layer), walk.resident)
        _move(ruled.moves, 0, serve(ruled, routing, here, at, layer), walk.resident)


@compiled
def _move(moves: Any, first: Whole, last: Whole, resident: Any) -> None:
    """Each goes before the one who takes its slot comes."""
    for move in range(first, last):
        if moves.part[move] != DROP:
            if moves.leave[move] != NOBODY:
                take(resident, moves.leave[move])
            if moves.enter[move] != NOBODY:
                put(resident, moves.enter[move])


@compiled
def _compare(routing: Any, prices: Any, walk: Any, sequence: Whole, block: Whole, forward: Whole) -> None:
    """Hold a step against those before it in its block, and remember it."""
    place, kept, A = walk.place, walk.kept, walk.num_pairs.shape[1]
    if place[_SEQUENCE] != sequence or place[_BLOCK] != block:
        place[_SEQUENCE], place[_BLOCK], place[_NUM_STEPS] = sequence, block, 0
    number = place[_NUM_STEPS]
    for lag in range(1, min(number, A) + 1):
        old = kept[(number - lag) % (A + 1)]
        walk.num_pairs[sequence, lag - 1] += 1
        _count(routing, walk, old, sequence, lag, forward)
        if lag == 1:
            _add_late(routing, prices, old, walk.late_ns[sequence], forward)
    for word in range(len(walk.resident)):
        kept[number % (A + 1), word] = walk.resident[word]
    place[_NUM_STEPS] = number + 1


@inlined
def _count(routing: Any, walk: Any, old: Any, sequence: Whole, lag: Whole, forward: Whole) -> None:
    """Who has come since `old` [L * W], and who would be missed with it."""
    L, W = walk.late_ns.shape[1], routing.active.shape[1]
    for layer in range(L):
        num_new, num_missed = 0, 0
        for word in range(W):
            absent = ~old[layer * W + word]
            num_new += ones(walk.resident[layer * W + word] & absent)
            num_missed += ones(routing.active[forward * L + layer, word] & absent)
        walk.replaced[sequence, lag - 1, layer] += num_new
        walk.missed[sequence, lag - 1, layer] += num_missed


@inlined
def _add_late(routing: Any, prices: Any, old: Any, late_ns: Any, forward: Whole) -> None:
    """What the host takes for who is missed with `old` [L * W], by layer."""
    L, W = len(late_ns), routing.active.shape[1]
    for layer in range(L):
        num_pairs: Whole = 0
        for group in range(routing.first_group[forward * L + layer], routing.first_group[forward * L + layer + 1]):
            num_missed, num_rows = 0, np.int64(routing.group_rows[group])
            for word in range(W):
                num_missed += ones(routing.groups[group, word] & ~old[layer * W + word])
            late_ns[layer] += prices.host[num_rows] * num_missed
            num_pairs += num_rows * num_missed
        if num_pairs > 0:
            late_ns[layer] += prices.call[prices.first_call[forward] + num_pairs]
