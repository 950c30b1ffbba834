"""Values that were measured, and how samples become one: medians, spreads, and the fit of copy times.

Every measurement alternates between the conditions that it compares, so that what else the machine does falls on all
of them alike, and throws its first round away: threads start there, pages are touched and code is compiled.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Self, TypeVar

import numpy as np
from scipy.optimize import nnls

from tidesim.errors import ProfileError

MIN_ROUNDS = 3
# Other processes may use so many cores, or so much of all cores, before a round counts as disturbed.
_CALM_CORES, _CALM_SHARE = 0.25, 0.1
_SHORT_S = 0.05  # some ticks of the clock that the system counts busy time with
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


class OtherProcesses:
    """How busy all others keep the cores, from when this is made on; for systems that have /proc/stat."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._file = root / "proc/stat"
        self._start = self._now()

    def cores(self) -> float | None:
        """Cores that were busy on average with what is not this process.

        None if the system does not tell, or counts too coarsely for so short a time.
        """
        start, end = self._start, self._now()
        if start is None or end is None or end[1] - start[1] < _SHORT_S:
            return None
        return max(0.0, (end[0] - start[0]) / (end[1] - start[1]))

    def _now(self) -> tuple[float, float] | None:
        """Seconds that cores have spent on others since the system started, and seconds since then."""
        try:
            ticks = [int(word) for word in self._file.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = ticks[:8]
        own = os.times()
        busy_s = (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
        return busy_s - own.user - own.system, perf_counter()


def sample(measures: Mapping[Key, Callable[[], Sample]], repeats: int, limit_s: float) -> dict[Key, list[Sample]]:
    """Samples of each measure, taken in turn, round after round.

    Rounds beside busy other processes say little about the machine. They are left out, and further ones taken while
    there is time, twice as much of it if need be. Where fewer than `MIN_ROUNDS` were calm even so, the calmest ones are
    kept, as many as asked for.

    Parameters
    ----------
    measures : name -> what takes one sample.
    repeats : rounds to keep, without the first one, which is thrown away.
    limit_s : no round begins later than this (twice this while `MIN_ROUNDS` calm ones are missing), but for the first
        `MIN_ROUNDS` of them.
    """
    for measure in measures.values():
        measure()
    rounds: list[tuple[float, dict[Key, Sample]]] = []
    num_calm, calm_cores = 0, max(_CALM_CORES, _CALM_SHARE * (os.cpu_count() or 1))
    start_s = perf_counter()
    while num_calm < repeats:
        allowed_s = limit_s if num_calm >= MIN_ROUNDS else 2 * limit_s
        if len(rounds) >= MIN_ROUNDS and perf_counter() - start_s > allowed_s:
            break
        others = OtherProcesses()
        taken = {name: measure() for name, measure in measures.items()}
        rounds.append((others.cores() or 0.0, taken))
        num_calm += rounds[-1][0] <= calm_cores
    by_calm = sorted(range(len(rounds)), key=lambda number: rounds[number][0])
    kept = sorted(by_calm[: num_calm if num_calm >= MIN_ROUNDS else repeats])
    return {name: [rounds[number][1][name] for number in kept] for name in measures}


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
