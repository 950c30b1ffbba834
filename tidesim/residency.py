"""Who is on the device: a fixed choice (`Placement`), a state (`Residency`), and the moves between states (`Moves`).

Everything here is whole numbers and sets. A policy names the moves, `Residency` guards them, and whoever runs the
network (a simulator or a live engine) performs them; so both make the same moves by construction.

Letters: L MoE layers, E experts per layer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from tidesim.errors import BudgetError, InputError


@dataclass(frozen=True, slots=True)
class Moves:
    """What a policy wants done in one layer: experts to promote and experts to evict, each in the order moved."""

    promote: tuple[int, ...] = ()
    evict: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.promote or self.evict)


NO_MOVES = Moves()


class Swap(NamedTuple):
    """One slot changing hands: `evict` leaves it and `promote` enters it. None: nobody does."""

    promote: int | None
    evict: int | None


@dataclass(frozen=True, slots=True)
class Placement:
    """A fixed choice of resident experts: `experts[layer]` holds their ids, ascending.

    Raise ValueError if the ids of a layer are negative, repeated or out of order.
    """

    experts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for layer, ids in enumerate(self.experts):
            if list(ids) != sorted(set(ids)) or min(ids, default=0) < 0:
                raise ValueError(f"experts[{layer}](={list(ids)}) must be ascending ids >= 0, each once.")

    @classmethod
    def of(cls, experts: Iterable[Iterable[int]]) -> Self:
        """The placement with these experts in each layer, given in any order."""
        return cls(tuple(tuple(sorted(index(expert) for expert in ids)) for ids in experts))

    @classmethod
    def from_json(cls, experts: object) -> Self:
        """Read what `to_json` wrote. Raise InputError if `experts` is not a list of lists of ids."""
        if not isinstance(experts, list) or not all(isinstance(ids, list) for ids in experts):
            raise InputError(f"a placement(={experts!r:.60}) must be a list with one list of expert ids per layer.")
        if not all(isinstance(expert, int) and not isinstance(expert, bool) for ids in experts for expert in ids):
            raise InputError("a placement must hold whole numbers only: the ids of the resident experts.")
        return cls.of(experts)

    @property
    def num_experts(self) -> int:
        """Experts on the device, over all layers."""
        return sum(map(len, self.experts))

    def to_json(self) -> list[list[int]]:
        """One list of ids per layer, ready for `json.dumps`."""
        return [list(ids) for ids in self.experts]


def per_layer(value: int | Sequence[int], num_layers: int, name: str) -> tuple[int, ...]:
    """One number per layer, from one number for all layers or from a sequence that has one each.

    Raise InputError if a sequence has another length. `name` is for the message.
    """
    if isinstance(value, Sequence):
        if len(value) != num_layers:
            raise InputError(
                f"{name} has {len(value)} numbers; give one, or one for each of the {num_layers} MoE layers."
            )
        return tuple(index(item) for item in value)
    return (index(value),) * num_layers


def check_budgets(budgets: Sequence[int], num_experts: int) -> None:
    """Raise BudgetError if a layer's budget is negative or exceeds its number of experts."""
    for layer, budget in enumerate(budgets):
        if not 0 <= budget <= num_experts:
            raise BudgetError(f"budget(={budget}) of layer {layer} must be in 0..num_experts(={num_experts}).")


class Residency:
    """Who is on the device now, never more than the budget.

    Parameters
    ----------
    num_experts : E.
    budgets : slots of each layer, [L].
    placement : who is resident at the start.
    is_pooled : whether all layers share the sum of the slots. A victim may then be of any layer, and moves name expert
        e of layer l as l * E + e where they evict it. Promotions are always of the layer that the moves are for.

    Raise BudgetError if a budget exceeds E, ValueError if `placement` has another shape or exceeds a budget.
    """

    def __init__(
        self, num_experts: int, budgets: Sequence[int], placement: Placement, *, is_pooled: bool = False
    ) -> None:
        check_budgets(budgets, num_experts)
        if len(placement.experts) != len(budgets):
            raise ValueError(f"placement has {len(placement.experts)} layers, but there are {len(budgets)} budgets.")
        self.num_experts = num_experts
        self.budgets = tuple(budgets)
        self.is_pooled = is_pooled
        self._is_resident = np.zeros((len(budgets), num_experts), np.bool_)
        # The same memory, l * E + e, which Python reads one by one much faster than an array.
        self._cells = self._is_resident.data.cast("B")
        # One pool of slots for each layer, or one for all; of each, its slots and how many are taken.
        self._slots = [sum(budgets)] if is_pooled else list(budgets)
        self._num_taken = [0] * len(self._slots)
        for layer, ids in enumerate(placement.experts):
            self.apply(layer, Moves(promote=ids))
        self._everybody = self._is_resident.view()
        self._everybody.flags.writeable = False

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.budgets)

    @property
    def everybody(self) -> npt.NDArray[np.bool_]:
        """Whether each expert of each layer is on the device, [L, E]: a read-only view that follows later moves."""
        return self._everybody

    def is_resident(self, layer: int) -> npt.NDArray[np.bool_]:
        """Whether each expert of `layer` is on the device, [E]: a read-only view that follows later moves."""
        view: npt.NDArray[np.bool_] = self._everybody[layer]
        return view

    def num_resident(self, layer: int) -> int:
        """Experts of `layer` on the device."""
        return int(np.count_nonzero(self._is_resident[layer]))

    def placement(self) -> Placement:
        """Who is on the device now, as a fixed choice."""
        return Placement(tuple(tuple(np.flatnonzero(row).tolist()) for row in self._is_resident))

    def victim(self, layer: int, expert: int) -> tuple[int, int]:
        """(layer, expert within it) of the victim that moves for `layer` name as `expert`."""
        return divmod(expert, self.num_experts) if self.is_pooled else (layer, expert)

    def apply(self, layer: int, moves: Moves) -> tuple[Swap, ...]:
        """Do the moves of a refresh: all evictions, then all promotions.

        Promotions take free slots first, then the slots of the evicted, both in order; the swaps returned say
        which. Evictions that nobody follows come last. Raise ValueError if a move does not fit: an id out of
        range, an eviction of an absent or a promotion of a resident expert, or more residents than the budget.
        """
        num_free = self._num_free(layer)
        for expert in moves.evict:
            self._evict(layer, expert)
        for expert in moves.promote:
            self._promote(layer, expert)
        return _pair(moves, num_free)

    def fetch(self, layer: int, moves: Moves) -> tuple[Swap, ...]:
        """Do the moves of fetching missed experts one after another: each promotion evicts one if no slot is free.

        So an expert fetched early may be a victim later in the same moves. Raise ValueError as `apply` does, and
        if there are more or fewer victims than promotions without a free slot.
        """
        swaps = _pair(moves, self._num_free(layer))
        if any(swap.promote is None for swap in swaps):
            raise ValueError(
                f"layer {layer}: evict(={moves.evict}) must name one victim per fetch without a free slot."
            )
        for swap in swaps:
            if swap.evict is not None:
                self._evict(layer, swap.evict)
            if swap.promote is not None:
                self._promote(layer, swap.promote)
        return swaps

    def _num_free(self, layer: int) -> int:
        pool = 0 if self.is_pooled else layer
        return self._slots[pool] - self._num_taken[pool]

    def _evict(self, layer: int, expert: int) -> None:
        pool = 0 if self.is_pooled else layer
        stop = len(self._cells) if self.is_pooled else self.num_experts
        if not 0 <= expert < stop:
            raise ValueError(_out_of_range(layer, expert, stop))
        cell = expert if self.is_pooled else layer * self.num_experts + expert
        if not self._cells[cell]:
            home, victim = divmod(cell, self.num_experts)
            raise ValueError(f"layer {home}: expert {victim} cannot be evicted, it is not on the device.")
        self._cells[cell] = False
        self._num_taken[pool] -= 1

    def _promote(self, layer: int, expert: int) -> None:
        pool = 0 if self.is_pooled else layer
        if not 0 <= expert < self.num_experts:
            raise ValueError(_out_of_range(layer, expert, self.num_experts))
        cell = layer * self.num_experts + expert
        if self._cells[cell]:
            raise ValueError(f"layer {layer}: expert {expert} cannot be promoted, it is on the device already.")
        if self._num_taken[pool] >= self._slots[pool]:
            slots = self._slots[pool]
            raise ValueError(f"layer {layer}: no slot is left for expert {expert}, budget(={slots}) is full.")
        self._cells[cell] = True
        self._num_taken[pool] += 1


def _out_of_range(layer: int, expert: int, stop: int) -> str:
    return f"layer {layer}: expert(={expert}) must be in 0..{stop - 1}."


def _pair(moves: Moves, num_free: int) -> tuple[Swap, ...]:
    """Which promotion takes whose slot, when `num_free` slots are free before."""
    if not moves:
        return ()
    victims: list[int | None] = [None] * min(num_free, len(moves.promote))
    victims += moves.evict
    entering: list[int | None] = list(moves.promote)
    length = max(len(entering), len(victims))
    entering += [None] * (length - len(entering))
    victims += [None] * (length - len(victims))
    return tuple(Swap(promote, evict) for promote, evict in zip(entering, victims, strict=True))
