"""What TIDE's programme takes for granted, and whether the trace has it so: in numbers, and in one sentence each.

It has one drift at every age of a set, and one drift, one interval and one budget for all layers.

Letters: R resamples, A lags, L MoE layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidesim.planner.curves import fit_drift, replaced_after
from tidesim.planner.resampling import intervals_of
from tidesim.planner.tide_samples import Curves, Points, Samples

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SMALL_LOSS = 0.01  # of the programme's cost: less is not worth an interval for each layer
_NOISE = 2.0  # times what resampling alone would show; layers that differ by less are as good as alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumption:
    """One of them.

    Parameters
    ----------
    holds : None if the trace cannot tell.
    figures : what that was decided by.
    sentence : the same in words.
    """

    name: str
    holds: bool | None
    figures: Mapping[str, float]
    sentence: str


def assumptions_of(
    samples: Samples, times: Floats | None, points: Points, curves: Curves, copy_s: float, num_steps: int
) -> tuple[Assumption, ...]:
    """All of them, for the `curves` that were fitted to `points`; `times` [R, S] are the resamples, if there are any.

    Without resamples only what is no question of noise is decided.
    """
    drawn = None if times is None else samples.all_layers(times)
    alone = np.ones((1, samples.num_sequences))
    layers = samples.each_layer(alone)
    interval = int(curves.best(copy_s, samples.budget * samples.num_layers, num_steps)[0])
    made = [constant_drift(points, float(curves.drift[0]), drawn, samples.num_sequences)]
    if samples.num_layers > 1:
        by_layer = None if times is None else samples.each_layer(times)
        made.append(one_drift(layers, by_layer))
        made.append(one_interval(layers, copy_s, samples.budget, num_steps))
        made.append(one_budget(layers, by_layer, interval))
    return tuple(made)


def constant_drift(points: Points, drift: float, drawn: Points | None, num_sequences: int) -> Assumption:
    """Whether a set changes at the same rate at every age: the d that one step shows, and the d that several show.

    Several are as many as half as many pairs of steps lie apart as are neighbours. `points` has one sample.
    """
    num_pairs = points.num_pairs[0]
    far = int(np.flatnonzero(2 * num_pairs >= num_pairs[0])[-1]) + 1
    first, later = float(_rate(points, 1)[0]), float(_rate(points, far)[0])
    measured = num_pairs > 0
    off = (points.replaced[0] - replaced_after(drift, points.lags))[measured]
    num_runs, expected_runs = runs_of(off)
    figures = {
        "first": first,
        "later": later,
        "later_lag": float(far),
        "largest_residual": float(np.abs(off).max()),
        "runs": float(num_runs),
        "expected_runs": expected_runs,
    }
    off_by = f"the curve is off by up to {100 * figures['largest_residual']:.1f} % of the slots, " + (
        f"on the same side in {num_runs} runs where chance would give {expected_runs:.1f}"
    )
    seen = f"a set loses {100 * first:.2f} % in its first step and {100 * later:.2f} % a step over {far}"
    if drawn is None or far == 1 or not first:
        return Assumption(name="constant drift", holds=None, figures=figures, sentence=f"{seen}; {off_by}.")
    slower = intervals_of((_rate(drawn, far) - _rate(drawn, 1))[:, None], num_sequences)[0]
    figures |= {"difference_low": slower.low, "difference_high": slower.high}
    holds = 0.0 in slower
    verdict = "drift may be constant" if holds else "drift is not constant"
    return Assumption(name="constant drift", holds=holds, figures=figures, sentence=f"{verdict}: {seen}; {off_by}.")


def _rate(points: Points, lag: int) -> Floats:
    """The d that would replace so much of a set in `lag` steps, of each sample."""
    return np.asarray(1 - (1 - points.replaced[:, lag - 1]) ** (1 / lag))


def runs_of(residuals: Floats) -> tuple[int, float]:
    """Runs of residuals on the same side, and how many there would be on average if sides came in any order."""
    is_above = residuals > 0
    num_runs = 1 + int(np.count_nonzero(is_above[1:] != is_above[:-1]))
    num_above, num_all = int(np.count_nonzero(is_above)), len(is_above)
    return num_runs, 1 + 2 * num_above * (num_all - num_above) / num_all


def one_drift(layers: Points, by_layer: Points | None) -> Assumption:
    """Whether all layers drift alike; `layers` has one sample a layer, `by_layer` R of each."""
    drift = fit_drift(layers.lags, layers.replaced, layers.num_pairs)
    drawn = None if by_layer is None else fit_drift(by_layer.lags, by_layer.replaced, by_layer.num_pairs)
    least, most = _named(drift)
    seen = f"d is {drift.min():.4f} in layer {least} and {drift.max():.4f} in layer {most}"
    return _alike("one drift for all layers", drift, drawn, seen)


def one_budget(layers: Points, by_layer: Points | None, interval: int) -> Assumption:
    """Whether all layers make as good use of their slots: what a set misses that is `interval` steps old."""
    missed = layers.missed[:, interval - 1]
    drawn = None if by_layer is None else by_layer.missed[:, interval - 1]
    least, most = _named(missed)
    seen = (
        f"a set {interval} step{'s' * (interval > 1)} old misses {100 * missed.min():.0f} % of the slots' number in "
        f"layer {least} and {100 * missed.max():.0f} % in layer {most}"
    )
    return _alike("one budget for all layers", missed, drawn, seen)


def one_interval(layers: Points, copy_s: float, budget: int, num_steps: int) -> Assumption:
    """Whether one interval is nearly as good as each layer's own, by each layer's own curves and costs."""
    costs = np.add(*Curves.of(layers).costs_s(copy_s, budget, num_steps))  # [L, I]
    own, together = costs.min(axis=1).sum(), costs.sum(axis=0).min()
    intervals = costs.argmin(axis=1) + 1
    loss = float(together / own - 1) if own else 0.0
    figures = {"shortest": float(intervals.min()), "longest": float(intervals.max()), "loss": loss}
    spread = f"layers by themselves would choose intervals of {intervals.min()} to {intervals.max()}"
    if intervals.min() == intervals.max():
        spread = f"every layer by itself would choose an interval of {intervals.min()}"
    return Assumption(
        name="one interval for all layers",
        holds=loss <= _SMALL_LOSS,
        figures=figures,
        sentence=f"{spread}; one interval for all costs {100 * loss:.2f} % more by the programme.",
    )


def _named(values: Floats) -> tuple[int, int]:
    """The layers with the least and with the largest value."""
    return int(values.argmin()), int(values.argmax())


def _alike(name: str, values: Floats, drawn: Floats | None, seen: str) -> Assumption:
    """Whether layers have the same value, as far as resamples can tell.

    Their spread, a standard deviation over layers, is held against the one that sequences alone would give: how far
    layers move against each other from resample to resample. What moves all of them alike is no difference.
    """
    spread = float(values.std())
    figures = {"least": float(values.min()), "most": float(values.max()), "spread": spread}
    if drawn is None:
        return Assumption(name=name, holds=None, figures=figures, sentence=f"{seen}.")
    by_resample = drawn.reshape(-1, len(values))
    apart = by_resample - by_resample.mean(axis=1, keepdims=True)
    noise = float(np.sqrt(apart.var(axis=0).mean()))
    holds = spread <= _NOISE * noise
    verdict = "layers may be alike" if holds else "layers differ"
    sentence = f"{verdict}: {seen} (spread {spread:.4f}, of which sequences alone would give {noise:.4f})."
    return Assumption(name=name, holds=holds, figures=figures | {"noise": noise}, sentence=sentence)
