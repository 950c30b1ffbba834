"""A network whose experts live in two memories: decisions by a policy, copies into device slots, misses elsewhere.

Experts on the device lie in slabs of slots: one slab for each layer, or one that all layers share, and one for those
that are forgotten after use. A map says which expert lies in which slot. A promotion is one copy into a slot, an
eviction frees a slot and moves no bytes, as the host copy never left. The policy is the very object that a simulator
would ask, and it is asked in the same order; `tidesim.simulator` tells the story that is lived here. What a memory, a
copy or a computation is, is the business of a `Backend`.

Letters: L MoE layers, T tokens of a forward, K top-k, E experts, B slots of a slab, D hidden size, P = T * K pairs.
"""

from bisect import insort
from collections.abc import Callable, Collection, Sequence
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
from tidesim.execution import Costs, Execution
from tidesim.policies import Ahead, ForwardInfo, Policy, Serving, Shape
from tidesim.residency import Moves, Residency, Swap
from tidesim.result import Decision
from tidesim.workload import ForwardKind

Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int32]
ABSENT = -1


class Batch(NamedTuple):
    """The rows of one layer in one forward, and which of their pairs the device has the experts for.

    Parameters
    ----------
    x : [T, D], on the device.
    pairs : sorted by slot and then, from B on, by the id of the missed expert.
    num_slots : B of the layer's slab. num_hits : pairs whose expert is resident; they come first.
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

    def pairs_of(self, experts: Ints) -> slice | Ints:
        """Where the pairs of `experts`, all or some of `missed`, stand."""
        first, keys = self.pairs.first, self.num_slots + experts
        if int((first[keys + 1] - first[keys]).sum()) == self.num_misses:
            return slice(self.num_hits, len(self.pairs.tokens))
        return np.concatenate([np.arange(first[key], first[key + 1]) for key in keys])


class Backend(Protocol):
    """Memories, copies and computations of one machine. Experts are copied in the order in which that is asked for.

    Attributes
    ----------
    spans : what its workers did, if it was asked to keep that.
    """

    spans: list[Span] | None

    def open_slots(self, slabs: Sequence[int]) -> None:
        """Set up slabs of so many empty slots each."""

    def copy(self, layer: int, expert: int, slab: int, slot: int) -> Any:
        """Begin to copy an expert into a slot, behind all copies begun before; returns its arrival.

        What was begun on the device before may still use the slot: the copy waits for that.
        """

    def has_arrived(self, arrival: Any) -> bool:
        """Whether a copy is done."""

    def wait_for(self, arrival: Any) -> None:
        """Have the device do nothing more until a copy is done. Raise what the copy raised."""

    def ids_on_host(self, expert_ids: Tensor) -> Ints:
        """The choices [T, K] of a forward, on the host; waits for the device to have made them."""

    def run_residents(self, slab: int, batch: Batch) -> None:
        """Run the experts in `batch.used_slots` of a slab on their pairs, all at once."""

    def run_fetched(self, batch: Batch, expert: int, slab: int, slot: int) -> None:
        """Run on the device one expert that `batch` holds as missed and that now lies in a slot."""

    def start_missed(self, layer: int, batch: Batch, experts: Ints) -> Any:
        """Begin to run `experts`, all or some of `batch.missed`, away from the device."""

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
    costs : what everything takes on this machine by its profile, for policies that decide by that; may be None.

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
        costs: Costs | None = None,
    ) -> None:
        check_execution(execution)
        self.backend, self.policy, self.decisions = backend, policy, decisions
        self.num_experts = network.config.num_experts
        self.budgets = tuple(budgets)
        self.is_background = execution.copies == "background"
        self.is_parallel = execution.host == "parallel"
        placement = policy.initial(Shape(self.num_experts, self.budgets, costs))
        self.residency = Residency(self.num_experts, self.budgets, placement, is_pooled=policy.scope == "network")
        self.slots = [np.full(self.num_experts, ABSENT, np.int64) for _ in self.budgets]
        # By layer: promoted experts on their way, each with its arrival.
        self.in_flight: list[dict[int, Any]] = [{} for _ in self.budgets]
        self.forced: Tensor | None = None
        self.hits = self.misses = self.promotions = self.evictions = self.drops = self.num_forwards = 0
        self.times = Times(len(self.budgets), is_detailed)
        self._next = ForwardInfo(-1, -1, ForwardKind.DENOISE, 0, 0, is_first_block=False, tokens=0)
        self._slabs = [sum(self.budgets)] if self.residency.is_pooled else list(self.budgets)
        # Free slots of each slab, ascending; the slab of scratch memory is the last one.
        self._free = [list(range(num_slots)) for num_slots in self._slabs]
        self.scratch = policy.scratch_experts(self.num_experts)
        backend.open_slots([*self._slabs, self.scratch])
        self._load()
        self._busy_before_ns = backend.busy_ns()
        for layer, moe in enumerate(network.moe_layers):
            moe.experts = OffloadedExperts(self, layer)

    def _load(self) -> None:
        """Fill the slots with whom the policy begins; this is not part of the run."""
        arrivals = []
        for layer, experts in enumerate(self.residency.placement().experts):
            slab = self.slab(layer)
            for expert in experts:
                slot = self.slots[layer][expert] = self._free[slab].pop(0)
                arrivals.append(self.backend.copy(layer, expert, slab, slot))
        for arrival in arrivals:
            self.backend.wait_for(arrival)

    def slab(self, layer: int) -> int:
        """Where residents of `layer` lie."""
        return 0 if self.residency.is_pooled else layer

    @property
    def scratch_slab(self) -> int:
        """Where experts lie that are forgotten after use."""
        return len(self._slabs)

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
        policy, everybody = self.policy, self.residency.everybody
        policy.observe(self._next, layer, counts, everybody)
        moved = []
        if not self.is_background:
            moved.append(policy.refresh(self._next, layer, counts, everybody))
            self._move_now(layer, layer, moved[0])
        batch = self._batch(layer, x, ids)
        serving = policy.serve(self._next, layer, batch.missed.tolist(), counts, everybody)
        serving.check(layer, self.scratch)
        moved.append(serving.keep)
        ahead = self._run(layer, batch, counts, serving)
        output = self.backend.combine(batch, routing.expert_weights)
        if self.is_background:
            moved.append(policy.refresh(self._next, layer, counts, everybody))
            self._move_later(layer, moved[-1])
        self._count(layer, batch, moved, serving.drop, ahead)
        self._passed("launch", layer)
        return output

    def _batch(self, layer: int, x: Tensor, ids: Ints) -> Batch:
        num_slots = self._slabs[self.slab(layer)]
        pairs = sorted_pairs(ids, self.slots[layer], num_slots)
        return Batch(x, pairs, num_slots, int(pairs.first[num_slots]))

    def _run(self, layer: int, batch: Batch, counts: Counts, serving: Serving) -> Sequence[Ahead]:
        """Resident experts on the device, and each fetched one when it is there; the others away from it, beside it or
        after it. Returns the moves in other layers, which are under way then."""
        backend, missed = self.backend, batch.missed.tolist()
        on_host = np.array(serving.on_host(missed), np.int64)
        started = backend.start_missed(layer, batch, on_host) if len(on_host) and self.is_parallel else None
        needed = self._needed(layer, counts)
        copies = Copies(self, layer, counts, serving)
        ahead: Sequence[Ahead] = ()
        if self.is_background:
            ahead = self.policy.ahead(self._next, layer, counts, self.residency.everybody)
            copies.add_ahead(ahead)
            copies.begin(num_done=0)
        self._passed("launch", layer)
        self._wait(layer, needed)
        backend.run_residents(self.slab(layer), batch)
        self._passed("device", layer)
        self._run_fetched(layer, batch, copies, set(missed))
        if len(on_host):
            backend.finish_missed(started if self.is_parallel else backend.start_missed(layer, batch, on_host))
            self._passed("host_wait", layer)
        if not self.is_background:
            ahead = self.policy.ahead(self._next, layer, counts, self.residency.everybody)
            for there, moves in ahead:
                self._move_now(layer, there, moves)
        return ahead

    def _run_fetched(self, layer: int, batch: Batch, copies: "Copies", missed: Collection[int]) -> None:
        """The fetched experts, one after another; those without rows are not waited for."""
        if self.is_background:
            copies.begin(num_done=1)
        for number, copy in enumerate(copies.fetched):
            if not self.is_background:
                self._wait(layer, [copies.begin_one()])
            if copy.expert in missed:
                if self.is_background:
                    self._wait(layer, [copies.arrivals[number]])
                self.backend.run_fetched(batch, copy.expert, copy.slab, copy.slot)
                self._passed("device", layer)
            if self.is_background:
                copies.begin(num_done=number + 2)

    # --- moves ---

    def _move_now(self, waiting: int, layer: int, moves: Moves) -> None:
        """Do moves while everything else waits; the time is that of the layer that is `waiting`."""
        self._passed("launch", waiting)
        slots = self.slots_of(layer, self.residency.apply(layer, moves))
        slab = self.slab(layer)
        pairs = zip(moves.promote, slots, strict=True)
        self._wait(waiting, [self.backend.copy(layer, expert, slab, slot) for expert, slot in pairs])

    def _move_later(self, layer: int, moves: Moves) -> None:
        """Do the moves of a refresh on paper, and leave the copies to the copy stream."""
        slab = self.slab(layer)
        for expert, slot in zip(moves.promote, self.slots_of(layer, self.residency.apply(layer, moves)), strict=True):
            self.in_flight[layer][expert] = self.backend.copy(layer, expert, slab, slot)

    def slots_of(self, layer: int, swaps: Sequence[Swap]) -> list[int]:
        """Let slots change hands on paper; the slot of each expert that `swaps` of `layer` promote, in order."""
        free, taken = self._free[self.slab(layer)], []
        for swap in swaps:
            slot = None
            if swap.evict is not None:
                home, victim = self.residency.victim(layer, swap.evict)
                slot, self.slots[home][victim] = int(self.slots[home][victim]), ABSENT
                # An expert may be evicted while it is on its way: it is not waited for any more.
                self.in_flight[home].pop(victim, None)
            if swap.promote is None:
                assert slot is not None
                insort(free, slot)
            else:
                self.slots[layer][swap.promote] = slot = free.pop(0) if slot is None else slot
                taken.append(slot)
        return taken

    def _needed(self, layer: int, counts: Counts) -> list[Any]:
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

    def _count(
        self, layer: int, batch: Batch, moved: list[Moves], drop: tuple[int, ...], ahead: Sequence[Ahead]
    ) -> None:
        """Write down what was decided for one layer of one forward."""
        promote = tuple(expert for moves in moved for expert in moves.promote)
        evict = tuple(expert for moves in moved for expert in moves.evict)
        self.hits += batch.num_hits
        self.misses += batch.num_misses
        self.promotions += len(promote) + sum(len(moves.promote) for _, moves in ahead)
        self.evictions += len(evict) + sum(len(moves.evict) for _, moves in ahead)
        self.drops += len(drop)
        if self.decisions is not None:
            elsewhere = tuple((there, moves.promote, moves.evict) for there, moves in ahead)
            hits, misses = batch.num_hits, batch.num_misses
            self.decisions(Decision(self._next.index, layer, promote, evict, hits, misses, drop, elsewhere))


class Copy(NamedTuple):
    """One copy of a layer: whom, where to, and how many parts of the layer must have run before it may begin.

    The parts are the residents (the first) and each fetched expert (one more).
    """

    layer: int
    expert: int
    slab: int
    slot: int
    due: int


class Copies:
    """The copies that one layer asks for, in their order: experts to keep, to drop, and those of other layers.

    A slot whose expert still has rows to run is waited for: a resident's until the residents have run, that of an
    expert that is fetched in this very forward until it has.
    """

    def __init__(self, offload: Offload, layer: int, counts: Counts, serving: Serving) -> None:
        self._offload, self._layer, self._counts = offload, layer, counts
        order = (*serving.keep.promote, *serving.drop)
        self._part_of = {expert: number + 2 for number, expert in enumerate(order)}
        self._kept = frozenset(serving.keep.promote)
        kept = self._moves(layer, serving.keep, offload.residency.fetch(layer, serving.keep))
        self.fetched = kept + self._drops(serving.drop)
        self.arrivals: list[Any] = []
        self._ahead: list[Copy] = []

    def _moves(self, layer: int, moves: Moves, swaps: Sequence[Swap]) -> list[Copy]:
        due = [self._due(layer, swap) for swap in swaps if swap.promote is not None]
        slots, slab = self._offload.slots_of(layer, swaps), self._offload.slab(layer)
        return [Copy(layer, *rest) for rest in zip(moves.promote, [slab] * len(slots), slots, due, strict=True)]

    def _due(self, layer: int, swap: Swap) -> int:
        if swap.evict is None:
            return 0
        home, victim = self._offload.residency.victim(layer, swap.evict)
        if home != self._layer:
            return 0
        # Whoever is kept and evicted in one forward is first fetched. A resident may be among those that are dropped.
        return self._part_of[victim] if victim in self._kept else int(self._counts[victim] > 0)

    def _drops(self, drop: Sequence[int]) -> list[Copy]:
        offload, scratch = self._offload, self._offload.scratch
        return [
            Copy(
                self._layer,
                expert,
                offload.scratch_slab,
                number % scratch,
                self._part_of[drop[number - scratch]] if number >= scratch else 0,
            )
            for number, expert in enumerate(drop)
        ]

    def add_ahead(self, ahead: Sequence[Ahead]) -> None:
        """Moves in other layers, behind all others."""
        for layer, moves in ahead:
            self._ahead += self._moves(layer, moves, self._offload.residency.apply(layer, moves))

    def begin(self, num_done: int) -> None:
        """Begin the copies that may begin when so many parts of the layer have run."""
        copies = self.fetched + self._ahead
        while len(self.arrivals) < len(copies) and copies[len(self.arrivals)].due <= num_done:
            self.begin_one()

    def begin_one(self) -> Any:
        """Begin the next copy; its arrival."""
        number = len(self.arrivals)
        copy = (self.fetched + self._ahead)[number]
        arrival = self._offload.backend.copy(copy.layer, copy.expert, copy.slab, copy.slot)
        self.arrivals.append(arrival)
        has_rows = copy.layer == self._layer and self._counts[copy.expert] > 0
        if copy.slab != self._offload.scratch_slab and not (number < len(self.fetched) and has_rows):
            self._offload.in_flight[copy.layer][copy.expert] = arrival
        return arrival
