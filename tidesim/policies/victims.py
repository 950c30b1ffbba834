"""In which order residents give up their slots, for a refresh or for experts that are fetched one after another.

Letters: L MoE layers, E experts per layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, Literal

import numpy as np

from tidesim.policies.interface import Mask, Shape
from tidesim.policies.pieces import Piece, Score, hears_of

Expert = tuple[int, int]  # its layer, and its id there
Tie = Literal["layer", "expert"]


class Queue(ABC):
    """Who may go for fetched experts of a layer, in order, while one after another goes and comes."""

    @abstractmethod
    def pop(self) -> Expert | None:
        """The next victim, which leaves the queue; None if there is nobody."""

    @abstractmethod
    def push(self, layer: int, expert: int) -> None:
        """An expert that has come in may go too."""


class Victims(Piece):
    """In which order residents give up their slots."""

    def queue(self, layer: int, may_go: Mask) -> Queue:
        """The victims among `may_go` [L, E], for experts of `layer`."""
        raise NotImplementedError

    def order(self, layer: int, wanted: Sequence[int], may_go: Mask) -> list[int]:
        """All of `may_go` [E] in `layer`, the next victim first. `wanted` are the experts that are to be there."""
        raise NotImplementedError

    def settled(self, layer: int, wanted: Sequence[int], stay: Sequence[int]) -> None:
        """A refresh is over: the residents are now `wanted`, and `stay` of those that `order` named."""
        return


class Lowest(Victims):
    """Who is worth least goes first.

    Parameters
    ----------
    scores : the first decides; where it is equal, the next one does.
    scope : whether victims are looked for in the layer that needs a slot or in the whole network.
    tie : of equal ones the lower id goes first; in the whole network "layer" is for the lower layer before the lower
        id, "expert" for the lower id before the lower layer.
    """

    _sign = 1

    def __init__(self, *scores: Score, scope: Literal["layer", "network"] = "layer", tie: Tie = "layer") -> None:
        self._scores, self._scope, self._tie = scores, scope, tie
        self._is_sorted_once = all(
            score.is_own or not (hears_of("promoted", score) or hears_of("evicted", score)) for score in scores
        )

    @property
    def parts(self) -> Sequence[Piece]:
        """The scores."""
        return self._scores

    def queue(self, layer: int, may_go: Mask) -> Queue:
        """See `Victims`."""
        if self._is_sorted_once:
            return _SortedOnce(self, layer, may_go)
        return _SortedAnew(self, layer, may_go)

    def keys(self, layers: Any, ids: Any, shape: tuple[int, ...]) -> list[Any]:
        """What to compare of experts, the first thing first; the lowest goes first. The last tells who it is.

        Parameters
        ----------
        layers, ids : of many experts, or of one. shape : [L, E].
        """
        num_layers, num_experts = shape
        ties = ids * num_layers + layers if self._tie == "expert" else layers * num_experts + ids
        return [*(self._sign * score.table[layers, ids] for score in self._scores), ties]

    def keys_among(self, layer: int, may_go: Mask) -> list[Any]:
        """The keys of those of `may_go` [L, E] that are looked at for an expert of `layer`."""
        layers: Any = layer
        if self._scope == "network":
            layers, ids = may_go.nonzero()
        else:
            (ids,) = may_go[layer].nonzero()
        return self.keys(layers, ids, may_go.shape)

    def named(self, tie: int, shape: tuple[int, ...]) -> Expert:
        """The expert whose last key is `tie`; `shape` is [L, E]."""
        num_layers, num_experts = shape
        if self._tie == "expert":
            expert, layer = divmod(tie, num_layers)
            return layer, expert
        return divmod(tie, num_experts)

    def order(self, layer: int, wanted: Sequence[int], may_go: Mask) -> list[int]:
        """See `Victims`."""
        ids = np.flatnonzero(may_go)
        keys = [self._sign * score.of(layer)[ids] for score in reversed(self._scores)]
        ordered: list[int] = ids[np.lexsort((ids, *keys))].tolist()
        return ordered


class Highest(Lowest):
    """Who is worth most goes first; all else is as with `Lowest`."""

    _sign = -1


class _SortedOnce(Queue):
    """Sorted at first, beside a heap of newcomers: right where a move changes nobody's worth but that of who moves."""

    def __init__(self, victims: Lowest, layer: int, may_go: Mask) -> None:
        self._victims, self._shape = victims, may_go.shape
        keys = victims.keys_among(layer, may_go)
        order = np.lexsort(keys[::-1])
        self._sorted = list(zip(*(key[order].tolist() for key in keys), strict=True))
        self._num_gone, self._newcomers = 0, list[tuple[Any, ...]]()

    def pop(self) -> Expert | None:
        """See `Queue`."""
        is_any_left = self._num_gone < len(self._sorted)
        if self._newcomers and not (is_any_left and self._sorted[self._num_gone] < self._newcomers[0]):
            key = heappop(self._newcomers)
        elif is_any_left:
            key = self._sorted[self._num_gone]
            self._num_gone += 1
        else:
            return None
        return self._victims.named(key[-1], self._shape)

    def push(self, layer: int, expert: int) -> None:
        """See `Queue`."""
        heappush(self._newcomers, tuple(self._victims.keys(layer, expert, self._shape)))


class _SortedAnew(Queue):
    """Sorted for each victim."""

    def __init__(self, victims: Lowest, layer: int, may_go: Mask) -> None:
        self._victims, self._layer, self._may_go = victims, layer, may_go.copy()

    def pop(self) -> Expert | None:
        """See `Queue`."""
        keys = self._victims.keys_among(self._layer, self._may_go)
        if not len(keys[-1]):
            return None
        first = np.lexsort(keys[::-1])[0]
        victim = self._victims.named(int(keys[-1][first]), self._may_go.shape)
        self._may_go[victim] = False
        return victim

    def push(self, layer: int, expert: int) -> None:
        """See `Queue`."""
        self._may_go[layer, expert] = True


class SetOrder(Victims):
    """The iteration order of a CPython set, as the released TIDE code has it.

    The set is rebuilt at each refresh, from the wanted experts in their order and then the others that stay. With at
    least 77 elements CPython (3.11 to 3.14) iterates small integers in ascending order, below that the order depends on
    what was put in before. Real sets are built in the same way here, so this needs CPython.
    """

    def begin(self, shape: Shape) -> None:
        """The first residents are ids 0..B-1, put in in that order."""
        self._residents = [set(range(budget)) for budget in shape.budgets]

    def order(self, layer: int, wanted: Sequence[int], may_go: Mask) -> list[int]:
        """See `Victims`."""
        return [expert for expert in self._residents[layer] if may_go[expert]]

    def settled(self, layer: int, wanted: Sequence[int], stay: Sequence[int]) -> None:
        """See `Victims`. Even without a move the set is built anew, and that can change its next iteration."""
        rebuilt = set(wanted)
        rebuilt.update(stay)
        self._residents[layer] = rebuilt
