"""Run every contender on the same sequences and the same machine, and say how far each is from the ceiling."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.ceiling import Ceiling, hit_ceiling, time_ceiling
from tidesim.comparison.contenders import Contender, contenders
from tidesim.comparison.warnings import warnings_about
from tidesim.errors import BudgetError, InputError
from tidesim.execution import EXECUTIONS, Costs, Execution, check_memory
from tidesim.hardware import Hardware
from tidesim.lending import Lent
from tidesim.moe import MoEConfig
from tidesim.planner.candidates import distinct_intervals, spread
from tidesim.policies import Policy
from tidesim.policies.knowledge import Knowledge
from tidesim.result import RunResult
from tidesim.timing import timed
from tidesim.windows import windows
from tidesim.workers import Progress, Workers
from tidesim.workload import Context, Workload

# Refresh intervals that are tried for those that refresh.
INTERVALS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender.

    Parameters
    ----------
    name, family : see `Contender`.
    result : its run.
    ceiling : the bound on runs like it: under its execution, with slots of each layer's own, or with slots that all
        layers share.
    scratch : experts of scratch memory, which it has that much fewer slots for.
    is_routing_only : whether it decides without the profile's times.
    is_best_of_family : whether no other interval of the same policy is faster; of equally fast ones, the shortest.
    """

    name: str
    result: RunResult
    ceiling: Ceiling
    family: str | None
    scratch: int
    is_routing_only: bool
    is_best_of_family: bool

    @property
    def ceiling_share(self) -> float:
        """Its throughput over that of the ceiling."""
        return self.result.tok_per_s / self.ceiling.tok_per_s

    def to_dict(self) -> dict[str, object]:
        """Everything by name; the names of the result are those of `RunResult`."""
        own = ("name", "family", "scratch", "is_routing_only", "is_best_of_family", "ceiling_share")
        return {name: getattr(self, name) for name in own} | self.result.to_dict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All contenders, the fastest first.

    Parameters
    ----------
    rows : those that ran.
    left_out : why the others did not, by name.
    execution : of all rows; with `has_own_executions`, of those that belong to no system. The bounds are for it too.
    has_own_executions : whether the policies of other systems ran under those systems' own executions.
    ceiling, pooled_ceiling : bounds for policies with slots of each layer's own, and with slots that all layers share.
    most_hits : of any cache that is filled on demand.
    budget : slots of a layer. sequences, corpus : compared on, and known before.
    batch_size : most sequences that ran together.
    warnings : what to bear in mind, a sentence each.
    """

    rows: tuple[Row, ...]
    left_out: Mapping[str, str]
    execution: Execution
    has_own_executions: bool
    ceiling: Ceiling
    pooled_ceiling: Ceiling
    most_hits: int
    num_pairs: int
    budget: int
    sequences: tuple[int, ...]
    corpus: tuple[int, ...]
    batch_size: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """What `tidesim compare --json` prints."""
        shared = self.rows[0].result
        what = ("hardware", "model", "trace_origin", "seed", "version")
        bounds = {
            name: {"tok_per_s": bound.tok_per_s, "makespan_s": bound.makespan_ns / 1e9}
            for name, bound in (("ceiling", self.ceiling), ("pooled_ceiling", self.pooled_ceiling))
        }
        return (
            {"execution": self.execution.name, "context": self.execution.context, "batch_size": self.batch_size}
            | {"has_own_executions": self.has_own_executions}
            | {name: getattr(shared, name) for name in what}
            | {"budget": self.budget, "sequences": self.sequences, "corpus": self.corpus}
            | bounds
            | {"hit_ceiling": self.most_hits / self.num_pairs}
            | {"warnings": self.warnings, "left_out": dict(self.left_out)}
            | {"rows": [row.to_dict() for row in self.rows]}
        )

    def to_json(self) -> str:
        """`to_dict` as one JSON object on one line."""
        return json.dumps(self.to_dict())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Course:
    """What all runs under one execution share; `hindsight` [L, E] is what the host would take for an expert, ns."""

    costs: Costs
    hindsight: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Setting:
    """What all runs of a comparison share. `courses` has one for each execution by name; that of None is for those that
    have none of their own. `workloads` has those of each context, and `corpora` what is known before."""

    courses: Mapping[str | None, _Course]
    workloads: Mapping[str, Workload]
    corpora: Mapping[str, Workload]
    model: MoEConfig
    hardware: Hardware
    budget: int
    seed: int
    reserve_bytes: int | None
    is_memory_checked: bool

    def workload(self, execution: str | None) -> Workload:
        """What runs under an execution."""
        return self.workloads[self.courses[execution].costs.execution.context]


class _Outcome(NamedTuple):
    """A run with what it takes to place it, or why there is none."""

    result: RunResult | None
    is_pooled: bool = False
    scratch: int = 0
    is_routing_only: bool = True
    reason: str = ""


def compare(
    workload: Workload,
    corpus: Workload,
    model: MoEConfig,
    hardware: Hardware,
    *,
    execution: Execution,
    budget: int,
    names: Sequence[str] | None = None,
    by_context: Mapping[Context, tuple[Workload, Workload]] | None = None,
    intervals: Sequence[int] = INTERVALS,
    batch_size: int = 1,
    reserve_bytes: int | None = None,
    is_memory_checked: bool = True,
    workers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Run every policy on `workload`, with the sizes of `model`, on `hardware`, all with the same bytes on the device.

    By default all run under `execution`, so that nothing but the policies differs.

    Parameters
    ----------
    corpus : other sequences, for policies that want to know something beforehand.
    budget : slots of each layer. Who needs scratch memory has that much fewer slots, and who shares slots over the
        layers has those of all of them.
    names : the policies to compare, all by default; the best static placement in hindsight always is.
    by_context : workload and corpus for both contexts. With it, policies that belong to a system run under that
        system's own execution, `OWN_EXECUTIONS`, and the others under `execution`: systems are compared as a whole. Who
        does not fit the device under its own execution is left out.
    intervals : refresh intervals to try for those that refresh; those longer than every block mean the same.
    batch_size : sequences that run together, those of the corpus too; see `Workload.batched`.
    reserve_bytes, is_memory_checked : see `simulate`.
    workers : see `Workers`.
    progress : called with how many runs are done, and how many there are.

    Raise InputError if workload, model and execution do not fit together or a policy is unknown, BudgetError if the
    budget does not fit the device.
    """
    sequences, known_sequences = _sequences(workload), _sequences(corpus)
    known = {
        context: (one.batched(batch_size), other.batched(batch_size))
        for context, (one, other) in {**(by_context or {}), execution.context: (workload, corpus)}.items()
    }
    workload = known[execution.context][0]
    if is_memory_checked:
        _check_memory(model, hardware, execution, budget, workload, reserve_bytes)
    who = contenders(
        distinct_intervals(intervals, workload),
        names,
        has_lookahead=workload.lookahead is not None,
        has_own_executions=by_context is not None,
    )
    setting = _Setting(
        courses=_courses(who, execution, known, model, hardware),
        workloads={context: one for context, (one, _) in known.items()},
        corpora={context: other for context, (_, other) in known.items()},
        model=model,
        hardware=hardware,
        budget=budget,
        seed=seed,
        reserve_bytes=reserve_bytes,
        is_memory_checked=is_memory_checked,
    )
    outcomes = _outcomes(setting, who, workers, progress)
    return _compared(setting, who, outcomes, sequences, known_sequences, has_own_executions=by_context is not None)


def _check_memory(
    model: MoEConfig,
    hardware: Hardware,
    how: Execution,
    budget: int,
    workload: Workload,
    reserve_bytes: int | None,
) -> None:
    most = (workload.max_tokens, reserve_bytes)
    check_memory(model, hardware, how, budget, *most, batch_size=workload.batch_size)


def slots_left(budget: int, scratch: int, num_layers: int) -> tuple[int, ...] | None:
    """Slots of each layer when `scratch` experts of `budget` slots a layer go to scratch memory; None if too many.

    What does not divide evenly goes to the first layers.
    """
    total = budget * num_layers - scratch
    return spread(total, num_layers) if total >= 0 else None


# --- the runs ---


def _courses(
    who: Sequence[Contender],
    execution: Execution,
    known: Mapping[Context, tuple[Workload, Workload]],
    model: MoEConfig,
    hardware: Hardware,
) -> Mapping[str | None, _Course]:
    """A course for each execution that somebody runs under; `known` has workload and corpus by context."""
    own = [one.execution for one in who if one.execution is not None]
    hows: dict[str | None, Execution] = {None: execution} | {name: EXECUTIONS[name] for name in own}
    return {name: _course(known[how.context][0], model, hardware, how) for name, how in hows.items()}


def _course(workload: Workload, model: MoEConfig, hardware: Hardware, how: Execution) -> _Course:
    """What there is to know and how long things take, under one execution."""
    costs = Costs(model, hardware, how, int(workload.tokens.max()))
    hindsight = np.zeros(workload.counts.shape[1:], np.int64)
    for _, counts in windows(workload.counts):
        hindsight += costs.host_expert_ns[counts].sum(axis=0)
    return _Course(costs=costs, hindsight=hindsight)


def _outcomes(
    setting: _Setting, who: Sequence[Contender], workers: int | None, progress: Progress | None
) -> list[_Outcome]:
    """One for each contender."""
    outcomes = []
    with (
        Lent(setting.workloads) as workloads,
        Lent(setting.corpora) as corpora,
        Workers(replace(setting, workloads=workloads, corpora=corpora), workers) as pool,
    ):
        for outcome in pool.map(_run, who):
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(who))
    return outcomes


def _run(setting: _Setting, contender: Contender) -> _Outcome:
    """Simulate one contender."""
    course, workload = setting.courses[contender.execution], setting.workload(contender.execution)
    try:
        if setting.is_memory_checked:
            how = course.costs.execution
            _check_memory(setting.model, setting.hardware, how, setting.budget, workload, setting.reserve_bytes)
        made = _made(setting, contender)
        scratch = made.scratch_experts(setting.model.num_experts)
        budgets = slots_left(setting.budget, scratch, setting.model.num_layers)
        if budgets is None:
            total = setting.budget * setting.model.num_layers
            return _Outcome(None, reason=f"its scratch memory of {scratch} experts exceeds the {total} slots")
        result = _simulated(setting, workload, course.costs.execution, made, budgets)
    except (BudgetError, InputError) as error:
        return _Outcome(None, reason=str(error))
    return _Outcome(result, made.scope == "network", scratch, made.is_routing_only)


def _made(setting: _Setting, contender: Contender) -> Policy:
    """The contender's policy."""
    course, params = setting.courses[contender.execution], dict(contender.params)
    if params.get("popularity") == "hindsight":
        params["popularity"] = course.hindsight
    corpus = setting.corpora[course.costs.execution.context]
    return Knowledge(workload=setting.workload(contender.execution), corpus=corpus).make(contender.policy, params)


def _simulated(
    setting: _Setting, workload: Workload, how: Execution, made: Policy, budgets: tuple[int, ...]
) -> RunResult:
    return timed(
        workload,
        setting.model,
        setting.hardware,
        made,
        budget=budgets,
        execution=how,
        seed=setting.seed,
        is_memory_checked=False,
    )


# --- what they come to ---


def _compared(
    setting: _Setting,
    who: Sequence[Contender],
    outcomes: Sequence[_Outcome],
    sequences: tuple[int, ...],
    corpus: tuple[int, ...],
    *,
    has_own_executions: bool,
) -> Comparison:
    """The runs beside their ceilings; a batch no longer tells which `sequences` are in it."""
    how, workload = setting.courses[None].costs.execution, setting.workload(None)
    ceilings = _ceilings(setting, who, outcomes)
    rows = _rows(who, outcomes, ceilings)
    return Comparison(
        rows=rows,
        left_out={one.name: outcome.reason for one, outcome in zip(who, outcomes, strict=True) if outcome.reason},
        execution=how,
        has_own_executions=has_own_executions,
        ceiling=ceilings[None, False],
        pooled_ceiling=ceilings[None, True],
        most_hits=hit_ceiling(workload, setting.budget),
        num_pairs=sum(int(counts.sum(dtype=np.int64)) for _, counts in windows(workload.counts)),
        budget=setting.budget,
        sequences=sequences,
        corpus=corpus,
        batch_size=workload.batch_size,
        warnings=warnings_about(
            [(setting.workload(name), course.costs) for name, course in setting.courses.items()],
            setting.budget,
            [row.result for row in rows],
            has_own_executions=has_own_executions,
        ),
    )


def _ceilings(
    setting: _Setting, who: Sequence[Contender], outcomes: Sequence[_Outcome]
) -> Mapping[tuple[str | None, bool], Ceiling]:
    """The bounds for each execution and kind of slots that somebody ran with, and both for those without their own."""
    ran = [(one.execution, outcome.is_pooled) for one, outcome in zip(who, outcomes, strict=True) if outcome.result]
    needed = dict.fromkeys([(None, False), (None, True), *ran])
    return {
        (name, is_pooled): time_ceiling(
            setting.workload(name), setting.courses[name].costs, setting.budget, is_pooled=is_pooled
        )
        for name, is_pooled in needed
    }


def _rows(
    who: Sequence[Contender], outcomes: Sequence[_Outcome], ceilings: Mapping[tuple[str | None, bool], Ceiling]
) -> tuple[Row, ...]:
    """Those that ran, the fastest first; of equally fast ones as they were named."""
    ran = [(one, outcome, outcome.result) for one, outcome in zip(who, outcomes, strict=True)]
    best: dict[str | None, tuple[int, str]] = {}
    for one, _, result in ran:
        if result is not None and (one.family not in best or result.makespan_ns < best[one.family][0]):
            best[one.family] = result.makespan_ns, one.name
    rows = [
        Row(
            name=one.name,
            result=result,
            ceiling=ceilings[one.execution, outcome.is_pooled],
            family=one.family,
            scratch=outcome.scratch,
            is_routing_only=outcome.is_routing_only,
            is_best_of_family=one.family is None or one.name == best[one.family][1],
        )
        for one, outcome, result in ran
        if result is not None
    ]
    return tuple(sorted(rows, key=lambda row: row.result.makespan_ns))


def _sequences(workload: Workload) -> tuple[int, ...]:
    return tuple(np.unique(workload.sequence).tolist())
