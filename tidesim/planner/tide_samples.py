"""What TIDE's programme is fitted to, for a trace as it is, for resampled ones, and for each layer by itself.

Letters: S sequences, N samples, A lags, L MoE layers, B budget, T denoising steps, I intervals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.planner.curves import fit_drift, fit_misses, missed_after, replaced_after

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Points(NamedTuple):
    """Measured points of N samples.

    Parameters
    ----------
    num_pairs : [N, A], pairs of steps behind a point.
    replaced, missed : [N, A], of a set that is so old, as shares of B; 0 where no pair of steps is.
    host_s : [N], seconds on the host per missed expert when the set is one step old; 0 if none is ever missed.
    """

    num_pairs: Floats
    replaced: Floats
    missed: Floats
    host_s: Floats

    @property
    def lags(self) -> Floats:
        """1, 2, .. A."""
        return np.arange(1, self.num_pairs.shape[1] + 1, dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Sums by sequence, of which every other trace of the same sequences is made up; see `replay.drift.Drift`."""

    num_pairs: Ints
    replaced: Ints
    missed: Ints
    late_ns: Ints
    budget: int

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.num_pairs)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.late_ns.shape[1])

    @property
    def num_lags(self) -> int:
        """A."""
        return int(self.num_pairs.shape[1])

    def all_layers(self, times: Floats) -> Points:
        """Means over all layers, when sequence s is there `times[n, s]` times in sample n."""
        return self._points(times, lambda sums: sums.sum(axis=-1, keepdims=True))

    def each_layer(self, times: Floats) -> Points:
        """The same of each layer: the samples of the first one, N * L in all."""
        return self._points(times, lambda sums: sums)

    def _points(self, times: Floats, merged: Callable[[Ints], Ints]) -> Points:
        late_ns = times @ merged(self.late_ns)  # [N, L], L being 1 if all are merged
        num_merged = self.num_layers // late_ns.shape[1]
        num_pairs = np.repeat(times @ self.num_pairs, late_ns.shape[1], axis=0)
        slots = np.maximum(num_pairs, 1) * num_merged * self.budget
        replaced, missed = (_by_lag(times, merged(sums)) for sums in (self.replaced, self.missed))
        num_late = missed[:, :1].sum(axis=1)
        host_s = late_ns.ravel() / np.maximum(num_late, 1) / 1e9
        return Points(num_pairs, replaced / slots, missed / slots, host_s)


def _by_lag(times: Floats, sums: Ints) -> Floats:
    """`sums` [S, A, L] over the sequences of each sample, [N * L, A]."""
    drawn = np.tensordot(times, sums, axes=1)  # [N, A, L]
    return np.moveaxis(drawn, 1, 2).reshape(len(times) * sums.shape[2], sums.shape[1])


class Curves(NamedTuple):
    """The fitted programmes of N samples: d [N], (a, b, c) [N, 3] and C_cpu [N]."""

    drift: Floats
    misses: Floats
    host_s: Floats

    @classmethod
    def of(cls, points: Points) -> "Curves":
        """Least squares, weighted by pairs of steps."""
        lags = points.lags
        return cls(
            fit_drift(lags, points.replaced, points.num_pairs),
            fit_misses(lags, points.missed, points.num_pairs),
            points.host_s,
        )

    def costs_s(self, copy_s: float, num_slots: int, num_steps: int) -> tuple[Floats, Floats]:
        """Both terms of the programme, [N, I] each, for the intervals 1, 2, .. and blocks of `num_steps`."""
        intervals = np.arange(1, max(2, num_steps), dtype=np.float64)
        scale = num_slots * num_steps
        copy = copy_s * scale / intervals * replaced_after(self.drift[:, None], intervals)
        host = self.host_s[:, None] * scale * missed_after(self.misses[:, None, :], intervals)
        return copy, host

    def best(self, copy_s: float, num_slots: int, num_steps: int) -> Ints:
        """The interval with the least cost of each sample, the smallest of equals, [N]."""
        costs = np.add(*self.costs_s(copy_s, num_slots, num_steps))
        best: Ints = np.argmin(costs, axis=1) + 1
        return best
