"""What policies are made of: scores, which say how much each expert is worth by what was seen.

A piece remembers what it needs of a run. The policy that it belongs to tells it when a run begins, what every router
chose, and who was promoted or evicted. Letters: L MoE layers, E experts per layer.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Literal

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.policies.interface import Counts, ForwardInfo, Mask, Shape

Floats = npt.NDArray[np.float64]


class Piece:
    """A part of a policy. Made of other pieces, it names them in `parts`, and they are told by the policy too."""

    @property
    def parts(self) -> "Sequence[Piece]":
        """Pieces that it is made of."""
        return ()

    def begin(self, shape: Shape) -> None:
        """A run begins: forget everything learnt."""
        return

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """See `Policy.observe`."""
        return

    def promoted(self, layer: int, expert: int) -> None:
        """An expert was given a slot."""
        return

    def evicted(self, layer: int, expert: int) -> None:
        """An expert lost its slot."""
        return


def hears_of(move: Literal["promoted", "evicted"], piece: Piece) -> bool:
    """Whether a move of that kind means anything to `piece`: most do not listen, and there are many moves."""
    return getattr(type(piece), move) is not getattr(Piece, move)


def everything_in(pieces: Iterable[Piece | None]) -> list[Piece]:
    """The pieces and all that they are made of, each once, parts before the whole."""
    found: dict[int, Piece] = {}
    for piece in pieces:
        if piece is not None:
            for part in (*everything_in(piece.parts), piece):
                found.setdefault(id(part), part)
    return list(found.values())


class Score(Piece):
    """How much each expert is worth: the higher, the more.

    Attributes
    ----------
    table : the worth of all experts, [L, E].
    is_own : whether `promoted` and `evicted` change nobody's worth but that of who moves. If not, all are compared anew
        for each victim.
    """

    table: Floats
    is_own: bool = False

    def begin(self, shape: Shape) -> None:
        """Nobody is worth anything yet."""
        self.table = np.zeros((shape.num_layers, shape.num_experts))

    def of(self, layer: int) -> Floats:
        """The worth of each expert of `layer`, [E]."""
        row: Floats = self.table[layer]
        return row


class ThisForward(Score):
    """Tokens of the current forward alone."""

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Take the counts as they are."""
        self.table[layer] = counts


class Total(Score):
    """Tokens of all forwards of the run, the current one included."""

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Add the counts."""
        self.table[layer] += counts


class Decayed(Score):
    """Tokens of all forwards, each weighing `keep` times as much as the one after it.

    Raise InputError if `keep` is not in 0..1.
    """

    def __init__(self, keep: float) -> None:
        if not 0 <= keep <= 1:
            raise InputError(f"keep(={keep}) must be >= 0 and <= 1.")
        self._keep = keep

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """What was counted fades, and this forward's tokens come on top."""
        self.table[layer] = self._keep * self.table[layer] + counts


class LastUse(Score):
    """When an expert was used last on the device: the residents of a forward in ascending ids, then each one fetched.

    No two experts that were ever used are equal.
    """

    is_own = True

    def begin(self, shape: Shape) -> None:
        """Nobody was used; nothing is older than the clock's first tick."""
        super().begin(shape)
        self._clock = 0

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """The residents that have rows are used."""
        used = np.flatnonzero((counts > 0) & is_resident[layer])
        self.table[layer, used] = self._clock + 1 + np.arange(len(used))
        self._clock += len(used)

    def promoted(self, layer: int, expert: int) -> None:
        """Who comes in is used next."""
        self._clock += 1
        self.table[layer, expert] = self._clock


class InUse(Score):
    """1 for those experts of the running layer that have rows in this forward, 0 for all others of all layers."""

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """The layers before have run."""
        self.table[:] = 0
        self.table[layer] = counts > 0


class Arrival(Score):
    """The forward, counted from 1, in which an expert came in last; 0 for the first residents.

    The lower, the longer a resident has been there; those that came in one forward are equal.
    """

    is_own = True

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Look at the number of the forward."""
        self._now = forward.index + 1

    def promoted(self, layer: int, expert: int) -> None:
        """It comes in now."""
        self.table[layer, expert] = self._now


class LastActiveBefore(Score):
    """The forward, counted from 1, that routed to an expert last before the current one, on the device or not."""

    def begin(self, shape: Shape) -> None:
        """Nobody was routed to."""
        super().begin(shape)
        self._now = np.zeros_like(self.table)

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """What was the current forward has passed."""
        self.table[layer] = self._now[layer]
        self._now[layer, counts > 0] = forward.index + 1


class Recency(Score):
    """How recently an expert was routed to, on the device or not: the later the forward the more, and in it the higher
    the id.

    Who was not routed to yet comes behind all who were, the lower id before the higher one. No two experts are equal.
    """

    def begin(self, shape: Shape) -> None:
        """Nobody was routed to."""
        self._ids = np.arange(shape.num_experts)
        self.table = np.tile(-self._ids.astype(np.float64), (shape.num_layers, 1))

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Whoever has rows is more recent than all others."""
        used = self._ids[counts > 0]
        self.table[layer, used] = (forward.index + 1) * len(self._ids) + used


class LastTurn(Score):
    """The turn in which an expert was used last on the device; each layer of each forward is one, counted from 1.

    All that are used in one turn are equal.
    """

    is_own = True

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """The residents that have rows are used."""
        self._turn = forward.index * len(self.table) + layer + 1
        self.table[layer, (counts > 0) & is_resident[layer]] = self._turn

    def promoted(self, layer: int, expert: int) -> None:
        """Who comes in is used in this turn."""
        self.table[layer, expert] = self._turn


class Visits(Score):
    """Forwards in which an expert ran on the device: as a resident, or as one fetched.

    Parameters
    ----------
    forgets : whether all counts go back to 0 with each sequence.
    is_kept : whether an expert's count survives its eviction.
    """

    is_own = True

    def __init__(self, forgets: Literal["never", "sequence"] = "never", *, is_kept: bool = True) -> None:
        self._is_cleared, self._is_kept = forgets == "sequence", is_kept

    def begin(self, shape: Shape) -> None:
        """Nobody was used."""
        super().begin(shape)
        self._sequence: int | None = None

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """One more for each resident that has rows."""
        if self._is_cleared and forward.sequence != self._sequence:
            self._sequence = forward.sequence
            self.table[:] = 0
        self.table[layer] += (counts > 0) & is_resident[layer]

    def promoted(self, layer: int, expert: int) -> None:
        """Who comes in runs."""
        self.table[layer, expert] += 1

    def evicted(self, layer: int, expert: int) -> None:
        """Start again at 0, unless counts are kept."""
        if not self._is_kept:
            self.table[layer, expert] = 0


class FrequencyOverAge(Score):
    """Uses since an expert came in, over its age: the uses in its layer from its own last one on, that one included.

    The experts of a forward are used as for `LastUse`: the residents in ascending ids, then each one fetched.
    """

    def begin(self, shape: Shape) -> None:
        """Nobody was used."""
        super().begin(shape)
        self._uses, self._last = np.zeros_like(self.table), np.zeros_like(self.table)
        self._clock = np.zeros(shape.num_layers, np.int64)

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """One more use for each resident that has rows; everybody else grows older."""
        used = np.flatnonzero((counts > 0) & is_resident[layer])
        self._uses[layer, used] += 1
        self._last[layer, used] = self._clock[layer] + 1 + np.arange(len(used))
        self._clock[layer] += len(used)
        self._rate(layer)

    def promoted(self, layer: int, expert: int) -> None:
        """Who comes in is used once, and next."""
        self._clock[layer] += 1
        self._uses[layer, expert], self._last[layer, expert] = 1, self._clock[layer]
        self._rate(layer)

    def _rate(self, layer: int) -> None:
        self.table[layer] = self._uses[layer] / (self._clock[layer] - self._last[layer] + 1)


class SmoothedShare(Score):
    """Share of a layer's routed pairs, smoothed: each forward moves it by `alpha` of the way to its own share."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Move by `alpha` of the way."""
        share = counts / max(1, int(counts.sum()))
        self.table[layer] = (1 - self._alpha) * self.table[layer] + self._alpha * share


class LowerId(Score):
    """The lower an expert's id, the more it is worth: for ties that the lower id shall survive."""

    def begin(self, shape: Shape) -> None:
        """Nothing is learnt here."""
        self.table = np.tile(-np.arange(shape.num_experts, dtype=np.float64), (shape.num_layers, 1))


class Slot(Score):
    """The number of the slot that a resident lies in, counted through all layers: for ties that the lower slot loses.

    The first residents fill the slots in order of their layers and ids. Who comes in takes the lowest free one; for one
    that is fetched that is its victim's.
    """

    is_own = True

    def begin(self, shape: Shape) -> None:
        """Who lies where is seen with the first forward."""
        super().begin(shape)
        self._num_slots = sum(shape.budgets)
        self._free: list[int] | None = None

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """The first forward shows the first residents."""
        if self._free is None:
            num_taken = int(np.count_nonzero(is_resident))
            self.table[is_resident] = np.arange(num_taken)
            self._free = list(range(num_taken, self._num_slots))

    def promoted(self, layer: int, expert: int) -> None:
        """It takes the lowest free slot."""
        assert self._free is not None
        self.table[layer, expert] = heappop(self._free)

    def evicted(self, layer: int, expert: int) -> None:
        """Its slot is free."""
        assert self._free is not None
        heappush(self._free, int(self.table[layer, expert]))


def best(values: Floats, num: int) -> list[int]:
    """The `num` experts that are worth most, [E] -> ids: most first, and of equal ones the lower id."""
    ids: list[int] = np.argsort(-values, kind="stable")[:num].tolist()
    return ids
