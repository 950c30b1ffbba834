"""What becomes of a layer's misses: who is fetched and kept, who is fetched and dropped; the host does the rest."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tidesim.policies.interface import Counts, ForwardInfo, Mask, MissAction
from tidesim.policies.pieces import Piece, Score, best
from tidesim.workload import ForwardKind


class Fetched(NamedTuple):
    """Experts to keep and experts to drop, each in the order of their copies."""

    keep: Sequence[int] = ()
    drop: Sequence[int] = ()


class Split(Piece):
    """Divides misses between host and device.

    Attributes
    ----------
    action : see `Policy.miss_action`.
    """

    action: MissAction = "split"

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Whom of `missed` to fetch; the arguments are those of `Policy.serve`."""
        raise NotImplementedError


class OnHost(Split):
    """The host computes all."""

    action: MissAction = "host"

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Nobody."""
        return Fetched()


class KeepAll(Split):
    """All are fetched in ascending ids, and stay."""

    action: MissAction = "fetch"

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Everybody."""
        return Fetched(keep=missed)


class KeepBest(Split):
    """All are fetched; those that are then among the experts worth most stay, as many as there are residents.

    Who stays is copied first, then the others for this forward only; both in ascending ids. No two experts may be worth
    the same, and victims must be those worth least.

    Parameters
    ----------
    worth : the score.
    """

    action: MissAction = "fetch"

    def __init__(self, worth: Score) -> None:
        self._worth = worth

    @property
    def parts(self) -> Sequence[Piece]:
        """The score."""
        return (self._worth,)

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Everybody."""
        if not missed:
            return Fetched()
        top = set(best(self._worth.of(layer), int(np.count_nonzero(is_resident[layer]))))
        return Fetched([expert for expert in missed if expert in top], [each for each in missed if each not in top])


class DropAll(Split):
    """All are fetched in ascending ids, each for this forward only."""

    action: MissAction = "fetch"

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Everybody."""
        return Fetched(drop=missed)


class StreamLayer(Split):
    """The whole layer is copied in ascending ids, whoever has rows or not, for this forward only.

    Parameters
    ----------
    with_residents : whether residents are copied once more. Without, they come out of their slots, for nothing.
    """

    action: MissAction = "fetch"

    def __init__(self, *, with_residents: bool = True) -> None:
        self._with_residents = with_residents

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Everybody, or everybody who is absent."""
        everybody = range(len(counts))
        return Fetched(drop=[expert for expert in everybody if self._with_residents or not is_resident[layer, expert]])


class StreamAndKeepTop(Split):
    """The whole layer is copied, and those with most tokens of this forward stay: as many as there were residents.

    Ties: the lower id stays. Who stays without having been resident is copied first, then all the others for this
    forward only, residents once more among them; both in ascending ids. Victims must be those with fewest tokens, and
    of equal ones the higher id: see `pieces.LowerId`.
    """

    action: MissAction = "fetch"

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Everybody."""
        top = best(counts.astype(np.float64), int(np.count_nonzero(is_resident[layer])))
        keep = sorted(expert for expert in top if not is_resident[layer, expert])
        return Fetched(keep, [expert for expert in range(len(counts)) if expert not in keep])


class ByKind(Split):
    """One split for forwards that fill the cache with a prompt, and another for all others."""

    def __init__(self, prefill: Split, others: Split) -> None:
        self._prefill, self._others = prefill, others

    @property
    def parts(self) -> Sequence[Piece]:
        """Both splits."""
        return self._prefill, self._others

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """See `Split`."""
        split = self._prefill if forward.kind == ForwardKind.PREFILL else self._others
        return split.choose(forward, layer, missed, counts, is_resident)


class ByTokens(Split):
    """One split for forwards that route at least `threshold` tokens, and another for smaller ones."""

    def __init__(self, threshold: int, large: Split, small: Split) -> None:
        self._threshold, self._large, self._small = threshold, large, small

    @property
    def parts(self) -> Sequence[Piece]:
        """Both splits."""
        return self._large, self._small

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """See `Split`."""
        split = self._large if forward.tokens >= self._threshold else self._small
        return split.choose(forward, layer, missed, counts, is_resident)
