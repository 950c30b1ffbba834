"""Fetching ahead: whom to bring to the layers that are still to run, while one is running.

Letters: L MoE layers, E experts per layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from tidesim.errors import InputError
from tidesim.policies.interface import Counts, ForwardInfo, Mask, Shape
from tidesim.policies.pieces import Floats, Piece, best
from tidesim.policies.predictors import Predictor, shares

# --- how many of a layer ---

# What its experts are expected to get [E], and how far that is to be trusted (0..1) -> whom to fetch.
Choice = Callable[[Floats, float], list[int]]


def all_expected(tokens: Floats, confidence: float) -> list[int]:
    """Everybody who is expected to get anything."""
    chosen: list[int] = np.flatnonzero(tokens > 0).tolist()
    return chosen


@dataclass(frozen=True)
class MostExpected:
    """The `num` experts that are expected to get most; of equal ones the lower id."""

    num: int

    def __call__(self, tokens: Floats, confidence: float) -> list[int]:
        """See `Choice`."""
        return [expert for expert in best(tokens, self.num) if tokens[expert] > 0]


@dataclass(frozen=True)
class CumulativeShare:
    """The less the prediction is to be trusted, the more experts: most expected first (of equal ones the lower id), as
    long as their shares of the layer add up to 1 - confidence at most, but at least `least` of those expected."""

    least: int

    def __call__(self, tokens: Floats, confidence: float) -> list[int]:
        """See `Choice`."""
        order = best(tokens, int(np.count_nonzero(tokens > 0)))
        room = min(max(1 - confidence, 0.0), 1.0)
        num = int(np.count_nonzero(np.cumsum(shares(tokens)[order]) <= room))
        return order[: max(num, self.least)]


# --- all of it ---


class Prefetch(Piece):
    """Whom to fetch for later layers, each time a router is done. Residents are never fetched again.

    Whoever is expected in a layer keeps its slot until the router of that layer says who is used.

    Parameters
    ----------
    predictor : says what each expert will get.
    choice : whom of a layer to fetch; everybody expected if left out.
    nearest, furthest : how many layers ahead; up to the last layer if `furthest` is None.
    order : "layer": the next layer first, and in each the most expected first. "network": the most expected first,
        whatever their layer. Of equal ones the lower layer comes first, and then the lower id.

    Raise InputError if not 1 <= nearest <= furthest.
    """

    def __init__(
        self,
        predictor: Predictor,
        choice: Choice = all_expected,
        *,
        nearest: int = 1,
        furthest: int | None = 1,
        order: Literal["layer", "network"] = "layer",
    ) -> None:
        if nearest < 1 or (furthest is not None and furthest < nearest):
            raise InputError(f"nearest(={nearest}) must be >= 1, and furthest(={furthest}) must be >= nearest.")
        self._predictor, self._choice = predictor, choice
        self._nearest, self._furthest, self._order = nearest, furthest, order

    @property
    def parts(self) -> Sequence[Piece]:
        """The predictor."""
        return (self._predictor,)

    def begin(self, shape: Shape) -> None:
        """Nobody is expected."""
        self.expected = np.zeros((shape.num_layers, shape.num_experts), np.bool_)

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """What was expected of this layer has come true or not."""
        self.expected[layer] = False

    def wanted(self, forward: ForwardInfo, layer: int, is_resident: Mask) -> list[tuple[int, list[int]]]:
        """Layers and experts of theirs to fetch, in order; a layer may come up several times."""
        L, E = is_resident.shape
        stop = L if self._furthest is None else min(L, layer + self._furthest + 1)
        tokens = np.zeros((L, E))
        for target in range(layer + self._nearest, stop):
            tokens[target] = self._predictor.predict(forward, layer, target)
            chosen = self._choice(tokens[target], self._predictor.confidence(forward, layer))
            self.expected[target] = False
            self.expected[target, chosen] = True
        fetched = np.zeros_like(is_resident)
        fetched[layer + self._nearest : stop] = (self.expected & ~is_resident)[layer + self._nearest : stop]
        ids = np.flatnonzero(fetched)
        keys = (-tokens.ravel()[ids], ids // E) if self._order == "layer" else (-tokens.ravel()[ids],)
        order: list[int] = ids[np.lexsort(keys)].tolist()
        return [(target, [place % E for place in group]) for target, group in groupby(order, lambda place: place // E)]
