"""The time model as a recurrence, compiled. It walks the forwards once; `now` is the main process.

A link serves its copies in the order in which they are asked for: each starts when it is ready and the link is free.
What is asked for in the background may lie in the future of `now`. All times are whole nanoseconds, so the results are
exact. Who moves is in a `Script`, or follows a rule (`tidesim.replay.rules`).

Letters: F forwards, L MoE layers, E experts.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from tidesim.replay.rules import NOBODY, SCRIPTED, observe, refresh, serve
from tidesim.replay.script import AHEAD, DROP, KEEP, REFRESH

Ints = npt.NDArray[np.int64]

# Columns of `parts`, in the order of `result.PARTS`, rows of `busy` and of the links, and columns of `moves`.
DENSE, DEVICE, LAUNCH, HOST_WAIT, COPY_WAIT = range(5)
ON_DEVICE, ON_HOST, H2D, D2H = range(4)
HITS, MISSES, PROMOTIONS, EVICTIONS, DROPS = range(5)
FIRST_ROOM = 1 << 12  # copies under way at once that a run is first given room for


class Clock(NamedTuple):
    """State of a run.

    Parameters
    ----------
    parts : int64 [L + 1, 5], time of each part in each layer, and outside.
    busy : int64 [4], of each resource. counted : int64 [5], hits, misses, promotions, evictions, drops.
    resident : uint8 [L, E].
    arrival : int64 [L, E], when a copy that is or was under way ends. until : int64 [L], the last one of a layer.
    ran, ran_in : int64 [E], when an expert of the running layer ran, and in which layer of which forward that was.
    scratch_ran : int64 [E], when one in scratch memory ran.
    missed_rows : int32 [E], rows of the running layer's missed experts while its moves are done.
    free : int64 [4], when a link is free again.
    starts : int64 [4, room], when copies that are not over start, a ring for each link.
    oldest, newest : int64 [4], positions in the rings. is_full : int64 [1], whether a ring was too short.
    """

    parts: Ints
    busy: Ints
    counted: Ints
    resident: npt.NDArray[np.uint8]
    arrival: Ints
    until: Ints
    ran: Ints
    ran_in: Ints
    scratch_ran: Ints
    missed_rows: npt.NDArray[np.int32]
    free: Ints
    starts: Ints
    oldest: Ints
    newest: Ints
    is_full: Ints


def new_clock(resident: npt.NDArray[np.bool_], room: int) -> Clock:
    """Nothing has happened; `resident` [L, E] are on the device."""
    L, E = resident.shape
    return Clock(
        parts=np.zeros((L + 1, 5), np.int64),
        busy=np.zeros(4, np.int64),
        counted=np.zeros(5, np.int64),
        resident=resident.astype(np.uint8),
        arrival=np.zeros((L, E), np.int64),
        until=np.zeros(L, np.int64),
        ran=np.zeros(E, np.int64),
        ran_in=np.full(E, -1, np.int64),
        scratch_ran=np.zeros(E, np.int64),
        missed_rows=np.zeros(E, np.int32),
        free=np.zeros(4, np.int64),
        starts=np.zeros((4, room), np.int64),
        oldest=np.zeros(4, np.int64),
        newest=np.zeros(4, np.int64),
        is_full=np.zeros(1, np.int64),
    )


@njit(cache=True, nogil=True)
def play(routing: Any, prices: Any, script: Any, ruled: Any, clock: Any, scratch: int) -> int:
    """Run all forwards; returns the makespan. What is found out is left in `clock`.

    Parameters
    ----------
    routing, prices, script, ruled, clock : a `Routing`, `Prices`, `Script`, `Ruled` and `Clock`.
    scratch : experts that fit into scratch memory.
    """
    num_layers = len(clock.until)
    now, outside = 0, num_layers
    for forward in range(len(routing.tokens)):
        now = _compute(clock, outside, DENSE, prices.entry[forward, 0], prices.entry[forward, 1], now)
        for layer in range(num_layers):
            now = _compute(clock, layer, DENSE, prices.dense[forward, 0], prices.dense[forward, 1], now)
            now = _run_layer(routing, prices, script, ruled, clock, scratch, forward, layer, now)
        now = _compute(clock, outside, DENSE, prices.head[forward, 0], prices.head[forward, 1], now)
    _clip(clock, H2D, prices.promote, now)
    _clip(clock, D2H, prices.evict, now)
    return now


@njit(cache=True, nogil=True)
def _run_layer(
    routing: Any, prices: Any, script: Any, ruled: Any, clock: Any, scratch: int, forward: int, layer: int, now: int
) -> int:
    """The routed experts of a layer, and the moves around them; returns the time after it."""
    at = forward * len(clock.until) + layer
    begin, end = routing.first[at], routing.first[at + 1]
    experts, rows = routing.experts[begin:end], routing.rows[begin:end]
    is_scripted = ruled.code == SCRIPTED
    part, enter, leave = ruled.part, ruled.enter, ruled.leave
    move, last = 0, 0
    if is_scripted:
        part, enter, leave = script.part, script.enter, script.leave
        move, last = script.first[at], script.first[at + 1]
    observe(ruled, clock.resident, layer, experts, rows)
    if not prices.is_background:
        if not is_scripted:
            last = refresh(ruled, clock.resident, routing, forward, layer, experts, rows)
        while move < last and part[move] == REFRESH:
            now = _move_now(prices, clock, layer, enter[move], leave[move], now)
            move += 1
    start = now
    hits, num_active, loop_ns, host_ns, misses, needed = _split(prices, clock, layer, experts, rows, now)
    clock.counted[HITS] += hits
    clock.counted[MISSES] += misses
    now = _wait(clock, layer, COPY_WAIT, needed, now)
    if num_active > 0:
        now = _run_residents(prices, clock, layer, hits, num_active, loop_ns, now)
    if not is_scripted:
        move, last = 0, serve(ruled, clock.resident, layer, experts)
    num_moves = last - move
    if num_moves > 0:
        _note_roles(clock, layer, experts, rows, at, now)
        first_drop = move
        while move < last and part[move] <= DROP and part[move] != REFRESH:
            if part[move] == KEEP:
                first_drop = move + 1
            expert = enter[move] - layer * clock.resident.shape[1]
            if clock.missed_rows[expert] > 0:
                host_ns -= prices.host[clock.missed_rows[expert]]
                misses -= clock.missed_rows[expert]
            if part[move] == KEEP:
                now = _keep(prices, clock, layer, enter[move], leave[move], at, start, now)
            else:
                number = move - first_drop
                before = enter[move - scratch] - layer * clock.resident.shape[1] if number >= scratch else NOBODY
                now = _drop(prices, clock, layer, enter[move], before, start, now)
            move += 1
        clock.missed_rows[:] = 0
    if misses > 0:
        host_ns += prices.call[prices.first_call[forward] + misses]
        clock.busy[ON_HOST] += host_ns
        now = _wait(clock, layer, HOST_WAIT, (start if prices.is_parallel else now) + host_ns, now)
    while move < last and part[move] == AHEAD:
        if prices.is_background:
            _move_later(prices, clock, layer, enter[move], leave[move], at, start, now)
        else:
            now = _move_now(prices, clock, layer, enter[move], leave[move], now)
        move += 1
    if prices.is_background:
        if not is_scripted:
            move, last = 0, refresh(ruled, clock.resident, routing, forward, layer, experts, rows)
        while move < last:
            _move_later(prices, clock, NOBODY, enter[move], leave[move], at, now, now)
            move += 1
    return now


# --- what the device does ---


@njit(cache=True, nogil=True)
def _compute(clock: Any, layer: int, part: int, kernel_ns: int, launch_ns: int, now: int) -> int:
    """Kernels, and then the launch time that they do not hide; returns the time after them."""
    clock.busy[ON_DEVICE] += kernel_ns
    clock.parts[layer, part] += kernel_ns
    clock.parts[layer, LAUNCH] += launch_ns
    return now + kernel_ns + launch_ns


@njit(cache=True, nogil=True)
def _wait(clock: Any, layer: int, part: int, until: int, now: int) -> int:
    """Do nothing until then; returns the time after it."""
    if until <= now:
        return now
    clock.parts[layer, part] += until - now
    return until


@njit(cache=True, nogil=True)
def _split(
    prices: Any, clock: Any, layer: int, experts: Any, rows: Any, now: int
) -> tuple[int, int, int, int, int, int]:
    """What is on the device: rows, experts and their kernels one by one. What is not: the host's time for the experts
    alone, and rows. And when the last one has arrived that is needed here and on its way."""
    here, arrival = clock.resident[layer], clock.arrival[layer]
    hits, num_active, loop_ns, host_ns, num_pairs, needed = 0, 0, 0, 0, 0, 0
    for number in range(len(experts)):
        expert, num_rows = experts[number], rows[number]
        is_here = np.int64(here[expert])
        num_pairs += num_rows
        hits += num_rows * is_here
        num_active += is_here
        loop_ns += prices.loop[num_rows] * is_here
        host_ns += prices.host[num_rows] * (1 - is_here)
    if clock.until[layer] > now:
        for expert in experts:
            if here[expert]:
                needed = max(needed, arrival[expert])
    return hits, num_active, loop_ns, host_ns, num_pairs - hits, needed


@njit(cache=True, nogil=True)
def _run_residents(prices: Any, clock: Any, layer: int, hits: int, num_active: int, loop_ns: int, now: int) -> int:
    """The resident experts that have rows; see `Costs.experts_ns`. Returns the time after them."""
    launch_ns = 0
    if prices.is_loop:
        launch_ns = max(0, num_active * prices.expert_launch - (loop_ns if prices.is_async else 0))
        kernel_ns = loop_ns
    elif prices.has_curve:
        kernel_ns = prices.grouped + loop_ns
    else:
        kernel_ns = prices.grouped + max(prices.experts_bytes[num_active], prices.experts_flops[hits])
    return _compute(clock, layer, DEVICE, kernel_ns, launch_ns, now)


# --- moves ---


@njit(cache=True, nogil=True)
def _note_roles(clock: Any, layer: int, experts: Any, rows: Any, at: int, now: int) -> None:
    """Who was missed, with its rows, and who has run by `now`; before the first move."""
    for number in range(len(experts)):
        expert = experts[number]
        if clock.resident[layer, expert]:
            clock.ran[expert], clock.ran_in[expert] = now, at
        else:
            clock.missed_rows[expert] = rows[number]


@njit(cache=True, nogil=True)
def _copy(clock: Any, link: int, ready: int, duration_ns: int, now: int) -> int:
    """The next copy of a link, which may start at `ready`; returns its end."""
    start = max(ready, clock.free[link])
    clock.free[link] = start + duration_ns
    clock.busy[link] += duration_ns
    room = clock.starts.shape[1]
    oldest, newest = clock.oldest[link], clock.newest[link]
    while oldest < newest and clock.starts[link, oldest & (room - 1)] + duration_ns <= now:
        oldest += 1
    clock.oldest[link] = oldest
    if newest - oldest == room:
        clock.is_full[0] = 1
        return start + duration_ns
    clock.starts[link, newest & (room - 1)] = start
    clock.newest[link] = newest + 1
    return start + duration_ns


@njit(cache=True, nogil=True)
def _clip(clock: Any, link: int, duration_ns: int, now: int) -> None:
    """A link was not busy with what lies behind the end of the run."""
    room = clock.starts.shape[1]
    for position in range(clock.oldest[link], clock.newest[link]):
        start = clock.starts[link, position & (room - 1)]
        clock.busy[link] -= max(0, start + duration_ns - max(start, now))


@njit(cache=True, nogil=True)
def _evict(prices: Any, clock: Any, layer: int, leave: int, at: int, ready: int, now: int) -> int:
    """`leave` gives up its slot once it has run, if it is of the running `layer`, and has arrived, if it is on its way.
    Returns when the slot is free."""
    if leave == NOBODY:
        return ready
    home, expert = divmod(leave, clock.resident.shape[1])
    clock.counted[EVICTIONS] += 1
    clock.resident[home, expert] = 0
    if home == layer and clock.ran_in[expert] == at:
        ready = max(ready, clock.ran[expert])
    ready = max(ready, clock.arrival[home, expert])
    clock.arrival[home, expert] = 0
    return _copy(clock, D2H, ready, prices.evict, now) if prices.has_write_back else ready


@njit(cache=True, nogil=True)
def _enter(clock: Any, enter: int) -> None:
    """`enter` has a slot from now on."""
    layer, expert = divmod(enter, clock.resident.shape[1])
    clock.counted[PROMOTIONS] += 1
    clock.resident[layer, expert] = 1


@njit(cache=True, nogil=True)
def _move_now(prices: Any, clock: Any, waiting: int, enter: int, leave: int, now: int) -> int:
    """One out and one in, while everything else waits; the time is that of the layer that is `waiting`."""
    until = _evict(prices, clock, NOBODY, leave, 0, now, now)
    if enter != NOBODY:
        _enter(clock, enter)
        until = _copy(clock, H2D, until, prices.promote, now)
    return _wait(clock, waiting, COPY_WAIT, until, now)


@njit(cache=True, nogil=True)
def _move_later(prices: Any, clock: Any, layer: int, enter: int, leave: int, at: int, ready: int, now: int) -> None:
    """One out and one in, by copies in the background that may start at `ready`."""
    ready = _evict(prices, clock, layer, leave, at, ready, now)
    if enter != NOBODY:
        _enter(clock, enter)
        _note_arrival(clock, enter, _copy(clock, H2D, ready, prices.promote, now))


@njit(cache=True, nogil=True)
def _note_arrival(clock: Any, enter: int, arrival: int) -> None:
    """`enter` is on its way until then."""
    layer, expert = divmod(enter, clock.resident.shape[1])
    clock.arrival[layer, expert] = arrival
    clock.until[layer] = max(clock.until[layer], arrival)


@njit(cache=True, nogil=True)
def _keep(prices: Any, clock: Any, layer: int, enter: int, leave: int, at: int, start: int, now: int) -> int:
    """A fetched expert takes a slot, and runs if it has rows; returns the time after it."""
    expert = enter - layer * clock.resident.shape[1]
    ready = _evict(prices, clock, layer if prices.is_background else NOBODY, leave, at, _ready(prices, start, now), now)
    _enter(clock, enter)
    arrival = _copy(clock, H2D, ready, prices.promote, now)
    if clock.missed_rows[expert] == 0 and prices.is_background:
        _note_arrival(clock, enter, arrival)
    now = _run_fetched(prices, clock, layer, expert, arrival, now)
    clock.ran[expert], clock.ran_in[expert] = now, at
    return now


@njit(cache=True, nogil=True)
def _drop(prices: Any, clock: Any, layer: int, enter: int, before: int, start: int, now: int) -> int:
    """A fetched expert goes through the place in scratch memory that `before` had, and runs if it has rows there;
    returns the time after it."""
    expert = enter - layer * clock.resident.shape[1]
    clock.counted[DROPS] += 1
    ready = _ready(prices, start, now)
    if before != NOBODY and prices.is_background:
        ready = max(ready, clock.scratch_ran[before])
    now = _run_fetched(prices, clock, layer, expert, _copy(clock, H2D, ready, prices.promote, now), now)
    clock.scratch_ran[expert] = now
    return now


@njit(cache=True, nogil=True)
def _ready(prices: Any, start: int, now: int) -> int:
    """When the copies of fetched experts may start: at once, or each when the one before it has run."""
    return start if prices.is_background else now


@njit(cache=True, nogil=True)
def _run_fetched(prices: Any, clock: Any, layer: int, expert: int, arrival: int, now: int) -> int:
    """Wait for a fetched expert, unless nobody needs it, and run its rows; returns the time after it."""
    num_rows = clock.missed_rows[expert]
    if num_rows > 0 or not prices.is_background:
        now = _wait(clock, layer, COPY_WAIT, arrival, now)
    if num_rows > 0:
        now = _compute(clock, layer, DEVICE, prices.alone[num_rows, 0], prices.alone[num_rows, 1], now)
    return now
