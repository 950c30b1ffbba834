"""The actors of a run, and what each of them does."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from tidesim.execution import Costs
from tidesim.policies import Ahead, ForwardInfo, Policy, Serving, Shape, decided, forwards_of
from tidesim.residency import Moves, Residency, Swap
from tidesim.result import Decision, Interval
from tidesim.simulator.books import Books
from tidesim.simulator.contention import SharedMemory
from tidesim.simulator.work import Job, Routed, Work
from tidesim.workload import Workload

Story = Generator[simpy.Event, Any, None]
Ints = npt.NDArray[np.int64]
Expert = tuple[int, int]  # its layer, and its id there


class Run:
    """State and actors of one run; `shape` is what the policy is told."""

    def __init__(
        self,
        workload: Workload,
        costs: Costs,
        policy: Policy,
        shape: Shape,
        decisions: Callable[[Decision], None] | None,
        timeline: list[Interval] | None,
        spent: Ints | None,
    ) -> None:
        self.workload, self.costs, self.policy = workload, costs, policy
        self.is_background = costs.execution.copies == "background"
        self.is_parallel = costs.execution.host == "parallel"
        self.env = simpy.Environment()
        self.memory = SharedMemory(self.env, costs.hardware.contention)
        self.device, self.host = simpy.Resource(self.env), simpy.Resource(self.env)
        self.links = {direction: simpy.Resource(self.env) for direction in ("h2d", "d2h")}
        self.orders = {name: simpy.Store(self.env) for name in ("host", "h2d", "d2h")}

        self.scratch = policy.scratch_experts(workload.num_experts)
        placement = policy.initial(shape)
        self.residency = Residency(shape.num_experts, shape.budgets, placement, is_pooled=policy.scope == "network")
        self.num_loaded = placement.num_experts
        # By layer: promoted experts on their way, each with the event of its arrival.
        self.in_flight: list[dict[int, simpy.Event]] = [{} for _ in shape.budgets]

        self.spent = np.zeros((workload.num_forwards, workload.num_layers + 1), np.int64) if spent is None else spent
        self.books = Books(self.env, shape.num_layers, decisions, timeline)

    def play(self) -> None:
        """Run all actors until the last forward is done, and check the books against what they were made from."""
        self.env.process(self.host_worker())
        self.env.process(self.copy_engine("h2d"))
        self.env.process(self.copy_engine("d2h"))
        self.env.run(until=self.env.process(self.walk_forwards()))
        self.books.close()
        num_gained = self.residency.placement().num_experts - self.num_loaded
        self.books.recount(int(self.workload.counts.sum(dtype=np.int64)), num_gained)

    # --- the main process ---

    def walk_forwards(self) -> Story:
        """Every forward: embedding and dense layers, each MoE layer in turn, lm_head and sampling."""
        workload, costs = self.workload, self.costs
        rows = (workload.tokens, workload.context_tokens, workload.attended_pairs)
        entry_ns, dense_ns = _per_forward(costs.entry_ns(*rows)), _per_forward(costs.layer_ns(*rows))
        head_ns = _per_forward(costs.head_ns(workload.tokens, workload.logit_tokens))
        for forward in forwards_of(workload):
            index = forward.index
            # Mapped counts are narrower, and policies calculate with them.
            counts = workload.counts[index].astype(np.int32, copy=False)
            routed, begun_ns = Routed(counts, forward.tokens, costs), self.env.now
            yield from self.compute("entry", "dense", entry_ns[index], index, None)
            for layer in range(workload.num_layers):
                entered_ns = self.env.now
                yield from self.compute("dense", "dense", dense_ns[index], index, layer)
                yield from self.run_layer(forward, layer, routed)
                self.spent[index, layer] = self.env.now - entered_ns
            yield from self.compute("head", "dense", head_ns[index], index, None)
            self.spent[index, -1] = self.env.now - begun_ns - self.spent[index, :-1].sum()

    def run_layer(self, forward: ForwardInfo, layer: int, routed: Routed) -> Story:
        """The routed experts of one layer, and all that the policy decides around them."""
        policy, counts, everybody = self.policy, routed.counts[layer], self.residency.everybody
        policy.observe(forward, layer, counts, everybody)
        moved = []
        if not self.is_background:
            moved.append(policy.refresh(forward, layer, counts, everybody))
            yield from self.move_now(forward, layer, moved[-1])
        missed = routed.missed(layer, everybody[layer])
        serving = policy.serve(forward, layer, missed, counts, everybody)
        serving.check(layer, self.scratch)
        moved.append(serving.keep)
        work = routed.split(layer, everybody[layer], serving.on_host(missed))
        run_experts = self.run_beside if self.is_background else self.run_in_turn
        ahead = yield from run_experts(forward, layer, routed, work, serving, set(missed))
        if self.is_background:
            moved.append(policy.refresh(forward, layer, counts, everybody))
            self.move_later(forward, layer, moved[-1])
        self.books.count(decided(forward, layer, work.hits, work.misses, moved, serving, ahead))

    def run_in_turn(
        self, forward: ForwardInfo, layer: int, routed: Routed, work: Work, serving: Serving, missed: Collection[int]
    ) -> Generator[simpy.Event, Any, Sequence[Ahead]]:
        """Residents on the device, then each fetched expert: its victim out, itself in, and it runs. At last the moves
        in other layers. Beside or after all this, the host."""
        result = self.call_host(forward, layer, work) if self.is_parallel else None
        yield from self.compute("experts", "device", (work.kernel_ns, work.launch_ns), forward.index, layer)
        experts = (*serving.keep.promote, *serving.drop)
        swaps = (*self.residency.fetch(layer, serving.keep), *(Swap(expert, None) for expert in serving.drop))
        for expert, swap in zip(experts, swaps, strict=True):
            yield from self.copy_now("d2h", self.victims(layer, [swap]), forward, layer)
            yield from self.copy_now("h2d", [(layer, expert)], forward, layer)
            if expert in missed:
                yield from self.run_fetched(forward, layer, routed, expert)
        yield from self.join_host(forward, layer, work, result)
        ahead = self.policy.ahead(forward, layer, routed.counts[layer], self.residency.everybody)
        for there, moves in ahead:
            yield from self.move_now(forward, there, moves, waiting=layer)
        return ahead

    def run_beside(
        self, forward: ForwardInfo, layer: int, routed: Routed, work: Work, serving: Serving, missed: Collection[int]
    ) -> Generator[simpy.Event, Any, Sequence[Ahead]]:
        """Residents on the device, and each fetched expert when it is there; copies start at once, those of moves in
        other layers after them. Beside or after all this, the host."""
        result = self.call_host(forward, layer, work) if self.is_parallel else None
        arrivals = self.needed_arrivals(layer, routed)
        residents_done = self.env.event()
        ran = {expert: self.env.event() for expert in (*serving.keep.promote, *serving.drop)}
        # Who has rows in this forward gives up its slot only after it ran.
        in_use = np.flatnonzero((routed.counts[layer] > 0) & self.residency.is_resident(layer)).tolist()
        kept = {expert: ran[expert] for expert in serving.keep.promote}
        last_use = {(layer, expert): event for expert, event in (dict.fromkeys(in_use, residents_done) | kept).items()}
        coming = self.queue(forward, layer, self.residency.fetch(layer, serving.keep), last_use)
        for expert, arrival in zip(serving.keep.promote, coming, strict=True):
            if expert not in missed:
                self.in_flight[layer][expert] = arrival
        coming += self.queue_drops(forward, layer, serving.drop, ran)
        ahead = self.policy.ahead(forward, layer, routed.counts[layer], self.residency.everybody)
        for there, moves in ahead:
            self.move_later(forward, there, moves, last_use)
        for arrival in arrivals:
            yield from self.wait_for(arrival, "copy_wait", layer)
        yield from self.compute("experts", "device", (work.kernel_ns, work.launch_ns), forward.index, layer)
        self.tell(residents_done)
        for expert, arrival in zip(ran, coming, strict=True):
            if expert in missed:
                yield from self.wait_for(arrival, "copy_wait", layer)
                yield from self.run_fetched(forward, layer, routed, expert)
            self.tell(ran[expert])
        yield from self.join_host(forward, layer, work, result)
        return ahead

    # --- the other actors ---

    def host_worker(self) -> Story:
        """Computes the missed experts of one layer after the other."""
        while True:
            job: Job = yield self.orders["host"].get()
            yield from self.work_off("host", job, self.host)

    def copy_engine(self, direction: str) -> Story:
        """Copies experts in one direction, first come first served; a copy that must wait holds up those behind it."""
        while True:
            job: Job = yield self.orders[direction].get()
            yield from self.work_off(direction, job, self.links[direction])

    def work_off(self, name: str, job: Job, resource: simpy.Resource) -> Story:
        """Do one job once all that it needs has happened."""
        with resource.request() as request:
            yield request
            if job.needs:
                yield self.env.all_of(job.needs)
            yield from self.busy(name, job.name, job.duration_ns, job.forward, job.layer)
        job.done.succeed()

    # --- what they do ---

    def busy(self, resource: str, name: str, duration_ns: int, forward: int, layer: int | None) -> Story:
        """Something that takes `duration_ns` alone, and keeps `resource` busy for as long as it lasts."""
        self.books.begin(resource, name, duration_ns, forward, layer)
        yield from self.memory.work(resource, duration_ns)
        self.books.end(resource)

    def compute(self, name: str, part: str, cost_ns: tuple[int, int], forward: int, layer: int | None) -> Story:
        """Kernels on the device, and then the launch time that they do not hide."""
        kernel_ns, launch_ns = cost_ns
        start_ns = self.books.now_ns
        if kernel_ns:
            with self.device.request() as request:
                yield request
                yield from self.busy("device", name, kernel_ns, forward, layer)
        self.books.spend(layer, part, start_ns)
        start_ns = self.books.now_ns
        if launch_ns:
            yield self.launch(launch_ns, forward, layer)
        self.books.spend(layer, "launch", start_ns)

    def launch(self, launch_ns: int, forward: int, layer: int | None) -> simpy.Event:
        """Launching kernels, as far as it outlasts them: nothing but the main process is busy with it."""
        return self.env.timeout(launch_ns)

    def run_fetched(self, forward: ForwardInfo, layer: int, routed: Routed, expert: int) -> Story:
        """An expert that was fetched runs alone."""
        yield from self.compute(f"expert {expert}", "device", routed.alone(layer, expert), forward.index, layer)

    def wait_for(self, event: simpy.Event, part: str, layer: int) -> Story:
        """Do nothing until `event` has happened."""
        start_ns = self.books.now_ns
        yield event
        self.books.spend(layer, part, start_ns)

    def tell(self, event: simpy.Event) -> None:
        """The main process says that `event` has happened."""
        event.succeed()

    def call_host(self, forward: ForwardInfo, layer: int, work: Work) -> simpy.Event | None:
        """Have the host compute its part of `layer`; the event of its result, None if it has none."""
        if not work.host_ns:
            return None
        job = Job("experts", work.host_ns, [], self.env.event(), forward.index, layer)
        self.orders["host"].put(job)
        return job.done

    def join_host(self, forward: ForwardInfo, layer: int, work: Work, result: simpy.Event | None) -> Story:
        """Wait for the host's part, which begins only now where it runs after the device's."""
        if not self.is_parallel:
            result = self.call_host(forward, layer, work)
        if result is not None:
            yield from self.wait_for(result, "host_wait", layer)

    # --- copies ---

    def victims(self, layer: int, swaps: Sequence[Swap]) -> list[Expert]:
        """Whom `swaps` of `layer` evict."""
        return [self.residency.victim(layer, swap.evict) for swap in swaps if swap.evict is not None]

    def move_now(self, forward: ForwardInfo, layer: int, moves: Moves, waiting: int | None = None) -> Story:
        """Do moves while everything else waits: all evictions, then all promotions. The time is that of the layer that
        is `waiting`, by default the one that the moves are for."""
        swaps = self.residency.apply(layer, moves)
        at = layer if waiting is None else waiting
        yield from self.copy_now("d2h", self.victims(layer, swaps), forward, at)
        yield from self.copy_now("h2d", [(layer, expert) for expert in moves.promote], forward, at)

    def copy_now(self, direction: str, experts: Sequence[Expert], forward: ForwardInfo, waiting: int) -> Story:
        """Copy experts one after another, while everything else waits."""
        name, duration_ns = self.copy_of(direction)
        if not experts or not duration_ns:
            return
        start_ns = self.books.now_ns
        with self.links[direction].request() as request:
            yield request
            for layer, expert in experts:
                yield from self.busy(direction, f"{name} {expert}", duration_ns, forward.index, layer)
        self.books.spend(waiting, "copy_wait", start_ns)

    def copy_of(self, direction: str) -> tuple[str, int]:
        """What a copy in this direction is called, and how long it takes."""
        return ("promote", self.costs.promote_ns) if direction == "h2d" else ("evict", self.costs.evict_ns)

    def move_later(
        self, forward: ForwardInfo, layer: int, moves: Moves, last_use: Mapping[Expert, simpy.Event] | None = None
    ) -> None:
        """Do moves on paper, and leave the copies to the copy engines."""
        swaps = self.residency.apply(layer, moves)
        arrivals = self.queue(forward, layer, swaps, last_use or {})
        self.in_flight[layer].update(zip(moves.promote, arrivals, strict=True))

    def queue(
        self, forward: ForwardInfo, layer: int, swaps: Sequence[Swap], last_use: Mapping[Expert, simpy.Event]
    ) -> list[simpy.Event]:
        """Queue the copies of `swaps`; the arrivals of the promoted. `last_use` says when a victim has run."""
        arrivals = []
        for swap in swaps:
            needs: list[simpy.Event] = []
            if swap.evict is not None:
                home, victim = self.residency.victim(layer, swap.evict)
                # An expert may be evicted while it is on its way: it is not stopped, but not waited for any more.
                arrival = self.in_flight[home].pop(victim, None)
                needs = [event for event in (arrival, last_use.get((home, victim))) if event is not None]
                if self.costs.evict_bytes:
                    needs = [self.order("d2h", victim, needs, forward, home)]
            if swap.promote is not None:
                arrivals.append(self.order("h2d", swap.promote, needs, forward, layer))
        return arrivals

    def queue_drops(
        self, forward: ForwardInfo, layer: int, drop: Sequence[int], ran: Mapping[int, simpy.Event]
    ) -> list[simpy.Event]:
        """Queue the copies into scratch memory; their arrivals. A place there is free again when its expert has run."""
        return [
            self.order(
                "h2d", expert, [ran[drop[number - self.scratch]]] if number >= self.scratch else [], forward, layer
            )
            for number, expert in enumerate(drop)
        ]

    def order(
        self, direction: str, expert: int, needs: list[simpy.Event], forward: ForwardInfo, layer: int
    ) -> simpy.Event:
        """Queue one copy; the event of its end."""
        name, duration_ns = self.copy_of(direction)
        job = Job(f"{name} {expert}", duration_ns, needs, self.env.event(), forward.index, layer)
        self.orders[direction].put(job)
        return job.done

    def needed_arrivals(self, layer: int, routed: Routed) -> list[simpy.Event]:
        """Arrivals of the experts that are on their way and have rows to run now."""
        in_flight = self.in_flight[layer]
        for expert in [expert for expert, arrival in in_flight.items() if arrival.processed]:
            del in_flight[expert]
        return [arrival for expert, arrival in in_flight.items() if routed.counts[layer, expert]]


def _per_forward(cost_ns: tuple[Ints, Ints]) -> list[tuple[int, int]]:
    """(kernel, launch) arrays [F] -> one pair of plain ints per forward."""
    kernel_ns, launch_ns = cost_ns
    return list(zip(kernel_ns.tolist(), launch_ns.tolist(), strict=True))
