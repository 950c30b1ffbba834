"""What `gain` decides, compiled: the same code whether it is asked about one layer or about a whole workload.

Nothing here allocates. Sums are taken in one order only, so that every run on a machine decides the same to the last
bit. Named tuples are handed over as plain ones, as to take a named one apart costs more than the work itself. Letters:
F forwards, L MoE layers, E experts per layer, R most rows of a forward, K top-k.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.compiling import Whole, compiled, inlined
from tidesim.execution import Costs
from tidesim.policies.foresight import NUM_FEATURES
from tidesim.policies.foresight_kernel import Memory, look_ahead, new_memory, see
from tidesim.policies.interface import AHEAD, DROP, KEEP, NOBODY

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# An idle link brings in who is worth so many uses more than the victim: a copy for less would only stand in the way.
LEAST_LEAD = 0.05
FEW = 64  # so many of the lowest are found one by one, more by sorting all

# Places of a paper clock.
NOW, ROUTER, LINK_FREE = range(3)
# Columns of the forwards of a workload.
SEQUENCE, BLOCK, SITUATION, TOKENS, CALL = range(5)


# --- predicted time, added up ---


class Times(NamedTuple):
    """What everything takes, in ns. int64, by rows [R + 1] where nothing else is said; see `times_of`.

    Parameters
    ----------
    dense : a layer's dense part. host : one missed expert. alone : one fetched expert.
    loop, plus, least, rows : residents take the sum of `loop` and `plus` [E + 1] by their number, but no less than
        `least` [E + 1] by their number and `rows` [R * K + 1] by the rows of all.
    saving : float64, what one miss less saves.
    copy : fetching one expert.
    is_background, is_parallel : copies beside everything else; the host beside the device.
    """

    dense: Ints
    host: Ints
    alone: Ints
    loop: Ints
    plus: Ints
    least: Ints
    rows: Ints
    saving: Floats
    copy: int
    is_background: bool
    is_parallel: bool


def times_of(costs: Costs) -> Times:
    """The predicted times of a machine.

    A victim goes out first where it is written back: in the background on a lane of its own, so that the slower copy of
    the two counts. Where the host works beside the device and copies, host and link share misses: so one miss less
    saves what both take for one side by side, else what the host takes for it.

    What lies between two forwards is left out, and so is what the dense part of a layer attends to besides the
    forward's own rows. The rows of a batch are taken for those of one sequence, which attend to each other.
    """
    execution, by_rows = costs.execution, np.arange(costs.max_rows + 1)
    is_background, is_parallel = execution.copies == "background", execution.host == "parallel"
    copy_ns = (max if is_background else sum)((costs.promote_ns, costs.evict_ns))
    host_ns = costs.host_expert_ns.astype(np.float64)
    both_ns = np.maximum(host_ns + copy_ns, 1.0)
    return Times(
        dense=np.add(*costs.layer_ns(by_rows, np.zeros_like(by_rows))),
        host=costs.host_expert_ns,
        alone=costs.fetched_ns,
        **_residents(costs),
        saving=host_ns * copy_ns / both_ns if is_background and is_parallel else host_ns,
        copy=copy_ns,
        is_background=is_background,
        is_parallel=is_parallel,
    )


def _residents(costs: Costs) -> dict[str, Ints]:
    """What `Costs.experts_ns` says, as tables."""
    is_any, nothing = np.arange(len(costs.grouped_bytes_ns)) > 0, np.zeros_like(costs.grouped_bytes_ns)
    no_rows = np.zeros_like(costs.grouped_flops_ns)
    if costs.execution.kernels == "loop":
        launch_ns = np.arange(len(nothing)) * costs.expert_launch_ns
        plus, least = (nothing, launch_ns) if costs.execution.is_async else (launch_ns, nothing)
        return {"loop": costs.loop_ns, "plus": plus, "least": least, "rows": no_rows}
    if costs.has_expert_curve:
        return {"loop": costs.loop_ns, "plus": is_any * costs.grouped_overhead_ns, "least": nothing, "rows": no_rows}
    bytes_ns, flops_ns = costs.grouped_bytes_ns, costs.grouped_flops_ns
    return {
        "loop": np.zeros_like(costs.loop_ns),
        "plus": nothing,
        "least": is_any * (costs.grouped_overhead_ns + bytes_ns),
        "rows": (flops_ns > 0) * (costs.grouped_overhead_ns + flops_ns),
    }


def call_ns(costs: Costs, tokens: int) -> Ints:
    """What calling the host takes in a forward of `tokens` rows, [tokens * K + 1] by the pairs that are left to it."""
    pairs = np.arange(tokens * costs.model.top_k + 1)
    # A row with several missed experts travels once.
    return costs.host_call_ns(np.minimum(tokens, pairs), pairs)


@inlined
def backlog_ns(clock: Any) -> Whole:
    """What the link still has to do."""
    return max(0, clock[LINK_FREE] - clock[NOW])


@inlined
def has_idle_link(times: Any, clock: Any, tokens: Whole) -> bool:
    """Whether copies run beside everything else and the link is free before the next layer's router is done."""
    return bool(times.is_background and clock[LINK_FREE] < clock[NOW] + times.dense[tokens])


@inlined
def pass_dense(clock: Any, dense_ns: Whole) -> None:
    """The dense part of a layer, up to its router."""
    clock[NOW] += dense_ns
    clock[ROUTER] = clock[NOW]


@inlined
def pass_layer(times: Any, clock: Any, layer_ns: Whole, num_copies: Whole) -> None:
    """The routed experts of a layer, and the copies that began with them."""
    if num_copies > 0 and times.is_background:
        clock[LINK_FREE] = max(clock[LINK_FREE], clock[NOW]) + num_copies * times.copy
    clock[NOW] += layer_ns


@inlined
def pass_copy(times: Any, clock: Any) -> None:
    """One copy more, behind those that began when the router was done."""
    clock[LINK_FREE] = max(clock[LINK_FREE], clock[ROUTER]) + times.copy


@compiled
def residents_ns(times: Any, counts: Any, here: Any) -> Whole:
    """The part of the residents that have rows."""
    loop_ns, num_active, num_rows = 0, 0, 0
    for expert in range(len(counts)):
        rows = counts[expert] * here[expert]
        loop_ns += times.loop[rows]
        num_active += rows > 0
        num_rows += rows
    num_rows = min(num_rows, len(times.rows) - 1)
    return max(loop_ns + times.plus[num_active], times.least[num_active], times.rows[num_rows])


@compiled
def layer_ns(
    times: Any,
    call: Any,
    device_ns: Whole,
    ready_ns: Whole,
    counts: Any,
    missed: Any,
    num_free: Whole,
    victims: Any,
    totals: Any,
) -> None:
    """What a layer takes if the first 0, 1, .. of the `missed` experts are fetched and the host computes the rest.

    Residents take `device_ns`. The link can begin at `ready_ns`; a copy begins when the one before it has ended, but
    who takes the place of a victim that has rows comes only after that one has run. An expert runs when it has arrived
    and those before it have run. `call` [pairs + 1] is what calling the host takes by the pairs that are left to it.
    Written to `totals` [missed + 1].
    """
    host_ns, num_pairs = 0, 0
    for expert in missed:
        host_ns += times.host[counts[expert]]
        num_pairs += counts[expert]
    arrived_ns, ran_ns = ready_ns, device_ns
    for number in range(len(missed) + 1):
        left_ns = host_ns + call[min(num_pairs, len(call) - 1)]
        totals[number] = max(ran_ns, left_ns) if times.is_parallel else ran_ns + left_ns
        if number < len(missed):
            rows, place = counts[missed[number]], number - num_free
            if not times.is_background:
                ran_ns += times.copy
            elif 0 <= place < len(victims) and counts[victims[place]] > 0:
                arrived_ns = max(arrived_ns, device_ns)
            if times.is_background:
                arrived_ns += times.copy
                ran_ns = max(ran_ns, arrived_ns)
            ran_ns += times.alone[rows]
            host_ns -= times.host[rows]
            num_pairs -= rows


# --- what is decided ---


class Answer(NamedTuple):
    """Buffers for what a layer is asked about.

    Parameters
    ----------
    totals : int64 [E + 1], what the layer takes if the first 0, 1, .. of the missed are fetched.
    keep, drop, evict : int64 [E], as in `Serving`.
    missed, victims : int64 [E], whom one would fetch first, and evict first.
    worth, last_worth, first_saved : float64 [E], what each is worth, and the keys that those two are sorted by.
    leads : float64 [E], by how much each of the missed is worth more than whom it would replace; 0 if by nothing.
    """

    totals: Ints
    keep: Ints
    drop: Ints
    evict: Ints
    missed: Ints
    victims: Ints
    worth: Floats
    last_worth: Floats
    first_saved: Floats
    leads: Floats


def new_answer(num_experts: int) -> Answer:
    """Buffers for layers of so many experts."""
    ints, floats = np.zeros((5, num_experts), np.int64), np.zeros((4, num_experts))
    return Answer(np.zeros(num_experts + 1, np.int64), *ints, *floats)


@compiled
def sort_by_key(keys: Any, experts: Any) -> None:
    """Those of lower keys first, and of equals the lower id: a Shell sort, as some hundred are soon sorted by it."""
    for gap in (701, 301, 132, 57, 23, 10, 4, 1):
        for begin in range(gap, len(keys)):
            key, expert, place = keys[begin], experts[begin], begin
            while place >= gap and (
                keys[place - gap] > key or (keys[place - gap] == key and experts[place - gap] > expert)
            ):
                keys[place], experts[place] = keys[place - gap], experts[place - gap]
                place -= gap
            keys[place], experts[place] = key, expert


@compiled
def sort_lowest(keys: Any, experts: Any, num_lowest: Whole) -> None:
    """The same, but only so many of the lowest keys need to stand in order, and what is behind them is lost."""
    if num_lowest > FEW:
        sort_by_key(keys, experts)
        return
    for begin in range(len(keys) if num_lowest else 0):
        key, expert, place = keys[begin], experts[begin], min(begin, num_lowest)
        while place and (keys[place - 1] > key or (keys[place - 1] == key and experts[place - 1] > expert)):
            place -= 1
            if place + 1 < num_lowest:
                keys[place + 1], experts[place + 1] = keys[place], experts[place]
        if place < num_lowest:
            keys[place], experts[place] = key, expert


@compiled
def serve(
    table: Any,
    rows: Any,
    times: Any,
    clock: Any,
    answer: Any,
    call: Any,
    layer: Whole,
    num_slots: Whole,
    counts: Any,
    here: Any,
) -> tuple[Whole, Whole, Whole]:
    """How many are kept, dropped and evicted, of those that are written to `answer`; see `Gain.serve`."""
    paper, found = Times(*times), Answer(*answer)
    worth, missed, victims = found.worth, found.missed, found.victims
    num_missed, num_victims = 0, 0
    for expert in range(len(counts)):
        worth[expert] = table[layer, expert] * paper.saving[rows[layer, expert]]
        # Both are written, and what does not belong there is overwritten: to guess who is resident takes longer.
        victims[num_victims], found.last_worth[num_victims] = expert, worth[expert]
        missed[num_missed] = expert
        found.first_saved[num_missed] = -(worth[expert] + paper.host[counts[expert]])
        num_victims += here[expert]
        num_missed += counts[expert] > 0 and not here[expert]
    missed, victims, num_free = missed[:num_missed], victims[:num_victims], num_slots - num_victims
    sort_by_key(found.first_saved[:num_missed], missed)
    sort_lowest(found.last_worth[:num_victims], victims, min(num_victims, max(0, num_missed - num_free)))
    device_ns, totals = residents_ns(paper, counts, here), found.totals
    layer_ns(paper, call, device_ns, backlog_ns(clock), counts, missed, num_free, victims, totals)
    num_fetched, least_ns, later_ns = 0, float(totals[0]), 0.0
    for number in range(num_missed):
        lead = 0.0
        if number < num_free + num_victims:
            replaced = 0.0 if number < num_free else found.last_worth[number - num_free]
            lead = max(worth[missed[number]] - replaced, 0.0)
        found.leads[number] = lead
        later_ns += lead
        if totals[number + 1] - later_ns < least_ns:
            num_fetched, least_ns = number + 1, totals[number + 1] - later_ns
    pass_layer(paper, clock, totals[num_fetched], num_fetched)
    num_kept, num_dropped = 0, 0
    for number in range(num_fetched):
        if found.leads[number] > 0:
            found.keep[num_kept] = missed[number]
            num_kept += 1
        else:
            found.drop[num_dropped] = missed[number]
            num_dropped += 1
    num_evicted = max(0, num_kept - num_free)
    for number in range(num_evicted):
        found.evict[number] = victims[number]
    return num_kept, num_dropped, num_evicted


@compiled
def ahead(
    table: Any, rows: Any, times: Any, clock: Any, here: Any, target: Whole, num_slots: Whole, tokens: Whole
) -> tuple[Whole, Whole]:
    """Who comes into layer `target`, and who goes out for it; -1 is nobody. `here` [E] is who is resident there."""
    paper = Times(*times)
    if not has_idle_link(paper, clock, tokens):
        return NOBODY, NOBODY
    best, worst, num_resident, best_ns, worst_ns = NOBODY, NOBODY, 0, 0.0, 0.0
    for expert in range(len(here)):
        worth_ns = table[target, expert] * paper.saving[rows[target, expert]]
        if here[expert]:
            num_resident += 1
            if worst == NOBODY or worth_ns < worst_ns:
                worst, worst_ns = expert, worth_ns
        elif best == NOBODY or worth_ns > best_ns:
            best, best_ns = expert, worth_ns
    if num_resident < num_slots:
        worst, least_ns = NOBODY, 0.0
    else:
        least_ns = worst_ns + LEAST_LEAD * paper.saving[1]
    if best == NOBODY or num_slots == 0 or best_ns <= least_ns:
        return NOBODY, NOBODY
    pass_copy(paper, clock)
    return best, worst


# --- a whole workload ---


@compiled
def write(
    memory: Any,
    times: Any,
    clock: Any,
    answer: Any,
    calls: Any,
    budgets: Any,
    forwards: Any,
    counts: Any,
    resident: Any,
    first: Any,
    moves: Any,
) -> None:
    """All that is decided in some forwards, as if it were asked layer by layer.

    Parameters
    ----------
    calls : int64, tables as `serve` takes them, one behind the other; that of forward f begins at forwards[f, CALL].
    budgets : int64 [L]. forwards : int64 [F, 5]. counts : int32 [F, L, E].
    resident : bool [L, E], who is resident; kept up to date.
    first : int64 [F * L + 1], moves : int32 [.., 4], written; see `Written`.
    """
    num_layers, num_moves, dense_ns = len(budgets), 0, Times(*times).dense
    told, found = Memory(*memory), Answer(*answer)
    first[0] = 0
    for forward in range(len(forwards)):
        sequence, block, situation, tokens, call = forwards[forward]
        for layer in range(num_layers):
            target = (layer + 1) % num_layers
            rows, here = counts[forward, layer], resident[layer]
            look_ahead(memory, layer, sequence, block, situation, tokens, rows)
            pass_dense(clock, dense_ns[tokens])
            num_kept, num_dropped, num_evicted = serve(
                told.table, told.rows, times, clock, answer, calls[call:], layer, budgets[layer], rows, here
            )
            for number in range(num_kept):
                victim = number - (num_kept - num_evicted)
                out = found.evict[victim] if victim >= 0 else NOBODY
                num_moves = _move(moves, num_moves, KEEP, layer, found.keep[number], out)
                _swap(here, found.keep[number], out)
            for number in range(num_dropped):
                num_moves = _move(moves, num_moves, DROP, layer, found.drop[number], NOBODY)
            here = resident[target]
            best, worst = ahead(told.table, told.rows, times, clock, here, target, budgets[target], tokens)
            if best != NOBODY:
                num_moves = _move(moves, num_moves, AHEAD, target, best, worst)
                _swap(here, best, worst)
            first[forward * num_layers + layer + 1] = num_moves


@inlined
def _move(moves: Any, num_moves: Whole, part: Whole, layer: Whole, enter: Whole, leave: Whole) -> Whole:
    """One move more; returns how many there are."""
    moves[num_moves, 0], moves[num_moves, 1] = part, layer
    moves[num_moves, 2], moves[num_moves, 3] = enter, leave
    return num_moves + 1


@inlined
def _swap(here: Any, enter: Whole, leave: Whole) -> None:
    """One comes in, and one may go out."""
    here[enter] = True
    if leave != NOBODY:
        here[leave] = False


def compile_now() -> None:
    """Compile what decides, unless that is on disk: before a run is timed in which it is asked."""
    ints, floats, counts, here = np.zeros(5, np.int64), np.zeros((1, 1)), np.zeros(1, np.int32), np.zeros(1, np.bool_)
    memory = new_memory(floats, floats, np.zeros((1, NUM_FEATURES)))
    known, plain, answer, clock = (
        (memory.table, memory.rows),
        tuple(memory),
        tuple(new_answer(1)),
        np.zeros(3, np.int64),
    )
    times = (*(ints,) * 7, np.zeros(2), 0, False, False)
    see(plain, 0, 0, 0, 1, counts, memory.features)
    look_ahead(plain, 0, 0, 0, 0, 1, counts)
    pass_dense(clock, 0)
    serve(*known, times, clock, answer, ints, 0, 0, counts, here)
    ahead(*known, times, clock, here, 0, 0, 1)
    whole = np.zeros((0, 5), np.int64), counts.reshape(1, 1, 1), here.reshape(1, 1), ints, np.zeros((0, 4), np.int32)
    write(plain, times, clock, answer, ints, ints[:1], *whole)
