"""The cheapest way through a run for every expert by itself, at given prices.

Letters: F forwards, L MoE layers, E experts.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.ceiling.relaxation import Relaxed

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Choices = npt.NDArray[np.uint8]  # bits, [F, L, E] or of one forward


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
    """What all experts do, and the sum of what they pay.

    Parameters
    ----------
    device, host : [F, L], the times of those that the device computes, and of those that the host does.
    num_copies : [F, L], experts that are copied during the forward, into a slot or just for this once.
    num_residents : [F, L], experts that are in a slot just before the forward.
    """

    cost: float
    device: Floats
    host: Floats
    num_copies: Ints
    num_residents: Ints


# What is best in a forward, for an expert in a slot and for one in none; bits of `Choices`.
KEEPS = 1  # whether it is in a slot afterwards, if it was, and
ENTERS = 2  # if it was not
PREFERS_DEVICE = 4  # whether it is computed there if that needs no copy
FETCHES = 8  # whether it is copied just for this once if it is in no slot before and after


def cheapest_paths(relaxation: Relaxed, prices: Prices) -> Paths:
    """A dynamic programme with two states, in a slot or not, for all experts at once.

    In each forward an expert with rows is computed by the host, or by the device if it is resident or copied now. A
    copy may stay in a slot afterwards or not. Nothing is paid for the first residents but their slots.
    """
    cost, is_here, choices = _look_back(relaxation, prices)
    F, L, _ = relaxation.shape
    paths = Paths(cost, *np.empty((2, F, L)), *np.empty((2, F, L), np.int64))
    for number, span in enumerate(relaxation.spans):
        device, host = relaxation.part(number)
        is_resident, is_copied, is_on_device = (np.empty(host.shape, np.bool_) for _ in range(3))
        for place, chosen in enumerate(choices[span]):
            is_resident[place] = is_here
            comes = _is(chosen, ENTERS) & ~is_here
            has_it = is_here | comes
            is_fetched = _is(chosen, FETCHES) & ~has_it
            is_copied[place] = comes | is_fetched
            is_on_device[place] = is_fetched | (has_it & _is(chosen, PREFERS_DEVICE))
            is_here = comes | (is_here & _is(chosen, KEEPS))
        paths.device[span] = np.einsum("fle,fle->fl", device, is_on_device)
        paths.host[span] = np.einsum("fle,fle->fl", host, ~is_on_device)
        paths.num_copies[span] = np.count_nonzero(is_copied, axis=2)
        paths.num_residents[span] = np.count_nonzero(is_resident, axis=2)
    return paths


def _look_back(relaxation: Relaxed, prices: Prices) -> tuple[float, Mask, Choices]:
    """From the last forward to the first: what all pay, who is there at first, and the choices."""
    choices = np.empty(relaxation.shape, np.uint8)
    # What is left to pay after the forward: by an expert that is in no slot then, and by one that is in a slot.
    absent, present = np.zeros(relaxation.shape[1:]), np.zeros(relaxation.shape[1:])
    for number in reversed(range(len(relaxation.spans))):
        span, (device_part, host_part) = relaxation.spans[number], relaxation.part(number)
        # One forward's arrays fit the processor's cache, all of them together do not: so they are priced on the way.
        for forward in range(span.stop - 1, span.start - 1, -1):
            device = device_part[forward - span.start] * prices.device[forward][:, None]
            host = host_part[forward - span.start] * prices.host[forward][:, None]
            copy, leave = prices.copy[forward][:, None], absent + relaxation.evict
            chosen = _bit(device <= host, PREFERS_DEVICE)
            computed = np.minimum(device, host)
            device += copy
            chosen |= _bit(device < host, FETCHES)
            passes = np.minimum(device, host) + absent
            enter = computed + copy + present
            chosen |= _bit(enter < passes, ENTERS)
            choices[forward] = chosen | _bit(present <= leave, KEEPS)
            absent = np.minimum(enter, passes)
            present = np.minimum(present, leave) + computed + prices.slot[forward][:, None]
    return float(np.minimum(absent, present).sum()), present < absent, choices


def _bit(is_so: Mask, bit: int) -> Choices:
    """`bit` where it is so."""
    bits: Choices = is_so.view(np.uint8) * np.uint8(bit)
    return bits


def _is(chosen: Choices, bit: int) -> Mask:
    """Where `bit` is set."""
    is_set: Mask = (chosen & np.uint8(bit)) != 0
    return is_set
