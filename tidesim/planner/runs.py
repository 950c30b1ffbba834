"""The runs that planning needs, each timed once, on several processes at a time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from tidesim.execution import Execution
from tidesim.hardware import Hardware
from tidesim.lending import Lent
from tidesim.moe import MoEConfig
from tidesim.policies import Policy, policy
from tidesim.result import RunResult
from tidesim.timing import timed
from tidesim.workers import Progress, Workers
from tidesim.workload import Workload

REFRESHING = ("tide", "tide-as-coded")


class Case(NamedTuple):
    """One run: `policy` with these budgets and intervals, one per layer, on one part of the sequences.

    `interval` is None for a policy that never refreshes.
    """

    policy: str
    budget: tuple[int, ...]
    interval: tuple[int, ...] | None
    sequences: str

    @classmethod
    def uniform(cls, policy: str, budget: int, interval: int | None, sequences: str, num_layers: int) -> Self:
        """The same budget and interval in all layers."""
        intervals = None if interval is None else (interval,) * num_layers
        return cls(policy, (budget,) * num_layers, intervals, sequences)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """What all runs of one plan share.

    Parameters
    ----------
    workloads : the parts of the sequences, by name.
    popularity : [L, E], tokens per expert over the training sequences, for policies that want to know.
    tuning_popularity : the same over the profiled sequences alone, for runs on training sequences.
    held_out : name of the part that is not of the training sequences.
    """

    workloads: Mapping[str, Workload]
    popularity: npt.NDArray[np.int64]
    tuning_popularity: npt.NDArray[np.int64]
    held_out: str
    model: MoEConfig
    hardware: Hardware
    execution: Execution
    seed: int

    def run(self, case: Case) -> RunResult:
        """Time one case. Whether it fits the device is not asked: a table may hold more than fits."""
        popularity = self.popularity if case.sequences == self.held_out else self.tuning_popularity
        return timed(
            self.workloads[case.sequences],
            self.model,
            self.hardware,
            make_policy(case.policy, case.interval, popularity),
            budget=case.budget,
            execution=self.execution,
            seed=self.seed,
            is_memory_checked=False,
        )


def make_policy(name: str, interval: tuple[int, ...] | None, popularity: npt.NDArray[np.int64]) -> Policy:
    """The policy called `name`; `interval` goes to those that refresh, `popularity` to the static one."""
    if name in REFRESHING:
        return policy(name, refresh_interval=interval)
    return policy(name, popularity=popularity) if name == "static" else policy(name)


class Runs:
    """Times cases and remembers their results; use it in a `with` statement.

    Parameters
    ----------
    workers : see `Workers`.
    """

    def __init__(self, setting: Setting, *, workers: int | None = None, progress: Progress | None = None) -> None:
        self.setting = setting
        self._progress = progress
        self._results: dict[Case, RunResult] = {}
        self._lent = Lent(setting.workloads)
        self._workers = Workers(replace(setting, workloads=self._lent), workers)

    def __enter__(self) -> Self:
        self._lent.__enter__()
        self._workers.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._workers.__exit__(kind, error, tb)
        self._lent.__exit__(kind, error, tb)

    def results(self, cases: Iterable[Case]) -> list[RunResult]:
        """The result of each case, in order; only those not asked for before are simulated."""
        wanted = list(cases)
        new = [case for case in dict.fromkeys(wanted) if case not in self._results]
        num_known = len(self._results) + len(new)
        for case, result in zip(new, self._workers.map(Setting.run, new), strict=True):
            self._results[case] = result
            if self._progress is not None:
                self._progress(len(self._results), num_known)
        return [self._results[case] for case in wanted]

    def result(self, case: Case) -> RunResult:
        """The result of one case."""
        return self.results([case])[0]

    @property
    def num_simulated(self) -> int:
        """Runs simulated so far."""
        return len(self._results)
