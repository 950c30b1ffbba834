"""A network whose experts live in two memories: decisions by a policy, copies into device slots, misses elsewhere.

Experts on the device lie in slabs of slots: one slab for each layer, or one that all layers share, and one for those
that are forgotten after use. A map says which expert lies in which slot. A promotion is one copy into a slot, an
eviction frees a slot and moves no bytes, as the host copy never left. The policy is the very object that a simulator
would ask, and it is asked in the same order; `tidesim.simulator` tells the story that is lived here. What a memory, a
copy or a computation is, is the business of a `Backend`.

Letters: L MoE layers, T tokens of a forward, K top-k, E experts, B slots of a slab, D hidden size, P = T * K pairs.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tidesim.engine.backend import Backend, Batch, check_execution
from tidesim.engine.copies import Copies
from tidesim.engine.kernel import sorted_pairs
from tidesim.engine.model import LLaDA2, Routing
from tidesim.engine.slots import Slots
from tidesim.engine.times import Times
from tidesim.errors import InputError
from tidesim.execution import Costs, Execution
from tidesim.policies import Ahead, ForwardInfo, Policy, Serving, Shape, decided
from tidesim.residency import Moves
from tidesim.result import Decision
from tidesim.workload import ForwardKind

Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int32]


class OffloadedExperts:
    """The routed experts of one layer, as the network calls them."""

    def __init__(self, offload: "Offload", layer: int) -> None:
        self._offload, self._layer = offload, layer

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's expert outputs. x [T, D] -> [T, D] float32."""
        return self._offload.run_layer(self._layer, x, routing)


class Offload:
    """One run of a network under a policy: who is where, what was decided, and where the time went.

    Parameters
    ----------
    network : its experts are replaced by those of this run.
    budgets : slots of each MoE layer. They are filled before this returns; the backend is closed at the end of a
        `with` statement.
    execution : whether copies block, and whether the host runs beside the device.
    decisions : called with one `Decision` per forward and layer.
    is_detailed : keep what ran when, for a timeline.
    costs : what everything takes on this machine by its profile, for policies that decide by that, in forwards of up to
        `costs.max_rows` rows; None where nobody says.

    Attributes
    ----------
    forced : expert ids [T, L, K] to use in place of the router's in the next forward, once the router has chosen; set
        by whoever replays a trace.

    Raise InputError if the engine cannot follow `execution`, BudgetError if a budget exceeds the number of experts.
    """

    def __init__(
        self,
        network: LLaDA2,
        backend: Backend,
        policy: Policy,
        budgets: Sequence[int],
        execution: Execution,
        decisions: Callable[[Decision], None] | None = None,
        is_detailed: bool = False,
        costs: Costs | None = None,
    ) -> None:
        check_execution(execution)
        self.backend, self.policy, self.decisions = backend, policy, decisions
        self.num_experts = network.config.num_experts
        self.budgets = tuple(budgets)
        self.is_background = execution.copies == "background"
        self.is_parallel = execution.host == "parallel"
        self._max_rows = None if costs is None else costs.max_rows
        self.slots = Slots(
            self.num_experts,
            self.budgets,
            policy.initial(Shape(self.num_experts, self.budgets, costs)),
            is_pooled=policy.scope == "network",
            scratch=policy.scratch_experts(self.num_experts),
        )
        self.forced: Ints | None = None
        self.hits = self.misses = self.promotions = self.evictions = self.drops = self.num_forwards = 0
        self.times = Times(len(self.budgets), is_detailed)
        self._next = ForwardInfo(-1, -1, ForwardKind.DENOISE, 0, 0, is_first_block=False, tokens=0)
        backend.open_slots(self.slots.sizes)
        # Filling the slots is no part of the run, and done before it begins.
        for arrival in backend.copy(list(self.slots.places())):
            backend.wait_for(arrival)
        backend.elapsed_ns([backend.stamp(), backend.stamp()])
        self._busy_before_ns = backend.busy_ns()
        for layer, moe in enumerate(network.moe_layers):
            moe.experts = OffloadedExperts(self, layer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.backend.close()

    # --- what the decoding loop says ---

    def begin_sequence(self) -> None:
        """The forwards from now on belong to the next sequence."""
        self._next = replace(self._next, sequence=self._next.sequence + 1)

    def begin(self, kind: ForwardKind, block: int, step: int, is_first_block: bool, tokens: int) -> None:
        """A forward begins; `tokens` rows will be routed.

        Raise InputError if the policy's predicted times do not reach that far.
        """
        if self._max_rows is not None and tokens > self._max_rows:
            raise InputError(
                f"a forward routes tokens(={tokens}) rows, and the predicted times that the policy decides by reach "
                f"max_rows(={self._max_rows}); make them for the longest sequence."
            )
        self._next = ForwardInfo(
            self._next.index + 1, self._next.sequence, kind, block, step, is_first_block=is_first_block, tokens=tokens
        )
        self.num_forwards += 1
        self.times.begin(self.backend.stamp())

    def end(self) -> None:
        """The forward is done, its sampling included."""
        self.times.end("dense", None, self.backend.stamp(), self.backend.elapsed_ns)

    def busy_ns(self) -> dict[str, int]:
        """How long "host" and "h2d" have been at work in this run, at most for its whole length."""
        busy_ns = {name: ns - self._busy_before_ns[name] for name, ns in self.backend.busy_ns().items()}
        return {name: min(ns, self.times.makespan_ns) for name, ns in busy_ns.items()}

    # --- one layer ---

    def run_layer(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        """The routed experts of one layer, and the policy's moves before or after them. -> [T, D] float32."""
        ids, known = self.backend.ids_on_host(x, routing.expert_ids)
        self.times.passed("dense", layer, known)
        if self.forced is not None:
            ids = np.ascontiguousarray(self.forced[:, layer])
        counts = np.bincount(ids.ravel(), minlength=self.num_experts).astype(np.int32)
        policy, everybody = self.policy, self.slots.residency.everybody
        moved, is_early = [], self.is_background and self.backend.is_async
        if is_early:
            # Who is resident is known, so the device need not wait for what is decided about the others.
            batch = self._batch(layer, x, ids)
            self._run_residents(layer, batch, self._needed(layer, counts))
        policy.observe(self._next, layer, counts, everybody)
        if not self.is_background:
            moved.append(policy.refresh(self._next, layer, counts, everybody))
            self._move_now(layer, layer, moved[0])
        if not is_early:
            batch = self._batch(layer, x, ids)
        serving = policy.serve(self._next, layer, batch.missed.tolist(), counts, everybody)
        serving.check(layer, self.slots.scratch)
        moved.append(serving.keep)
        ahead = self._run(layer, batch, counts, serving, is_early)
        output = self.backend.combine(batch, routing.expert_weights)
        if self.is_background:
            moved.append(policy.refresh(self._next, layer, counts, everybody))
            self._move_later(layer, moved[-1])
        self._count(decided(self._next, layer, batch.num_hits, batch.num_misses, moved, serving, ahead))
        self._passed("launch", layer)
        return output

    def _batch(self, layer: int, x: Tensor, ids: Ints) -> Batch:
        num_slots = self.slots.sizes[self.slots.slab(layer)]
        pairs = sorted_pairs(ids, self.slots.of[layer], num_slots)
        return Batch(x, pairs, num_slots, int(pairs.first[num_slots]))

    def _run(self, layer: int, batch: Batch, counts: Counts, serving: Serving, is_begun: bool) -> Sequence[Ahead]:
        """Resident experts on the device, if they have not begun, and fetched ones when they are there; the others away
        from it, beside it or after it. Returns the moves in other layers, which are under way then."""
        backend, missed = self.backend, batch.missed.tolist()
        on_host = np.array(serving.on_host(missed), np.int64)
        needed = [] if is_begun else self._needed(layer, counts)
        copies = Copies(self.slots, backend, layer, counts, serving)
        ahead: Sequence[Ahead] = ()
        if self.is_background:
            ahead = self.policy.ahead(self._next, layer, counts, self.slots.residency.everybody)
            copies.add_ahead(ahead)
            copies.begin(num_done=0)
        # Only now: the threads that it wakes get in the way of this one.
        started = backend.start_missed(layer, batch, on_host) if len(on_host) and self.is_parallel else None
        self._passed("launch", layer)
        if not is_begun:
            self._run_residents(layer, batch, needed)
        self._run_fetched(layer, batch, copies, set(missed))
        if len(on_host):
            backend.finish_missed(started if self.is_parallel else backend.start_missed(layer, batch, on_host))
            self._passed("host_wait", layer)
        if not self.is_background:
            ahead = self.policy.ahead(self._next, layer, counts, self.slots.residency.everybody)
            for there, moves in ahead:
                self._move_now(layer, there, moves)
        return ahead

    def _run_residents(self, layer: int, batch: Batch, needed: Sequence[Any]) -> None:
        """The resident experts, once those that are `needed` have arrived."""
        self._passed("launch", layer)
        self._wait(layer, needed)
        self.backend.run_residents(self.slots.slab(layer), batch)
        self._passed("device", layer)

    def _run_fetched(self, layer: int, batch: Batch, copies: Copies, missed: Collection[int]) -> None:
        """The fetched experts; those without rows are not waited for.

        A device that goes on beside the calling thread runs together all whose copies may be under way at once: they
        take less than a copy, and beginning them one by one takes more. Others run one after another.
        """
        if not self.is_background:
            for copy in copies.fetched:
                self._wait(layer, [copies.begin_one()])
                if copy.place.expert in missed:
                    self.backend.run_fetched(batch, [copy.place])
                    self._passed("device", layer)
            return
        done = 0
        while done < len(copies.fetched):
            copies.begin(num_done=done + 1)
            end = min(len(copies.arrivals), len(copies.fetched)) if self.backend.is_async else done + 1
            used = [number for number in range(done, end) if copies.fetched[number].place.expert in missed]
            if used:
                self._wait(layer, [copies.arrivals[number] for number in used])
                self.backend.run_fetched(batch, [copies.fetched[number].place for number in used])
                self._passed("device", layer)
            done = end
        copies.begin(num_done=done + 1)

    # --- moves ---

    def _move_now(self, waiting: int, layer: int, moves: Moves) -> None:
        """Do moves while everything else waits; the time is that of the layer that is `waiting`."""
        self._passed("launch", waiting)
        self._wait(waiting, self.backend.copy(self.slots.apply(layer, moves)))

    def _move_later(self, layer: int, moves: Moves) -> None:
        """Do the moves of a refresh on paper, and leave the copies to the copy stream."""
        places = self.slots.apply(layer, moves)
        for place, arrival in zip(places, self.backend.copy(places), strict=True):
            self.slots.in_flight[layer][place.expert] = arrival

    def _needed(self, layer: int, counts: Counts) -> list[Any]:
        """Arrivals of the experts that are on their way and have rows to run now."""
        in_flight = self.slots.in_flight[layer]
        for expert in [expert for expert, arrival in in_flight.items() if self.backend.has_arrived(arrival)]:
            del in_flight[expert]
        return [arrival for expert, arrival in in_flight.items() if counts[expert]]

    def _wait(self, layer: int, arrivals: Sequence[Any]) -> None:
        for arrival in arrivals:
            self.backend.wait_for(arrival)
        if arrivals:
            self._passed("copy_wait", layer)

    # --- the books ---

    def _passed(self, part: str, layer: int) -> None:
        """What ran since the last stamp was `part`."""
        self.times.passed(part, layer, self.backend.stamp())

    def _count(self, decision: Decision) -> None:
        """Write down what was decided for one layer of one forward."""
        self.hits += decision.hits
        self.misses += decision.misses
        self.promotions += decision.num_promotions
        self.evictions += decision.num_evictions
        self.drops += len(decision.drop)
        if self.decisions is not None:
            self.decisions(decision)
