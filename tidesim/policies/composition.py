"""A policy put together from pieces: who begins, when it refreshes, whom it evicts, what becomes of misses, and who is
fetched ahead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tidesim.errors import BudgetError, InputError
from tidesim.policies.interface import (
    ALL_ON_HOST,
    Ahead,
    Counts,
    ForwardInfo,
    Interval,
    Mask,
    MissAction,
    Policy,
    Serving,
    Shape,
)
from tidesim.policies.pieces import Piece, Score, best, everything_in, hears_of
from tidesim.policies.prefetch import Prefetch
from tidesim.policies.rules import Rule, Schedule, Steps
from tidesim.policies.splits import OnHost, Split
from tidesim.policies.victims import Queue, Victims
from tidesim.residency import NO_MOVES, Moves, Placement
from tidesim.workload import ForwardKind

# --- who begins ---

Start = Callable[[Shape], Placement]


def nobody(shape: Shape) -> Placement:
    """Every slot is free."""
    return Placement(((),) * shape.num_layers)


def first_ids(shape: Shape) -> Placement:
    """Experts 0..B-1 of each layer."""
    return Placement(tuple(tuple(range(budget)) for budget in shape.budgets))


def last_ids(shape: Shape) -> Placement:
    """The B highest ids of each layer."""
    E = shape.num_experts
    return Placement(tuple(tuple(range(E - budget, E)) for budget in shape.budgets))


def first_layers(shape: Shape) -> Placement:
    """All experts of the first layers, and the first ids of the next one, as far as all slots together go."""
    ids, left = [], sum(shape.budgets)
    for _ in shape.budgets:
        ids.append(range(min(left, shape.num_experts)))
        left -= len(ids[-1])
    return Placement.of(ids)


def last_layers(shape: Shape) -> Placement:
    """All experts of the last layers, of as many as all slots together hold whole; the other slots stay free."""
    everybody, num_whole = range(shape.num_experts), sum(shape.budgets) // shape.num_experts
    num_layers = shape.num_layers
    return Placement.of(everybody if layer >= num_layers - num_whole else () for layer in range(num_layers))


@dataclass(frozen=True)
class MostPopular:
    """The experts with the highest `popularity` [L, E] in each layer, or, "network", in all layers together.

    Ties: the lower id, and before that the lower layer.
    """

    popularity: npt.ArrayLike
    across: Literal["layer", "network"] = "layer"

    def __call__(self, shape: Shape) -> Placement:
        """The placement. Raise InputError if `popularity` is not [L, E]."""
        table, wanted = np.asarray(self.popularity, np.float64), (shape.num_layers, shape.num_experts)
        if table.shape != wanted:
            raise InputError(f"popularity has shape {list(table.shape)}; it must be [L, E] = {list(wanted)}.")
        if self.across == "layer":
            return Placement.of(best(row, budget) for row, budget in zip(table, shape.budgets, strict=True))
        chosen = np.zeros(table.size, np.bool_)
        chosen[best(table.ravel(), sum(shape.budgets))] = True
        return Placement.of(np.flatnonzero(row) for row in chosen.reshape(wanted))


@dataclass(frozen=True)
class RandomIds:
    """Experts of all layers together, drawn at random with `seed`: the same for the same shape."""

    seed: int

    def __call__(self, shape: Shape) -> Placement:
        """The placement."""
        rng, E = np.random.default_rng(self.seed), shape.num_experts
        chosen = rng.permutation(shape.num_layers * E)[: sum(shape.budgets)]
        return Placement.of(chosen[chosen // E == layer] % E for layer in range(shape.num_layers))


# --- when to refresh, and which swaps are worth it ---


class Trigger(Piece):
    """When a layer is refreshed.

    Attributes
    ----------
    refresh_interval, refresh_steps : see `Policy`.
    """

    refresh_interval: Interval = None
    refresh_steps: Steps | None = None

    def is_due(self, forward: ForwardInfo, layer: int) -> bool:
        """Whether this forward refreshes `layer`."""
        raise NotImplementedError


class OnSchedule(Trigger):
    """On the denoising steps of a block that `schedule` says."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.refresh_interval, self.refresh_steps = schedule.refresh_interval, schedule.stated_steps

    def begin(self, shape: Shape) -> None:
        """Raise InputError if the schedule is for another number of layers."""
        self._schedule.check(shape.num_layers)

    def is_due(self, forward: ForwardInfo, layer: int) -> bool:
        """See `Trigger`."""
        if forward.kind != ForwardKind.DENOISE:
            return False
        is_always = self._schedule.first_block and forward.is_first_block
        return is_always or self._schedule.is_due(layer, forward.step)


class AfterPrefill(Trigger):
    """Once a sequence, with the forward that fills the cache with its prompt."""

    def is_due(self, forward: ForwardInfo, layer: int) -> bool:
        """See `Trigger`."""
        return forward.kind == ForwardKind.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Which swaps are worth their copies.

    Parameters
    ----------
    margin : a challenger must be worth (1 + margin) times its victim at least, or
    is_strict : more than that. The first one that is not ends the refresh.
    min_dwell : refreshes that a resident must have been there for; the one that it would go with counts, the one that
        it came in with does not. Younger ones are passed over.
    max_swaps : promotions of one refresh at most.

    Raise InputError if `margin` or `min_dwell` is negative.
    """

    margin: float = 0.0
    is_strict: bool = False
    min_dwell: int = 0
    max_swaps: int | None = None

    def __post_init__(self) -> None:
        if self.margin < 0 or self.min_dwell < 0:
            raise InputError(f"margin(={self.margin}) and min_dwell(={self.min_dwell}) must be >= 0.")

    def allows(self, challenger: float, victim: float) -> bool:
        """Whether an expert worth `challenger` may take the slot of one worth `victim`."""
        least = victim * (1 + self.margin)
        return challenger > least if self.is_strict else challenger >= least


class Refresh(Piece):
    """Choosing a layer's residents afresh: the experts that are worth most, as far as there are slots.

    They are promoted most worthy first (ties: the lower id), into free slots and then into those of residents that are
    not among them.

    Parameters
    ----------
    trigger : when.
    want : who is worth how much; who is worth nothing is not wanted.
    victims : the order in which the others go.
    guard : which swaps are worth it; None: all.
    is_pairwise : instead, any absent expert may be promoted and any resident be a victim: the best absent one changes
        places with the first victim, and so on, as long as the guard allows.
    """

    def __init__(
        self, trigger: Trigger, want: Score, victims: Victims, guard: Guard | None = None, *, is_pairwise: bool = False
    ) -> None:
        self.trigger, self._want, self._victims, self._guard = trigger, want, victims, guard
        self._is_pairwise = is_pairwise

    @property
    def parts(self) -> Sequence[Piece]:
        """Its pieces."""
        return self.trigger, self._want, self._victims

    def begin(self, shape: Shape) -> None:
        """Nobody was refreshed yet."""
        self._budgets = shape.budgets
        self._num_refreshes = [0] * shape.num_layers
        self._since = np.zeros((shape.num_layers, shape.num_experts), np.int64)

    def promoted(self, layer: int, expert: int) -> None:
        """Its dwell begins."""
        self._since[layer, expert] = self._num_refreshes[layer]

    def moves(self, forward: ForwardInfo, layer: int, is_resident: Mask) -> Moves:
        """The swaps of this forward; `is_resident` is [E]."""
        if not self.trigger.is_due(forward, layer):
            return NO_MOVES
        self._num_refreshes[layer] += 1
        worth, budget = self._want.of(layer), self._budgets[layer]
        ranked = np.array(best(worth, len(worth) if self._is_pairwise else budget), np.intp)
        ranked = ranked[worth[ranked] > 0]
        may_go = is_resident.copy()
        if not self._is_pairwise:
            may_go[ranked] = False
        wanted: list[int] = ranked.tolist()
        candidates = self._victims.order(layer, wanted, may_go)
        challengers: list[int] = ranked[~is_resident[ranked]].tolist()
        num_free = budget - int(np.count_nonzero(is_resident))
        promote, evict = self._swaps(layer, challengers, candidates, num_free)
        gone = set(evict)
        self._victims.settled(layer, wanted, [expert for expert in candidates if expert not in gone])
        return Moves(tuple(promote), tuple(evict)) if promote else NO_MOVES

    def _swaps(
        self, layer: int, challengers: Sequence[int], candidates: Sequence[int], num_free: int
    ) -> tuple[list[int], list[int]]:
        """Who comes in and who goes out."""
        if self._guard is None:
            return list(challengers), list(candidates[: max(0, len(challengers) - num_free)])
        guard, worth = self._guard, self._want.of(layer)
        age: list[int] = (self._num_refreshes[layer] - self._since[layer]).tolist()
        waiting = [victim for victim in candidates if age[victim] >= guard.min_dwell]
        promote: list[int] = []
        for challenger in challengers[: guard.max_swaps]:
            if len(promote) >= num_free:
                victim = waiting[len(promote) - num_free] if len(promote) - num_free < len(waiting) else None
                if victim is None or not guard.allows(worth[challenger], worth[victim]):
                    break
            promote.append(challenger)
        return promote, waiting[: max(0, len(promote) - num_free)]


# --- all of it ---


def check_slots(policy: Policy, shape: Shape) -> None:
    """Raise BudgetError unless `policy` has a slot in each layer, or, in the whole network, one at all."""
    num_slots = sum(shape.budgets) if policy.scope == "network" else min(shape.budgets)
    if num_slots < 1:
        raise BudgetError(f"policy {policy.name!r} fetches into slots; budget(={num_slots}) must be >= 1.")


class Composition(Policy):
    """A policy made of pieces.

    Parameters
    ----------
    name : what results call it.
    start : who is resident at first.
    refresh : when and how residents are chosen afresh; None: never.
    split : what becomes of misses.
    victims : whose slots fetched experts take, one after another, those fetched in this very forward not
        excepted.
    prefetch : who is fetched for later layers, as far as there are victims that have no rows in the running layer;
        whoever it expects is no victim. None: nobody.
    is_in_use_safe : whether nobody who has rows in this forward may be a victim of a fetch. If no other victim is left,
        the expert is dropped after use instead.
    scope, scratch, scratch_layers, is_routing_only, rule : see `Policy`.
    """

    def __init__(
        self,
        name: str,
        start: Start,
        *,
        refresh: Refresh | None = None,
        split: Split | None = None,
        victims: Victims | None = None,
        prefetch: Prefetch | None = None,
        is_in_use_safe: bool = False,
        scope: Literal["layer", "network"] = "layer",
        scratch: int = 0,
        scratch_layers: int = 0,
        is_routing_only: bool = True,
        rule: Rule | None = None,
    ) -> None:
        self.name, self.scope, self.is_routing_only, self.rule = name, scope, is_routing_only, rule
        self.scratch, self.scratch_layers = scratch, scratch_layers
        self._start, self._refresh, self._victims, self._prefetch = start, refresh, victims, prefetch
        self._split = split or OnHost()
        self._is_in_use_safe = is_in_use_safe
        self._pieces = everything_in([refresh, self._split, victims, prefetch])
        self._told_of_promotions = [piece for piece in self._pieces if hears_of("promoted", piece)]
        self._told_of_evictions = [piece for piece in self._pieces if hears_of("evicted", piece)]
        self.miss_action: MissAction = self._split.action

    @property
    def refresh_interval(self) -> Interval:
        """See `Policy`."""
        return None if self._refresh is None else self._refresh.trigger.refresh_interval

    @property
    def refresh_steps(self) -> Steps | None:
        """See `Policy`."""
        return None if self._refresh is None else self._refresh.trigger.refresh_steps

    def initial(self, shape: Shape) -> Placement:
        """See `Policy`. Raise BudgetError if it keeps whom it fetches and a layer, or the network, has no slot."""
        if self._victims is not None and not (self.scope == "network" and self._is_in_use_safe):
            check_slots(self, shape)
        self._num_slots = shape.budgets
        for piece in self._pieces:
            piece.begin(shape)
        return self._start(shape)

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """See `Policy`."""
        for piece in self._pieces:
            piece.observe(forward, layer, counts, is_resident)

    def refresh(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Moves:
        """See `Policy`."""
        if self._refresh is None:
            return NO_MOVES
        moves = self._refresh.moves(forward, layer, is_resident[layer])
        for expert in moves.evict:
            self._tell_evicted(layer, expert)
        for expert in moves.promote:
            self._tell_promoted(layer, expert)
        return moves

    def serve(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Serving:
        """See `Policy`."""
        fetched = self._split.choose(forward, layer, missed, counts, is_resident)
        if not (fetched.keep or fetched.drop):
            return ALL_ON_HOST
        safe = self._expected(is_resident)
        if self._is_in_use_safe:
            safe[layer] |= counts > 0
        keep, homeless = self._make_room(layer, fetched.keep, is_resident.copy(), safe)
        return Serving(keep, (*homeless, *fetched.drop))

    def ahead(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Sequence[Ahead]:
        """See `Policy`."""
        if self._prefetch is None:
            return ()
        present, moves = is_resident.copy(), []
        wanted = self._prefetch.wanted(forward, layer, is_resident)
        safe = self._expected(is_resident)
        safe[layer] |= counts > 0
        for target, experts in wanted:
            room, homeless = self._make_room(target, experts, present, safe)
            if room:
                moves.append(Ahead(target, room))
            if homeless and self.scope == "network":
                break
        return moves

    def _expected(self, is_resident: Mask) -> Mask:
        """Who is expected in a later layer, [L, E]: a copy."""
        return np.zeros_like(is_resident) if self._prefetch is None else self._prefetch.expected.copy()

    def _make_room(self, layer: int, keep: Sequence[int], present: Mask, safe: Mask) -> tuple[Moves, Sequence[int]]:
        """A slot for each expert of `keep`, one after another, if need be that of one who is not `safe` [L, E]; and
        those for whom there was none. Who is `present` [L, E] changes accordingly."""
        is_pooled = self.scope == "network"
        slots = sum(self._num_slots) if is_pooled else self._num_slots[layer]
        num_free = slots - int(np.count_nonzero(present if is_pooled else present[layer]))
        evict: list[int] = []
        queue: Queue | None = None
        for number, expert in enumerate(keep):
            if number >= num_free:
                if queue is None and self._victims is not None:
                    queue = self._victims.queue(layer, present & ~safe)
                victim = None if queue is None else queue.pop()
                if victim is None:
                    return Moves(tuple(keep[:number]), tuple(evict)), keep[number:]
                present[victim] = False
                evict.append(victim[0] * present.shape[1] + victim[1] if is_pooled else victim[1])
                self._tell_evicted(*victim)
            present[layer, expert] = True
            self._tell_promoted(layer, expert)
            if queue is not None and not safe[layer, expert]:
                queue.push(layer, expert)
        return Moves(tuple(keep), tuple(evict)), ()

    def _tell_promoted(self, layer: int, expert: int) -> None:
        for piece in self._told_of_promotions:
            piece.promoted(layer, expert)

    def _tell_evicted(self, layer: int, expert: int) -> None:
        for piece in self._told_of_evictions:
            piece.evicted(layer, expert)
