"""The cheapest way through a run for every expert by itself, at given prices.

Letters: F forwards, L MoE layers, E experts.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.ceiling.relaxation import Relaxation

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Prices(NamedTuple):
    """What an expert pays.

    Parameters
    ----------
    device, host : [F, L], for each ns that it is computed there.
    copy : [F, L] or [F, 1], for a copy to the device during the forward.
    slot : [F, L] or [F, 1], for being in a slot just before the forward.
    """

    device: Floats
    host: Floats
    copy: Floats
    slot: Floats


class Paths(NamedTuple):
    """What every expert does, [F, L, E] each, and the sum of what they pay.

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


class _Choices(NamedTuple):
    """What is best in each forward, [F, L, E], for an expert in a slot and for one in none.

    Parameters
    ----------
    keeps, enters : whether it is in a slot afterwards, if it was and if it was not.
    prefers_device : whether it is computed there if that needs no copy.
    fetches : whether it is copied just for this once if it is in no slot before and after.
    """

    keeps: Mask
    enters: Mask
    prefers_device: Mask
    fetches: Mask


def cheapest_paths(relaxation: Relaxation, prices: Prices) -> Paths:
    """A dynamic programme with two states, in a slot or not, for all experts at once.

    In each forward an expert with rows is computed by the host, or by the device if it is resident or copied now. A
    copy may stay in a slot afterwards or not. Nothing is paid for the first residents but their slots.
    """
    cost, is_here, choices = _look_back(relaxation, prices)
    is_resident, is_copied, is_on_device = (np.empty_like(choices.keeps) for _ in range(3))
    for forward, (keeps, enters, prefers_device, fetches) in enumerate(zip(*choices, strict=True)):
        is_resident[forward] = is_here
        comes = enters & ~is_here
        has_it = is_here | comes
        is_fetched = fetches & ~has_it
        is_copied[forward] = comes | is_fetched
        is_on_device[forward] = is_fetched | (has_it & prefers_device)
        is_here = comes | (is_here & keeps)
    return Paths(cost, is_resident, is_copied, is_on_device)


def _look_back(relaxation: Relaxation, prices: Prices) -> tuple[float, Mask, _Choices]:
    """From the last forward to the first: what all pay, who is there at first, and the choices."""
    shape = relaxation.host.shape
    choices = _Choices(*(np.empty(shape, np.bool_) for _ in range(4)))
    # What is left to pay after the forward: by an expert that is in no slot then, and by one that is in a slot.
    absent, present = np.zeros(shape[1:]), np.zeros(shape[1:])
    # One forward's arrays fit the processor's cache, all of them together do not: so they are priced on the way.
    for forward in range(shape[0] - 1, -1, -1):
        device = relaxation.device[forward] * prices.device[forward][:, None]
        host = relaxation.host[forward] * prices.host[forward][:, None]
        copy, leave = prices.copy[forward][:, None], absent + relaxation.evict
        np.less_equal(device, host, out=choices.prefers_device[forward])
        computed = np.minimum(device, host)
        device += copy
        np.less(device, host, out=choices.fetches[forward])
        passes = np.minimum(device, host) + absent
        enter = computed + copy + present
        np.less(enter, passes, out=choices.enters[forward])
        np.less_equal(present, leave, out=choices.keeps[forward])
        absent = np.minimum(enter, passes)
        present = np.minimum(present, leave) + computed + prices.slot[forward][:, None]
    return float(np.minimum(absent, present).sum()), present < absent, choices
