"""Rules, compiled: the moves of `policies.rules.Rule`, decided as the policies that state them decide.

A rule writes the moves of one layer of one forward into a buffer of the form of a `Script`. Letters: L MoE layers,
E experts per layer, S places of a set's table.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.policies.rules import Rule
from tidesim.replay.compiling import Whole, compiled, inlined
from tidesim.replay.script import DROP, KEEP, NOBODY, REFRESH, Decisions, Script
from tidesim.residency import per_layer
from tidesim.workload import ForwardKind

Ints = npt.NDArray[np.int64]

SCRIPTED, NEVER, TOP_COUNTS, HOTTEST_FOR_COLDEST, LEAST_RECENT, MOST_RECENT = range(6)
_CODES = {
    "never": NEVER,
    "top-counts": TOP_COUNTS,
    "hottest-for-coldest": HOTTEST_FOR_COLDEST,
    "least-recent": LEAST_RECENT,
    "most-recent": MOST_RECENT,
}
_DENOISE = int(ForwardKind.DENOISE)

# How CPython (3.11 to 3.14) looks for a place in a set, Objects/setobject.c.
_LINEAR_PROBES, _PERTURB_SHIFT, _SMALLEST_TABLE = 9, 5, 8
# A set of so many small integers has a table of 512 places or more, where each lies at its own number.
ASCENDING_FROM, ASCENDING_TABLE = 77, 512
_NEVER = 2**62


class Ruled(NamedTuple):
    """A rule, and what it remembers.

    Parameters
    ----------
    code : which rule. first_block, interval : see `Rule`; interval is int64 [L].
    budgets, num_resident : int64 [L], slots, and those that are taken.
    total : int64 [L * E], tokens so far.
    older, newer : int32 [L, E + 1], the residents by their last use, a ring; place E is between newest and oldest.
    table : int32 [L, S], residents as a CPython set has them, and -1. mask : int64 [L], its places in use, less one.
    old : int32 [S], order : int32 [E], buffers.
    mark : int64 [E], stamps of who was looked at.
    moves : those that were decided last; `first` says nothing.
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
    old: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    mark: Ints
    moves: Script


def ruled(decisions: Decisions, num_experts: int) -> Ruled:
    """The rule of `decisions` at the beginning of a run.

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
        total=np.zeros(L * E, np.int64),
        older=ring,
        newer=ring.copy(),
        table=np.full((L, places if rule.name == "top-counts" else 1), NOBODY, np.int32),
        mask=np.full(L, _SMALLEST_TABLE - 1, np.int64),
        old=np.zeros(places, np.int32),
        order=np.zeros(E, np.int32),
        mark=np.zeros(E, np.int64),
        moves=Script(np.zeros(1, np.int64), np.zeros(E, np.uint8), *np.zeros((2, E), np.int32)),
    )
    for layer, ids in enumerate(decisions.placement.experts):
        _begin(made, layer, np.array(ids, np.int32))
    return made


@compiled
def _begin(ruled: Any, layer: Whole, residents: Any) -> None:
    """The first residents, ascending: none was used yet, and a set of them was filled in that order.

    By `caches.lru` the lower id is the more recent one of those.
    """
    older, newer = ruled.older, ruled.newer
    E = older.shape[1] - 1
    older[layer, E] = newer[layer, E] = E
    for expert in residents:
        older[layer, expert] = newer[layer, expert] = expert
        if ruled.code == LEAST_RECENT:
            _use(older[layer], newer[layer], expert)
    if ruled.code == MOST_RECENT:
        for expert in residents[::-1]:
            _use(older[layer], newer[layer], expert)
    if ruled.code == TOP_COUNTS:
        ruled.mask[layer] = build_set(ruled.table[layer], residents, len(residents), ruled.old)


@inlined
def observe(ruled: Any, routing: Any, here: Any, ids: Any, ends: Any, rows: Any, at: Whole, layer: Whole) -> None:
    """The router of `layer` is done. `here` [E] are its residents, `ids` who has rows, in groups that end at `ends`
    with `rows` each; `at` is the layer's place among all of the run."""
    E = len(here)
    if ruled.code == HOTTEST_FOR_COLDEST:
        _add(ruled.total[layer * E : layer * E + E], ids, ends, rows, routing.first[at])
    elif ruled.code == LEAST_RECENT:
        _use_residents(
            ruled.older[layer], ruled.newer[layer], here, routing.ascending[routing.first[at] : routing.first[at + 1]]
        )


@inlined
def refresh(ruled: Any, routing: Any, here: Any, ids: Any, forward: Whole, at: Whole, layer: Whole) -> Whole:
    """The moves of a refresh, if one is due, in the buffer; returns how many there are. `ids` are sorted by rows."""
    num_moves, E = 0, len(here)
    if ruled.code in (HOTTEST_FOR_COLDEST, TOP_COUNTS) and routing.kind[forward] == _DENOISE:
        is_always = ruled.first_block and routing.is_first_block[forward]
        if is_always or routing.step[forward] % ruled.interval[layer] == 0:
            # Where a layer of a forward stands is as good a stamp as any.
            if ruled.code == HOTTEST_FOR_COLDEST:
                total = ruled.total[layer * E : layer * E + E]
                num_moves = _hottest_for_coldest(total, here, ruled.mark, at + 1, ruled.moves, layer * E)
            else:
                num_moves = _top_counts(ruled, ids, here, at + 1, layer)
    return num_moves


@inlined
def serve(ruled: Any, routing: Any, here: Any, begin: Whole, end: Whole, layer: Whole) -> Whole:
    """Whom to fetch of the misses among the pairs begin:end, in the buffer; returns how many there are."""
    num_moves = 0
    if ruled.code == LEAST_RECENT:
        num_moves = _fetch_all(ruled, routing.ascending[begin:end], here, ruled.older[layer], ruled.newer[layer], layer)
    elif ruled.code == MOST_RECENT:
        num_moves = _keep_recent(
            ruled, routing.ascending[begin:end], here, ruled.older[layer], ruled.newer[layer], layer
        )
    return num_moves


@inlined
def _add(total: Any, ids: Any, ends: Any, rows: Any, begin: Whole) -> None:
    """Count the rows of each expert."""
    first = 0
    for group in range(len(ends)):
        stop = ends[group] - begin
        for pair in range(first, stop):
            total[ids[np.uint64(pair)]] += rows[group]
        first = stop


# --- by last use ---


@compiled
def _fetch_all(ruled: Any, ascending: Any, here: Any, older: Any, newer: Any, layer: Whole) -> Whole:
    """All misses of `layer` are fetched and kept, in the buffer; returns how many moves there are."""
    moves, E, num_moves = ruled.moves, len(here), 0
    for pair in range(len(ascending)):
        expert = np.int64(ascending[pair])
        if here[ascending[pair]]:
            continue
        moves.part[num_moves], moves.enter[num_moves], moves.leave[num_moves] = KEEP, layer * E + expert, NOBODY
        if ruled.num_resident[layer] < ruled.budgets[layer]:
            ruled.num_resident[layer] += 1
        else:
            oldest = newer[E]
            moves.leave[num_moves] = layer * E + oldest
            _leave_ring(older, newer, oldest)
        older[expert] = newer[expert] = expert
        _use(older, newer, expert)
        num_moves += 1
    return num_moves


@compiled
def _keep_recent(ruled: Any, ascending: Any, here: Any, older: Any, newer: Any, layer: Whole) -> Whole:
    """All misses of `layer` are fetched, and those among the most recent stay; returns how many moves there are.

    The ring has the residents. It takes in whoever stays in the order of use, and then its oldest members go.
    """
    moves, E, num_moves = ruled.moves, len(here), 0
    first_kept = max(0, len(ascending) - ruled.budgets[layer])
    for pair in range(first_kept):
        if here[ascending[pair]]:
            _use(older, newer, np.int64(ascending[pair]))
    for pair in range(first_kept, len(ascending)):
        expert = np.int64(ascending[pair])
        if not here[expert]:
            moves.part[num_moves], moves.enter[num_moves] = KEEP, layer * E + expert
            older[expert] = newer[expert] = expert
            num_moves += 1
        _use(older, newer, expert)
    for move in range(num_moves):
        oldest = newer[E]
        moves.leave[move] = layer * E + oldest
        _leave_ring(older, newer, oldest)
    for pair in range(first_kept):
        expert = np.int64(ascending[pair])
        if not here[expert]:
            moves.part[num_moves], moves.enter[num_moves], moves.leave[num_moves] = DROP, layer * E + expert, NOBODY
            num_moves += 1
    return num_moves


@inlined
def _use_residents(older: Any, newer: Any, here: Any, ascending: Any) -> None:
    """The residents that have rows are used, in ascending ids."""
    for pair in range(len(ascending)):
        if here[ascending[pair]]:
            _use(older, newer, np.int64(ascending[pair]))


@inlined
def _leave_ring(older: Any, newer: Any, expert: Whole) -> None:
    """Take `expert` out of the ring. One that is alone is its own neighbour, and stays so."""
    before, behind = older[expert], newer[expert]
    newer[before], older[behind] = behind, before


@inlined
def _use(older: Any, newer: Any, expert: Whole) -> None:
    """`expert`, wherever it is in the ring or if it is alone, is now the one that was used last."""
    _leave_ring(older, newer, expert)
    E = len(older) - 1
    last = older[E]
    older[expert], newer[expert] = last, E
    newer[last] = older[E] = expert


# --- by counts so far ---


@compiled
def _hottest_for_coldest(total: Any, here: Any, mark: Any, stamp: Whole, moves: Any, offset: Whole) -> Whole:
    """Swaps as long as the absent expert has strictly more tokens; of equals the lower id goes first. Moves go to the
    buffer; returns how many there are."""
    E, num_moves = len(mark), 0
    while True:
        # Without a branch, so that the compiler makes vectors of it.
        most, least = np.int64(-1), np.int64(_NEVER)
        for expert in range(E):
            tokens, is_here, is_out = total[expert], here[expert] != 0, mark[expert] == stamp
            most = max(most, np.int64(-1) if is_here | is_out else tokens)
            least = min(least, np.int64(_NEVER) if is_here == is_out else tokens if is_here else np.int64(_NEVER))
        if most <= least:
            return num_moves
        hottest = _first(total, here, mark, stamp, most, 0)
        coldest = _first(total, here, mark, stamp, least, 1)
        mark[coldest] = mark[hottest] = stamp
        moves.part[num_moves] = REFRESH
        moves.enter[num_moves], moves.leave[num_moves] = offset + hottest, offset + coldest
        num_moves += 1


@inlined
def _first(total: Any, here: Any, mark: Any, stamp: Whole, tokens: Whole, is_resident: Whole) -> Whole:
    """The lowest id that has so many tokens, is on the device or is not, and carries no mark; there is one."""
    expert = 0
    # Hardly anybody has just so many tokens, so the other two are looked at last.
    while total[expert] != tokens or here[expert] != is_resident or mark[expert] == stamp:
        expert += 1
    return expert


# --- by the counts of one forward, and a set ---


@compiled
def _top_counts(ruled: Any, ids: Any, here: Any, stamp: Whole, layer: Whole) -> Whole:
    """The first of `ids`, sorted by rows, come in; out goes who comes first in a set of the residents. Moves go to the
    buffer; returns how many there are."""
    moves, mark, order, E, num_moves = ruled.moves, ruled.mark, ruled.order, len(here), 0
    budget, table, offset = ruled.budgets[layer], ruled.table[layer], layer * E
    num_wanted = min(budget, len(ids))
    for number in range(num_wanted):
        expert = ids[number]
        order[number], mark[expert] = expert, stamp
        if not here[expert]:
            moves.part[num_moves], moves.enter[num_moves] = REFRESH, offset + expert
            num_moves += 1
    if budget >= ASCENDING_FROM and E <= ASCENDING_TABLE:
        _leave_ascending(here, mark, stamp, offset, num_moves, moves.leave)
        return num_moves
    places = table[: ruled.mask[layer] + 1]
    num_members = _leave_in_set_order(places, mark, stamp, offset, num_moves, moves.leave, order, num_wanted)
    ruled.mask[layer] = build_set(table, order, num_members, ruled.old)
    return num_moves


@inlined
def _leave_ascending(here: Any, mark: Any, stamp: Whole, offset: Whole, num_moves: Whole, leave: Any) -> None:
    """The first `num_moves` residents, ascending, that carry no mark leave."""
    num_left, expert = 0, 0
    while num_left < num_moves:
        if here[expert] and mark[expert] != stamp:
            leave[num_left] = offset + expert
            num_left += 1
        expert += 1


@inlined
def _leave_in_set_order(
    table: Any, mark: Any, stamp: Whole, offset: Whole, num_moves: Whole, leave: Any, members: Any, num_members: Whole
) -> Whole:
    """The first `num_moves` of a set that carry no mark leave; the others without one stay, and are put down behind the
    first `num_members` of `members`. Returns how many those are then."""
    num_left, last = 0, num_members
    for place in range(len(table)):
        expert = table[place]
        if expert == NOBODY or mark[expert] == stamp:
            continue
        if num_left < num_moves:
            leave[num_left] = offset + expert
            num_left += 1
        else:
            members[last] = expert
            last += 1
    return last


@compiled
def build_set(table: Any, members: Any, num_members: Whole, old: Any) -> Whole:
    """Fill `table` as CPython fills the table of a set with `members`, one after another; returns its mask.

    `old` is a buffer of the same length.
    """
    mask = _SMALLEST_TABLE - 1
    table[:_SMALLEST_TABLE] = NOBODY
    for number in range(num_members):
        _put(table, mask, members[number])
        if (number + 1) * 5 >= mask * 3:
            num_places = _SMALLEST_TABLE
            while num_places <= (number + 1) * 4:
                num_places *= 2
            for place in range(mask + 1):
                old[place] = table[place]
            table[:num_places] = NOBODY
            for place in range(mask + 1):
                if old[place] != NOBODY:
                    _put(table, num_places - 1, old[place])
            mask = num_places - 1
    return mask


@inlined
def _put(table: Any, mask: Whole, member: Whole) -> None:
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
