"""The slots of a device: which expert lies in which of them, and how they change hands.

Slots lie in slabs: one for each layer, or one that all layers share, and one for experts that are forgotten after use.
Letters: L MoE layers, E experts.
"""

from bisect import insort
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.residency import Moves, Placement, Residency, Swap

Ints = npt.NDArray[np.int64]
ABSENT = -1


class Place(NamedTuple):
    """An expert of a layer, and the slot that it has been given."""

    layer: int
    expert: int
    slab: int
    slot: int


class Slots:
    """Who lies where.

    Parameters
    ----------
    budgets : slots of each layer, or their share of the slots if layers share them (`is_pooled`).
    placement : who is resident at the start.
    scratch : slots for experts that are forgotten after use.

    Attributes
    ----------
    residency : who is resident.
    of : L arrays [E], the slot of each expert within its slab, or `ABSENT`.
    sizes : slots of each slab; the one of scratch memory comes last.
    in_flight : by layer, promoted experts on their way, each with its arrival.

    Raise BudgetError if a budget exceeds the number of experts.
    """

    def __init__(
        self, num_experts: int, budgets: Sequence[int], placement: Placement, *, is_pooled: bool, scratch: int
    ) -> None:
        self.residency = Residency(num_experts, budgets, placement, is_pooled=is_pooled)
        self.of = [np.full(num_experts, ABSENT, np.int64) for _ in budgets]
        self.sizes = [*([sum(budgets)] if is_pooled else budgets), scratch]
        self.in_flight: list[dict[int, Any]] = [{} for _ in budgets]
        # Free slots of each slab of residents, ascending.
        self._free = [list(range(size)) for size in self.sizes[:-1]]
        for layer, experts in enumerate(placement.experts):
            for expert in experts:
                self.of[layer][expert] = self._free[self.slab(layer)].pop(0)

    def slab(self, layer: int) -> int:
        """Where residents of `layer` lie."""
        return 0 if self.residency.is_pooled else layer

    @property
    def scratch(self) -> int:
        """Slots of scratch memory."""
        return self.sizes[-1]

    @property
    def scratch_slab(self) -> int:
        """Where experts lie that are forgotten after use."""
        return len(self.sizes) - 1

    def places(self) -> Iterator[Place]:
        """Everybody who has a slot."""
        for layer, slots in enumerate(self.of):
            for expert in np.flatnonzero(slots != ABSENT).tolist():
                yield Place(layer, expert, self.slab(layer), int(slots[expert]))

    def apply(self, layer: int, moves: Moves) -> list[Place]:
        """Do the moves of a refresh; the places of the promoted, in order."""
        return self.hand_over(layer, self.residency.apply(layer, moves))

    def hand_over(self, layer: int, swaps: Sequence[Swap]) -> list[Place]:
        """Let slots change hands as `swaps` of `layer` say; the places of the promoted, in order."""
        slab = self.slab(layer)
        free, taken = self._free[slab], []
        for swap in swaps:
            slot = None
            if swap.evict is not None:
                home, victim = self.residency.victim(layer, swap.evict)
                slot, self.of[home][victim] = int(self.of[home][victim]), ABSENT
                # An expert may be evicted while it is on its way: it is not waited for any more.
                self.in_flight[home].pop(victim, None)
            if swap.promote is None:
                assert slot is not None
                insort(free, slot)
            else:
                self.of[layer][swap.promote] = slot = free.pop(0) if slot is None else slot
                taken.append(Place(layer, swap.promote, slab, slot))
        return taken
