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
    shape = Shape(model.num_experts, tuple(budgets))
    residency = Residency(model.num_experts, budgets, policy.initial(shape))
    clock = Clock(model.num_layers, stretch)
    one = [slice(index, index + 1) for index in range(workload.num_forwards)]
    for index in range(workload.num_forwards):
        tokens, context, logits = (
            column[one[index]] for column in (workload.tokens, workload.context_tokens, workload.logit_tokens)
        )
        info = ForwardInfo(
            index,
            int(workload.sequence[index]),
            ForwardKind(workload.kind[index]),
            int(workload.block[index]),
            int(workload.step[index]),
            bool(workload.is_first_block[index]),
            int(tokens[0]),
        )
        clock.compute(-1, "dense", *(part[0] for part in costs.entry_ns(tokens, context)))
        for layer in range(model.num_layers):
            clock.compute(layer, "dense", *(part[0] for part in costs.layer_ns(tokens, context)))
            run_layer(clock, costs, residency, policy, info, layer, workload.counts[index, layer])
        clock.compute(-1, "dense", *(part[0] for part in costs.head_ns(tokens, logits)))
    busy = {name: sum(max(0, min(end, clock.now) - start) for start, end in uses) for name, uses in clock.uses.items()}
    return tuple(tuple(parts.values()) for parts in clock.parts), busy


def run_layer(clock, costs, residency, policy, info, layer, counts):
    used, resident = costs.execution, residency.is_resident(layer)
    is_background = used.copies == "background"
    if not is_background:
        moves = policy.refresh(info, layer, counts, resident)
        residency.apply(layer, moves)
        for direction, experts, duration in (
            ("d2h", moves.evict, costs.evict_ns),
            ("h2d", moves.promote, costs.promote_ns),
        ):
            for _ in experts:
                clock.wait(layer, "copy_wait", clock.copy(direction, clock.now, duration))
    hit = np.flatnonzero((counts > 0) & resident)
    missed = np.flatnonzero((counts > 0) & ~resident)
    needed = max((clock.arrivals[layer].get(expert, 0) for expert in hit.tolist()), default=0)
    kernels = costs.experts_ns(int(costs.loop_ns[counts[hit]].sum()), len(hit), int(counts[hit].sum()))
    if policy.miss_action == "fetch":
        fetch(clock, costs, residency, policy, info, layer, counts, missed.tolist(), needed, kernels)
    else:
        pairs = int(counts[missed].sum())
        host = costs.host_expert_ns[counts[missed]].sum() + int(costs.host_call_ns(min(info.tokens, pairs), pairs))
        host = clock.slow("host", host)
        start = clock.now
        clock.wait(layer, "copy_wait", needed)
        clock.compute(layer, "device", *kernels)
        start = start if used.host == "parallel" else clock.now
        clock.uses["host"].append((start, start + host))
        clock.wait(layer, "host_wait", start + host)
    if is_background:
        moves = policy.refresh(info, layer, counts, resident)
        for swap in residency.apply(layer, moves):
            ready = clock.now
            if swap.evict is not None:
                arrival = clock.arrivals[layer].pop(swap.evict, 0)
                if costs.evict_bytes:
                    ready = clock.copy("d2h", max(ready, arrival), costs.evict_ns)
            if swap.promote is not None:
                clock.arrivals[layer][swap.promote] = clock.copy("h2d", ready, costs.promote_ns)


def fetch(clock, costs, residency, policy, info, layer, counts, missed, needed, kernels):
    moves = policy.fetch(info, layer, missed, counts, residency.is_resident(layer))
    is_background = costs.execution.copies == "background"
    start = clock.now
    clock.wait(layer, "copy_wait", needed)
    clock.compute(layer, "device", *kernels)
    ran = {expert: clock.now for expert in moves.evict if counts[expert] and expert not in moves.promote}
    for swap in residency.fetch(layer, moves):
        ready = max(start, ran.get(swap.evict, 0)) if is_background else clock.now
        if swap.evict is not None:
            ready = max(ready, clock.arrivals[layer].pop(swap.evict, 0))
            if costs.evict_bytes:
                ready = clock.copy("d2h", ready, costs.evict_ns)
        clock.wait(layer, "copy_wait", clock.copy("h2d", ready, costs.promote_ns))
        clock.compute(layer, "device", *costs.alone_ns(int(costs.loop_ns[counts[swap.promote]])))
        ran[swap.promote] = clock.now
