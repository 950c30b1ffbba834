"""The best lower bound that prices can show: Lagrangian relaxation, with prices found by ascent.

What ties the experts together (the slots of a layer, the link, the two sides of a layer) is priced instead of enforced.
Then each expert takes its own cheapest path, and what all of them pay is at most the best makespan, whatever the prices
(weak duality). The slopes of the bound say which price to raise; the steps are those of Adam (Kingma and Ba,
arXiv 1412.6980), halved whenever the bound stops rising.

Letters: F forwards, L MoE layers, E experts.
"""

from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.ceiling.paths import Prices, cheapest_paths
from tidesim.ceiling.relaxation import Relaxation

Floats = npt.NDArray[np.float64]

WINDOW = 10  # iterations between two looks at the progress
PROGRESS = 3e-4  # relative rise within a window, below which the step is halved
FIRST_STEP, LAST_STEP = 0.1, 0.004  # of each multiplier's own scale
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99  # Adam's moving means


class Multipliers(NamedTuple):
    """Prices of what ties experts together, or a value for each of them.

    Parameters
    ----------
    side : [F, L], weight of the device's side in the larger of the two; in 0..1.
    link : [F], share of the forward's time that is counted as time of the link; in 0..1.
    slot : [F, L], or [F, 1] if all layers share their slots: ns for a slot over the gap before the forward; >= 0.
    """

    side: Floats
    link: Floats
    slot: Floats

    def clipped(self) -> "Multipliers":
        """The nearest ones that are allowed."""
        return Multipliers(np.clip(self.side, 0, 1), np.clip(self.link, 0, 1), np.maximum(self.slot, 0))


def ascend(relaxation: Relaxation, slots: Floats) -> tuple[float, int]:
    """The best bound found on the makespan, in ns, and the iterations that it took.

    `slots` is [L], or [1] if all layers share them.
    """
    multipliers, scales = first_multipliers(relaxation, slots)
    mean = [np.zeros_like(scale) for scale in multipliers]
    square = [np.zeros_like(scale) for scale in multipliers]
    best = reached = -np.inf
    step = FIRST_STEP
    for iteration in count(1):
        value, slopes = lower_bound(relaxation, slots, multipliers)
        best = max(best, value)
        if iteration % WINDOW == 0:
            if best - reached <= PROGRESS * abs(best):
                step /= 2
            reached = best
            if step < LAST_STEP:
                return best, iteration
        moved = []
        for i, (at, slope, scale) in enumerate(zip(multipliers, slopes, scales, strict=True)):
            slope = slope * scale
            mean[i] = MEAN_DECAY * mean[i] + (1 - MEAN_DECAY) * slope
            square[i] = SQUARE_DECAY * square[i] + (1 - SQUARE_DECAY) * slope**2
            speed = np.sqrt(square[i] / (1 - SQUARE_DECAY**iteration))
            direction = mean[i] / (1 - MEAN_DECAY**iteration) / np.where(speed > 0, speed, 1.0)
            moved.append(at + step * scale * direction)
        multipliers = Multipliers(*moved).clipped()


def lower_bound(relaxation: Relaxation, slots: Floats, multipliers: Multipliers) -> tuple[float, Multipliers]:
    """The bound that `multipliers` show, in ns, and its slopes."""
    side, link, slot = multipliers
    counted = 1 - link[:, None]
    on_device, on_host = (side, 1 - side) if relaxation.is_parallel else (np.ones_like(side), np.ones_like(side))
    prices = Prices(
        (counted * on_device)[:, :, None] * relaxation.device,
        (counted * on_host)[:, :, None] * relaxation.host,
        relaxation.promote * (link if relaxation.is_background else np.ones_like(link)),
        slot,
        relaxation.evict,
    )
    paths = cheapest_paths(prices)
    device = relaxation.device_fixed + np.einsum("fle,fle->fl", relaxation.device, paths.is_on_device)
    host = relaxation.host_fixed + np.einsum("fle,fle->fl", relaxation.host, ~paths.is_on_device)
    fixed = on_device * relaxation.device_fixed + on_host * relaxation.host_fixed
    value = paths.cost + float((counted[:, 0] * (relaxation.dense + fixed.sum(axis=1))).sum() - (slot * slots).sum())
    forward_ns = relaxation.dense + (on_device * device + on_host * host).sum(axis=1)
    num_resident = paths.is_resident.sum(axis=2)
    return value, Multipliers(
        side=counted * (device - host) if relaxation.is_parallel else np.zeros_like(side),
        link=relaxation.promote * paths.is_copied.sum(axis=(1, 2)) - forward_ns
        if relaxation.is_background
        else np.zeros_like(link),
        slot=(num_resident if slot.shape == side.shape else num_resident.sum(axis=1, keepdims=True)) - slots,
    )


def first_multipliers(relaxation: Relaxation, slots: Floats) -> tuple[Multipliers, Multipliers]:
    """Where the ascent begins, and the scale of each multiplier.

    A slot is worth what an expert saves in its next use, spread over the forwards from its last use to there. With B
    slots their price is such that the B-th expert just pays it.
    """
    F, L, _ = relaxation.host.shape
    side = np.full((F, L), 0.1 if relaxation.is_parallel else 0.0)
    link = np.full(F, 0.5 if relaxation.is_background and relaxation.promote else 0.0)
    weight = (1 - link)[:, None, None] * np.ones((F, L, 1))
    on_device, on_host = (0.1, 0.9) if relaxation.is_parallel else (1.0, 1.0)
    saving = weight * (on_host * relaxation.host - on_device * relaxation.device)
    copy = relaxation.promote * (link[:, None, None] if relaxation.is_background else 1.0)
    saving = np.clip(saving, 0, copy) * (relaxation.host > 0)
    slot = _nth_largest(_worth(saving), slots)
    unit = max(float(slot.mean()), 1e-3 * float(saving.mean())) or 1.0
    return Multipliers(side, link, slot), Multipliers(np.ones_like(side), np.ones_like(link), np.full_like(slot, unit))


def _worth(saving: Floats) -> Floats:
    """For each gap before a forward, the saving of an expert's next use over the number of gaps since its last."""
    is_used = saving > 0
    F = len(saving)
    forward = np.arange(F)[:, None, None]
    last = np.maximum.accumulate(np.where(is_used, forward, -1), axis=0)
    last = np.concatenate([np.full_like(last[:1], -1), last[:-1]])
    following = np.minimum.accumulate(np.where(is_used, forward, F)[::-1], axis=0)[::-1]
    padded = np.concatenate([saving, np.zeros_like(saving[:1])])
    return np.take_along_axis(padded, following, axis=0) / (following - last)


def _nth_largest(worth: Floats, slots: Floats) -> Floats:
    """Of each layer, or of all layers if they share slots, the worth of the last expert that gets one, [F, 1 or L]."""
    groups = worth if len(slots) == worth.shape[1] else worth.reshape(len(worth), 1, -1)
    ordered = -np.sort(-groups, axis=2)
    place = np.minimum(slots.astype(np.int64), groups.shape[2] - 1)
    nth = np.take_along_axis(ordered, np.broadcast_to(place[None, :, None], (*ordered.shape[:2], 1)), axis=2)[:, :, 0]
    return np.where(slots < groups.shape[2], nth, 0.0)
