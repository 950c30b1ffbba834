"""Stacks of experts, compiled: a layer's experts in the one order whose first B are resident at any budget B.

Depths count from 0, so an expert is resident at the budgets above its depth. One that moves up from depth `old` to
`new` is promoted for new < B <= old. Letters: L MoE layers, E experts, I refresh intervals.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.compiling import Whole, compiled, inlined
from tidesim.replay.bits import WORD, lowest
from tidesim.replay.rules import ASCENDING_FROM, ASCENDING_TABLE
from tidesim.workload import ForwardKind

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint16]
Flags = npt.NDArray[np.bool_]

_DENOISE = int(ForwardKind.DENOISE)


def first_depths(*shape: int) -> Ids:
    """Depths [.., E] before the first forward: residents are ids 0..B-1."""
    return np.tile(np.arange(shape[-1], dtype=np.uint16), (*shape[:-1], 1))


# --- by last use ---


@compiled
def walk_recency(
    routing: Any, depth: Any, is_used: Any, after: Any, ids: Any, rows: Any, used: Any, dropped: Any
) -> None:
    """Keep the stacks of `caches.lru` over `routing`, and count by depth.

    With r active experts of higher ids an expert at depth d is promoted for r < B <= d, and dropped for B <= min(r, d).

    Parameters
    ----------
    depth : uint16 [L, E], how many experts are more recent.
    rows, used, dropped : int64 [L, E], rows and experts by their depth, and experts by the smaller of r and d.
    is_used, after, ids : uint16 [E], buffers; `is_used` is 0.
    """
    num_layers, num_experts = depth.shape
    for at in range(len(routing.first) - 1):
        layer = at % num_layers
        depths, num_active = depth[layer], 0
        for word in range(routing.active.shape[1]):
            active = routing.active[at, word]
            while active:
                ids[num_active] = WORD * word + lowest(active)
                active &= active - np.uint64(1)
                num_active += 1
        for pair in range(num_active):
            place = depths[ids[pair]]
            is_used[place] = 1
            used[layer, place] += 1
            dropped[layer, min(np.int64(place), num_active - 1 - pair)] += 1
        _add_rows(routing, at, depths, rows[layer])
        num_behind = num_active
        for place in range(num_experts):
            num_behind -= is_used[place]
            after[place] = place + num_behind
            is_used[place] = 0
        for expert in range(num_experts):
            depths[expert] = after[depths[expert]]
        for pair in range(num_active):
            depths[ids[pair]] = num_active - 1 - pair


@inlined
def _add_rows(routing: Any, at: Whole, depths: Any, rows: Any) -> None:
    """Count the rows of a layer of a forward by the depths of their experts."""
    for pair in range(routing.first[at], routing.first[at + 1]):
        rows[depths[routing.experts[pair]]] += routing.rows[pair]


# --- by refreshes ---


class Stacks(NamedTuple):
    """One stack for each interval and layer, and what is counted of it.

    Parameters
    ----------
    depth : uint16 [I, L, E], of each expert. order : uint16 [I, L, E], the expert at each depth.
    total : int64 [L, E], tokens so far. ranking : uint16 [L, E], ids, most tokens first, of equals the lower one.
    rows : int64 [I, L, E], rows by the depth of their expert.
    moved : int64 [I, L, E + 2], promotions: how many more than at the next smaller budget.
    is_exact : bool [I, L, E + 1], at which budgets the stack says who is resident.
    ids : uint16 [E], 0 to E - 1.
    new : uint16 [E], is_waiting, is_done : bool [E], buffers; the latter are False.
    """

    depth: Ids
    order: Ids
    total: Ints
    ranking: Ids
    rows: Ints
    moved: Ints
    is_exact: Flags
    ids: Ids
    new: Ids
    is_waiting: Flags
    is_done: Flags


def new_stacks(num_intervals: int, num_layers: int, num_experts: int) -> Stacks:
    """Stacks before the first forward."""
    each, E = (num_intervals, num_layers), num_experts
    return Stacks(
        depth=first_depths(*each, E),
        order=first_depths(*each, E),
        total=np.zeros((num_layers, E), np.int64),
        ranking=first_depths(num_layers, E),
        rows=np.zeros((*each, E), np.int64),
        moved=np.zeros((*each, E + 2), np.int64),
        is_exact=np.ones((*each, E + 1), np.bool_),
        ids=first_depths(E),
        new=np.zeros(E, np.uint16),
        is_waiting=np.zeros(E, np.bool_),
        is_done=np.zeros(E, np.bool_),
    )


@compiled
def walk_refreshes(
    routing: Any, intervals: Any, first_block: Any, is_by_total: Any, is_background: Any, stacks: Any
) -> None:
    """Keep the stacks of `tide.tide` (`is_by_total`) or `tide.tide_as_coded` over `routing`, and count.

    Parameters
    ----------
    routing, stacks : a `Routing` and `Stacks`. intervals : int64 [I].
    first_block, is_background : whether first blocks are refreshed on each step; whether refreshes come behind hits.
    """
    num_layers = len(stacks.total)
    for at in range(len(routing.first) - 1):
        forward, layer = at // num_layers, at % num_layers
        ids = routing.experts[routing.first[at] : routing.first[at + 1]]
        is_always = first_block and routing.is_first_block[forward]
        is_ranked = False
        if is_by_total:
            _add_rows(routing, at, stacks.ids, stacks.total[layer])
        for number in range(len(intervals)):
            depth = stacks.depth[number, layer]
            if is_background:
                _add_rows(routing, at, depth, stacks.rows[number, layer])
            if routing.kind[forward] == _DENOISE and (is_always or routing.step[forward] % intervals[number] == 0):
                if not is_by_total:
                    _restack_by_counts(stacks, ids, number, layer)
                else:
                    if not is_ranked:
                        _rank(stacks.ranking[layer], stacks.total[layer])
                        is_ranked = True
                    _restack_by_total(stacks, number, layer)
                _settle(stacks.new, depth, stacks.order[number, layer], stacks.moved[number, layer])
            if not is_background:
                _add_rows(routing, at, depth, stacks.rows[number, layer])


@inlined
def _settle(new: Any, depth: Any, order: Any, moved: Any) -> None:
    """The `new` order becomes the stack's; who moves up is promoted where it was not resident and is now."""
    for place in range(len(new)):
        expert = new[place]
        old = np.int64(depth[expert])
        if place < old:
            moved[place + 1] += 1
            moved[old + 1] -= 1
        depth[expert], order[place] = place, expert


@compiled
def _restack_by_counts(stacks: Any, ids: Any, number: Whole, layer: Whole) -> None:
    """The new order when those experts come first that have rows, `ids`, and at each budget the others with the lowest
    ids leave.

    From one budget to the next one more of the others is a resident. It waits with those that have left at this budget,
    and one less has to leave: the highest id of all that wait comes back.
    """
    order, new, is_waiting, is_active = stacks.order[number, layer], stacks.new, stacks.is_waiting, stacks.is_done
    num_experts, num_active, highest, deepest = len(new), len(ids), np.int64(-1), np.int64(0)
    for pair in range(num_active):
        new[pair] = ids[pair]
        is_active[ids[pair]] = True
        deepest = max(deepest, np.int64(stacks.depth[number, layer, ids[pair]]))
    for place in range(num_experts):
        expert = np.int64(order[place])
        if place < num_active:
            if not is_active[expert]:
                is_waiting[expert] = True
                highest = max(highest, expert)
        elif not is_active[expert] and expert > highest:
            new[place] = expert
        else:
            is_waiting[expert] = not is_active[expert]
            # Nobody who waits has a higher id than the last that came back from among them.
            while not is_waiting[highest]:
                highest -= 1
            new[place], is_waiting[highest] = highest, False
    for pair in range(num_active):
        is_active[ids[pair]] = False
    in_order = ASCENDING_FROM if num_experts <= ASCENDING_TABLE else num_experts + 1
    last: Whole = min(deepest, np.int64(in_order - 1))
    for budget in range(num_active + 1, last + 1):
        stacks.is_exact[number, layer, budget] = False


@inlined
def _rank(ranking: Any, total: Any) -> None:
    """Sort by tokens, most first, of equals the lower id: by insertion, as most are where they were."""
    for place in range(1, len(ranking)):
        expert = ranking[place]
        before = place
        while before > 0 and (
            total[ranking[before - 1]] < total[expert]
            or (total[ranking[before - 1]] == total[expert] and ranking[before - 1] > expert)
        ):
            ranking[before] = ranking[before - 1]
            before -= 1
        ranking[before] = expert


@compiled
def _restack_by_total(stacks: Any, number: Whole, layer: Whole) -> None:
    """The new order by tokens so far; among equals it depends on who was resident."""
    ranking, total, begin = stacks.ranking[layer], stacks.total[layer], 0
    while begin < len(ranking):
        end = begin + 1
        while end < len(ranking) and total[ranking[end]] == total[ranking[begin]]:
            end += 1
        if end == begin + 1:
            stacks.new[begin] = ranking[begin]
        else:
            _order_equals(stacks, number, layer, begin, end)
        begin = end


@inlined
def _order_equals(stacks: Any, number: Whole, layer: Whole, begin: Whole, end: Whole) -> None:
    """The new order of the equals at begin:end of the ranking, which take these places.

    At each budget residents stay before others come, the higher id before the lower one, and of the others the lower id
    comes first. So from one budget to the next, the one more that is in is the highest id of the residents that were
    not in, if there is one, and else the lowest id.
    """
    ranking, total, order = stacks.ranking[layer], stacks.total[layer], stacks.order[number, layer]
    is_waiting, is_in, highest, lowest = stacks.is_waiting, stacks.is_done, np.int64(-1), begin
    for place in range(begin, end):
        expert = np.int64(ranking[place])
        if stacks.depth[number, layer, expert] < begin:
            is_waiting[expert] = True
            highest = max(highest, expert)
    for place in range(begin, end):
        comer = np.int64(order[place])
        chosen = np.int64(-1)
        if total[comer] == total[ranking[begin]] and not is_in[comer]:
            if comer > highest:
                chosen = comer
            is_waiting[comer] = comer <= highest
        if chosen < 0:
            while highest >= 0 and not is_waiting[highest]:
                highest -= 1
            chosen = highest
        while chosen < 0:
            if not is_in[ranking[lowest]]:
                chosen = np.int64(ranking[lowest])
            lowest += 1
        stacks.new[place], is_in[chosen], is_waiting[chosen] = chosen, True, False
    for place in range(begin, end):
        is_in[ranking[place]] = False
