"""Caches: every missed expert is fetched and kept, in the place of another one, in forwards of all kinds."""

from tidesim.policies.composition import Composition, first_ids
from tidesim.policies.interface import Policy
from tidesim.policies.pieces import LastUse, Lowest
from tidesim.policies.splits import KeepAll


def lru() -> Policy:
    """Fetch every missed expert and keep it, in the place of the least recently used one of its layer.

    The experts of a forward are used resident ones first, ascending ids, and all residents in use count as used before
    the first copy. So a forward's own residents are the last victims; when a forward misses more experts than there are
    slots, the fetched ones follow. The first residents are ids 0..B-1 (oldest: 0). There are no ties: uses are totally
    ordered.
    """
    return Composition("lru", first_ids, split=KeepAll(), victims=Lowest(LastUse()))
