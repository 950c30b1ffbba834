"""Values that were measured, and how samples become one: medians, spreads, and the fit of copy times.

Every measurement alternates between the conditions that it compares, so that what else the machine does falls on all
of them alike, and throws its first round away: threads start there, pages are touched and code is compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Self, TypeVar

import numpy as np
from scipy.optimize import nnls

from tidesim.errors import ProfileError

MIN_ROUNDS = 3
Key = TypeVar("Key")
Sample = TypeVar("Sample")


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured quantity in seconds, bytes/s, FLOP/s or as a share, whatever the function that returns it says.

    Parameters
    ----------
    value : median of the samples, or the parameter of a fit.
    spread : distance between the quartiles of the samples, as a share of their median.
    repeats : number of samples, without what was thrown away.
    note : how it was measured.
    """

    value: float
    spread: float
    repeats: int
    note: str

    @classmethod
    def of(cls, samples: Sequence[float], note: str) -> Self:
        """The median of `samples`."""
        low, median, high = np.percentile(samples, (25, 50, 75))
        return cls(float(median), float((high - low) / median) if median else 0.0, len(samples), note)

    def per(self, work: float) -> "Measured":
        """`work` (bytes, FLOP) over a measured time."""
        return replace(self, value=work / self.value)

    def with_value(self, value: float, note: str = "") -> "Measured":
        """Another value that follows from this one; `note` is added to what this one says."""
        return replace(self, value=value, note=f"{self.note}; {note}" if note else self.note)

    @property
    def source(self) -> str:
        """All but the value in words, as the source of a figure in a profile."""
        return f"{self.note}; median of {self.repeats}, quartiles {100 * self.spread:.1f} % apart"


def sample(measures: Mapping[Key, Callable[[], Sample]], repeats: int, limit_s: float) -> dict[Key, list[Sample]]:
    """Samples of each measure, taken in turn, round after round.

    Parameters
    ----------
    measures : name -> what takes one sample.
    repeats : rounds, without the first one, which is thrown away.
    limit_s : no round begins later than this, but for the first `MIN_ROUNDS` of them.
    """
    for measure in measures.values():
        measure()
    samples: dict[Key, list[Sample]] = {name: [] for name in measures}
    end_s = perf_counter() + limit_s
    for number in range(max(repeats, MIN_ROUNDS)):
        if number >= MIN_ROUNDS and perf_counter() > end_s:
            break
        for name, measure in measures.items():
            samples[name].append(measure())
    return samples


def seconds(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start_s = perf_counter()
    run()
    return perf_counter() - start_s


def seconds_per_call(run: Callable[[], object], num_calls: int) -> float:
    """Seconds of one of many calls in a row, for what is too short to be timed alone."""

    def run_all() -> None:
        for _ in range(num_calls):
            run()

    return seconds(run_all) / num_calls


# --- copies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CopyFit:
    """A path that bytes are copied over: a copy takes latency [s] + bytes / bandwidth [bytes/s]."""

    bytes_per_s: Measured
    latency_s: Measured


def fit_copies(samples: Mapping[int, Sequence[float]], note: str) -> CopyFit:
    """Latency and bandwidth that fit copies of many sizes best.

    The squares of *relative* errors are summed: else a few large copies would drown all small ones, and the latency
    would come out as whatever they leave over. Neither parameter can be negative.

    Parameters
    ----------
    samples : bytes -> seconds of copies of that size; two sizes at least.
    note : how they were measured.

    Raise ProfileError if large copies took no longer than small ones, so that there is no bandwidth to speak of.
    """
    by_size = {size: Measured.of(times, note) for size, times in samples.items()}
    sizes = np.array(list(by_size), np.float64)
    times = np.array([measured.value for measured in by_size.values()])
    # In units of the largest copy, so that both columns of the matrix are of the same order.
    unit_s, unit_bytes = times.max(), sizes.max()
    (latency, slope), _ = nnls(
        np.stack((unit_s / times, sizes / unit_bytes * unit_s / times), axis=1), np.ones(len(sizes))
    )
    if slope <= 0:
        raise ProfileError(
            f"{note}: copies of {int(sizes.max())} bytes took no longer than copies of {int(sizes.min())}; "
            "calibrate again when the machine does nothing else."
        )
    latency_s, bytes_per_s = latency * unit_s, unit_bytes / (slope * unit_s)
    errors = np.abs((latency_s + sizes / bytes_per_s) / times - 1)
    whole = f"{note}; fitted to {len(sizes)} sizes from {int(sizes.min())} to {int(sizes.max())} bytes"
    fit_note = f"{whole}, off by {100 * np.median(errors):.1f} % (median) and {100 * errors.max():.1f} % (largest)"
    spread = float(np.median([measured.spread for measured in by_size.values()]))
    repeats = min(measured.repeats for measured in by_size.values())
    return CopyFit(
        Measured(float(bytes_per_s), spread, repeats, fit_note), Measured(float(latency_s), spread, repeats, fit_note)
    )
