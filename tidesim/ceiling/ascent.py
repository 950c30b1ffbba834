"""The best bound that prices can show: Lagrangian relaxation, with prices found by ascent.

What ties experts to each other (the slots, the link, the two sides of a layer) is priced instead of enforced. Each
expert then takes its own cheapest path, and whatever the prices, what all of them pay is at most the best makespan
(weak duality). The bound's slopes say which price to raise. The steps are those of Adam (Kingma and Ba, arXiv
1412.6980), halved whenever the bound has stopped rising.

Letters: F forwards, L MoE layers, E experts.
"""

from itertools import count
from time import monotonic
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.ceiling.paths import Paths, Prices, cheapest_paths
from tidesim.ceiling.relaxation import Relaxation

Floats = npt.NDArray[np.float64]

WINDOW = 10  # iterations from one look at the progress to the next
PROGRESS = 3e-4  # relative rise within a window, below which the step is halved
FIRST_STEP, LAST_STEP = 0.1, 0.004  # of each multiplier's own scale
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99  # of Adam's moving means
# Scales that came closest to the exact optimum on single layers of the shipped trace; the last in mean slot prices.
SIDE_SCALE, LINK_SCALE, SLOT_SCALE = 0.3, 0.3, 2.0


class Multipliers(NamedTuple):
    """What prices follow from, or a value for each of them.

    Parameters
    ----------
    side : [F, L], weight of the device's side of a layer where the larger of two sides counts; in 0..1.
    link : [F], share of the forward's time that is counted as time of the link; in 0..1.
    slot : [F, L], or [F, 1] if all layers share their slots: ns for a slot over the gap before the forward; >= 0.
    """

    side: Floats
    link: Floats
    slot: Floats


class Ascent(NamedTuple):
    """The best bound found on the makespan, after how many iterations, and whether more would hardly raise it."""

    bound_ns: float
    num_iterations: int
    is_settled: bool


def ascend(relaxation: Relaxation, slots: Floats, time_limit_s: float | None = None) -> Ascent:
    """The best bound that is found within `time_limit_s`, or until it is settled; at least one iteration is made.

    `slots` is [L], or [1] if all layers share them.
    """
    start_s = monotonic()
    multipliers, scales = first_multipliers(relaxation, slots)
    steps = _Steps(scales)
    best = reached = -np.inf
    size = FIRST_STEP
    for iteration in count(1):
        value, slopes = bound(relaxation, slots, multipliers)
        best = max(best, value)
        if iteration % WINDOW == 0:
            size = size / 2 if best - reached <= PROGRESS * abs(best) else size
            reached = best
        is_settled = size < LAST_STEP
        if is_settled or (time_limit_s is not None and monotonic() - start_s >= time_limit_s):
            break
        multipliers = steps.move(multipliers, slopes, size)
    return Ascent(best, iteration, is_settled)


def bound(relaxation: Relaxation, slots: Floats, multipliers: Multipliers) -> tuple[float, Multipliers]:
    """The bound that `multipliers` show, in ns, and its slopes."""
    prices = _prices(relaxation, multipliers)
    paths = cheapest_paths(relaxation, prices)
    fixed = prices.device * relaxation.device_fixed + prices.host * relaxation.host_fixed
    dense = (1 - multipliers.link) @ relaxation.dense
    value = paths.cost + float(dense + fixed.sum() - (multipliers.slot * slots).sum())
    return value, _slopes(relaxation, slots, multipliers, paths)


def _weights(relaxation: Relaxation, side: Floats) -> tuple[Floats, Floats]:
    """How much of the device's and of the host's time makes up a layer's, [F, L] each."""
    return (side, 1 - side) if relaxation.is_parallel else (np.ones_like(side), np.ones_like(side))


def _prices(relaxation: Relaxation, multipliers: Multipliers) -> Prices:
    side, link, slot = multipliers
    counted = 1 - link[:, None]
    on_device, on_host = _weights(relaxation, side)
    copy = relaxation.promote * (link[:, None] if relaxation.is_background else on_device)
    return Prices(counted * on_device, counted * on_host, copy, slot)


def _slopes(relaxation: Relaxation, slots: Floats, multipliers: Multipliers, paths: Paths) -> Multipliers:
    """By how much what `paths` do breaks each of the limits; 0 for a multiplier that has no part in the prices."""
    device = relaxation.device_fixed + np.einsum("fle,fle->fl", relaxation.device, paths.is_on_device)
    host = relaxation.host_fixed + np.einsum("fle,fle->fl", relaxation.host, ~paths.is_on_device)
    on_device, on_host = _weights(relaxation, multipliers.side)
    forward = relaxation.dense + (on_device * device + on_host * host).sum(axis=1)
    copies = relaxation.promote * np.count_nonzero(paths.is_copied, axis=2)
    on_side = 0 if relaxation.is_background else copies
    residents = np.count_nonzero(paths.is_resident, axis=2)
    is_pooled = multipliers.slot.shape != residents.shape
    return Multipliers(
        side=((1 - multipliers.link[:, None]) * (device - host) + on_side) * relaxation.is_parallel,
        link=(copies.sum(axis=1) - forward) * relaxation.is_background,
        slot=(residents.sum(axis=1, keepdims=True) if is_pooled else residents) - slots,
    )


class _Steps:
    """Adam's moving means of the slopes and of their squares, one multiplier's in units of its own scale."""

    def __init__(self, scales: Multipliers) -> None:
        self._scales = scales
        self._means = [np.zeros_like(scale) for scale in scales]
        self._squares = [np.zeros_like(scale) for scale in scales]
        self._num_moves = 0

    def move(self, multipliers: Multipliers, slopes: Multipliers, size: float) -> Multipliers:
        """The multipliers one step up the slopes, at the nearest place that is allowed."""
        self._num_moves += 1
        moved = []
        for i, (here, slope, scale) in enumerate(zip(multipliers, slopes, self._scales, strict=True)):
            self._means[i] += (1 - MEAN_DECAY) * (slope - self._means[i])
            self._squares[i] += (1 - SQUARE_DECAY) * (slope**2 - self._squares[i])
            mean = self._means[i] / (1 - MEAN_DECAY**self._num_moves)
            root = np.sqrt(self._squares[i] / (1 - SQUARE_DECAY**self._num_moves))
            moved.append(here + size * scale * mean / np.where(root > 0, root, 1.0))
        side, link, slot = moved
        return Multipliers(np.clip(side, 0, 1), np.clip(link, 0, 1), np.maximum(slot, 0))


# --- where the ascent begins ---


def first_multipliers(relaxation: Relaxation, slots: Floats) -> tuple[Multipliers, Multipliers]:
    """Where the ascent begins, and the scale of each multiplier.

    A slot is worth what an expert saves in its next use, spread over the forwards from its last use to there. With B
    slots their price is the worth of one to the expert that comes after the first B.
    """
    F, L, _ = relaxation.host.shape
    side = np.full((F, L), 0.1)
    link = np.full(F, 0.5 if relaxation.is_background and relaxation.promote else 0.0)
    prices = _prices(relaxation, Multipliers(side, link, np.zeros((F, len(slots)))))
    saving = prices.host[:, :, None] * relaxation.host - prices.device[:, :, None] * relaxation.device
    saving = np.clip(saving, 0, prices.copy[:, :, None])
    slot = _next_best(_worth(saving), slots)
    unit = SLOT_SCALE * max(float(slot.mean()), 1e-3 * float(saving.mean()))
    scales = (np.full_like(side, SIDE_SCALE), np.full_like(link, LINK_SCALE), np.full_like(slot, unit))
    return Multipliers(side, link, slot), Multipliers(*scales)


def _worth(saving: Floats) -> Floats:
    """What a slot is worth to each expert in the gap before each forward, [F, L, E]."""
    F, is_used = len(saving), saving > 0
    forward = np.arange(F)[:, None, None]
    used = np.maximum.accumulate(np.where(is_used, forward, -1), axis=0)
    last = np.concatenate([np.full_like(used[:1], -1), used[:-1]])
    following = np.minimum.accumulate(np.where(is_used, forward, F)[::-1], axis=0)[::-1]
    unused = np.zeros_like(saving[:1])
    worth: Floats = np.take_along_axis(np.concatenate([saving, unused]), following, axis=0) / (following - last)
    return worth


def _next_best(worth: Floats, slots: Floats) -> Floats:
    """The (B + 1)-th largest worth in each layer of B slots, or in all that share them; 0 if nobody is left."""
    groups = worth.reshape(len(worth), len(slots), -1)
    ordered = np.sort(groups, axis=2)[:, :, ::-1]
    num_experts = groups.shape[2]
    place = np.minimum(slots, num_experts - 1).astype(np.int64)
    next_best: Floats = ordered[:, np.arange(len(slots)), place] * (slots < num_experts)
    return next_best
