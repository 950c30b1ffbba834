"""The time model as a recurrence, compiled. It walks the forwards once; `now` is the main process.

A link serves its copies in the order in which they are asked for: each starts when it is ready and the link is free.
What is asked for in the background may lie in the future of `now`. All times are whole nanoseconds, so the results are
exact. Who moves is in a `Script`, or follows a rule (`tidesim.replay.rules`).

Compiled code counts references whenever it takes an array out of a tuple or hands one to a function. In loops as short
as these that takes longer than the work. So tuples are unpacked once, and the small functions are inlined.

Letters: F forwards, L MoE layers, E experts.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.replay.compiling import compiled, inlined
from tidesim.replay.rules import (
    DENOISE_KIND,
    HOTTEST_FOR_COLDEST,
    LEAST_RECENT,
    SCRIPTED,
    TOP_COUNTS,
    hottest_for_coldest,
    serve_least_recent,
    top_counts,
    use_residents,
)
from tidesim.replay.script import AHEAD, DROP, KEEP, NOBODY, REFRESH

Ints = npt.NDArray[np.int64]

# Columns of `parts`, in the order of `result.PARTS`; places of `tally`; rows of `links`.
DENSE, DEVICE, LAUNCH, HOST_WAIT, COPY_WAIT = range(5)
HITS, MISSES, PROMOTIONS, EVICTIONS, DROPS, DEVICE_BUSY, HOST_BUSY = range(7)
H2D, D2H = range(2)
# Columns of a link: when it is free, how long it was busy, which of its copies are not over, and whether there was too
# little room for those. Behind them, when these copies start: a ring.
FREE, BUSY, OLDEST, NEWEST, IS_FULL, RING = range(6)
FIRST_ROOM = 1 << 12  # copies under way at once that a run is first given room for; a power of two


class Clock(NamedTuple):
    """State of a run.

    Parameters
    ----------
    parts : int64 [L + 1, 5], time of each part in each layer, and outside.
    tally : int64 [7], what is counted, and how long device and host were busy.
    resident : uint8 [L * E].
    until : int64 [L * E], when an expert has arrived and has run, so that its slot may be overwritten. What lies in the
        past needs no clearing. layer_until : int64 [L], the last arrival of a layer.
    scratch_until : int64 [E], the same of who was dropped.
    missed_rows : int32 [E], rows of the running layer's missed experts while its moves are done.
    links : int64 [2, RING + room].
    """

    parts: Ints
    tally: Ints
    resident: npt.NDArray[np.uint8]
    until: Ints
    layer_until: Ints
    scratch_until: Ints
    missed_rows: npt.NDArray[np.int32]
    links: Ints


def new_clock(resident: npt.NDArray[np.bool_], room: int) -> Clock:
    """Nothing has happened; `resident` [L, E] are on the device."""
    L, E = resident.shape
    return Clock(
        parts=np.zeros((L + 1, 5), np.int64),
        tally=np.zeros(7, np.int64),
        resident=resident.ravel().astype(np.uint8),
        until=np.zeros(L * E, np.int64),
        layer_until=np.zeros(L, np.int64),
        scratch_until=np.zeros(E, np.int64),
        missed_rows=np.zeros(E, np.int32),
        links=np.zeros((2, RING + room), np.int64),
    )


@compiled
def play(routing: Any, prices: Any, fixed: Any, script: Any, ruled: Any, clock: Any) -> int:
    """Run all forwards; returns the makespan. What is found out is left in `clock`.

    Parameters
    ----------
    routing, prices, fixed, script, ruled, clock : a `Routing`, `Prices`, `Fixed`, `Script`, `Ruled` and `Clock`.
    """
    first, first_group, experts, ascending = routing.first, routing.first_group, routing.experts, routing.ascending
    group_end, group_rows, counts = routing.group_end, routing.group_rows, routing.counts
    entry, dense, head, loop, alone = prices.entry, prices.dense, prices.head, prices.loop, prices.alone
    experts_bytes, experts_flops = prices.experts_bytes, prices.experts_flops
    host, call, first_call = prices.host, prices.call, prices.first_call
    parts, tally, resident, links = clock.parts, clock.tally, clock.resident, clock.links
    until, layer_until = clock.until, clock.layer_until
    missed_rows, scratch_until = clock.missed_rows, clock.scratch_until
    code, total, older, newer = ruled.code, ruled.total, ruled.older, ruled.newer
    interval, first_block, mark, budgets, num_resident = (
        ruled.interval,
        ruled.first_block,
        ruled.mark,
        ruled.budgets,
        ruled.num_resident,
    )
    table, mask, order, old = ruled.table, ruled.mask, ruled.order, ruled.old
    kind, step, is_first_block = routing.kind, routing.step, routing.is_first_block
    num_routed = routing.num_pairs
    part, enter, leave, script_first = ruled.part, ruled.enter, ruled.leave, script.first
    if code == SCRIPTED:
        part, enter, leave = script.part, script.enter, script.leave
    num_layers, E = len(layer_until), len(missed_rows)
    now, at = 0, 0
    for forward in range(len(first_call)):
        now = _compute(parts, tally, num_layers, DENSE, entry[forward, 0], entry[forward, 1], now)
        is_refreshing = (code == HOTTEST_FOR_COLDEST or code == TOP_COUNTS) and kind[forward] == DENOISE_KIND
        is_always, num_pairs = first_block and is_first_block[forward], num_routed[forward]
        for layer in range(num_layers):
            now = _compute(parts, tally, layer, DENSE, dense[forward, 0], dense[forward, 1], now)
            begin, end, offset = first[at], first[at + 1], layer * E
            ids, here = experts[begin:end], resident[offset : offset + E]
            ends = group_end[first_group[at] : first_group[at + 1]]
            rows = group_rows[first_group[at] : first_group[at + 1]]
            move, last = 0, 0
            is_due = is_refreshing and (is_always or step[forward] % interval[layer] == 0)
            if code == SCRIPTED:
                move, last = script_first[at], script_first[at + 1]
            elif code == HOTTEST_FOR_COLDEST:
                _add_rows(total[offset : offset + E], counts[at])
            elif code == LEAST_RECENT:
                use_residents(older[layer], newer[layer], here, ascending[begin:end])
            if not fixed.is_background:
                if is_due:
                    last = _refresh(
                        code,
                        ids,
                        total[offset : offset + E],
                        here,
                        mark,
                        at + 1,
                        part,
                        enter,
                        leave,
                        offset,
                        budgets[layer],
                        table[layer],
                        mask[layer : layer + 1],
                        order,
                        old,
                    )
                while move < last and part[move] == REFRESH:
                    now = _move_now(parts, tally, resident, until, links, fixed, layer, enter[move], leave[move], now)
                    move += 1
            start = now
            hits, num_active, loop_ns, host_ns = _split(here, ids, ends, rows, loop, host, begin)
            misses = num_pairs - hits
            tally[HITS] += hits
            tally[MISSES] += misses
            if layer_until[layer] > now:
                needed = _last_arrival(here, until[offset : offset + E], ids)
                now = _wait(parts, layer, COPY_WAIT, needed, now)
            if num_active > 0:
                launch_ns = 0
                if fixed.is_loop:
                    launch_ns = max(0, num_active * fixed.expert_launch - (loop_ns if fixed.is_async else 0))
                elif fixed.has_curve:
                    loop_ns += fixed.grouped
                else:
                    loop_ns = fixed.grouped + max(experts_bytes[num_active], experts_flops[hits])
                now = _compute(parts, tally, layer, DEVICE, loop_ns, launch_ns, now)
            if code == LEAST_RECENT:
                last = serve_least_recent(
                    ascending[begin:end],
                    here,
                    older[layer],
                    newer[layer],
                    num_resident,
                    budgets,
                    part,
                    enter,
                    leave,
                    layer,
                )
            if move < last:
                _note_roles(here, until[offset : offset + E], missed_rows, ids, ends, rows, begin, now)
                num_drops = 0
                while move < last and (part[move] == KEEP or part[move] == DROP):
                    num_rows = np.int64(missed_rows[enter[move] - offset])
                    host_ns -= host[num_rows]
                    misses -= num_rows
                    ready = start if fixed.is_background else now
                    if part[move] == KEEP:
                        ready = _evict(tally, resident, until, links, fixed, leave[move], ready, now)
                        tally[PROMOTIONS] += 1
                        resident[enter[move]] = 1
                    else:
                        if num_drops >= fixed.scratch and fixed.is_background:
                            ready = max(ready, scratch_until[enter[move - fixed.scratch] - offset])
                        tally[DROPS] += 1
                        num_drops += 1
                    arrival = _copy(links, H2D, ready, fixed.promote, now)
                    if num_rows > 0 or not fixed.is_background:
                        now = _wait(parts, layer, COPY_WAIT, arrival, now)
                    if num_rows > 0:
                        now = _compute(parts, tally, layer, DEVICE, alone[num_rows, 0], alone[num_rows, 1], now)
                    if part[move] == KEEP:
                        until[enter[move]] = max(arrival, now)
                        layer_until[layer] = max(layer_until[layer], arrival)
                    else:
                        scratch_until[enter[move] - offset] = now
                    move += 1
                for pair in range(len(ids)):
                    missed_rows[ids[pair]] = 0
            if misses > 0:
                host_ns += call[first_call[forward] + misses]
                tally[HOST_BUSY] += host_ns
                now = _wait(parts, layer, HOST_WAIT, (start if fixed.is_parallel else now) + host_ns, now)
            while move < last and part[move] == AHEAD:
                if fixed.is_background:
                    _move_later(
                        tally, resident, until, layer_until, links, fixed, E, enter[move], leave[move], start, now
                    )
                else:
                    now = _move_now(parts, tally, resident, until, links, fixed, layer, enter[move], leave[move], now)
                move += 1
            if fixed.is_background:
                if is_due:
                    move, last = (
                        0,
                        _refresh(
                            code,
                            ids,
                            total[offset : offset + E],
                            here,
                            mark,
                            at + 1,
                            part,
                            enter,
                            leave,
                            offset,
                            budgets[layer],
                            table[layer],
                            mask[layer : layer + 1],
                            order,
                            old,
                        ),
                    )
                while move < last:
                    _move_later(
                        tally, resident, until, layer_until, links, fixed, E, enter[move], leave[move], now, now
                    )
                    move += 1
            at += 1
        now = _compute(parts, tally, num_layers, DENSE, head[forward, 0], head[forward, 1], now)
    _clip(links, H2D, fixed.promote, now)
    _clip(links, D2H, fixed.evict, now)
    return now


# --- the routing of a layer ---


@inlined
def _refresh(
    code: int,
    ids: Any,
    total: Any,
    here: Any,
    mark: Any,
    stamp: int,
    part: Any,
    enter: Any,
    leave: Any,
    offset: int,
    budget: int,
    table: Any,
    mask: Any,
    order: Any,
    old: Any,
) -> int:
    """The moves of a refresh, in the buffer; returns how many there are."""
    if code == HOTTEST_FOR_COLDEST:
        num_moves = hottest_for_coldest(total, here, mark, stamp, part, enter, leave, offset)
    else:
        num_moves = top_counts(ids, here, mark, stamp, part, enter, leave, offset, budget, table, mask, order, old)
    return num_moves


@compiled
def _add_rows(total: Any, counts: Any) -> None:
    """Count the rows of each expert; all of them, as the compiler makes vectors of that."""
    for expert in range(len(counts)):
        total[expert] += counts[expert]


@inlined
def _split(
    here: Any, ids: Any, ends: Any, group_rows: Any, loop: Any, host: Any, begin: int
) -> tuple[int, int, int, int]:
    """What is on the device: rows, experts, and their kernels one by one; and the host's time for all other experts."""
    hits, num_active, loop_ns, host_ns, first = 0, 0, 0, 0, 0
    for group in range(len(ends)):
        num_rows, stop, num_here = group_rows[group], ends[group] - begin, 0
        for pair in range(first, stop):
            num_here += here[ids[np.uint64(pair)]]
        hits += num_rows * num_here
        num_active += num_here
        loop_ns += loop[np.uint64(num_rows)] * num_here
        host_ns += host[np.uint64(num_rows)] * (stop - first - num_here)
        first = stop
    return hits, num_active, loop_ns, host_ns


@inlined
def _last_arrival(here: Any, until: Any, ids: Any) -> int:
    """When the last of the residents that have rows has arrived."""
    needed = 0
    for pair in range(len(ids)):
        needed = max(needed, until[ids[pair]] * here[ids[pair]])
    return needed


@inlined
def _note_roles(
    here: Any, until: Any, missed_rows: Any, ids: Any, ends: Any, group_rows: Any, begin: int, now: int
) -> None:
    """Who was missed, with its rows, and who has run by `now`; before the first move."""
    first = 0
    for group in range(len(ends)):
        stop = ends[group] - begin
        for pair in range(first, stop):
            expert = ids[np.uint64(pair)]
            is_here = np.int64(here[expert])
            until[expert] += (now - until[expert]) * is_here
            missed_rows[expert] = group_rows[group] * (1 - is_here)
        first = stop


# --- what takes time ---


@inlined
def _compute(parts: Any, tally: Any, layer: int, part: int, kernel_ns: int, launch_ns: int, now: int) -> int:
    """Kernels, and then the launch time that they do not hide; returns the time after them."""
    tally[DEVICE_BUSY] += kernel_ns
    parts[layer, part] += kernel_ns
    parts[layer, LAUNCH] += launch_ns
    return now + kernel_ns + launch_ns


@inlined
def _wait(parts: Any, layer: int, part: int, until: int, now: int) -> int:
    """Do nothing until then; returns the time after it."""
    then = max(until, now)
    parts[layer, part] += then - now
    return then


@inlined
def _copy(links: Any, link: int, ready: int, duration_ns: int, now: int) -> int:
    """The next copy of a link, which may start at `ready`; returns its end."""
    start = max(ready, links[link, FREE])
    links[link, FREE] = start + duration_ns
    links[link, BUSY] += duration_ns
    room = links.shape[1] - RING
    oldest, newest = links[link, OLDEST], links[link, NEWEST]
    while oldest < newest and links[link, RING + (oldest & (room - 1))] + duration_ns <= now:
        oldest += 1
    links[link, OLDEST] = oldest
    if newest - oldest == room:
        links[link, IS_FULL] = 1
    else:
        links[link, RING + (newest & (room - 1))] = start
        links[link, NEWEST] = newest + 1
    return start + duration_ns


@inlined
def _clip(links: Any, link: int, duration_ns: int, now: int) -> None:
    """A link was not busy with what lies behind the end of the run."""
    room = links.shape[1] - RING
    for position in range(links[link, OLDEST], links[link, NEWEST]):
        start = links[link, RING + (position & (room - 1))]
        links[link, BUSY] -= max(0, start + duration_ns - max(start, now))


# --- moves ---


@inlined
def _evict(tally: Any, resident: Any, until: Any, links: Any, fixed: Any, leave: int, ready: int, now: int) -> int:
    """`leave` gives up its slot once it has arrived and has run. Returns when the slot is free."""
    free = ready
    if leave != NOBODY:
        tally[EVICTIONS] += 1
        resident[leave] = 0
        free = max(free, until[leave])
        if fixed.has_write_back:
            free = _copy(links, D2H, free, fixed.evict, now)
    return free


@inlined
def _move_now(
    parts: Any,
    tally: Any,
    resident: Any,
    until: Any,
    links: Any,
    fixed: Any,
    waiting: int,
    enter: int,
    leave: int,
    now: int,
) -> int:
    """One out and one in, while everything else waits; the time is that of the layer that is `waiting`."""
    done = _evict(tally, resident, until, links, fixed, leave, now, now)
    if enter != NOBODY:
        tally[PROMOTIONS] += 1
        resident[enter] = 1
        done = _copy(links, H2D, done, fixed.promote, now)
    return _wait(parts, waiting, COPY_WAIT, done, now)


@inlined
def _move_later(
    tally: Any,
    resident: Any,
    until: Any,
    layer_until: Any,
    links: Any,
    fixed: Any,
    E: int,
    enter: int,
    leave: int,
    ready: int,
    now: int,
) -> None:
    """One out and one in, by copies in the background that may start at `ready`."""
    free = _evict(tally, resident, until, links, fixed, leave, ready, now)
    if enter != NOBODY:
        arrival = _copy(links, H2D, free, fixed.promote, now)
        tally[PROMOTIONS] += 1
        resident[enter] = 1
        until[enter] = arrival
        layer_until[enter // E] = max(layer_until[enter // E], arrival)
