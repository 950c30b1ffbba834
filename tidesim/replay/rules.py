"""Rules, compiled: the moves of `policies.rules.Rule`, decided as the policies that state them decide.

A rule writes the moves of one layer of one forward into a buffer of the form of a `Script`. Letters: L MoE layers,
E experts per layer, W words of a set of them, N = 64 * W bits of it, S denoising steps of a block, P places of the
table of CPython's sets.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.compiling import Whole, compiled, inlined, joined
from tidesim.policies.rules import Rule
from tidesim.replay.bits import WORD, Words, is_in, lowest, num_bits, put, take
from tidesim.replay.script import DROP, KEEP, NOBODY, REFRESH, Decisions, Script
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
_PROBED = (1 << (_LINEAR_PROBES + 1)) - 1
# A set of so many small integers has a table of 512 places or more, where each lies at its own number.
ASCENDING_FROM, ASCENDING_TABLE = 77, 512
_NEVER = 2**62


class Ruled(NamedTuple):
    """A rule, and what it remembers.

    Parameters
    ----------
    code : which rule. first_block : see `Schedule`. is_due : bool [L, S], its steps in all other blocks.
    budgets, num_resident : int64 [L], slots, and those that are taken.
    total : int64 [L, N], tokens so far.
    older, newer : int32 [L, E + 1], the residents by their last use, a ring; place E is between newest and oldest.
    table : int32 [L, P], residents as a CPython set has them. taken : uint64 [L, P / 64 + 1], which of its places.
    mask : int64 [L], the places that it makes use of, less one.
    old, order : int32 [E + 1], buffers.
    wanted : uint64 [W], a buffer.
    moves : those that were decided last; `first` says nothing.
    """

    code: int
    first_block: bool
    is_due: npt.NDArray[np.bool_]
    budgets: Ints
    num_resident: Ints
    total: Ints
    older: npt.NDArray[np.int32]
    newer: npt.NDArray[np.int32]
    table: npt.NDArray[np.int32]
    taken: Words
    mask: Ints
    old: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    wanted: Words
    moves: Script


def ruled(decisions: Decisions, num_experts: int, num_steps: int) -> Ruled:
    """The rule of `decisions` at the beginning of a run whose blocks have `num_steps` steps at most.

    Rules with refreshes begin with no free slot, so that a swap is all that they ever do.
    """
    rule, L, E, N = decisions.rule or Rule("never"), len(decisions.budgets), num_experts, num_bits(num_experts)
    ring, places = np.zeros((L, E + 1), np.int32), WORD
    while places < 8 * E and rule.name == "top-counts":
        places *= 2
    made = Ruled(
        code=SCRIPTED if decisions.rule is None else _CODES[rule.name],
        first_block=rule.schedule.first_block,
        is_due=rule.schedule.table(L, num_steps),
        budgets=np.array(decisions.budgets, np.int64),
        num_resident=np.array([len(ids) for ids in decisions.placement.experts], np.int64),
        total=np.zeros((L, N), np.int64),
        older=ring,
        newer=ring.copy(),
        table=np.zeros((L, places), np.int32),
        taken=np.zeros((L, places // WORD + 1), np.uint64),
        mask=np.full(L, _SMALLEST_TABLE - 1, np.int64),
        old=np.zeros(E + 1, np.int32),
        order=np.zeros(E + 1, np.int32),
        wanted=np.zeros(N // WORD, np.uint64),
        moves=Script(np.zeros(1, np.int64), np.zeros(E + 1, np.uint8), *np.zeros((3, E + 1), np.int32)),
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
        ruled.mask[layer] = build_set(ruled.table[layer], ruled.taken[layer], residents, len(residents), ruled.old)


@inlined
def observe(ruled: Any, routing: Any, here: Any, at: Whole, layer: Whole) -> None:
    """The router of `layer` is done. `here` [W] are its residents; `at` is the layer's place in `routing`."""
    if ruled.code == HOTTEST_FOR_COLDEST:
        _add(ruled.total[layer], routing, at)
    elif ruled.code == LEAST_RECENT:
        _use_residents(ruled.older[layer], ruled.newer[layer], here, routing.active[at])


@joined
def refresh(ruled: Any, routing: Any, here: Any, forward: Whole, at: Whole, layer: Whole) -> Whole:
    """The moves of a refresh, if one is due, in the buffer; returns how many there are."""
    num_moves = 0
    if ruled.code in (HOTTEST_FOR_COLDEST, TOP_COUNTS) and routing.kind[forward] == _DENOISE:
        is_always = ruled.first_block and routing.is_first_block[forward]
        if is_always or ruled.is_due[layer, routing.step[forward]]:
            if ruled.code == HOTTEST_FOR_COLDEST:
                num_moves = _hottest_for_coldest(ruled.total[layer], here, ruled.wanted, ruled.moves, layer)
            else:
                num_moves = _top_counts(ruled, routing.experts[routing.first[at] : routing.first[at + 1]], here, layer)
    return num_moves


@joined
def serve(ruled: Any, routing: Any, here: Any, at: Whole, layer: Whole) -> Whole:
    """Whom to fetch of the misses, in the buffer; returns how many there are."""
    num_moves = 0
    if ruled.code == LEAST_RECENT:
        num_moves = _fetch_all(ruled, routing.active[at], here, ruled.older[layer], ruled.newer[layer], layer)
    elif ruled.code == MOST_RECENT:
        num_active = routing.first[at + 1] - routing.first[at]
        num_moves = _keep_recent(ruled, routing.active[at], num_active, here, layer)
    return num_moves


@inlined
def _add(total: Any, routing: Any, at: Whole) -> None:
    """Count the rows of each expert."""
    for pair in range(routing.first[at], routing.first[at + 1]):
        total[np.uint64(routing.experts[np.uint64(pair)])] += routing.rows[np.uint64(pair)]


# --- by last use ---


@joined
def _fetch_all(ruled: Any, active: Any, here: Any, older: Any, newer: Any, layer: Whole) -> Whole:
    """All misses of `layer` are fetched and kept, in the buffer; returns how many moves there are."""
    moves, E, num_moves, offset = ruled.moves, len(older) - 1, 0, layer * len(here) * WORD
    for word in range(len(here)):
        missed = active[word] & ~here[word]
        while missed:
            expert = WORD * word + lowest(missed)
            missed &= missed - np.uint64(1)
            moves.part[num_moves], moves.layer[num_moves] = KEEP, layer
            moves.enter[num_moves], moves.leave[num_moves] = offset + expert, NOBODY
            if ruled.num_resident[layer] < ruled.budgets[layer]:
                ruled.num_resident[layer] += 1
            else:
                oldest = newer[E]
                moves.leave[num_moves] = offset + oldest
                _leave_ring(older, newer, oldest)
            older[expert] = newer[expert] = expert
            _use(older, newer, expert)
            num_moves += 1
    return num_moves


@joined
def _keep_recent(ruled: Any, active: Any, num_active: Whole, here: Any, layer: Whole) -> Whole:
    """All misses of `layer` are fetched, and those among the most recent stay; returns how many moves there are.

    The ring has the residents. It takes in whoever stays in the order of use, and then its oldest members go. Who does
    not stay is dropped.
    """
    moves, older, newer, offset = ruled.moves, ruled.older[layer], ruled.newer[layer], layer * len(here) * WORD
    E, num_kept, num_seen, num_dropped = len(older) - 1, 0, 0, 0
    num_forgotten = max(0, num_active - ruled.budgets[layer])
    for word in range(len(here)):
        used = active[word]
        while used:
            expert = WORD * word + lowest(used)
            used &= used - np.uint64(1)
            is_here = is_in(here, expert)
            if num_seen >= num_forgotten:
                if not is_here:
                    moves.part[num_kept], moves.layer[num_kept], moves.enter[num_kept] = KEEP, layer, offset + expert
                    older[expert] = newer[expert] = expert
                    num_kept += 1
                _use(older, newer, expert)
            elif is_here:
                _use(older, newer, expert)
            else:
                # Those that are dropped come after those that stay, and are put aside until then.
                ruled.order[num_dropped] = expert
                num_dropped += 1
            num_seen += 1
    for move in range(num_kept):
        oldest = newer[E]
        moves.leave[move] = offset + oldest
        _leave_ring(older, newer, oldest)
    for number in range(num_dropped):
        move = num_kept + number
        moves.part[move], moves.layer[move] = DROP, layer
        moves.enter[move], moves.leave[move] = offset + ruled.order[number], NOBODY
    return num_kept + num_dropped


@inlined
def _use_residents(older: Any, newer: Any, here: Any, active: Any) -> None:
    """The residents that have rows are used, in ascending ids."""
    for word in range(len(here)):
        used = active[word] & here[word]
        while used:
            _use(older, newer, WORD * word + lowest(used))
            used &= used - np.uint64(1)


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


@joined
def _hottest_for_coldest(total: Any, here: Any, then: Any, moves: Any, layer: Whole) -> Whole:
    """Swaps as long as the absent expert has strictly more tokens; of equals the lower id goes first. `then` [W] is a
    buffer. Moves go to the buffer; returns how many there are."""
    num_moves, offset = 0, layer * len(total)
    for word in range(len(here)):
        then[word] = here[word]
    while True:
        most, least = _extremes(total, then)
        # Who has moved is no candidate any more: it has more than the residents' least, or less than the others' most.
        if most <= least:
            return num_moves
        hottest, coldest = _first(total, then, most, 0), _first(total, then, least, 1)
        put(then, hottest)
        take(then, coldest)
        moves.part[num_moves], moves.layer[num_moves] = REFRESH, layer
        moves.enter[num_moves], moves.leave[num_moves] = offset + hottest, offset + coldest
        num_moves += 1


@inlined
def _extremes(total: Any, here: Any) -> tuple[Whole, Whole]:
    """Most tokens of an absent expert, and fewest of a resident one. Places behind the last expert count as absent."""
    most, least = np.int64(-1), np.int64(_NEVER)
    for word in range(len(here)):
        # Without a branch, so that the compiler makes vectors of it.
        for bit in range(WORD):
            tokens, is_here = total[WORD * word + bit], (here[word] >> np.uint64(bit)) & np.uint64(1) != 0
            most = max(most, np.int64(-1) if is_here else tokens)
            least = min(least, tokens if is_here else np.int64(_NEVER))
    return most, least


@inlined
def _first(total: Any, here: Any, tokens: Whole, is_resident: Whole) -> Whole:
    """The lowest id that has so many tokens and is on the device or is not; there is one."""
    expert = 0
    # Hardly anybody has just so many tokens, so the other is looked at last.
    while total[np.uint64(expert)] != tokens or is_in(here, expert) != is_resident:
        expert += 1
    return expert


# --- by the counts of one forward, and a set ---


@joined
def _top_counts(ruled: Any, ids: Any, here: Any, layer: Whole) -> Whole:
    """The first of `ids`, sorted by rows, come in; out goes who comes first in a set of the residents. Moves go to the
    buffer; returns how many there are."""
    moves, wanted, order, E, num_moves = ruled.moves, ruled.wanted, ruled.order, len(ruled.order) - 1, 0
    budget, offset = ruled.budgets[layer], layer * len(here) * WORD
    num_wanted = min(budget, len(ids))
    wanted[:] = 0
    for number in range(num_wanted):
        expert = ids[number]
        order[number] = expert
        put(wanted, expert)
        # Written in any case, and kept if it comes in: whether it does is hard to foresee for a processor.
        moves.part[num_moves], moves.layer[num_moves], moves.enter[num_moves] = REFRESH, layer, offset + expert
        num_moves += 1 - is_in(here, expert)
    if budget >= ASCENDING_FROM and E <= ASCENDING_TABLE:
        _leave_ascending(here, wanted, offset, num_moves, moves.leave)
        return num_moves
    table, taken = ruled.table[layer], ruled.taken[layer]
    num_members = list_set(table, taken, ruled.mask[layer], ruled.old)
    num_members = _leave_in_order(ruled.old, num_members, wanted, offset, num_moves, moves.leave, order, num_wanted)
    ruled.mask[layer] = build_set(table, taken, order, num_members, ruled.old)
    return num_moves


@inlined
def _leave_ascending(here: Any, wanted: Any, offset: Whole, num_moves: Whole, leave: Any) -> None:
    """The first `num_moves` residents, ascending, that are not wanted leave."""
    num_left, word = 0, 0
    while num_left < num_moves:
        idle = here[word] & ~wanted[word]
        while idle and num_left < num_moves:
            leave[num_left] = offset + WORD * word + lowest(idle)
            idle &= idle - np.uint64(1)
            num_left += 1
        word += 1


@inlined
def _leave_in_order(
    residents: Any,
    num_residents: Whole,
    wanted: Any,
    offset: Whole,
    num_moves: Whole,
    leave: Any,
    members: Any,
    num_members: Whole,
) -> Whole:
    """The first `num_moves` of `residents` that are not wanted leave; the others that are not stay, and are put down
    behind the first `num_members` of `members`. Returns how many those are then."""
    num_left, last = 0, num_members
    for number in range(num_residents):
        expert = residents[number]
        is_idle = 1 - is_in(wanted, expert)
        is_leaving = is_idle & (num_left < num_moves)
        # Written in any case, and kept if so it is, as above.
        leave[num_left], members[last] = offset + expert, expert
        num_left += is_leaving
        last += is_idle - is_leaving
    return last


@compiled
def build_set(table: Any, taken: Any, members: Any, num_members: Whole, old: Any) -> Whole:
    """Fill `table` as CPython fills the table of a set with `members`, one after another; returns its mask.

    `old` is a buffer for all members.
    """
    mask = _SMALLEST_TABLE - 1
    _clear(taken, mask)
    for number in range(num_members):
        _place(table, taken, mask, members[number])
        if (number + 1) * 5 >= mask * 3:
            num_places = _SMALLEST_TABLE
            while num_places <= (number + 1) * 4:
                num_places *= 2
            list_set(table, taken, mask, old)
            mask = num_places - 1
            _clear(taken, mask)
            for again in range(number + 1):
                _place(table, taken, mask, old[again])
    return mask


@compiled
def list_set(table: Any, taken: Any, mask: Whole, members: Any) -> Whole:
    """Write down the members of a set in its order; returns how many they are."""
    num_members = 0
    for word in range(mask // WORD + 1):
        places = taken[word]
        while places:
            members[num_members] = table[WORD * word + lowest(places)]
            places &= places - np.uint64(1)
            num_members += 1
    return num_members


@inlined
def _clear(taken: Any, mask: Whole) -> None:
    """No place of a table is taken."""
    for word in range(mask // WORD + 1):
        taken[word] = 0


@inlined
def _place(table: Any, taken: Any, mask: Whole, member: Whole) -> None:
    """Put `member`, which is its own hash, where CPython does."""
    perturb = np.int64(member)
    place = perturb & mask
    free = _free(taken, place, mask)
    while free == np.uint64(0):
        perturb >>= _PERTURB_SHIFT
        place = (place * 5 + 1 + perturb) & mask
        free = _free(taken, place, mask)
    found = place + lowest(free)
    table[found] = member
    put(taken, found)


@inlined
def _free(taken: Any, place: Whole, mask: Whole) -> Whole:
    """Which of the places from `place` on that are looked at one after another are free; the lowest bit is `place`."""
    word, bit = place // WORD, np.uint64(place % WORD)
    # Those of the next word included; a shift by 64 would be none.
    ahead = (taken[word] >> bit) | ((taken[word + 1] << (np.uint64(63) - bit)) << np.uint64(1))
    return ~ahead & np.uint64(_PROBED if place + _LINEAR_PROBES <= mask else 1)
