"""Filling `StepCosts`: one walk over the forwards, in which every layer runs with residents of every age.

The residents that a refresh leaves are taken to be those of a policy that refreshes at every step. For `tide`, which
goes by counts of the whole run, they are the same in fact but for ties; `tide-as-coded` keeps some residents by what
its set was before, so there they only resemble them. The rest is the time model as it is, except for background copies.
Their queue is left out: each layer has the link for itself while it is visited, its dense part included, in the forward
that orders the copies and in the next one, which comes to later layers as late as their copies come; if the step before
was refreshed too, only in the first of these. Copies that take longer are waited for. The dense parts themselves are
left out, and so are blocks that a policy refreshes at every step anyway.

Letters: L MoE layers, S steps of the longest block, W words of a set of experts.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.compiling import Whole, compiled, inlined, joined
from tidesim.replay.bits import Words, ones, put, take, words_of
from tidesim.replay.clock import residents_ns, split
from tidesim.replay.prices import NO_COSTS, NO_PRICES, Fixed, Prices
from tidesim.replay.routing import NO_ROUTING, Routing
from tidesim.replay.rules import observe, refresh, ruled
from tidesim.replay.script import NO_DECISIONS, Decisions
from tidesim.replay.step_costs import StepCosts
from tidesim.workload import ForwardKind

_DENOISE = int(ForwardKind.DENOISE)
STEP, COUNTS, COPIED = range(3)  # places of `at`


class _Walk(NamedTuple):
    """Where a walk is.

    Parameters
    ----------
    at : int64 [3], the step that ran last, -1 before the first one; whether its block counts; and the step whose copies
        the next forward may have to wait for, or -1.
    resident : uint64 [L * W], who is on the device now.
    sets : uint64 [L, S + 1, W], residents by the last refresh: those before the block, and those after each of its
        steps.
    late_ns : int64 [L, S], how late they are if they have the link for one visit, by the last refresh before that step.
    keep_ns, refresh_ns : see `StepCosts`.
    """

    at: npt.NDArray[np.int64]
    resident: Words
    sets: Words
    late_ns: npt.NDArray[np.int64]
    keep_ns: npt.NDArray[np.int64]
    refresh_ns: npt.NDArray[np.int64]


def fill_step_costs(
    parts: Iterable[tuple[Routing, Prices]], fixed: Fixed, decisions: Decisions, num_experts: int, num_steps: int
) -> StepCosts:
    """The costs over all `parts` of a workload; `decisions` are those of a policy that refreshes at every step."""
    resident = np.stack([words_of(ids, num_experts) for ids in decisions.placement.experts])
    L, W = resident.shape
    walk = _Walk(
        at=np.array([-1, 0, -1], np.int64),
        resident=resident.ravel(),
        sets=np.zeros((L, num_steps + 1, W), np.uint64),
        late_ns=np.zeros((L, num_steps), np.int64),
        keep_ns=np.zeros((L, num_steps, num_steps), np.int64),
        refresh_ns=np.zeros((L, num_steps, num_steps), np.int64),
    )
    rule = ruled(decisions, num_experts, num_steps)
    for routing, prices in parts:
        _walk(routing, prices, fixed, rule, walk)
    return StepCosts(walk.keep_ns, walk.refresh_ns)


def compile_now() -> None:
    """Compile the walk, unless that is on disk."""
    fill_step_costs([(NO_ROUTING, NO_PRICES)], NO_COSTS, NO_DECISIONS, 1, 1)


@compiled
def _walk(routing: Any, prices: Any, fixed: Any, ruled: Any, walk: Any) -> None:
    """Go on over some forwards."""
    num_layers = len(walk.sets)
    for forward in range(len(routing.tokens)):
        is_step = routing.kind[forward] == _DENOISE
        if is_step:
            _begin_step(routing, ruled, walk, forward)
        step = walk.at[STEP]
        for layer in range(num_layers):
            at = forward * num_layers + layer
            here = walk.resident[layer * walk.sets.shape[2] : (layer + 1) * walk.sets.shape[2]]
            observe(ruled, routing, here, at, layer)
            if walk.at[COPIED] >= 0:
                _wait(routing, prices, fixed, walk, here, forward, at, layer)
            for move in range(refresh(ruled, routing, here, forward, at, layer)):
                put(walk.resident, ruled.moves.enter[move])
                take(walk.resident, ruled.moves.leave[move])
            if is_step:
                _copy(walk.sets[layer, step + 1], here)
            if walk.at[COUNTS]:
                _count(routing, prices, fixed, walk, forward, at, layer, step, is_step)
        walk.at[COPIED] = step if is_step and walk.at[COUNTS] and fixed.is_background else -1


@joined
def _begin_step(routing: Any, ruled: Any, walk: Any, forward: Whole) -> None:
    """The next denoising step, perhaps of another block."""
    at, step, num_words = walk.at, routing.step[forward], walk.sets.shape[2]
    last = at[STEP] if step > at[STEP] else -1
    for layer in range(len(walk.sets)):
        # A step that did not run refreshed nobody.
        for before in range(last + 1, step + 1):
            _copy(walk.sets[layer, before], walk.resident[layer * num_words : (layer + 1) * num_words])
    at[STEP] = step
    at[COUNTS] = 0 if ruled.first_block and routing.is_first_block[forward] else 1


@inlined
def _copy(to: Any, words: Any) -> None:
    """Make a set equal to another."""
    for word in range(len(words)):
        to[word] = words[word]


@joined
def _count(
    routing: Any,
    prices: Any,
    fixed: Any,
    walk: Any,
    forward: Whole,
    at: Whole,
    layer: Whole,
    step: Whole,
    is_step: Whole,
) -> None:
    """Add the time of a layer of a forward with residents of every age: a step, or what follows on the last one."""
    sets, keep_ns, refresh_ns = walk.sets[layer], walk.keep_ns[layer], walk.refresh_ns[layer]
    dense_ns = prices.dense[forward, 0] + prices.dense[forward, 1]
    new_ns = _run_ns(routing, prices, fixed, sets[step + 1], forward, at)
    for last in range(step + 1):
        old_ns = _run_ns(routing, prices, fixed, sets[last], forward, at)
        keep_ns[last, step] += old_ns
        if not is_step:
            refresh_ns[last, step] += new_ns
        elif fixed.is_background:
            move_ns = max(fixed.promote, fixed.evict if fixed.has_write_back else 0)
            copy_ns = move_ns * _num_new(sets[step + 1], sets[last])
            refresh_ns[last, step] += old_ns
            walk.late_ns[layer, last] = copy_ns - dense_ns - old_ns
        else:
            move_ns = fixed.promote + (fixed.evict if fixed.has_write_back else 0)
            refresh_ns[last, step] += new_ns + move_ns * _num_new(sets[step + 1], sets[last])


@joined
def _wait(routing: Any, prices: Any, fixed: Any, walk: Any, here: Any, forward: Whole, at: Whole, layer: Whole) -> None:
    """Add for how long a layer of a forward waits for the copies of the step before."""
    copied, refresh_ns, late_ns = walk.at[COPIED], walk.refresh_ns[layer], walk.late_ns[layer]
    visit_ns = prices.dense[forward, 0] + prices.dense[forward, 1]
    visit_ns += _run_ns(routing, prices, fixed, here, forward, at)
    for last in range(copied + 1):
        is_busy = last == copied and copied > 0
        refresh_ns[last, copied] += max(0, late_ns[last] - (0 if is_busy else visit_ns))


@joined
def _run_ns(routing: Any, prices: Any, fixed: Any, here: Any, forward: Whole, at: Whole) -> Whole:
    """The routed experts of a layer whose residents are `here` and have arrived."""
    hits, num_active, loop_ns, host_ns = split(routing, prices, here, at)
    kernel_ns, launch_ns = residents_ns(prices, fixed, hits, num_active, loop_ns)
    misses = routing.num_pairs[forward] - hits
    if misses > 0:
        host_ns += prices.call[prices.first_call[forward] + misses]
    device_ns = kernel_ns + launch_ns
    return max(device_ns, host_ns) if fixed.is_parallel else device_ns + host_ns


@inlined
def _num_new(new: Any, old: Any) -> Whole:
    """Experts of one set that are not in the other."""
    num_new = 0
    for word in range(len(new)):
        num_new += ones(new[word] & ~old[word])
    return num_new
