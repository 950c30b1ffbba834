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
from tidesim.ceiling.relaxation import Relaxed

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

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


def ascend(relaxation: Relaxed, slots: Floats, time_limit_s: float | None = None) -> Ascent:
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


def bound(relaxation: Relaxed, slots: Floats, multipliers: Multipliers) -> tuple[float, Multipliers]:
    """The bound that `multipliers` show, in ns, and its slopes."""
    prices = _prices(relaxation, multipliers)
    paths = cheapest_paths(relaxation, prices)
    fixed = prices.device * relaxation.device_fixed + prices.host * relaxation.host_fixed
    dense = (1 - multipliers.link) @ relaxation.dense
    value = paths.cost + float(dense + fixed.sum() - (multipliers.slot * slots).sum())
    return value, _slopes(relaxation, slots, multipliers, paths)


def _weights(relaxation: Relaxed, side: Floats) -> tuple[Floats, Floats]:
    """How much of the device's and of the host's time makes up a layer's, [F, L] each."""
    return (side, 1 - side) if relaxation.is_parallel else (np.ones_like(side), np.ones_like(side))


def _prices(relaxation: Relaxed, multipliers: Multipliers) -> Prices:
    side, link, slot = multipliers
    counted = 1 - link[:, None]
    on_device, on_host = _weights(relaxation, side)
    copy = relaxation.promote * (link[:, None] if relaxation.is_background else on_device)
    return Prices(counted * on_device, counted * on_host, copy, slot)


def _slopes(relaxation: Relaxed, slots: Floats, multipliers: Multipliers, paths: Paths) -> Multipliers:
    """By how much what `paths` do breaks each of the limits; 0 for a multiplier that has no part in the prices."""
    device, host = relaxation.device_fixed + paths.device, relaxation.host_fixed + paths.host
    on_device, on_host = _weights(relaxation, multipliers.side)
    forward = relaxation.dense + (on_device * device + on_host * host).sum(axis=1)
    copies, residents = relaxation.promote * paths.num_copies, paths.num_residents
    on_side = 0 if relaxation.is_background else copies
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


def first_multipliers(relaxation: Relaxed, slots: Floats) -> tuple[Multipliers, Multipliers]:
    """Where the ascent begins, and the scale of each multiplier.

    A slot is worth what an expert saves in its next use, spread over the forwards from its last use to there. With B
    slots their price is the worth of one to the expert that comes after the first B.
    """
    F, L, _ = relaxation.shape
    side = np.full((F, L), 0.1)
    link = np.full(F, 0.5 if relaxation.is_background and relaxation.promote else 0.0)
    prices = _prices(relaxation, Multipliers(side, link, np.zeros((F, len(slots)))))
    slot, mean_saving = _first_slot_prices(relaxation, prices, slots)
    unit = SLOT_SCALE * max(float(slot.mean()), 1e-3 * mean_saving)
    scales = (np.full_like(side, SIDE_SCALE), np.full_like(link, LINK_SCALE), np.full_like(slot, unit))
    return Multipliers(side, link, slot), Multipliers(*scales)


def _first_slot_prices(relaxation: Relaxed, prices: Prices, slots: Floats) -> tuple[Floats, float]:
    """[F, L] or [F, 1], and what an expert saves on the mean in a forward."""
    F, L, E = relaxation.shape
    slot, total = np.empty((F, len(slots))), 0.0
    before = _last_uses(relaxation, prices)
    following, worth = np.full((L, E), F), np.zeros((L, E))  # the next use, and what it saves
    for number in reversed(range(len(relaxation.spans))):
        span, saving = relaxation.spans[number], _saving(relaxation, prices, number)
        total += float(saving.sum())
        last = _uses_before(saving, before[number], span.start)
        spread = np.empty_like(saving)
        for place in range(len(saving) - 1, -1, -1):
            is_used = saving[place] > 0
            following, worth = np.where(is_used, span.start + place, following), np.where(is_used, saving[place], worth)
            np.divide(worth, following - last[place], out=spread[place])
        slot[span] = _next_best(spread, slots)
    return slot, total / (F * L * E)


def _saving(relaxation: Relaxed, prices: Prices, number: int) -> Floats:
    """What it saves to have each expert on the device in the forwards of a part, at most what a copy costs."""
    span, (device, host) = relaxation.spans[number], relaxation.part(number)
    saving = prices.host[span, :, None] * host - prices.device[span, :, None] * device
    saved: Floats = np.clip(saving, 0, prices.copy[span, :, None])
    return saved


def _last_uses(relaxation: Relaxed, prices: Prices) -> list[Ints]:
    """For each part, the forward in which each expert was used last before it, [L, E]; -1 if never."""
    last, uses = np.full(relaxation.shape[1:], -1), []
    for number, span in enumerate(relaxation.spans):
        uses.append(last)
        saving = _saving(relaxation, prices, number)
        is_used = saving > 0
        latest = span.stop - 1 - np.argmax(is_used[::-1], axis=0)
        last = np.where(is_used.any(axis=0), latest, last)
    return uses


def _uses_before(saving: Floats, last: Ints, start: int) -> Ints:
    """The forward in which each expert was used last before each one of a part that begins at `start`, [f, L, E].

    `last` [L, E] is that before the part.
    """
    forward = start + np.arange(len(saving))[:, None, None]
    used = np.maximum.accumulate(np.where(saving > 0, forward, -1), axis=0)
    return np.concatenate([last[None], np.maximum(used[:-1], last)])


def _next_best(worth: Floats, slots: Floats) -> Floats:
    """The (B + 1)-th largest worth in each layer of B slots, or in all that share them; 0 if nobody is left."""
    groups = worth.reshape(len(worth), len(slots), -1)
    ordered = np.sort(groups, axis=2)[:, :, ::-1]
    num_experts = groups.shape[2]
    place = np.minimum(slots, num_experts - 1).astype(np.int64)
    next_best: Floats = ordered[:, np.arange(len(slots)), place] * (slots < num_experts)
    return next_best
