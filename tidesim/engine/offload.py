"""A network whose experts live in two memories: decisions by a policy, copies into device slots, misses elsewhere.

Per layer the device has a slab of B slots, and a slot map says which expert lies in which. A promotion is one copy into
a slot, an eviction frees a slot and moves no bytes, as the host copy never left. The policy is the very object that
a simulator would ask, and it is asked in the same order; `tidesim.simulator` tells the story that is lived here.
What a memory, a copy or a computation is, is the business of a `Backend`.

Letters: L MoE layers, T tokens of a forward, K top-k, E experts, B slots of a layer, D hidden size, P = T * K pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tidesim.engine.kernel import Pairs, sorted_pairs
from tidesim.engine.model import LLaDA2, Routing
from tidesim.engine.times import Span, Times
from tidesim.errors import InputError
from tidesim.execution import Execution
from tidesim.policies import ForwardInfo, Policy, Shape
from tidesim.residency import Moves, Residency, Swap
from tidesim.result import Decision
from tidesim.workload import ForwardKind

Ints = npt.NDArray[np.int64]
ABSENT = -1


class Batch(NamedTuple):
    """The rows of one layer in one forward, and which of their pairs the device has the experts for.

    Parameters
    ----------
    x : [T, D], on the device.
    pairs : sorted by slot and then, from B on, by the id of the missed expert.
    num_slots : B. num_hits : pairs whose expert is resident; they come first.
    """

    x: Tensor
    pairs: Pairs
    num_slots: int
    num_hits: int

    @property
    def used_slots(self) -> Ints:
        """Slots whose expert has rows, ascending."""
        return np.flatnonzero(self.pairs.counts[: self.num_slots])

    @property
    def missed(self) -> Ints:
        """Experts that have rows and no slot, ascending ids."""
        return np.flatnonzero(self.pairs.counts[self.num_slots :])

    @property
    def num_misses(self) -> int:
        """Pairs whose expert is not resident."""
        return len(self.pairs.tokens) - self.num_hits


class Backend(Protocol):
    """Memories, copies and computations of one machine. Experts are copied in the order in which that is asked for.

    Attributes
    ----------
    spans : what its workers did, if it was asked to keep that.
    """

    spans: list[Span] | None

    def open_slots(self, budgets: Sequence[int]) -> None:
        """Set up `budgets[layer]` empty slots in each layer."""

    def copy(self, layer: int, expert: int, slot: int) -> Any:
        """Begin to copy an expert into a slot, behind all copies begun before; returns its arrival.

        What was begun on the device before may still use the slot: the copy waits for that.
        """

    def has_arrived(self, arrival: Any) -> bool:
        """Whether a copy is done."""

    def wait_for(self, arrival: Any) -> None:
        """Have the device do nothing more until a copy is done. Raise what the copy raised."""

    def ids_on_host(self, expert_ids: Tensor) -> Ints:
        """The choices [T, K] of a forward, on the host; waits for the device to have made them."""

    def run_residents(self, layer: int, batch: Batch) -> None:
        """Run the experts in `batch.used_slots` on their pairs, all at once."""

    def run_fetched(self, layer: int, batch: Batch, expert: int, slot: int) -> None:
        """Run on the device one expert that `batch` holds as missed and that now lies in `slot`."""

    def start_missed(self, layer: int, batch: Batch) -> Any:
        """Begin to run all of `batch.missed` away from the device."""

    def finish_missed(self, started: Any) -> None:
        """Wait until they have run and their results are on the device."""

    def combine(self, batch: Batch, weights: Tensor) -> Tensor:
        """Weighted sum [T, D] float32 of each token's K outputs, in the order of its choices."""

    def stamp(self) -> Any:
        """A point in time of the device."""

    def elapsed_ns(self, stamps: Sequence[Any]) -> list[int]:
        """Nanoseconds from each stamp to the next, once the device has passed the last one."""

    def busy_ns(self) -> dict[str, int]:
        """How long "host" and "h2d" have been at work since the slots were opened."""

    def close(self) -> None:
        """Wait for pending copies, and give back threads and memory."""


def check_execution(execution: Execution) -> None:
    """Raise InputError with every setting of `execution` that the engine cannot follow."""
    fixed = {
        "logits": "block",
        "kernels": "grouped",
        "host_calls": "layer",
        "write_back": False,
        "copies_per_expert": 1,
        "is_pinned": True,
    }
    wrong = [
        f"{name}={getattr(execution, name)!r}" for name, value in fixed.items() if getattr(execution, name) != value
    ]
    if wrong:
        raise InputError(
            f"the engine cannot run execution {execution.name!r}, which has {', '.join(wrong)}; "
            "plan for one that it runs: overlapped, engine, emulated or disk."
        )


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

    Attributes
    ----------
    forced : expert ids [T, L, K] to use in place of the router's in the next forward; set by whoever replays a trace.

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
    ) -> None:
        check_execution(execution)
        self.backend, self.policy, self.decisions = backend, policy, decisions
        self.num_experts = network.config.num_experts
        self.budgets = tuple(budgets)
        self.is_background = execution.copies == "background"
        self.is_parallel = execution.host == "parallel"
        self.residency = Residency(
            self.num_experts, self.budgets, policy.initial(Shape(self.num_experts, self.budgets))
        )
        self.slots = [np.full(self.num_experts, ABSENT, np.int64) for _ in self.budgets]
        # By layer: promoted experts on their way, each with its arrival.
        self.in_flight: list[dict[int, Any]] = [{} for _ in self.budgets]
        self.forced: Tensor | None = None
        self.hits = self.misses = self.promotions = self.evictions = self.num_forwards = 0
        self.times = Times(len(self.budgets), is_detailed)
        self._next = ForwardInfo(-1, -1, ForwardKind.DENOISE, 0, 0, is_first_block=False, tokens=0)
        backend.open_slots(self.budgets)
        self._load()
        self._busy_before_ns = backend.busy_ns()
        for layer, moe in enumerate(network.moe_layers):
            moe.experts = OffloadedExperts(self, layer)

    def _load(self) -> None:
        """Fill the slots with whom the policy begins; this is not part of the run."""
        arrivals = []
        for layer, experts in enumerate(self.residency.placement().experts):
            for slot, expert in enumerate(experts):
                self.slots[layer][expert] = slot
                arrivals.append(self.backend.copy(layer, expert, slot))
        for arrival in arrivals:
            self.backend.wait_for(arrival)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.backend.close()

    # --- what the decoding loop says ---

    def begin_sequence(self) -> None:
        """The forwards from now on belong to the next sequence."""
        self._next = replace(self._next, sequence=self._next.sequence + 1)

    def begin(self, kind: ForwardKind, block: int, step: int, is_first_block: bool, tokens: int) -> None:
        """A forward begins; `tokens` rows will be routed."""
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
        expert_ids = routing.expert_ids if self.forced is None else self.forced[:, layer]
        ids = self.backend.ids_on_host(expert_ids)
        self._passed("dense", layer)
        counts = np.bincount(ids.ravel(), minlength=self.num_experts).astype(np.int32)
        is_resident = self.residency.is_resident(layer)
        moved = []
        if not self.is_background:
            moved.append(self.policy.refresh(self._next, layer, counts, is_resident))
            self._move_now(layer, moved[0])
        batch = self._batch(layer, x, ids, counts)
        if self.policy.miss_action == "fetch":
            missed = batch.missed.tolist()
            moved.append(self.policy.fetch(self._next, layer, missed, counts, is_resident))
            if sorted(moved[-1].promote) != missed:
                raise ValueError(f"layer {layer}: the policy fetched {moved[-1].promote}, missed were {missed}.")
            self._run_fetching(layer, batch, counts, moved[-1])
        else:
            self._run(layer, batch, counts)
        output = self.backend.combine(batch, routing.expert_weights)
        if self.is_background:
            moved.append(self.policy.refresh(self._next, layer, counts, is_resident))
            self._move_later(layer, moved[-1])
        self._count(layer, batch, moved)
        self._passed("launch", layer)
        return output

    def _batch(self, layer: int, x: Tensor, ids: Ints, counts: npt.NDArray[np.int32]) -> Batch:
        num_slots = self.budgets[layer]
        pairs = sorted_pairs(ids, self.slots[layer], num_slots)
        return Batch(x, pairs, num_slots, int(pairs.first[num_slots]))

    def _run(self, layer: int, batch: Batch, counts: npt.NDArray[np.int32]) -> None:
        """Resident experts on the device; missed ones away from it, beside it or after it."""
        backend, has_misses = self.backend, batch.num_misses > 0
        started = backend.start_missed(layer, batch) if has_misses and self.is_parallel else None
        self._passed("launch", layer)
        self._wait(layer, self._needed(layer, counts))
        backend.run_residents(layer, batch)
        self._passed("device", layer)
        if has_misses:
            backend.finish_missed(started if self.is_parallel else backend.start_missed(layer, batch))
            self._passed("host_wait", layer)

    def _run_fetching(self, layer: int, batch: Batch, counts: npt.NDArray[np.int32], moves: Moves) -> None:
        """Resident experts on the device, and each missed one when it is there."""
        backend = self.backend
        needed = self._needed(layer, counts)
        slots, due = self._copies_of_fetch(layer, counts, moves)
        arrivals: list[Any] = []

        def copy(num_done: int) -> None:
            """Begin the copies that may begin when so many parts of the layer have run: residents 1, each fetched 1."""
            while self.is_background and len(arrivals) < len(slots) and due[len(arrivals)] <= num_done:
                arrivals.append(backend.copy(layer, moves.promote[len(arrivals)], slots[len(arrivals)]))

        copy(0)
        self._passed("launch", layer)
        self._wait(layer, needed)
        backend.run_residents(layer, batch)
        self._passed("device", layer)
        copy(1)
        for number, (expert, slot) in enumerate(zip(moves.promote, slots, strict=True)):
            if not self.is_background:
                arrivals.append(backend.copy(layer, expert, slot))
            self._wait(layer, [arrivals[number]])
            backend.run_fetched(layer, batch, expert, slot)
            self._passed("device", layer)
            copy(number + 2)

    def _copies_of_fetch(self, layer: int, counts: npt.NDArray[np.int32], moves: Moves) -> tuple[list[int], list[int]]:
        """For each fetched expert: its slot, and how many parts of the layer must have run before it may be copied.

        A slot whose expert still has rows to run is waited for: a resident one until the residents have run (1), one
        that is fetched in this very forward until it has (its number + 2).
        """
        swaps = self.residency.fetch(layer, moves)
        number_of = {expert: number for number, expert in enumerate(moves.promote)}
        due = []
        for number, swap in enumerate(swaps):
            victim = swap.evict
            if victim is None:
                due.append(0)
            elif number_of.get(victim, number) < number:
                due.append(number_of[victim] + 2)
            else:
                due.append(1 if counts[victim] else 0)
        return self._slots_of(layer, swaps), due

    # --- moves ---

    def _move_now(self, layer: int, moves: Moves) -> None:
        """Do the moves of a refresh while everything else waits."""
        self._passed("launch", layer)
        slots = self._slots_of(layer, self.residency.apply(layer, moves))
        self._wait(layer, [self.backend.copy(layer, *pair) for pair in zip(moves.promote, slots, strict=True)])

    def _move_later(self, layer: int, moves: Moves) -> None:
        """Do the moves of a refresh on paper, and leave the copies to the copy stream."""
        for expert, slot in zip(moves.promote, self._slots_of(layer, self.residency.apply(layer, moves)), strict=True):
            self.in_flight[layer][expert] = self.backend.copy(layer, expert, slot)

    def _slots_of(self, layer: int, swaps: Sequence[Swap]) -> list[int]:
        """Let slots change hands on paper; the slot of each promoted expert, in order."""
        slots, taken = self.slots[layer], []
        for swap in swaps:
            if swap.evict is None:
                slot = min(set(range(self.budgets[layer])).difference(slots.tolist()))
            else:
                slot = int(slots[swap.evict])
                slots[swap.evict] = ABSENT
                # An expert may be evicted while it is on its way: it is not waited for any more.
                self.in_flight[layer].pop(swap.evict, None)
            if swap.promote is not None:
                slots[swap.promote] = slot
                taken.append(slot)
        return taken

    def _needed(self, layer: int, counts: npt.NDArray[np.int32]) -> list[Any]:
        """Arrivals of the experts that are on their way and have rows to run now."""
        in_flight = self.in_flight[layer]
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

    def _count(self, layer: int, batch: Batch, moved: list[Moves]) -> None:
        """Write down what was decided for one layer of one forward."""
        promote = tuple(expert for moves in moved for expert in moves.promote)
        evict = tuple(expert for moves in moved for expert in moves.evict)
        self.hits += batch.num_hits
        self.misses += batch.num_misses
        self.promotions += len(promote)
        self.evictions += len(evict)
        if self.decisions is not None:
            self.decisions(Decision(self._next.index, layer, promote, evict, batch.num_hits, batch.num_misses))
