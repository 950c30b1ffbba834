"""What planning came to: the plan, what it is expected to do, and what it was compared with."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest

import numpy as np

from tidesim.errors import PlanError
from tidesim.execution import DeviceMemory
from tidesim.planner.explaining import Explanation
from tidesim.planner.integer_programme import SolverReport
from tidesim.planner.listed_steps import ListedSteps
from tidesim.planner.plan_file import Plan
from tidesim.planner.scoring import Judgement, Regret
from tidesim.planner.tide_programme import TideProgramme
from tidesim.result import RunResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which sequences a plan is made on, and which it is scored on; drawn with `seed`.

    Parameters
    ----------
    training : the plan is made on these.
    profiled : of them, those that expert popularity is counted on while choosing; the others are simulated. A static
        placement that were tried on the sequences that it was counted on would look better than it is. A single
        training sequence is counted on and simulated all the same.
    held_out : the plan is scored on these.
    """

    training: tuple[int, ...]
    profiled: tuple[int, ...]
    held_out: tuple[int, ...]
    seed: int

    @property
    def tuned(self) -> tuple[int, ...]:
        """The training sequences that candidates are simulated on."""
        return tuple(sequence for sequence in self.training if sequence not in self.profiled)


def split_sequences(num_sequences: int, held_out_share: float, seed: int) -> Split:
    """Draw the held-out sequences: the nearest whole number to the share, but at least one, and one left to train on.

    A share of 0 holds out none. Half of the training sequences are profiled, rounded down. Raise PlanError if the share
    is not >= 0 and < 1, or there are too few sequences.
    """
    if not 0 <= held_out_share < 1:
        raise PlanError(f"held_out_share(={held_out_share}) must be >= 0 and < 1.")
    if not num_sequences:
        raise PlanError("the trace holds no sequence; record at least one.")
    if held_out_share and num_sequences == 1:
        raise PlanError(
            "the trace holds 1 sequence, which cannot be split; record more, or give a held-out share of 0."
        )
    num_held_out = min(num_sequences - 1, max(1, round(held_out_share * num_sequences))) if held_out_share else 0
    drawn = np.random.default_rng(seed).permutation(num_sequences).tolist()
    held_out, training = drawn[:num_held_out], drawn[num_held_out:]
    return Split(
        training=tuple(sorted(training)),
        profiled=tuple(sorted(training[: len(training) // 2])),
        held_out=tuple(sorted(held_out)),
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Something simpler on the same sequences, with as many experts on the device, or a reference.

    Parameters
    ----------
    name, description : what it is.
    is_reference : whether it is only there to compare with, as it does not use the same memory.
    predicted, held_out : on the tuned and on the held-out sequences.
    """

    name: str
    description: str
    is_reference: bool
    predicted: RunResult
    held_out: RunResult | None

    def to_dict(self, result: RunResult) -> dict[str, object]:
        """`result`, which is one of ours, with our name."""
        about = {"baseline": self.name, "description": self.description, "is_reference": self.is_reference}
        return about | result.to_dict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Programme:
    """The integer programme of one policy.

    Parameters
    ----------
    budget, refresh_interval : its choice, one number per layer.
    solver : the solver's report; its times are sums over the table.
    resimulated_s : the same choice simulated as a whole, on the sequences of the table.
    num_columns : (budget, interval) pairs in the table.
    """

    policy: str
    budget: tuple[int, ...]
    refresh_interval: tuple[int, ...] | None
    solver: SolverReport
    resimulated_s: float
    num_columns: int

    @property
    def table_error(self) -> float:
        """How far the sum over the table is off: resimulated / sum - 1. It is 0 where layers do not share a link."""
        return self.resimulated_s / self.solver.time_s - 1

    def to_dict(self) -> dict[str, object]:
        """Every field by name."""
        return asdict(self) | {"table_error": self.table_error}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """What whole runs on the tuned sequences said of the programmes' choices, in seconds.

    Parameters
    ----------
    programme_s : the choice of the programme of the plan's policy, or what comes nearest if no sum of its table does
        what is asked.
    before_s : the best of all choices and of simpler ones. after_s : the plan, which is that or better.
    num_neighbours : runs around the best one that differ from it in one thing.
    """

    num_neighbours: int
    programme_s: float
    before_s: float
    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """All that planning found out.

    Parameters
    ----------
    chosen : the plan.
    predicted, held_out : the plan simulated on the tuned, and on the held-out sequences (None if there are none).
    baselines : on the same sequences, fastest first.
    programmes : one per policy; that of the plan's policy is `programme`.
    rescored : how the plan came about from the programmes.
    judgement : how the plan does on held-out sequences and how sure that is; with the explanation.
    explanation : why it is as fast as it is, if that was asked for.
    listed_steps : for each policy that refreshes, listed refresh steps beside constant intervals.
    tide : TIDE's own programme, one per policy that refreshes, each simulated among the baselines.
    tide_replayed : of each of these, how its choice does among the candidate intervals on held-out sequences; with the
        explanation.
    split, trace_origin : which sequences were used, and where they come from.
    memory, slots : device memory without experts, and how many experts fit into the rest.
    table_forwards : forwards that the tables were filled on: the first tuned sequences.
    slowest_block_s : seconds of the slowest block of the tuned sequences.
    num_runs : simulated runs.
    solve_s, total_s : seconds that the solvers took, and planning as a whole.
    """

    chosen: Plan
    predicted: RunResult
    held_out: RunResult | None
    baselines: tuple[Baseline, ...]
    programmes: tuple[Programme, ...]
    rescored: Rescored
    judgement: Judgement | None
    explanation: Explanation | None
    listed_steps: tuple[ListedSteps, ...]
    tide: tuple[TideProgramme, ...]
    tide_replayed: Sequence[Regret]
    split: Split
    trace_origin: str
    memory: DeviceMemory
    slots: int
    table_forwards: int
    slowest_block_s: float
    num_runs: int
    solve_s: float
    total_s: float

    @property
    def programme(self) -> Programme:
        """The integer programme of the chosen policy."""
        return next(programme for programme in self.programmes if programme.policy == self.chosen.policy)

    @property
    def gap(self) -> float:
        """How far the best choice in the chosen policy's table may be from the best there is in it."""
        return self.programme.solver.gap

    def to_dict(self) -> dict[str, object]:
        """What `tidesim plan --json` prints."""
        return {
            "chosen": self.chosen.to_dict(),
            "predicted": self.predicted.to_dict(),
            "baselines": [baseline.to_dict(baseline.predicted) for baseline in self.baselines],
            "gap": self.gap,
            "solver": self.programme.solver.to_dict(),
            "held_out": self._held_out(),
            "solve_s": self.solve_s,
            "total_s": self.total_s,
            "rescored": asdict(self.rescored),
            "judgement": None if self.judgement is None else self.judgement.to_dict(),
            "explanation": None if self.explanation is None else self.explanation.to_dict(),
            "programmes": [programme.to_dict() for programme in self.programmes],
            "listed_steps": [compared.to_dict() for compared in self.listed_steps],
            "tide": [
                programme.to_dict() | {"replayed": None if replayed is None else replayed.to_dict()}
                for programme, replayed in zip_longest(self.tide, self.tide_replayed)
            ],
            "split": asdict(self.split),
            "trace_origin": self.trace_origin,
            "memory": asdict(self.memory),
            "slots": self.slots,
            "scratch": self.chosen.make_policy().scratch_experts(self.chosen.model.num_experts),
            "table_forwards": self.table_forwards,
            "slowest_block_s": self.slowest_block_s,
            "num_runs": self.num_runs,
        }

    def to_json(self) -> str:
        """`to_dict` as one JSON object on one line."""
        return json.dumps(self.to_dict())

    def _held_out(self) -> dict[str, object] | None:
        if self.held_out is None:
            return None
        scored: Sequence[tuple[Baseline, RunResult]] = [
            (baseline, baseline.held_out) for baseline in self.baselines if baseline.held_out is not None
        ]
        return self.held_out.to_dict() | {
            "sequences": self.split.held_out,
            "baselines": [baseline.to_dict(result) for baseline, result in scored],
        }
