"""Rules, compiled: the moves of `policies.rules.Rule`, decided as the policies that state them decide.

A rule writes the moves of one layer of one forward into a buffer of the form of a `Script`. Letters: L MoE layers,
E experts per layer, S places of a set's table.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from tidesim.policies.rules import Rule
from tidesim.replay.script import KEEP, NOBODY, REFRESH, Decisions
from tidesim.residency import per_layer
from tidesim.workload import ForwardKind

Ints = npt.NDArray[np.int64]

SCRIPTED, NEVER, TOP_COUNTS, HOTTEST_FOR_COLDEST, LEAST_RECENT = range(5)
_CODES = {
    "never": NEVER,
    "top-counts": TOP_COUNTS,
    "hottest-for-coldest": HOTTEST_FOR_COLDEST,
    "least-recent": LEAST_RECENT,
}
_DENOISE = int(ForwardKind.DENOISE)


# How CPython (3.11 to 3.14) looks for a place in a set, Objects/setobject.c.
_LINEAR_PROBES, _PERTURB_SHIFT, _SMALLEST_TABLE = 9, 5, 8
# A set of so many small integers has a table of 512 places or more, where each lies at its own number.
_ASCENDING_FROM, _ASCENDING_TABLE = 77, 512


class Ruled(NamedTuple):
    """A rule, and what it remembers.

    Parameters
    ----------
    code : which rule. first_block, interval : see `Rule`; interval is int64 [L].
    budgets, num_resident : int64 [L], slots, and those that are taken.
    total : int64 [L, E], tokens so far.
    older, newer : int32 [L, E + 1], the residents by their last use, a ring; place E is between newest and oldest.
    table : int32 [L, S], residents as a CPython set has them, and -1. mask : int64 [L], its places in use, less one.
    bucket : int64 [R + 2], for sorting by counts. order : int32 [E], a buffer.
    mark : int64 [E], stamps of who was looked at. stamp : int64 [1].
    part, enter, leave : the moves that were decided last, as in a `Script`; [2 E].
    """

    code: int
    first_block: bool
    interval: Ints
    budgets: Ints
    num_resident: Ints
    total: Ints
    older: npt.NDArray[np.int32]
    newer: npt.NDArray[np.int32]
    table: npt.NDArray[np.int32]
    mask: Ints
    bucket: Ints
    order: npt.NDArray[np.int32]
    mark: Ints
    stamp: Ints
    part: npt.NDArray[np.uint8]
    enter: npt.NDArray[np.int32]
    leave: npt.NDArray[np.int32]


def ruled(decisions: Decisions, num_experts: int, max_rows: int) -> Ruled:
    """The rule of `decisions` at the beginning of a run; `max_rows` is the most rows that an expert gets.

    Rules with refreshes begin with no free slot, so that a swap is all that they ever do.
    """
    rule, L, E = decisions.rule or Rule("never"), len(decisions.budgets), num_experts
    ring, places = np.zeros((L, E + 1), np.int32), 1
    while places < 8 * E:
        places *= 2
    made = Ruled(
        code=SCRIPTED if decisions.rule is None else _CODES[rule.name],
        first_block=rule.first_block,
        interval=np.array(per_layer(rule.refresh_interval, L, "refresh_interval"), np.int64),
        budgets=np.array(decisions.budgets, np.int64),
        num_resident=np.array([len(ids) for ids in decisions.placement.experts], np.int64),
        total=np.zeros((L, E), np.int64),
        older=ring,
        newer=ring.copy(),
        table=np.full((L, places if rule.name == "top-counts" else 1), NOBODY, np.int32),
        mask=np.full(L, _SMALLEST_TABLE - 1, np.int64),
        bucket=np.zeros(max_rows + 2, np.int64),
        order=np.zeros(E, np.int32),
        mark=np.zeros(E, np.int64),
        stamp=np.zeros(1, np.int64),
        part=np.zeros(2 * E, np.uint8),
        enter=np.zeros(2 * E, np.int32),
        leave=np.zeros(2 * E, np.int32),
    )
    for layer, ids in enumerate(decisions.placement.experts):
        _begin(made, layer, np.array(ids, np.int32))
    return made


@njit(cache=True, nogil=True)
def _begin(ruled: Any, layer: int, residents: Any) -> None:
    """The first residents, ascending: none was used yet, and a set of them was filled in that order."""
    E = ruled.older.shape[1] - 1
    ruled.older[layer, E] = ruled.newer[layer, E] = E
    for expert in residents:
        if ruled.code == LEAST_RECENT:
            _use(ruled, layer, expert)
    if ruled.code == TOP_COUNTS:
        _build_set(ruled, layer, residents, len(residents))


@njit(cache=True, nogil=True)
def observe(ruled: Any, resident: Any, layer: int, experts: Any, rows: Any) -> None:
    """The router of `layer` is done: `experts` got `rows`."""
    if ruled.code == HOTTEST_FOR_COLDEST:
        for number in range(len(experts)):
            ruled.total[layer, experts[number]] += rows[number]
    elif ruled.code == LEAST_RECENT:
        for expert in experts:
            if resident[layer, expert]:
                _forget(ruled, layer, expert)
                _use(ruled, layer, expert)


@njit(cache=True, nogil=True)
def refresh(ruled: Any, resident: Any, routing: Any, forward: int, layer: int, experts: Any, rows: Any) -> int:
    """The moves of a refresh, if one is due, in the buffer; returns how many there are."""
    if ruled.code != TOP_COUNTS and ruled.code != HOTTEST_FOR_COLDEST:
        return 0
    if routing.kind[forward] != _DENOISE:
        return 0
    is_first = ruled.first_block and routing.is_first_block[forward]
    if not is_first and routing.step[forward] % ruled.interval[layer] != 0:
        return 0
    if ruled.code == TOP_COUNTS:
        return _top_counts(ruled, resident, layer, experts, rows)
    return _hottest_for_coldest(ruled, resident, layer)


@njit(cache=True, nogil=True)
def serve(ruled: Any, resident: Any, layer: int, experts: Any) -> int:
    """What becomes of the misses among `experts`, in the buffer; returns how many moves there are."""
    if ruled.code != LEAST_RECENT:
        return 0
    num_moves, E = 0, resident.shape[1]
    for expert in experts:
        if resident[layer, expert]:
            continue
        leave = NOBODY
        if ruled.num_resident[layer] < ruled.budgets[layer]:
            ruled.num_resident[layer] += 1
        else:
            leave = ruled.newer[layer, E]
            _forget(ruled, layer, leave)
            leave += layer * E
        _use(ruled, layer, expert)
        _note(ruled, num_moves, KEEP, layer * E + expert, leave)
        num_moves += 1
    return num_moves


@njit(cache=True, nogil=True)
def _note(ruled: Any, number: int, part: int, enter: int, leave: int) -> None:
    """Put down a move."""
    ruled.part[number], ruled.enter[number], ruled.leave[number] = part, enter, leave


# --- by last use ---


@njit(cache=True, nogil=True)
def _use(ruled: Any, layer: int, expert: int) -> None:
    """`expert`, which is not in the ring, is the one that was used last."""
    E = ruled.older.shape[1] - 1
    last = ruled.older[layer, E]
    ruled.older[layer, expert], ruled.newer[layer, expert] = last, E
    ruled.newer[layer, last] = ruled.older[layer, E] = expert


@njit(cache=True, nogil=True)
def _forget(ruled: Any, layer: int, expert: int) -> None:
    """Take `expert` out of the ring."""
    older, newer = ruled.older[layer, expert], ruled.newer[layer, expert]
    ruled.newer[layer, older], ruled.older[layer, newer] = newer, older


# --- by counts so far ---


@njit(cache=True, nogil=True)
def _hottest_for_coldest(ruled: Any, resident: Any, layer: int) -> int:
    """Swaps as long as the absent expert has strictly more tokens; of equals the lower id goes first."""
    E, total, here = resident.shape[1], ruled.total[layer], resident[layer]
    ruled.stamp[0] += 1
    stamp, num_moves = ruled.stamp[0], 0
    while True:
        hottest, coldest = NOBODY, NOBODY
        for expert in range(E):
            if ruled.mark[expert] == stamp:
                continue
            if here[expert]:
                if coldest == NOBODY or total[expert] < total[coldest]:
                    coldest = expert
            elif hottest == NOBODY or total[expert] > total[hottest]:
                hottest = expert
        if hottest == NOBODY or coldest == NOBODY or total[hottest] <= total[coldest]:
            return num_moves
        ruled.mark[coldest] = ruled.mark[hottest] = stamp
        _note(ruled, num_moves, REFRESH, layer * E + hottest, layer * E + coldest)
        num_moves += 1


# --- by the counts of one forward, and a set ---


@njit(cache=True, nogil=True)
def _top_counts(ruled: Any, resident: Any, layer: int, experts: Any, rows: Any) -> int:
    """The experts with most rows come in; out goes who comes first in a set of the residents."""
    E, here = resident.shape[1], resident[layer]
    num_wanted = min(ruled.budgets[layer], len(experts))
    _sort_by_rows(ruled, experts, rows)
    ruled.stamp[0] += 1
    num_moves = 0
    for number in range(num_wanted):
        expert = ruled.order[number]
        ruled.mark[expert] = ruled.stamp[0]
        if not here[expert]:
            _note(ruled, num_moves, REFRESH, layer * E + expert, NOBODY)
            num_moves += 1
    _leave_in_set_order(ruled, here, layer, num_wanted, num_moves)
    return num_moves


@njit(cache=True, nogil=True)
def _sort_by_rows(ruled: Any, experts: Any, rows: Any) -> None:
    """`order` begins with `experts` (ascending ids), most rows first, and of equals the lower id."""
    most = 0
    for number in range(len(rows)):
        most = max(most, rows[number])
    bucket = ruled.bucket
    bucket[: most + 2] = 0
    for number in range(len(rows)):
        bucket[most - rows[number] + 1] += 1
    for number in range(most):
        bucket[number + 1] += bucket[number]
    for number in range(len(rows)):
        place = most - rows[number]
        ruled.order[bucket[place]] = experts[number]
        bucket[place] += 1


@njit(cache=True, nogil=True)
def _leave_in_set_order(ruled: Any, here: Any, layer: int, num_wanted: int, num_moves: int) -> None:
    """The first `num_moves` residents in the order of the set that carry no mark leave. The set is then built anew, of
    who is wanted and who stays."""
    E, num_left = len(here), 0
    if ruled.budgets[layer] >= _ASCENDING_FROM and E <= _ASCENDING_TABLE:
        for expert in range(E):
            if num_left == num_moves:
                return
            if here[expert] and ruled.mark[expert] != ruled.stamp[0]:
                ruled.leave[num_left] = layer * E + expert
                num_left += 1
        return
    members, num_members = ruled.order, num_wanted
    for place in range(ruled.mask[layer] + 1):
        expert = ruled.table[layer, place]
        if expert == NOBODY or ruled.mark[expert] == ruled.stamp[0]:
            continue
        if num_left < num_moves:
            ruled.leave[num_left] = layer * E + expert
            num_left += 1
        else:
            members[num_members] = expert
            num_members += 1
    _build_set(ruled, layer, members, num_members)


@njit(cache=True, nogil=True)
def _build_set(ruled: Any, layer: int, members: Any, num_members: int) -> None:
    """`table` of `layer` as CPython has a set that `members` were put into, one after another."""
    table, mask, num_filled = ruled.table[layer], _SMALLEST_TABLE - 1, 0
    table[:_SMALLEST_TABLE] = NOBODY
    for number in range(num_members):
        _put(table, mask, members[number])
        num_filled += 1
        if num_filled * 5 >= mask * 3:
            places = _SMALLEST_TABLE
            while places <= num_filled * 4:
                places *= 2
            old = table[: mask + 1].copy()
            mask = places - 1
            table[:places] = NOBODY
            for member in old:
                if member != NOBODY:
                    _put(table, mask, member)
    ruled.mask[layer] = mask


@njit(cache=True, nogil=True)
def _put(table: Any, mask: int, member: int) -> None:
    """Put `member`, which is its own hash, where CPython does."""
    perturb, place = member, member & mask
    while True:
        num_probes = _LINEAR_PROBES if place + _LINEAR_PROBES <= mask else 0
        for probe in range(num_probes + 1):
            if table[place + probe] == NOBODY:
                table[place + probe] = member
                return
        perturb >>= _PERTURB_SHIFT
        place = (place * 5 + 1 + perturb) & mask
