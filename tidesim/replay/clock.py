"""The time model as a recurrence, compiled. It walks the forwards once; `now` is the main process.

A link serves its copies in the order in which they are asked for: each starts when it is ready and the link is free.
What is asked for in the background may lie in the future of `now`. All times are whole nanoseconds, so the results are
exact. Who moves is in a `Script`, or follows a rule (`tidesim.replay.rules`).

Letters: F forwards, L MoE layers, E experts, W words of a set of experts, N = 64 * W bits of it. An expert is named
through all layers: l * N + e.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.compiling import Whole, compiled, inlined, joined
from tidesim.replay.bits import STRIDE, WORD, Words, is_in, lowest, ones, put, take
from tidesim.replay.rules import SCRIPTED, observe, refresh, serve
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
    resident : uint64 [L * W], who is on the device.
    until : int64 [L * N], when an expert has arrived and has run, so that its slot may be overwritten. What lies in the
        past needs no clearing. layer_until : int64 [L], the last arrival of a layer.
    scratch_until : int64 [N], the same of who was dropped.
    missed_rows : int32 [N], rows of the running layer's missed experts while its moves are done.
    missed : uint64 [W], who these are.
    links : int64 [2, RING + room].
    """

    parts: Ints
    tally: Ints
    resident: Words
    until: Ints
    layer_until: Ints
    scratch_until: Ints
    missed_rows: npt.NDArray[np.int32]
    missed: Words
    links: Ints


def new_clock(resident: Words, room: int) -> Clock:
    """Nothing has happened; `resident` [L, W] are on the device."""
    L, N = len(resident), resident.shape[1] * WORD
    return Clock(
        parts=np.zeros((L + 1, 5), np.int64),
        tally=np.zeros(7, np.int64),
        resident=resident.ravel().copy(),
        until=np.zeros(L * N, np.int64),
        layer_until=np.zeros(L, np.int64),
        scratch_until=np.zeros(N, np.int64),
        missed_rows=np.zeros(N, np.int32),
        missed=np.zeros(resident.shape[1], np.uint64),
        links=np.zeros((2, RING + room), np.int64),
    )


@compiled
def play(routing: Any, prices: Any, fixed: Any, script: Any, ruled: Any, clock: Any, spent: Any, now: Whole) -> Whole:
    """Run some forwards, the first of which begins at `now`; returns the time after them, the rest is in `clock`.

    Parameters
    ----------
    routing, prices, script : a `Routing`, `Prices` and `Script` of these forwards. fixed, ruled, clock : a `Fixed`,
        `Ruled` and `Clock` of the run. spent : int64 [F, L + 1], what each layer takes, and what lies outside; filled
        unless it is empty.
    """
    num_layers, is_noted = len(clock.layer_until), len(spent) > 0
    outside = num_layers
    for forward in range(len(routing.tokens)):
        begun = now
        now = _compute(clock, outside, DENSE, prices.entry[forward, 0], prices.entry[forward, 1], now)
        inside = np.int64(0)
        for layer in range(num_layers):
            entered = now
            now = _compute(clock, layer, DENSE, prices.dense[forward, 0], prices.dense[forward, 1], now)
            now = _run_layer(routing, prices, fixed, script, ruled, clock, forward, layer, now)
            if is_noted:
                spent[forward, layer] = now - entered
                inside += now - entered
        now = _compute(clock, outside, DENSE, prices.head[forward, 0], prices.head[forward, 1], now)
        if is_noted:
            spent[forward, outside] = now - begun - inside
    return now


@inlined
def _run_layer(
    routing: Any,
    prices: Any,
    fixed: Any,
    script: Any,
    ruled: Any,
    clock: Any,
    forward: Whole,
    layer: Whole,
    now: Whole,
) -> Whole:
    """The routed experts of a layer, and the moves around them; returns the time after it."""
    is_scripted, W = ruled.code == SCRIPTED, len(clock.missed)
    at, offset = forward * len(clock.layer_until) + layer, layer * W * WORD
    active, here = routing.active[at], clock.resident[layer * W : layer * W + W]
    moves = script if is_scripted else ruled.moves
    move, last = (script.first[at], script.first[at + 1]) if is_scripted else (0, 0)

    observe(ruled, routing, here, at, layer)
    if not fixed.is_background:
        if not is_scripted:
            last = refresh(ruled, routing, here, forward, at, layer)
        while move < last and moves.part[move] == REFRESH:
            now = _move_now(clock, fixed, moves, move, layer, now)
            move += 1
    start = now
    hits, num_active, loop_ns, host_ns = split(routing, prices, here, at)
    misses = routing.num_pairs[forward] - hits
    clock.tally[HITS] += hits
    clock.tally[MISSES] += misses
    if clock.layer_until[layer] > now:
        now = _wait(clock, layer, COPY_WAIT, _last_arrival(active, here, clock.until, offset), now)
    kernel_ns, launch_ns = residents_ns(prices, fixed, hits, num_active, loop_ns)
    now = _compute(clock, layer, DEVICE, kernel_ns, launch_ns, now)
    if not is_scripted:
        move, last = 0, serve(ruled, routing, here, at, layer)
    if move < last:
        _note_roles(routing, clock, here, at, offset, now)
        move, misses, host_ns, now = _fetch(
            prices, fixed, clock, moves, layer, offset, move, last, misses, host_ns, start, now
        )
        _forget_roles(clock)
    if misses > 0:
        host_ns += prices.call[prices.first_call[forward] + misses]
        clock.tally[HOST_BUSY] += host_ns
        now = _wait(clock, layer, HOST_WAIT, (start if fixed.is_parallel else now) + host_ns, now)
    while move < last and moves.part[move] == AHEAD:
        if fixed.is_background:
            _move_later(clock, fixed, moves, move, start, now)
        else:
            now = _move_now(clock, fixed, moves, move, layer, now)
        move += 1
    if fixed.is_background:
        if not is_scripted:
            move, last = 0, refresh(ruled, routing, here, forward, at, layer)
        while move < last:
            _move_later(clock, fixed, moves, move, now, now)
            move += 1
    return now


# --- the routing of a layer ---


@inlined
def split(routing: Any, prices: Any, here: Any, at: Whole) -> tuple[Whole, Whole, Whole, Whole]:
    """What is on the device: rows, experts, and their kernels one by one; and the host's time for all other experts."""
    hits, num_active, loop_ns, host_ns = 0, 0, 0, 0
    for group in range(routing.first_group[at], routing.first_group[at + 1]):
        num_here, members = 0, routing.groups[group]
        for word in range(0, len(here), STRIDE):
            num_here += (
                ones(members[word] & here[word])
                + ones(members[word + 1] & here[word + 1])
                + ones(members[word + 2] & here[word + 2])
                + ones(members[word + 3] & here[word + 3])
            )
        num_rows: Whole = np.uint64(routing.group_rows[group])
        hits += routing.group_rows[group] * num_here
        num_active += num_here
        loop_ns += prices.loop[num_rows] * num_here
        host_ns += prices.host[num_rows] * (routing.group_size[group] - num_here)
    return hits, num_active, loop_ns, host_ns


@inlined
def _last_arrival(active: Any, here: Any, until: Any, offset: Whole) -> Whole:
    """When the last of the residents that have rows has arrived."""
    needed = 0
    for word in range(len(here)):
        needing = active[word] & here[word]
        while needing:
            needed = max(needed, until[offset + WORD * word + lowest(needing)])
            needing &= needing - np.uint64(1)
    return needed


@joined
def _note_roles(routing: Any, clock: Any, here: Any, at: Whole, offset: Whole, now: Whole) -> None:
    """Who was missed, with its rows, and who has run by `now`; before the first move."""
    for word in range(len(here)):
        running = routing.active[at, word] & here[word]
        clock.missed[word] = routing.active[at, word] & ~here[word]
        while running:
            clock.until[offset + WORD * word + lowest(running)] = now
            running &= running - np.uint64(1)
    for pair in range(routing.first[at], routing.first[at + 1]):
        clock.missed_rows[routing.experts[pair]] = routing.rows[pair] * is_in(clock.missed, routing.experts[pair])


@joined
def _forget_roles(clock: Any) -> None:
    """Nobody is missed any more."""
    for word in range(len(clock.missed)):
        missed = clock.missed[word]
        while missed:
            clock.missed_rows[WORD * word + lowest(missed)] = 0
            missed &= missed - np.uint64(1)


# --- what takes time ---


@inlined
def _compute(clock: Any, layer: Whole, part: Whole, kernel_ns: Whole, launch_ns: Whole, now: Whole) -> Whole:
    """Kernels, and then the launch time that they do not hide; returns the time after them."""
    clock.tally[DEVICE_BUSY] += kernel_ns
    clock.parts[layer, part] += kernel_ns
    clock.parts[layer, LAUNCH] += launch_ns
    return now + kernel_ns + launch_ns


@inlined
def _wait(clock: Any, layer: Whole, part: Whole, until: Whole, now: Whole) -> Whole:
    """Do nothing until then; returns the time after it."""
    then = max(until, now)
    clock.parts[layer, part] += then - now
    return then


@inlined
def residents_ns(prices: Any, fixed: Any, hits: Whole, num_active: Whole, loop_ns: Whole) -> tuple[Whole, Whole]:
    """Kernels of the resident experts that have rows, and the launch time that they do not hide; see
    `Costs.experts_ns`."""
    kernel_ns, launch_ns = 0, 0
    if num_active > 0:
        if fixed.is_loop:
            kernel_ns = loop_ns
            launch_ns = max(0, num_active * fixed.expert_launch - (loop_ns if fixed.is_async else 0))
        elif fixed.has_curve:
            kernel_ns = fixed.grouped + loop_ns
        else:
            kernel_ns = fixed.grouped + max(prices.experts_bytes[num_active], prices.experts_flops[hits])
    return kernel_ns, launch_ns


@joined
def _copy(links: Any, link: Whole, ready: Whole, duration_ns: Whole, now: Whole) -> Whole:
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


@compiled
def stop(fixed: Any, clock: Any, now: Whole) -> None:
    """The run is over."""
    _clip(clock.links, H2D, fixed.promote, now)
    _clip(clock.links, D2H, fixed.evict, now)


@inlined
def _clip(links: Any, link: Whole, duration_ns: Whole, now: Whole) -> None:
    """A link was not busy with what lies behind the end of the run."""
    room = links.shape[1] - RING
    for position in range(links[link, OLDEST], links[link, NEWEST]):
        start = links[link, RING + (position & (room - 1))]
        links[link, BUSY] -= max(0, start + duration_ns - max(start, now))


# --- moves ---


@joined
def _fetch(
    prices: Any,
    fixed: Any,
    clock: Any,
    moves: Any,
    layer: Whole,
    offset: Whole,
    move: Whole,
    last: Whole,
    misses: Whole,
    host_ns: Whole,
    start: Whole,
    now: Whole,
) -> tuple[Whole, Whole, Whole, Whole]:
    """Experts come in one after another, to stay or to be dropped, and run if they have rows. What they take off the
    host is taken off `misses` and `host_ns`. Returns the move behind them, these two, and the time."""
    first_drop = move
    while move < last and (moves.part[move] == KEEP or moves.part[move] == DROP):
        enter = moves.enter[move]
        num_rows = np.int64(clock.missed_rows[enter - offset])
        host_ns -= prices.host[num_rows]
        misses -= num_rows
        ready = start if fixed.is_background else now
        if moves.part[move] == KEEP:
            ready = _evict(clock, fixed, moves.leave[move], ready, now)
            first_drop = move + 1
        elif move - first_drop >= fixed.scratch and fixed.is_background:
            # A place in scratch memory is free again when its expert has run.
            ready = max(ready, clock.scratch_until[moves.enter[move - fixed.scratch] - offset])
        arrival = _copy(clock.links, H2D, ready, fixed.promote, now)
        if num_rows > 0 or not fixed.is_background:
            now = _wait(clock, layer, COPY_WAIT, arrival, now)
        now = _compute(clock, layer, DEVICE, prices.alone[num_rows, 0], prices.alone[num_rows, 1], now)
        if moves.part[move] == KEEP:
            _settle(clock, layer, enter, arrival, now)
        else:
            clock.tally[DROPS] += 1
            clock.scratch_until[enter - offset] = now
        move += 1
    return move, misses, host_ns, now


@joined
def _evict(clock: Any, fixed: Any, leave: Whole, ready: Whole, now: Whole) -> Whole:
    """`leave` gives up its slot once it has arrived and has run. Returns when the slot is free."""
    free = ready
    if leave != NOBODY:
        clock.tally[EVICTIONS] += 1
        take(clock.resident, leave)
        free = max(free, clock.until[leave])
        if fixed.has_write_back:
            free = _copy(clock.links, D2H, free, fixed.evict, now)
    return free


@joined
def _settle(clock: Any, layer: Whole, enter: Whole, arrival: Whole, now: Whole) -> None:
    """`enter` has a slot from now on, which may be overwritten when it has arrived and what runs by `now` has run."""
    clock.tally[PROMOTIONS] += 1
    put(clock.resident, enter)
    clock.until[enter] = max(arrival, now)
    clock.layer_until[layer] = max(clock.layer_until[layer], arrival)


@joined
def _move_now(clock: Any, fixed: Any, moves: Any, move: Whole, waiting: Whole, now: Whole) -> Whole:
    """One out and one in, while everything else waits; the time is that of the layer that is `waiting`."""
    done = _evict(clock, fixed, moves.leave[move], now, now)
    if moves.enter[move] != NOBODY:
        done = _copy(clock.links, H2D, done, fixed.promote, now)
        _settle(clock, moves.layer[move], moves.enter[move], done, now)
    return _wait(clock, waiting, COPY_WAIT, done, now)


@joined
def _move_later(clock: Any, fixed: Any, moves: Any, move: Whole, ready: Whole, now: Whole) -> None:
    """One out and one in, by copies in the background that may start at `ready`."""
    free = _evict(clock, fixed, moves.leave[move], ready, now)
    if moves.enter[move] != NOBODY:
        arrival = _copy(clock.links, H2D, free, fixed.promote, now)
        _settle(clock, moves.layer[move], moves.enter[move], arrival, now)
