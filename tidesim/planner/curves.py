"""The two curves of TIDE's programme, each fitted to many samples at once by weighted least squares.

    1 - (1 - d)^tau, with d in 0..1,  and  f(tau) = a + b * tau^c, with a, b >= 0 and c in 0..2.

Both have one parameter that is not linear. A grid finds the neighbourhood of its best value, so that no start is needed
and no fit ends beside it; a few steps find the value. Resampled traces are fitted as the trace is, hundreds at a time.

Letters: N samples, A lags, G places of a grid.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_DRIFTS = np.concatenate([[0.0], np.logspace(-6, 0, 241)])
_NEWTON_STEPS, _SETTLED = 12, 1e-13  # the last of which moves nobody any further
_EXPONENTS = np.linspace(0.0, 2.0, 41)
_GOLDEN, _GOLDEN_STEPS = (np.sqrt(5) - 1) / 2, 32


def replaced_after(drift: npt.ArrayLike, lags: npt.ArrayLike) -> Floats:
    """1 - (1 - d)^tau."""
    return np.asarray(1.0 - (1.0 - np.asarray(drift, np.float64)) ** np.asarray(lags, np.float64))


def missed_after(misses: npt.ArrayLike, lags: npt.ArrayLike) -> Floats:
    """a + b * tau^c, (a, b, c) being the last axis of `misses`."""
    start, growth, exponent = np.moveaxis(np.asarray(misses, np.float64), -1, 0)
    return np.asarray(start + growth * np.asarray(lags, np.float64) ** exponent)


def fit_drift(lags: Floats, replaced: Floats, weight: Floats) -> Floats:
    """d of each sample, [N]; `lags` [A], `replaced` and `weight` [N, A]. It is 0 without any weight."""
    grid = replaced_after(_DRIFTS[:, None], lags)  # [G, A]
    place = np.argmin(weight @ (grid**2).T - 2 * (weight * replaced) @ grid.T, axis=1)
    low, high = _DRIFTS[np.maximum(place - 2, 0)], _DRIFTS[np.minimum(place + 2, len(_DRIFTS) - 1)]
    drift: Floats = _DRIFTS[place]
    for _ in range(_NEWTON_STEPS):
        left = (1 - drift)[:, None]
        slope = lags * left ** (lags - 1)
        bend = -lags * (lags - 1) * left ** np.maximum(lags - 2, 0)
        off = weight * (1 - left**lags - replaced)
        gauss = (weight * slope**2).sum(axis=1)
        newton = gauss + (off * bend).sum(axis=1)
        curvature = np.where(newton > 0, newton, gauss)
        step = (off * slope).sum(axis=1) / np.where(curvature > 0, curvature, 1.0)
        before, drift = drift, np.clip(drift - step, low, high)
        if np.all(np.abs(drift - before) <= _SETTLED):
            break
    return drift


def fit_misses(lags: Floats, missed: Floats, weight: Floats) -> Floats:
    """(a, b, c) of each sample, [N, 3]; arguments as in `fit_drift`."""
    errors = [_straight(lags, missed, weight, np.full(len(missed), exponent))[2] for exponent in _EXPONENTS]
    best = _EXPONENTS[np.argmin(errors, axis=0)]
    low, high = np.maximum(best - _EXPONENTS[1], 0.0), np.minimum(best + _EXPONENTS[1], 2.0)
    for _ in range(_GOLDEN_STEPS):
        inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        is_low = _straight(lags, missed, weight, inner)[2] <= _straight(lags, missed, weight, outer)[2]
        low, high = np.where(is_low, low, inner), np.where(is_low, outer, high)
    exponent = (low + high) / 2
    start, growth, _ = _straight(lags, missed, weight, exponent)
    return np.stack([start, growth, exponent], axis=1)


def _straight(lags: Floats, missed: Floats, weight: Floats, exponent: Floats) -> tuple[Floats, Floats, Floats]:
    """The best a and b for a given c, and the sum of squares that they leave; [N] each."""
    power = lags ** exponent[:, None]
    total = np.maximum(weight.sum(axis=1), 1e-300)
    mean_power, mean = (weight * power).sum(axis=1) / total, (weight * missed).sum(axis=1) / total
    wide = power - mean_power[:, None]
    spread = (weight * wide**2).sum(axis=1)
    # For c near 0 all powers are alike, and any growth would do.
    is_bent = spread > 1e-12 * total
    growth = np.where(is_bent, (weight * wide * missed).sum(axis=1) / np.where(is_bent, spread, 1.0), 0.0)
    growth = np.maximum(growth, 0.0)
    start = mean - growth * mean_power
    from_zero = (weight * power * missed).sum(axis=1) / np.maximum((weight * power**2).sum(axis=1), 1e-300)
    is_below = start < 0
    start, growth = np.where(is_below, 0.0, start), np.where(is_below, from_zero, growth)
    left = missed - start[:, None] - growth[:, None] * power
    return start, growth, (weight * left**2).sum(axis=1)


def r_squared(measured: Floats, fitted: Floats, weight: Floats) -> float:
    """Share of the weighted variance that a fit explains; all [A]."""
    mean = np.average(measured, weights=weight)
    total = float(np.sum(weight * (measured - mean) ** 2))
    left = float(np.sum(weight * (measured - fitted) ** 2))
    if total <= 1e-20 * float(np.sum(weight)):
        return 1.0 if left <= 1e-12 * float(np.sum(weight)) else 0.0
    return 1.0 - left / total


def asymptotic_drift(
    drift: float, lags: Floats, replaced: Floats, weight: Floats, level: float
) -> tuple[float, float] | None:
    """The band of d if all lags were measured independently: from the Jacobian at the optimum; None for one lag.

    The variance of a point is taken from how far the points are off the curve, as `scipy.optimize.curve_fit` does.
    """
    from scipy import special  # it takes a while to import

    slope = lags * (1 - drift) ** (lags - 1)
    freedom, gauss = len(lags) - 1, float(np.sum(weight * slope**2))
    if freedom < 1 or gauss <= 0:
        return None
    left = float(np.sum(weight * (replaced_after(drift, lags) - replaced) ** 2))
    reach = float(special.stdtrit(freedom, (1 + level) / 2)) * float(np.sqrt(left / freedom / gauss))
    return max(0.0, drift - reach), min(1.0, drift + reach)
