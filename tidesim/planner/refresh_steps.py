"""Which steps of a block to refresh, rather than how often: the shortest path, and whether it is worth it.

What a step of a block costs depends on when the last refresh was, so the best steps are a shortest path over (last
refresh, step). `StepCosts` has the lengths, and the path is exact for them, for each layer or for all together. They
only resemble what a run takes, as background copies share one link. So from there on all is replayed: steps are
dropped, added and shifted as long as that is faster on the training sequences; layers take turns, so that their copies
do not all ask for the link in the same forward; and what comes of it is held against every constant interval.

Letters: L MoE layers, S steps of the longest block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tidesim import replay
from tidesim.execution import Execution
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.paper_run import RunSettings
from tidesim.policies import policy
from tidesim.policies.rules import AnySteps, Schedule
from tidesim.replay.step_costs import Ints, StepCosts
from tidesim.result import RunResult
from tidesim.timing import timed
from tidesim.workload import Workload

_NEVER_NS = 2**62
MAX_RUNS = 64


# --- the path ---


def shortest_path(keep_ns: Ints, refresh_ns: Ints) -> tuple[int, ...]:
    """The refresh steps with the least total, exactly, of costs [S, S] as `StepCosts` has them for a layer.

    The least over what came before is kept for each step of the last refresh, so it takes S^2 additions.
    """
    num_steps = len(keep_ns)
    best_ns = np.full(num_steps + 1, _NEVER_NS, np.int64)  # by last refresh
    best_ns[0] = 0
    before = []
    for step in range(num_steps):
        refreshed_ns = best_ns[: step + 1] + refresh_ns[: step + 1, step]
        before.append(int(np.argmin(refreshed_ns)))
        best_ns[: step + 1] += keep_ns[: step + 1, step]
        best_ns[step + 1] = refreshed_ns[before[-1]]
    steps, last = [], int(np.argmin(best_ns))
    while last:
        steps.append(last - 1)
        last = before[last - 1]
    return tuple(reversed(steps))


def common_steps(costs: StepCosts) -> tuple[int, ...]:
    """The best steps that are the same for all layers."""
    return shortest_path(costs.keep_ns.sum(axis=0), costs.refresh_ns.sum(axis=0))


def steps_by_layer(costs: StepCosts) -> tuple[tuple[int, ...], ...]:
    """The best steps of each layer."""
    return tuple(map(shortest_path, costs.keep_ns, costs.refresh_ns))


def intervals_by_layer(costs: StepCosts) -> tuple[int, ...]:
    """The best constant interval of each layer, the longest of equals."""
    intervals = range(costs.num_steps, 0, -1)
    times_ns = [costs.time_ns(Schedule(interval)) for interval in intervals]
    return tuple(intervals[number] for number in np.argmin(times_ns, axis=0).tolist())


def in_turn(interval: int, num_layers: int, num_steps: int) -> tuple[tuple[int, ...], ...]:
    """Every layer each `interval` steps, but not all of them on the same: layer l begins at step l mod `interval`."""
    return tuple(tuple(range(layer % interval, num_steps, interval)) for layer in range(num_layers))


# --- the neighbourhood ---


def neighbours(steps: tuple[int, ...], num_steps: int) -> Iterator[tuple[int, ...]]:
    """`steps` with one of them dropped, shifted by one, or added, all within 0 .. `num_steps` - 1."""
    for step in range(num_steps):
        if step not in steps:
            yield tuple(sorted({*steps, step}))
            continue
        rest = set(steps) - {step}
        yield tuple(sorted(rest))
        for beside in (step - 1, step + 1):
            if 0 <= beside < num_steps and beside not in steps:
                yield tuple(sorted({*rest, beside}))


def climb(
    start: tuple[int, ...],
    num_steps: int,
    time_ns: Callable[[tuple[int, ...]], int],
    expected_ns: Callable[[tuple[int, ...]], int],
    max_runs: int,
) -> tuple[int, ...]:
    """From `start` to a faster neighbour, again and again, until none is faster or `max_runs` of them were timed.

    Those with the least `expected_ns` are timed first, and the first that is faster is taken.
    """
    best, best_ns = start, time_ns(start)
    seen = {start}
    while True:
        unseen = [steps for steps in neighbours(best, num_steps) if steps not in seen]
        for steps in sorted(set(unseen), key=lambda steps: (expected_ns(steps), steps)):
            if len(seen) > max_runs:
                return best
            seen.add(steps)
            tried_ns = time_ns(steps)
            if tried_ns < best_ns:
                best, best_ns = steps, tried_ns
                break
        else:
            return best


# --- whether it is worth it ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshes:
    """A way to refresh, and what it comes to on the training sequences and on those held out, if there are any."""

    schedule: Schedule
    training: RunResult
    held_out: RunResult | None

    def to_dict(self) -> dict[str, object]:
        """The schedule and both throughputs."""
        return {
            "refresh_interval": self.schedule.refresh_interval,
            "refresh_steps": self.schedule.stated_steps,
            "training_tok_per_s": self.training.tok_per_s,
            "held_out_tok_per_s": None if self.held_out is None else self.held_out.tok_per_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshSteps:
    """Listed refresh steps beside constant intervals, for one policy and budget on one machine.

    Parameters
    ----------
    intervals : every constant interval that is the same for all layers, ascending.
    intervals_by_layer : the interval that the costs say is best for each layer.
    path : the shortest path for all layers together, as it is, and
    climbed : after its neighbours, and those of the best interval, were tried.
    by_layer : the shortest path of each layer.
    staggered : layers refreshed in turn, at the interval where that is fastest; see `in_turn`.
    num_runs : runs on training sequences that it took.
    """

    policy: str
    intervals: tuple[Refreshes, ...]
    intervals_by_layer: Refreshes
    path: Refreshes
    climbed: Refreshes
    by_layer: Refreshes
    staggered: Refreshes
    num_runs: int

    @property
    def constant(self) -> Refreshes:
        """The constant interval, of all layers or by layer, that is fastest on the training sequences."""
        return min((*self.intervals, self.intervals_by_layer), key=lambda one: one.training.makespan_ns)

    @property
    def chosen(self) -> Refreshes:
        """The listed steps that are fastest on the training sequences."""
        ways = (self.climbed, self.path, self.by_layer, self.staggered)
        return min(ways, key=lambda one: one.training.makespan_ns)

    @property
    def training_gain(self) -> float:
        """Throughput of the chosen steps over that of the fastest constant interval, less 1: training sequences."""
        return self.constant.training.makespan_ns / self.chosen.training.makespan_ns - 1

    @property
    def held_out_gain(self) -> float | None:
        """The same on held-out sequences, against whichever interval turns out fastest there; None without any."""
        runs = [one.held_out for one in (*self.intervals, self.intervals_by_layer) if one.held_out is not None]
        if self.chosen.held_out is None:
            return None
        return min(run.makespan_ns for run in runs) / self.chosen.held_out.makespan_ns - 1

    @property
    def is_better(self) -> bool:
        """Whether listed steps beat every constant interval, on training and on held-out sequences."""
        return self.training_gain > 0 and (self.held_out_gain is None or self.held_out_gain > 0)

    @property
    def line(self) -> str:
        """All of it in a sentence."""
        verdict = "faster" if self.is_better else "not faster"
        held_out = "" if self.held_out_gain is None else f", {100 * self.held_out_gain:+.2f} % on sequences held out"
        return (
            f"{_what(self.chosen.schedule)}: {verdict} than every constant interval, {100 * self.training_gain:+.2f} % "
            f"to {_what(self.constant.schedule)} on the sequences planned on{held_out}"
        )

    def to_dict(self) -> dict[str, object]:
        """Every way to refresh, and the verdict, ready for JSON."""
        ways = ("constant", "chosen", "intervals_by_layer", "path", "climbed", "by_layer", "staggered")
        return {
            "policy": self.policy,
            **{way: getattr(self, way).to_dict() for way in ways},
            "intervals": [one.to_dict() for one in self.intervals],
            "training_gain": self.training_gain,
            "held_out_gain": self.held_out_gain,
            "is_better": self.is_better,
            "num_runs": self.num_runs,
            "line": self.line,
        }


def refresh_steps(
    training: Workload,
    held_out: Workload | None,
    model: MoEConfig,
    hardware: Hardware,
    *,
    policy_name: str,
    budget: int | Sequence[int],
    execution: Execution,
    max_runs: int = MAX_RUNS,
) -> RefreshSteps:
    """Choose refresh steps by `training` alone, and hold them against constant intervals there and on `held_out`.

    Parameters
    ----------
    policy_name : "tide" or "tide-as-coded".
    budget : slots of each layer; whether they fit the device is not asked.
    max_runs : neighbours of a schedule that are replayed at most.

    Raise InputError as `Replayer.step_costs` does.
    """
    settings = RunSettings(budget=budget, execution=execution, is_memory_checked=False)
    timer = _Timer(model, hardware, policy_name, settings)
    costs = timer.costs(training)
    path, fastest = common_steps(costs), min(range(1, costs.num_steps + 1), key=timer.of_interval(training))
    climbed = climb(
        min(path, tuple(range(0, costs.num_steps, fastest)), key=timer.of_steps(training)),
        costs.num_steps,
        timer.of_steps(training),
        lambda steps: int(costs.time_ns(Schedule.of(None, steps)).sum()),
        max_runs,
    )
    turns = [in_turn(interval, costs.num_layers, costs.num_steps) for interval in range(1, costs.num_steps + 1)]

    def way(interval: int | Sequence[int] | None, steps: AnySteps | None = None) -> Refreshes:
        schedule = Schedule.of(interval, steps)
        scored = None if held_out is None else timer.run(held_out, schedule)
        return Refreshes(schedule=schedule, training=timer.run(training, schedule), held_out=scored)

    return RefreshSteps(
        policy=policy_name,
        intervals=tuple(map(way, range(1, costs.num_steps + 1))),
        intervals_by_layer=way(intervals_by_layer(costs)),
        path=way(None, path),
        climbed=way(None, climbed),
        by_layer=way(None, steps_by_layer(costs)),
        staggered=way(None, min(turns, key=timer.of_steps(training))),
        num_runs=timer.num_runs(training),
    )


class _Timer:
    """Times schedules on workloads, each once."""

    def __init__(self, model: MoEConfig, hardware: Hardware, policy_name: str, settings: RunSettings) -> None:
        self._model, self._hardware, self._policy_name, self._settings = model, hardware, policy_name, settings
        self._known: dict[tuple[Workload, Schedule], RunResult] = {}

    def costs(self, workload: Workload) -> StepCosts:
        """What each layer takes at each step, by its last refresh."""
        made = policy(self._policy_name)
        return replay.Replayer(workload).step_costs(self._model, self._hardware, made, **self._settings)

    def run(self, workload: Workload, schedule: Schedule) -> RunResult:
        """A run with this schedule."""
        key = (workload, schedule)
        if key not in self._known:
            params = {"refresh_interval": schedule.refresh_interval, "refresh_steps": schedule.refresh_steps}
            made = policy(self._policy_name, **params)
            self._known[key] = timed(workload, self._model, self._hardware, made, **self._settings)
        return self._known[key]

    def of_interval(self, workload: Workload) -> Callable[[int], int]:
        """How long a run with an interval takes."""
        return lambda interval: self.run(workload, Schedule(interval)).makespan_ns

    def of_steps(self, workload: Workload) -> Callable[[AnySteps], int]:
        """How long a run with refreshes at some steps takes."""
        return lambda steps: self.run(workload, Schedule.of(None, steps)).makespan_ns

    def num_runs(self, workload: Workload) -> int:
        """Runs on this workload so far."""
        return sum(known is workload for known, _ in self._known)


def _what(schedule: Schedule) -> str:
    """A schedule in words."""
    steps, interval = schedule.stated_steps, schedule.refresh_interval
    if steps is None:
        return "an interval for each layer" if isinstance(interval, tuple) else f"every {interval} steps"
    rows = schedule.refresh_steps or ()
    if len(set(rows)) > 1:
        lengths = list(map(len, rows))
        return f"at most {max(lengths)} refreshes a block, at steps of each layer's own"
    return f"refreshes at steps {','.join(map(str, rows[0]))}" if rows[0] else "no refresh at all"
