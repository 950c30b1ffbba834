"""The cheapest way through a run for every expert by itself, at given prices.

Letters: F forwards, L MoE layers, E experts.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Prices(NamedTuple):
    """What each thing costs an expert: whoever computes it, a copy, a slot, and leaving the slot.

    Parameters
    ----------
    device, host : [F, L, E], being computed there; 0 where the expert has no rows.
    copy : [F], a copy to the device during the forward.
    slot : [F, L] or [F, 1], being in a slot just before the forward.
    evict : leaving a slot, other than in the last forward.
    """

    device: Floats
    host: Floats
    copy: Floats
    slot: Floats
    evict: float


class Paths(NamedTuple):
    """What every expert does, [F, L, E] each, and the sum of what it costs them.

    Parameters
    ----------
    is_resident : whether it is in a slot just before the forward.
    is_copied : whether it is copied during the forward, into a slot or just for this once.
    is_on_device : whether the device computes it.
    """

    cost: float
    is_resident: Mask
    is_copied: Mask
    is_on_device: Mask


def cheapest_paths(prices: Prices) -> Paths:
    """A dynamic programme with two states, in a slot or not, for all experts at once.

    In each forward an expert with rows is computed by the host, or by the device if it is resident or copied now. A
    copy may stay in a slot afterwards or not. Nothing is paid for the first residents but their slots.
    """
    cost, enters, keeps, is_resident = _look_back(prices)
    is_here = np.empty(prices.host.shape, np.bool_)
    for forward in range(len(is_here)):
        is_here[forward] = is_resident
        is_resident = np.where(is_resident, keeps[forward], enters[forward])
    enters &= ~is_here
    has_it = is_here | enters
    is_fetched = ~has_it & (prices.device + prices.copy[:, None, None] < prices.host)
    return Paths(cost, is_here, is_fetched | enters, is_fetched | (has_it & (prices.device <= prices.host)))


def _look_back(prices: Prices) -> tuple[float, Mask, Mask, Mask]:
    """From the last forward to the first: the cost, who would enter and who would stay, and who is there at first."""
    device, host, copy, slot, evict = prices
    enters, keeps = np.empty(host.shape, np.bool_), np.empty(host.shape, np.bool_)
    # What is left to pay after the forward: by an expert that is in no slot then, and by one that is in a slot.
    absent, present = np.zeros(host.shape[1:]), np.zeros(host.shape[1:])
    for forward in range(len(host) - 1, -1, -1):
        computed = np.minimum(device[forward], host[forward])
        passes = np.minimum(host[forward], device[forward] + copy[forward]) + absent
        enter = computed + copy[forward] + present
        leave = absent + evict
        np.less(enter, passes, out=enters[forward])
        np.less_equal(present, leave, out=keeps[forward])
        absent = np.minimum(enter, passes)
        present = np.minimum(present, leave) + computed + slot[forward][:, None]
    return float(np.minimum(absent, present).sum()), enters, keeps, present < absent
