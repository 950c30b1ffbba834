"""What becomes of a layer's misses: who is fetched and kept, who is fetched and dropped; the host does the rest."""

from collections.abc import Sequence
from typing import NamedTuple

from tidesim.policies.interface import Counts, ForwardInfo, Mask, MissAction
from tidesim.policies.pieces import Piece


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


class DropAll(Split):
    """All are fetched in ascending ids, each for this forward only."""

    action: MissAction = "fetch"

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Everybody."""
        return Fetched(drop=missed)


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
