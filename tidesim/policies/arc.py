"""The adaptive replacement cache, for the experts of each layer."""

from collections.abc import Sequence

import numpy as np

from tidesim.policies.composition import check_slots, first_ids
from tidesim.policies.interface import Counts, ForwardInfo, Mask, MissAction, Policy, Serving, Shape
from tidesim.residency import Moves, Placement


class Arc(Policy):
    """Fetch every missed expert and keep it; who goes is up to an adaptive replacement cache (ARC) in each layer.

    After Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (FAST 2003), figure 4, without a
    change to its rules; see `Lists`. What is adapted is what counts as a request: each expert that a forward routes to
    is one, however many tokens it has, first the residents in ascending ids, then the misses in ascending ids. So all
    hits of a forward come before the first victim is chosen, and the first victims are never among them while there are
    others in the same list. An expert fetched in this very forward may be a victim. Layers know nothing of each other.

    The first residents are ids 0..B-1, as if each was requested once, in that order. There are no ties.
    """

    name = "arc"
    miss_action: MissAction = "fetch"

    def initial(self, shape: Shape) -> Placement:
        """See `Policy`. Raise BudgetError if a layer has no slot."""
        check_slots(self, shape)
        placement = first_ids(shape)
        self._lists = [Lists(ids) for ids in placement.experts]
        return placement

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """The residents that have rows are requested."""
        for expert in np.flatnonzero((counts > 0) & is_resident[layer]).tolist():
            self._lists[layer].hit(expert)

    def serve(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Serving:
        """The misses are requested, and all of them stay."""
        return Serving(Moves(tuple(missed), tuple(self._lists[layer].replace(expert) for expert in missed)))


class Lists:
    """What ARC knows of one layer: residents requested once or more often lately, and who was evicted of either kind.

    Every list begins with who was requested, or evicted, longest ago. In the paper they are T1, T2, B1 and B2, `share`
    is p, and the number of slots is c.

    Parameters
    ----------
    residents : who begins, one for each slot.
    """

    def __init__(self, residents: Sequence[int]) -> None:
        self._num_slots = len(residents)
        self._once, self._often = list(residents), list[int]()
        self._gone_once, self._gone_often = list[int](), list[int]()
        # Slots that residents requested once are to have; it grows when one of their evicted is missed.
        self._share = 0.0

    def hit(self, expert: int) -> None:
        """A resident is requested."""
        (self._once if expert in self._once else self._often).remove(expert)
        self._often.append(expert)

    def replace(self, expert: int) -> int:
        """An absent one is requested; the resident whose slot it takes."""
        if expert in self._gone_once:
            self._share = min(self._num_slots, self._share + max(1, len(self._gone_often) / len(self._gone_once)))
            self._gone_once.remove(expert)
            victim = self._evict(favours_once=False)
            self._often.append(expert)
        elif expert in self._gone_often:
            self._share = max(0, self._share - max(1, len(self._gone_once) / len(self._gone_often)))
            self._gone_often.remove(expert)
            victim = self._evict(favours_once=True)
            self._often.append(expert)
        else:
            victim = self._evict_for_stranger()
            self._once.append(expert)
        return victim

    def _evict(self, *, favours_once: bool) -> int:
        """Evict whom the share says; `favours_once`: one that was requested once, if they have just their share."""
        num_once = len(self._once)
        is_over = num_once > self._share or (favours_once and num_once == self._share)
        residents, gone = (self._once, self._gone_once) if num_once and is_over else (self._often, self._gone_often)
        gone.append(residents.pop(0))
        return gone[-1]

    def _evict_for_stranger(self) -> int:
        """Evict for one that no list knows; the lists remember two experts for each slot, and not more."""
        if len(self._once) == self._num_slots:
            return self._once.pop(0)
        if len(self._once) + len(self._gone_once) == self._num_slots:
            self._gone_once.pop(0)
        elif len(self._gone_once) + len(self._gone_often) == self._num_slots:
            self._gone_often.pop(0)
        return self._evict(favours_once=False)
