"""The copies that one layer of one forward asks for, and when each of them may begin."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.engine.backend import Backend
from tidesim.engine.slots import Place, Slots
from tidesim.policies import Ahead, Serving
from tidesim.residency import Swap

Counts = npt.NDArray[np.int32]


class Copy(NamedTuple):
    """One copy, and how many parts of the layer must have run before it may begin.

    The parts are the residents (the first) and each fetched expert (one more).
    """

    place: Place
    due: int


class Copies:
    """The copies of one layer, in their order: experts to keep, to drop, and those of other layers.

    A slot whose expert still has rows to run is waited for: a resident's until the residents have run, that of an
    expert that is fetched in this very forward until it has.

    Attributes
    ----------
    fetched : those of the layer itself.
    arrivals : of the copies that have begun.
    """

    def __init__(self, slots: Slots, backend: Backend, layer: int, counts: Counts, serving: Serving) -> None:
        self._slots, self._backend, self._layer, self._counts = slots, backend, layer, counts
        order = (*serving.keep.promote, *serving.drop)
        self._part_of = {expert: number + 2 for number, expert in enumerate(order)}
        self._kept = frozenset(serving.keep.promote)
        kept = self._moves(layer, slots.residency.fetch(layer, serving.keep))
        self.fetched = kept + self._drops(serving.drop)
        self.arrivals: list[Any] = []
        self._ahead: list[Copy] = []

    def _moves(self, layer: int, swaps: Sequence[Swap]) -> list[Copy]:
        due = [self._due(layer, swap) for swap in swaps if swap.promote is not None]
        return [Copy(*pair) for pair in zip(self._slots.hand_over(layer, swaps), due, strict=True)]

    def _due(self, layer: int, swap: Swap) -> int:
        if swap.evict is None:
            return 0
        home, victim = self._slots.residency.victim(layer, swap.evict)
        if home != self._layer:
            return 0
        # Whoever is kept and evicted in one forward is first fetched. A resident may be among those that are dropped.
        return self._part_of[victim] if victim in self._kept else int(self._counts[victim] > 0)

    def _drops(self, drop: Sequence[int]) -> list[Copy]:
        slab, scratch = self._slots.scratch_slab, self._slots.scratch
        return [
            Copy(
                Place(self._layer, expert, slab, number % scratch),
                self._part_of[drop[number - scratch]] if number >= scratch else 0,
            )
            for number, expert in enumerate(drop)
        ]

    def add_ahead(self, ahead: Sequence[Ahead]) -> None:
        """Moves in other layers, behind all others."""
        for layer, moves in ahead:
            self._ahead += self._moves(layer, self._slots.residency.apply(layer, moves))

    def begin(self, num_done: int) -> None:
        """Begin the copies that may begin when so many parts of the layer have run."""
        waiting = (self.fetched + self._ahead)[len(self.arrivals) :]
        self._begin([copy.place for copy in takewhile(lambda copy: copy.due <= num_done, waiting)], not num_done)

    def begin_one(self) -> Any:
        """Begin the next copy; its arrival."""
        self._begin([(self.fetched + self._ahead)[len(self.arrivals)].place], is_free=False)
        return self.arrivals[-1]

    def _begin(self, places: Sequence[Place], is_free: bool) -> None:
        for place, arrival in zip(places, self._backend.copy(places, is_free), strict=True):
            is_own = len(self.arrivals) < len(self.fetched)
            self.arrivals.append(arrival)
            has_rows = place.layer == self._layer and self._counts[place.expert] > 0
            if place.slab != self._slots.scratch_slab and not (is_own and has_rows):
                self._slots.in_flight[place.layer][place.expert] = arrival
