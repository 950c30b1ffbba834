"""Where the time of a measured run goes, in the parts that a simulated run has too."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any, NamedTuple

from tidesim.result import PARTS, Interval

# What of the main story keeps the device busy; the other parts are waits and bookkeeping.
ON_DEVICE = ("dense", "device")


class Span(NamedTuple):
    """Something that a worker did, by the clock of the machine [ns]."""

    resource: str
    name: str
    start_ns: int
    end_ns: int
    layer: int | None


class _Forward(NamedTuple):
    """When a forward began: by the machine's clock, by the run's own, and where its first interval stands."""

    machine_ns: int
    run_ns: int


class Times:
    """Adds up the parts of a run, forward by forward: what lies between two stamps belongs to one part.

    The clock of a run stands still between forwards, so its makespan is the sum of all parts.

    Parameters
    ----------
    num_layers : L.
    is_detailed : keep every interval, for a timeline.
    """

    def __init__(self, num_layers: int, is_detailed: bool = False) -> None:
        self.parts_ns = {layer: dict.fromkeys(PARTS, 0) for layer in (*range(num_layers), None)}
        self.makespan_ns = 0
        self._is_detailed = is_detailed
        self._forwards: list[_Forward] = []
        self._intervals: list[Interval] = []
        self._stamps: list[Any] = []
        self._labels: list[tuple[str, int | None]] = []

    def begin(self, stamp: Any) -> None:
        """A forward begins."""
        self._stamps, self._labels = [stamp], []
        self._forwards.append(_Forward(perf_counter_ns(), self.makespan_ns))

    def passed(self, part: str, layer: int | None, stamp: Any) -> None:
        """What ran since the last stamp was `part`, in `layer` or (None) outside of the MoE layers."""
        self._stamps.append(stamp)
        self._labels.append((part, layer))

    def end(self, part: str, layer: int | None, stamp: Any, elapsed_ns: Callable[[Sequence[Any]], list[int]]) -> None:
        """The forward is done; its last interval was `part`. `elapsed_ns` makes durations of stamps."""
        self.passed(part, layer, stamp)
        for (name, where), duration_ns in zip(self._labels, elapsed_ns(self._stamps), strict=True):
            self.parts_ns[where][name] += duration_ns
            if self._is_detailed and name in ON_DEVICE and duration_ns:
                end_ns = self.makespan_ns + duration_ns
                what = "experts" if name == "device" else name
                self._intervals.append(
                    Interval("device", what, self.makespan_ns, end_ns, len(self._forwards) - 1, where)
                )
            self.makespan_ns += duration_ns

    @property
    def device_ns(self) -> int:
        """How long the device was at work."""
        return sum(parts[name] for parts in self.parts_ns.values() for name in ON_DEVICE)

    def timeline(self, spans: Sequence[Span]) -> list[Interval]:
        """Who ran when, by the clock of the run, in order of their starts: the device, and the workers' `spans`."""
        begins = [forward.machine_ns for forward in self._forwards]
        intervals = list(self._intervals)
        for span in spans:
            number = bisect_right(begins, span.start_ns) - 1
            if number < 0:
                continue  # before the run: the first experts were loaded
            shift_ns = self._forwards[number].run_ns - self._forwards[number].machine_ns
            start_ns = span.start_ns + shift_ns
            end_ns = min(span.end_ns + shift_ns, self.makespan_ns)
            if start_ns < end_ns:
                intervals.append(Interval(span.resource, span.name, start_ns, end_ns, number, span.layer))
        return sorted(intervals, key=lambda interval: interval.start_ns)
