"""The runs that planning needs, each timed once.

A machine that the compiled replay can time takes milliseconds for a run, most of them without the GIL, so threads share
the runs. One whose device, host and copies slow each other down is for the event simulator, and its runs go to
processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from tidesim import replay
from tidesim.execution import Execution
from tidesim.hardware import Hardware
from tidesim.lending import Lent
from tidesim.moe import MoEConfig
from tidesim.policies import Policy, policy
from tidesim.policies.foresight import Learnt
from tidesim.result import RunResult
from tidesim.timing import by_sequence, timed
from tidesim.workers import Progress, Workers
from tidesim.workload import ForwardKind, Workload

REFRESHING = ("tide", "tide-as-coded")

Item = TypeVar("Item")
Outcomes = TypeVar("Outcomes")


class Case(NamedTuple):
    """One run: `policy` with these budgets and intervals, one per layer, on one part of the sequences.

    `interval` is None for a policy that never refreshes, and where there are `steps`: those of a block that each layer
    is refreshed on.
    """

    policy: str
    budget: tuple[int, ...]
    interval: tuple[int, ...] | None
    sequences: str
    steps: tuple[tuple[int, ...], ...] | None = None

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
    known : what policies may know of the training sequences.
    tuning : the same of the profiled sequences alone, for runs on training sequences.
    held_out : name of the part that is not of the training sequences.
    """

    workloads: Mapping[str, Workload]
    known: "Known"
    tuning: "Known"
    held_out: str
    model: MoEConfig
    hardware: Hardware
    execution: Execution
    seed: int

    def run(self, case: Case) -> "Outcome":
        """Time one case. Whether it fits the device is not asked: a table may hold more than fits."""
        workload = self.workloads[case.sequences]
        spent = np.zeros((workload.num_forwards, workload.num_layers + 1), np.int64)
        result = timed(
            workload,
            self.model,
            self.hardware,
            self.policy(case),
            spent=spent,
            budget=case.budget,
            execution=self.execution,
            seed=self.seed,
            is_memory_checked=False,
        )
        return Outcome(result, by_block(workload, spent), by_sequence(workload, spent))

    def policy(self, case: Case) -> Policy:
        """A policy object for a case, which knows no more than it may of the sequences that it is run on."""
        known = self.known if case.sequences == self.held_out else self.tuning
        return make_policy(case.policy, known, case.interval, case.steps)


class Outcome(NamedTuple):
    """What came of a run.

    Parameters
    ----------
    block_ns : int64 [blocks, L + 1], the time of each block by layer, and outside the layers.
    sequence_ns : the time of each sequence; sequences that run together are one.
    """

    result: RunResult
    block_ns: npt.NDArray[np.int64]
    sequence_ns: tuple[int, ...]

    @property
    def slowest_block_ns(self) -> int:
        """The time of the slowest block, from its first denoising step to its last forward."""
        return int(self.block_ns.sum(axis=1).max(initial=0))


def by_block(workload: Workload, spent: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`spent` [F, L + 1], added up over the forwards of each block; a prompt's prefill is none."""
    is_block = workload.kind != ForwardKind.PREFILL
    pairs = np.stack([workload.sequence, workload.block])[:, is_block]
    blocks, number = np.unique(pairs, axis=1, return_inverse=True)
    added = np.zeros((blocks.shape[1], spent.shape[1]), np.int64)
    np.add.at(added, number.ravel(), spent[is_block])
    return added


class Known(NamedTuple):
    """What policies know before a run: tokens that each expert got, [L, E], and what is used again."""

    popularity: npt.NDArray[np.int64]
    learnt: Learnt


def make_policy(
    name: str,
    known: Known,
    interval: tuple[int, ...] | None = None,
    steps: tuple[tuple[int, ...], ...] | None = None,
) -> Policy:
    """The policy called `name`.

    `interval` or `steps` go to those that refresh, and what is `known` to those that ask for it.
    """
    if name in REFRESHING:
        return policy(name, refresh_interval=interval, refresh_steps=steps)
    if name == "gain":
        return policy(name, corpus=known.learnt)
    return policy(name, popularity=known.popularity) if name == "static" else policy(name)


class Runs:
    """Times cases and remembers their results; use it in a `with` statement.

    Parameters
    ----------
    workers : threads if the replay can time the machine, else processes; see `Workers`.
    """

    def __init__(self, setting: Setting, *, workers: int | None = None, progress: Progress | None = None) -> None:
        self.setting = setting
        self._progress = progress
        self._outcomes: dict[Case, Outcome] = {}
        self._lent = Lent(setting.workloads)
        self._are_threads = not replay.is_contended(setting.hardware)
        shared = setting if self._are_threads else replace(setting, workloads=self._lent)
        self._workers = Workers(shared, workers, are_threads=self._are_threads)

    def __enter__(self) -> Self:
        self._lent.__enter__()
        self._workers.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._workers.__exit__(kind, error, tb)
        self._lent.__exit__(kind, error, tb)

    def outcomes(self, cases: Iterable[Case]) -> list[Outcome]:
        """What comes of each case, in order; only those not asked for before are run."""
        wanted = list(cases)
        new = [case for case in dict.fromkeys(wanted) if case not in self._outcomes]
        num_known = len(self._outcomes) + len(new)
        for case, outcome in zip(new, self._workers.map(Setting.run, new), strict=True):
            self._outcomes[case] = outcome
            if self._progress is not None:
                self._progress(len(self._outcomes), num_known)
        return [self._outcomes[case] for case in wanted]

    def each(self, work: Callable[[Item], Outcomes], items: Iterable[Item]) -> Iterator[Outcomes]:
        """`work(item)` for each item, in order: by the threads, if there are any."""
        if not self._are_threads:
            return map(work, items)
        return self._workers.map(lambda _, item: work(item), items)

    def result(self, case: Case) -> RunResult:
        """The result of one case."""
        return self.outcomes([case])[0].result

    def held_out(self, case: Case) -> RunResult | None:
        """The result of `case` on the held-out sequences, None if there are none."""
        held_out = self.setting.held_out
        return self.result(case._replace(sequences=held_out)) if held_out in self.setting.workloads else None

    @property
    def num_simulated(self) -> int:
        """Runs so far."""
        return len(self._outcomes)
