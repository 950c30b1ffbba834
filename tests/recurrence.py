"""The time model once more, as a recurrence over plain numbers: no events, no processes, nothing shared but the costs.

It walks the forwards once. `now` is the main process; a link is the moment at which it is free again. Nobody slows
anybody here, but everything that the device, the host or the links do may be stretched by a factor of theirs.
"""

import math

import numpy as np

from tidesim.execution import Costs
from tidesim.policies import ForwardInfo, Shape
from tidesim.residency import Residency
from tidesim.result import PARTS
from tidesim.workload import ForwardKind


class Clock:
    """Where the main process is, when each link is free, and what was done so far."""

    def __init__(self, num_layers: int, stretch=None) -> None:
        self.stretch = stretch or {}
        self.now = 0
        self.free = {"h2d": 0, "d2h": 0}
        self.uses = {"device": [], "host": [], "h2d": [], "d2h": []}
        self.parts = [dict.fromkeys(PARTS, 0) for _ in range(num_layers + 1)]
        self.arrivals = [{} for _ in range(num_layers)]

    def spend(self, layer, part, duration):
        self.parts[layer][part] += duration
        self.now += duration

    def wait(self, layer, part, until):
        self.spend(layer, part, max(0, until - self.now))

    def slow(self, resource, duration):
        return math.ceil(int(duration) * self.stretch.get(resource, 1))

    def compute(self, layer, part, kernel, launch):
        kernel = self.slow("device", kernel)
        self.uses["device"].append((self.now, self.now + kernel))
        self.spend(layer, part, int(kernel))
        self.spend(layer, "launch", int(launch))

    def copy(self, direction, ready, duration):
        """The end of a copy that is next in line and may start at `ready`."""
        start, duration = max(ready, self.free[direction]), self.slow(direction, duration)
        self.free[direction] = start + duration
        self.uses[direction].append((start, start + duration))
        return start + duration


def timed_by_hand(workload, model, hardware, policy, budgets, execution, stretch=None):
    """(parts of each layer and outside, busy time of each resource) of a run.

    `stretch` has a factor for each resource whose work takes longer.
    """
    costs = Costs(model, hardware, execution, int(workload.tokens.max()))
    start = policy.initial(Shape(model.num_experts, tuple(budgets), costs))
    residency = Residency(model.num_experts, budgets, start, is_pooled=policy.scope == "network")
    clock = Clock(model.num_layers, stretch)
    one = [slice(index, index + 1) for index in range(workload.num_forwards)]
    for index in range(workload.num_forwards):
        columns = (workload.tokens, workload.context_tokens, workload.attended_pairs, workload.logit_tokens)
        tokens, context, pairs, logits = (column[one[index]] for column in columns)
        info = ForwardInfo(
            index,
            int(workload.sequence[index]),
            ForwardKind(workload.kind[index]),
            int(workload.block[index]),
            int(workload.step[index]),
            bool(workload.is_first_block[index]),
            int(tokens[0]),
        )
        clock.compute(-1, "dense", *(part[0] for part in costs.entry_ns(tokens, context, pairs)))
        for layer in range(model.num_layers):
            clock.compute(layer, "dense", *(part[0] for part in costs.layer_ns(tokens, context, pairs)))
            run_layer(clock, costs, residency, policy, info, layer, workload.counts[index, layer])
        clock.compute(-1, "dense", *(part[0] for part in costs.head_ns(tokens, logits)))
    busy = {name: sum(max(0, min(end, clock.now) - start) for start, end in uses) for name, uses in clock.uses.items()}
    return tuple(tuple(parts.values()) for parts in clock.parts), busy


def run_layer(clock, costs, residency, policy, info, layer, counts):
    used, everybody = costs.execution, residency.everybody
    is_background = used.copies == "background"
    policy.observe(info, layer, counts, everybody)
    if not is_background:
        move_now(clock, costs, residency, layer, policy.refresh(info, layer, counts, everybody), layer)
    hit = np.flatnonzero((counts > 0) & everybody[layer])
    missed = np.flatnonzero((counts > 0) & ~everybody[layer]).tolist()
    needed = max((clock.arrivals[layer].get(expert, 0) for expert in hit.tolist()), default=0)
    kernels = costs.experts_ns(int(costs.loop_ns[counts[hit]].sum()), len(hit), int(counts[hit].sum()))
    serving = policy.serve(info, layer, missed, counts, everybody)
    on_host = [expert for expert in missed if expert not in serving.keep.promote + serving.drop]
    start = clock.now
    clock.wait(layer, "copy_wait", needed)
    clock.compute(layer, "device", *kernels)
    ran = {(layer, expert): clock.now for expert in hit.tolist()}
    bring = (residency.fetch(layer, serving.keep), serving.drop, policy.scratch_experts(len(counts)))
    for expert, swap_ready, is_dropped in fetches(clock, costs, residency, layer, start, ran, bring, is_background):
        arrival = clock.copy("h2d", swap_ready, costs.promote_ns)
        if expert in missed:
            clock.wait(layer, "copy_wait", arrival)
            clock.compute(layer, "device", *costs.alone_ns(int(costs.loop_ns[counts[expert]])))
        elif not is_background:
            clock.wait(layer, "copy_wait", arrival)
        elif not is_dropped:
            clock.arrivals[layer][expert] = arrival
        ran["scratch" if is_dropped else layer, expert] = clock.now
    ask_host(clock, costs, layer, counts[on_host], start if used.host == "parallel" else clock.now, info)
    for there, moves in policy.ahead(info, layer, counts, everybody):
        if is_background:
            move_later(clock, costs, residency, there, moves, start, ran)
        else:
            move_now(clock, costs, residency, there, moves, layer)
    if is_background:
        moves = policy.refresh(info, layer, counts, everybody)
        move_later(clock, costs, residency, layer, moves, clock.now, {})


def fetches(clock, costs, residency, layer, start, ran, bring, is_background):
    """Each fetched expert, when its copy may start, and whether it is dropped; `ran` grows meanwhile."""
    swaps, drop, scratch = bring
    for swap in swaps:
        ready = start if is_background else clock.now
        if swap.evict is not None:
            victim = residency.victim(layer, swap.evict)
            ready = max(ready, ran.get(victim, 0) if is_background else 0, clock.arrivals[victim[0]].pop(victim[1], 0))
            if costs.evict_bytes:
                ready = clock.copy("d2h", ready, costs.evict_ns)
        yield swap.promote, ready, False
    for number, expert in enumerate(drop):
        free = ran["scratch", drop[number - scratch]] if number >= scratch else 0
        yield expert, max(start, free) if is_background else clock.now, True


def ask_host(clock, costs, layer, rows, start, info):
    pairs = int(rows.sum())
    if not pairs:
        return
    host = costs.host_expert_ns[rows].sum() + int(costs.host_call_ns(min(info.tokens, pairs), pairs))
    host = clock.slow("host", host)
    clock.uses["host"].append((start, start + host))
    clock.wait(layer, "host_wait", start + host)


def move_now(clock, costs, residency, layer, moves, waiting):
    residency.apply(layer, moves)
    for direction, experts, duration in (
        ("d2h", moves.evict, costs.evict_ns),
        ("h2d", moves.promote, costs.promote_ns),
    ):
        for _ in experts:
            clock.wait(waiting, "copy_wait", clock.copy(direction, clock.now, duration))


def move_later(clock, costs, residency, layer, moves, start, ran):
    for swap in residency.apply(layer, moves):
        ready = start
        if swap.evict is not None:
            victim = residency.victim(layer, swap.evict)
            ready = max(ready, ran.get(victim, 0), clock.arrivals[victim[0]].pop(victim[1], 0))
            if costs.evict_bytes:
                ready = clock.copy("d2h", ready, costs.evict_ns)
        if swap.promote is not None:
            clock.arrivals[layer][swap.promote] = clock.copy("h2d", ready, costs.promote_ns)
