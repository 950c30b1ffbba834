"""How sure TIDE's programme can be of its two curves and of its interval, by drawing other sequences.

The Jacobian at the optimum gives bands as well, but not honest ones: it takes every point of a curve for a measurement
of its own. All points come from the same few sequences, whose steps resemble each other, and what is off the curve is
off because the curve has another form. So bands are those of the bootstrap over sequences, and that of d by the
Jacobian is only there to compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidesim.planner.curves import asymptotic_drift, missed_after
from tidesim.planner.resampling import LEVEL, Interval, caution, intervals_of
from tidesim.planner.tide_samples import Curves, Points

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """What other sequences would have given.

    Parameters
    ----------
    drift : where d lies. by_jacobian : where the Jacobian at the optimum would have it; None for a single lag.
    misses : where f(tau) lies, for tau = 1, 2, .., as far as it was measured.
    shares : (interval, share of the resamples that choose it), most often chosen first, of equals the shorter.
    alike : the intervals that cannot be told apart: those chosen most often, until `drift.level` is reached.
    costs_more : by how much the dearest of these exceeds the chosen one, by the programme itself.
    caution : what to bear in mind, "" if nothing.
    """

    num_sequences: int
    num_resamples: int
    drift: Interval
    by_jacobian: Interval | None
    misses: tuple[Interval, ...]
    shares: tuple[tuple[int, float], ...]
    alike: tuple[int, ...]
    costs_more: float
    caution: str


def bands_of(
    points: Points, curves: Curves, resampled: Curves, chosen: Sequence[int], costs_s: Floats, num_sequences: int
) -> Bands:
    """The bands around `curves`, fitted to `points`, one sample each.

    Parameters
    ----------
    resampled : curves of R resamples. chosen : the best interval of each.
    costs_s : what each interval costs by `curves`, [I].
    num_sequences : that were drawn from, at least 2.
    """
    measured = points.num_pairs[0] > 0
    lags = points.lags[measured]
    columns = np.column_stack([resampled.drift, missed_after(resampled.misses[:, None, :], lags)])
    drift, *misses = intervals_of(columns, num_sequences)
    plain = asymptotic_drift(
        float(curves.drift[0]), lags, points.replaced[0, measured], points.num_pairs[0, measured], LEVEL
    )
    shares = shares_of(chosen)
    alike = most_chosen(shares, LEVEL)
    least = float(costs_s.min())
    return Bands(
        num_sequences=num_sequences,
        num_resamples=len(chosen),
        drift=drift,
        by_jacobian=None if plain is None else Interval(*plain),
        misses=tuple(misses),
        shares=shares,
        alike=alike,
        costs_more=max(float(costs_s[interval - 1]) for interval in alike) / least - 1 if least else 0.0,
        caution=caution(num_sequences),
    )


def shares_of(chosen: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """(interval, its share of `chosen`), the most frequent first, of equals the shorter."""
    values, counts = np.unique(np.asarray(chosen), return_counts=True)
    ranked = sorted(zip(values.tolist(), counts.tolist(), strict=True), key=lambda item: (-item[1], item[0]))
    return tuple((interval, count / len(chosen)) for interval, count in ranked)


def most_chosen(shares: Sequence[tuple[int, float]], level: float) -> tuple[int, ...]:
    """The fewest of the intervals, ascending, that are chosen in `level` of all cases; `shares` as from `shares_of`."""
    reached, taken = 0.0, []
    for interval, share in shares:
        taken.append(interval)
        reached += share
        if reached >= level - 1e-12:
            break
    return tuple(sorted(taken))
