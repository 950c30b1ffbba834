"""The actors of a run, and what each of them does."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simpy

from tidesim.errors import InputError
from tidesim.execution import Costs, Execution, check_memory
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.policies import ForwardInfo, Policy, Shape
from tidesim.residency import Moves, Residency, Swap, check_budgets, per_layer
from tidesim.result import Decision, Interval, RunResult, one_or_each
from tidesim.simulator.books import Books
from tidesim.simulator.contention import SharedMemory
from tidesim.workload import ForwardKind, Workload

Story = Generator[simpy.Event, Any, None]
Ints = npt.NDArray[np.int64]


def simulate(
    workload: Workload,
    model: MoEConfig,
    hardware: Hardware,
    policy: Policy,
    *,
    budget: int | Sequence[int],
    execution: Execution,
    seed: int | None = None,
    decisions: Callable[[Decision], None] | None = None,
    timeline: list[Interval] | None = None,
    reserve_bytes: int | None = None,
    is_memory_checked: bool = True,
) -> RunResult:
    """Run `workload` under `policy`, with the sizes of `model`, on `hardware`.

    Parameters
    ----------
    budget : expert slots on the device, one number or one per MoE layer. They are filled before the clock starts.
    seed : only for the record; nothing here is random.
    decisions : called with one `Decision` per forward and MoE layer, in order.
    timeline : an empty list, filled with what ran when, in order of their starts; see `result.Interval`.
    reserve_bytes, is_memory_checked : see `execution.check_memory`, which is left out if the latter is False, for
        questions about machines that do not exist.

    Raise InputError if workload, model and execution do not fit together, BudgetError if the experts do not fit the
    machine, ValueError if the policy's moves are not possible.
    """
    _check_fit(workload, model, execution)
    budgets = per_layer(budget, model.num_layers, "budget")
    check_budgets(budgets, model.num_experts)
    if is_memory_checked:
        check_memory(model, hardware, execution, budgets, workload.max_tokens, reserve_bytes)
    costs = Costs(model, hardware, execution, int(workload.tokens.max()))
    run = _Run(workload, costs, policy, budgets, decisions, timeline)
    run.play()
    is_same_model = workload.model_name == model.name
    return RunResult(
        policy=policy.name,
        budget=one_or_each(budgets),
        refresh_interval=policy.refresh_interval,
        execution=execution.name,
        context=workload.context,
        hardware=hardware.name,
        model=model.name if is_same_model else f"routing of {workload.model_name} at the sizes of {model.name}",
        trace_origin=workload.origin,
        seed=seed,
        num_forwards=workload.num_forwards,
        generated_tokens=workload.generated_tokens,
        **run.books.totals(costs),
    )


def _check_fit(workload: Workload, model: MoEConfig, execution: Execution) -> None:
    if not workload.num_forwards:
        raise InputError("the workload has no forward; record at least one sequence.")
    if (workload.num_experts, workload.top_k) != (model.num_experts, model.top_k):
        raise InputError(
            f"the workload routes to {workload.top_k} of {workload.num_experts} experts, {model.name} to {model.top_k} "
            f"of {model.num_experts}; take a trace of a model with the same experts and top-k."
        )
    if workload.num_layers != model.num_layers:
        raise InputError(
            f"the workload has {workload.num_layers} MoE layers and {model.name} has {model.num_layers}; "
            f"use workload.tiled({model.num_layers})."
        )
    num_rows = workload.tokens[:, None]
    if (workload.counts.sum(axis=2) != num_rows * model.top_k).any() or (workload.counts.max(axis=2) > num_rows).any():
        raise InputError("the counts of the workload do not fit its tokens and top-k; build it with Trace.workload().")
    if workload.context != execution.context:
        raise InputError(
            f"execution {execution.name!r} {'keeps a' if execution.kv_cache else 'has no'} KV cache; "
            f"it needs a workload with context {execution.context!r}, not {workload.context!r}."
        )


class _Job(NamedTuple):
    """One piece of work for another actor: when all of `needs` have happened, take so long, then say `done`."""

    name: str
    duration_ns: int
    needs: list[simpy.Event]
    done: simpy.Event


class _Order(NamedTuple):
    """Jobs of one layer of one forward, to be done one after another."""

    jobs: list[_Job]
    forward: int
    layer: int


class _Work(NamedTuple):
    """What the routed experts of one layer have to do in one forward, given who is resident."""

    hits: int
    misses: int
    kernel_ns: int
    launch_ns: int
    host_ns: int


class _Routed:
    """Where the router sent the rows of one forward, and what each expert takes for its rows; arrays are [L, E]."""

    def __init__(self, counts: npt.NDArray[np.int32], num_rows: int, costs: Costs) -> None:
        self.counts = counts
        self._num_rows = num_rows
        self._costs = costs
        self._num_pairs: list[int] = counts.sum(axis=1).tolist()
        self._is_active = (counts > 0).astype(np.int64)
        self._loop_ns = costs.loop_ns[counts]
        self._host_ns = costs.host_expert_ns[counts]
        self._all_on_host_ns: list[int] = self._host_ns.sum(axis=1).tolist()

    def split(self, layer: int, is_resident: npt.NDArray[np.bool_]) -> _Work:
        """The work of `layer`: hits for the device, misses for the host."""
        hits = int(self.counts[layer] @ is_resident)
        misses = self._num_pairs[layer] - hits
        num_active = int(self._is_active[layer] @ is_resident)
        kernel_ns, launch_ns = self._costs.experts_ns(int(self._loop_ns[layer] @ is_resident), num_active, hits)
        host_ns = self._all_on_host_ns[layer] - int(self._host_ns[layer] @ is_resident)
        # A row with several missed experts travels once.
        host_ns += int(self._costs.host_call_ns(min(self._num_rows, misses), misses))
        return _Work(hits, misses, kernel_ns, launch_ns, host_ns)

    def alone(self, layer: int, expert: int) -> tuple[int, int]:
        """Kernels of one expert run alone on the device, and the launch time that they do not hide."""
        return self._costs.alone_ns(int(self._loop_ns[layer, expert]))


class _Run:
    """State and actors of one run."""

    def __init__(
        self,
        workload: Workload,
        costs: Costs,
        policy: Policy,
        budgets: tuple[int, ...],
        decisions: Callable[[Decision], None] | None,
        timeline: list[Interval] | None,
    ) -> None:
        self.workload, self.costs, self.policy = workload, costs, policy
        self.is_background = costs.execution.copies == "background"
        self.is_parallel = costs.execution.host == "parallel"
        self.env = simpy.Environment()
        self.memory = SharedMemory(self.env, costs.hardware.contention)
        self.device, self.host = simpy.Resource(self.env), simpy.Resource(self.env)
        self.links = {direction: simpy.Resource(self.env) for direction in ("h2d", "d2h")}
        self.orders = {name: simpy.Store(self.env) for name in ("host", "h2d", "d2h")}

        self.residency = Residency(workload.num_experts, budgets, policy.initial(Shape(workload.num_experts, budgets)))
        self.num_loaded = sum(len(ids) for ids in self.residency.placement().experts)
        # By layer: promoted experts on their way, each with the event of its arrival.
        self.in_flight: list[dict[int, simpy.Event]] = [{} for _ in budgets]

        self.books = Books(self.env, len(budgets), decisions, timeline)

    def play(self) -> None:
        """Run all actors until the last forward is done, and check the books against what they were made from."""
        self.env.process(self.host_worker())
        self.env.process(self.copy_engine("h2d"))
        self.env.process(self.copy_engine("d2h"))
        self.env.run(until=self.env.process(self.walk_forwards()))
        self.books.close()
        num_resident = sum(len(ids) for ids in self.residency.placement().experts)
        self.books.recount(int(self.workload.counts.sum(dtype=np.int64)), num_resident - self.num_loaded)

    # --- the main process ---

    def walk_forwards(self) -> Story:
        """Every forward: embedding and dense layers, each MoE layer in turn, lm_head and sampling."""
        workload, costs = self.workload, self.costs
        entry_ns = _per_forward(costs.entry_ns(workload.tokens, workload.context_tokens))
        dense_ns = _per_forward(costs.layer_ns(workload.tokens, workload.context_tokens))
        head_ns = _per_forward(costs.head_ns(workload.tokens, workload.logit_tokens))
        for forward in _forwards(workload):
            index = forward.index
            routed = _Routed(workload.counts[index], forward.tokens, costs)
            yield from self.compute("entry", "dense", entry_ns[index], index, None)
            for layer in range(workload.num_layers):
                yield from self.compute("dense", "dense", dense_ns[index], index, layer)
                yield from self.run_layer(forward, layer, routed)
            yield from self.compute("head", "dense", head_ns[index], index, None)

    def run_layer(self, forward: ForwardInfo, layer: int, routed: _Routed) -> Story:
        """The routed experts of one layer, and the policy's moves before or after them."""
        counts, is_resident = routed.counts[layer], self.residency.is_resident(layer)
        moved = []
        if not self.is_background:
            moved.append(self.policy.refresh(forward, layer, counts, is_resident))
            yield from self.move_now(forward, layer, moved[0])
        work = routed.split(layer, is_resident)
        if self.policy.miss_action == "fetch":
            missed = np.flatnonzero((counts > 0) & ~is_resident).tolist()
            moved.append(self.policy.fetch(forward, layer, missed, counts, is_resident))
            if sorted(moved[-1].promote) != missed:
                raise ValueError(f"layer {layer}: the policy fetched {moved[-1].promote}, missed were {missed}.")
            fetch = self.fetch_beside if self.is_background else self.fetch_now
            yield from fetch(forward, layer, routed, work, moved[-1])
        else:
            yield from self.run_experts(forward, layer, routed, work)
        if self.is_background:
            moved.append(self.policy.refresh(forward, layer, counts, is_resident))
            self.move_later(forward, layer, moved[-1])
        self.books.count(forward.index, layer, work.hits, work.misses, moved)

    def run_experts(self, forward: ForwardInfo, layer: int, routed: _Routed, work: _Work) -> Story:
        """Resident experts on the device; missed ones on the host, beside it or after it."""
        if self.is_parallel:
            result = self.call_host(forward, layer, work)
        for arrival in self.needed_arrivals(layer, routed):
            yield from self.wait_for(arrival, "copy_wait", layer)
        yield from self.compute("experts", "device", (work.kernel_ns, work.launch_ns), forward.index, layer)
        if not self.is_parallel:
            result = self.call_host(forward, layer, work)
        if result is not None:
            yield from self.wait_for(result, "host_wait", layer)

    def fetch_now(self, forward: ForwardInfo, layer: int, routed: _Routed, work: _Work, moves: Moves) -> Story:
        """Resident experts on the device, then each missed one: its victim out, itself in, and it runs."""
        yield from self.compute("experts", "device", (work.kernel_ns, work.launch_ns), forward.index, layer)
        for expert, swap in zip(moves.promote, self.residency.fetch(layer, moves), strict=True):
            if swap.evict is not None:
                yield from self.copy_now("d2h", "evict", (swap.evict,), forward, layer)
            yield from self.copy_now("h2d", "promote", (expert,), forward, layer)
            yield from self.compute(f"expert {expert}", "device", routed.alone(layer, expert), forward.index, layer)

    def fetch_beside(self, forward: ForwardInfo, layer: int, routed: _Routed, work: _Work, moves: Moves) -> Story:
        """Resident experts on the device, and each missed one when it is there; copies start at once."""
        arrivals = self.needed_arrivals(layer, routed)
        residents_done = self.env.event()
        ran = {expert: self.env.event() for expert in moves.promote}
        # Who has rows in this forward gives up its slot only after it ran.
        last_use = {victim: residents_done for victim in moves.evict if routed.counts[layer, victim]} | ran
        coming = self.queue(forward, layer, self.residency.fetch(layer, moves), last_use)
        for arrival in arrivals:
            yield from self.wait_for(arrival, "copy_wait", layer)
        yield from self.compute("experts", "device", (work.kernel_ns, work.launch_ns), forward.index, layer)
        residents_done.succeed()
        for expert, arrival in zip(moves.promote, coming, strict=True):
            yield from self.wait_for(arrival, "copy_wait", layer)
            yield from self.compute(f"expert {expert}", "device", routed.alone(layer, expert), forward.index, layer)
            ran[expert].succeed()

    # --- the other actors ---

    def host_worker(self) -> Story:
        """Computes the missed experts of one layer after the other."""
        while True:
            order: _Order = yield self.orders["host"].get()
            with self.host.request() as request:
                yield request
                yield from self.work_off("host", order)

    def copy_engine(self, direction: str) -> Story:
        """Copies experts in one direction, first come first served; a copy that must wait holds up those behind it."""
        while True:
            order: _Order = yield self.orders[direction].get()
            with self.links[direction].request() as request:
                yield request
                yield from self.work_off(direction, order)

    def work_off(self, resource: str, order: _Order) -> Story:
        """Do the jobs of an order; the resource is held already."""
        for job in order.jobs:
            if job.needs:
                yield self.env.all_of(job.needs)
            yield from self.busy(resource, job.name, job.duration_ns, order.forward, order.layer)
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
            yield self.env.timeout(launch_ns)
        self.books.spend(layer, "launch", start_ns)

    def wait_for(self, event: simpy.Event, part: str, layer: int) -> Story:
        """Do nothing until `event` has happened."""
        start_ns = self.books.now_ns
        yield event
        self.books.spend(layer, part, start_ns)

    def call_host(self, forward: ForwardInfo, layer: int, work: _Work) -> simpy.Event | None:
        """Have the host compute what `layer` misses; the event of its result, None if it misses nothing."""
        if not work.misses:
            return None
        job = _Job("experts", work.host_ns, [], self.env.event())
        self.orders["host"].put(_Order([job], forward.index, layer))
        return job.done

    def move_now(self, forward: ForwardInfo, layer: int, moves: Moves) -> Story:
        """Do the moves of a refresh while everything else waits: all evictions, then all promotions."""
        self.residency.apply(layer, moves)
        yield from self.copy_now("d2h", "evict", moves.evict, forward, layer)
        yield from self.copy_now("h2d", "promote", moves.promote, forward, layer)

    def copy_now(self, direction: str, name: str, experts: Sequence[int], forward: ForwardInfo, layer: int) -> Story:
        """Copy experts one after another, while everything else waits."""
        duration_ns = self.costs.promote_ns if direction == "h2d" else self.costs.evict_ns
        if not experts or not duration_ns:
            return
        start_ns = self.books.now_ns
        with self.links[direction].request() as request:
            yield request
            for expert in experts:
                yield from self.busy(direction, f"{name} {expert}", duration_ns, forward.index, layer)
        self.books.spend(layer, "copy_wait", start_ns)

    def move_later(self, forward: ForwardInfo, layer: int, moves: Moves) -> None:
        """Do the moves of a refresh on paper, and leave the copies to the copy engines."""
        swaps = self.residency.apply(layer, moves)
        arrivals = self.queue(forward, layer, swaps, {})
        self.in_flight[layer].update(zip(moves.promote, arrivals, strict=True))

    def queue(
        self, forward: ForwardInfo, layer: int, swaps: Sequence[Swap], last_use: Mapping[int, simpy.Event]
    ) -> list[simpy.Event]:
        """Order the copies of `swaps`; the arrivals of the promoted. `last_use` says when a victim has run."""
        costs, jobs = self.costs, {"h2d": list[_Job](), "d2h": list[_Job]()}
        for swap in swaps:
            needs: list[simpy.Event] = []
            if swap.evict is not None:
                # An expert may be evicted while it is on its way: it is not stopped, but not waited for any more.
                arrival = self.in_flight[layer].pop(swap.evict, None)
                needs = [event for event in (arrival, last_use.get(swap.evict)) if event is not None]
                if costs.evict_bytes:
                    jobs["d2h"].append(_Job(f"evict {swap.evict}", costs.evict_ns, needs, self.env.event()))
                    needs = [jobs["d2h"][-1].done]
            if swap.promote is not None:
                jobs["h2d"].append(_Job(f"promote {swap.promote}", costs.promote_ns, needs, self.env.event()))
        for direction, ordered in jobs.items():
            if ordered:
                self.orders[direction].put(_Order(ordered, forward.index, layer))
        return [job.done for job in jobs["h2d"]]

    def needed_arrivals(self, layer: int, routed: _Routed) -> list[simpy.Event]:
        """Arrivals of the experts that are on their way and have rows to run now."""
        in_flight = self.in_flight[layer]
        for expert in [expert for expert, arrival in in_flight.items() if arrival.processed]:
            del in_flight[expert]
        return [arrival for expert, arrival in in_flight.items() if routed.counts[layer, expert]]


def _per_forward(cost_ns: tuple[Ints, Ints]) -> list[tuple[int, int]]:
    """(kernel, launch) arrays [F] -> one pair of plain ints per forward."""
    kernel_ns, launch_ns = cost_ns
    return list(zip(kernel_ns.tolist(), launch_ns.tolist(), strict=True))


def _forwards(workload: Workload) -> list[ForwardInfo]:
    columns = (
        workload.sequence,
        workload.kind,
        workload.block,
        workload.step,
        workload.is_first_block,
        workload.tokens,
    )
    return [
        ForwardInfo(index, sequence, ForwardKind(kind), block, step, is_first_block, tokens)
        for index, (sequence, kind, block, step, is_first_block, tokens) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    ]
