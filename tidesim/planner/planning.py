"""From a trace and a machine to a plan: fill tables, solve them, simulate what comes out, keep what is really best.

The steps of `plan`:

1. Split the sequences; all choosing is done on the training ones: expert popularity is counted on one half of them,
   and every candidate is simulated on the other.
2. Fill a table for each policy, and solve its integer programme.
3. Simulate the programmes' choices as a whole, and the baselines beside them. The shortest run is the plan.
4. Simulate the plan and the baselines on the held-out sequences.

Runs are ranked by predicted time and by nothing else: a higher hit rate may cost more copies than it saves.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.errors import PlanError
from tidesim.execution import Costs, Execution, check_memory
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.planner.candidates import Candidates, find_candidates
from tidesim.planner.integer_programme import Choice, SolverName, choose
from tidesim.planner.plan_fields import OBJECTIVES, POLICY_NAMES
from tidesim.planner.plan_file import Machine, ModelSizes, Plan, Prediction, Proof, Routing, TideCode
from tidesim.planner.plan_report import Baseline, PlanReport, Programme, Split, split_sequences
from tidesim.planner.room import Room, measure_room
from tidesim.planner.runs import REFRESHING, Case, Runs, Setting, make_policy
from tidesim.planner.table import Table, fill_tables
from tidesim.planner.tide_programme import TideProgramme, tide_programme
from tidesim.policies import Shape, policy
from tidesim.residency import Placement
from tidesim.result import RunResult, tool_version
from tidesim.trace import Trace
from tidesim.windows import windows
from tidesim.workers import Progress
from tidesim.workload import Workload

Popularity = npt.NDArray[np.int64]  # [L, E]

_TUNED, _HELD_OUT, _TABLE = "tuned", "held-out", "table"


class _Rival(NamedTuple):
    """A baseline before it is run."""

    name: str
    description: str
    case: Case
    is_reference: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    """What the search came to: by policy, its table and choice; then TIDE's choices, the baselines and the winner."""

    tables: Mapping[str, Table]
    choices: Mapping[str, Choice]
    tide: tuple[TideProgramme, ...]
    rivals: Sequence[_Rival]
    winner: Case


def plan(
    trace: Trace,
    model: MoEConfig,
    hardware: Hardware,
    *,
    execution: Execution,
    objective: str = "throughput",
    policies: Sequence[str] = POLICY_NAMES,
    budgets: Sequence[int] | None = None,
    intervals: Sequence[int] | None = None,
    held_out_share: float = 0.25,
    reserve_bytes: int | None = None,
    solver: SolverName = "highs",
    time_limit_s: float = 60.0,
    table_visits: int = 8_000,
    workers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PlanReport:
    """Choose policy, budgets and refresh intervals for `model` on `hardware`, by the routing of `trace`.

    Parameters
    ----------
    trace : its layers are repeated if `model` has another number of them.
    execution : how the engine runs a forward.
    objective : one of `OBJECTIVES`.
    policies : those to choose from, of "static", "tide", "tide-as-coded" and "lru".
    budgets : candidates for a layer's budget; by default 0, the largest uniform one that fits, and some around it.
    intervals : candidates for a layer's refresh interval; by default some of 1 to 32, and what TIDE's own programme
        chooses.
    held_out_share : share of the sequences that the plan is scored on and not made on; 0 for none.
    reserve_bytes : device memory to leave alone; see `execution.device_memory`.
    solver, time_limit_s : for each integer programme; after the limit the best choice so far is taken.
    table_visits : the tables are filled on the first tuned sequences, as many as visit (forwards x layers) at most
        so many layers, and at least one. Everything else is simulated on all of them.
    workers : processes, None for one per CPU; see `Runs`.
    seed : of the split.
    progress : called with how many runs are done, and how many are known to be needed so far.

    Raise PlanError if the arguments allow no plan, InfeasibleError if memory does not, InputError if trace, model and
    execution do not fit together.
    """
    start_s = time.perf_counter()
    if objective not in OBJECTIVES:
        raise PlanError(f"objective(={objective!r}) must be one of {', '.join(OBJECTIVES)}.")
    split = split_sequences(len(trace.sequences), held_out_share, seed)
    popularity, tuning_popularity, most_tokens = _known(trace, model, execution, split)
    workloads = _workloads(trace, model, execution, split, table_visits)
    max_tokens = max(most_tokens, *(workload.max_tokens for workload in workloads.values()))
    room = measure_room(model, hardware, execution, max_tokens, reserve_bytes)
    check_memory(model, hardware, execution, 0, max_tokens, reserve_bytes)
    candidates = find_candidates(model, room.slots, workloads[_TUNED], policies, budgets, intervals)
    setting = Setting(
        workloads=workloads,
        popularity=popularity,
        tuning_popularity=tuning_popularity,
        held_out=_HELD_OUT,
        model=model,
        hardware=hardware,
        execution=execution,
        seed=seed,
    )
    with Runs(setting, workers=workers, progress=progress) as runs:
        found = _search(runs, candidates, room.slots, solver, time_limit_s)
        baselines = _score(runs, found)
        chosen = _make_plan(runs, found, trace, split, objective, max_tokens, room)
        return PlanReport(
            chosen=chosen,
            predicted=runs.result(found.winner),
            held_out=_held_out(runs, found.winner),
            baselines=baselines,
            programmes=_programmes(runs, found),
            tide=found.tide,
            split=split,
            trace_origin=trace.origin,
            memory=room.memory,
            slots=room.slots,
            table_forwards=workloads[_table_part(setting)].num_forwards,
            num_runs=runs.num_simulated,
            solve_s=sum(choice.report.solve_s for choice in found.choices.values()),
            total_s=time.perf_counter() - start_s,
        )


def _load(trace: Trace, model: MoEConfig, execution: Execution, sequences: Sequence[int]) -> Workload:
    return trace.workload(execution.context, sequences, is_mapped=True).tiled(model.num_layers)


def _known(trace: Trace, model: MoEConfig, execution: Execution, split: Split) -> tuple[Popularity, Popularity, int]:
    """Who is popular in the training sequences, who in those that are profiled, and the most tokens of the former."""
    training = _load(trace, model, execution, split.training)
    profiled = split.profiled or split.training
    return _popularity(training, split.training), _popularity(training, profiled), training.max_tokens


def _popularity(workload: Workload, sequences: Sequence[int]) -> Popularity:
    """[L, E], tokens that each expert got over all forwards of `sequences`."""
    is_counted = np.isin(workload.sequence, sequences)
    counted = np.zeros(workload.counts.shape[1:], np.int64)
    for span, counts in windows(workload.counts):
        counted += counts[is_counted[span]].sum(axis=0, dtype=np.int64)
    return counted


def _workloads(
    trace: Trace, model: MoEConfig, execution: Execution, split: Split, table_visits: int
) -> dict[str, Workload]:
    """The workload of each part; that of the table is left out if it is all that is tuned on."""
    parts = {_TUNED: _load(trace, model, execution, split.tuned)}
    if split.held_out:
        parts[_HELD_OUT] = _load(trace, model, execution, split.held_out)
    num_forwards = np.bincount(parts[_TUNED].sequence)[list(split.tuned)]
    visits = np.cumsum(num_forwards) * model.num_layers
    num_table = max(1, int(np.count_nonzero(visits <= table_visits)))
    if num_table < len(split.tuned):
        parts[_TABLE] = _load(trace, model, execution, split.tuned[:num_table])
    return parts


def _table_part(setting: Setting) -> str:
    return _TABLE if _TABLE in setting.workloads else _TUNED


# --- the search ---


def _search(runs: Runs, candidates: Candidates, slots: int, solver: SolverName, time_limit_s: float) -> _Found:
    tables = fill_tables(runs, candidates, _table_part(runs.setting))
    choices = {
        name: choose(table.options(), slots, fixed_ns=table.outside_ns, solver=solver, time_limit_s=time_limit_s)
        for name, table in tables.items()
    }
    tide = _tide_programmes(runs, candidates)
    contenders = [Case(name, choice.budget, choice.interval, _TUNED) for name, choice in choices.items()]
    for name, table in tables.items():
        budget, interval = table.fastest(slots)
        contenders.append(_uniform(runs, name, budget, interval))
    has_room_for_all = slots == runs.setting.model.num_layers * runs.setting.model.num_experts
    rivals = _rivals(runs, candidates, tide, has_room_for_all)
    contenders += [rival.case for rival in rivals if candidates.may_choose(rival.case.policy, rival.case.interval)]
    results = runs.results([*contenders, *(rival.case for rival in rivals)])
    # Of equally fast runs, the one with fewer experts on the device.
    ranked = sorted(zip(contenders, results, strict=False), key=lambda item: (item[1].makespan_ns, sum(item[0].budget)))
    rivals = [_best_static(rival, ranked) for rival in rivals]
    return _Found(tables, choices, tide, rivals, ranked[0][0])


def _uniform(runs: Runs, policy: str, budget: int, interval: int | None) -> Case:
    return Case.uniform(policy, budget, interval, _TUNED, runs.setting.model.num_layers)


def _refreshing(candidates: Candidates) -> list[str]:
    """The refreshing policies to compare with: TIDE as published always, others if they may be chosen."""
    return [name for name in REFRESHING if name == "tide" or name in candidates.policies]


def _tide_programmes(runs: Runs, candidates: Candidates) -> tuple[TideProgramme, ...]:
    """TIDE's own programme for each policy that refreshes, at the largest uniform budget; none if that is 0 or all."""
    setting = runs.setting
    if not 0 < candidates.uniform < setting.model.num_experts:
        return ()
    workload = setting.workloads[_TUNED]
    costs = Costs(setting.model, setting.hardware, setting.execution, int(workload.tokens.max()))
    return tuple(
        tide_programme(workload, costs, policy(name, refresh_interval=1), candidates.uniform)
        for name in _refreshing(candidates)
    )


def _rivals(runs: Runs, candidates: Candidates, tide: Sequence[TideProgramme], has_room_for_all: bool) -> list[_Rival]:
    """The baselines, all but the references with the largest uniform budget."""
    budget, num_experts = candidates.uniform, runs.setting.model.num_experts
    rivals = [_Rival("all-host", "no expert on the device", _uniform(runs, "all-host", 0, None), is_reference=True)]
    if has_room_for_all:
        everything = _uniform(runs, "all-device", num_experts, None)
        rivals.append(_Rival("all-device", "every expert on the device", everything, is_reference=True))
    if not budget:
        return rivals
    for name in _refreshing(candidates):
        about = f"policy {name!r}, a refresh at every step (the TIDE paper calls it Mixtral-Offload)"
        rivals.append(_Rival(f"{name}, every step", about, _uniform(runs, name, budget, 1)))
    for programme in tide:
        about = f"policy {programme.policy!r}, the interval that TIDE's own programme chooses"
        case = _uniform(runs, programme.policy, budget, programme.interval)
        rivals.append(_Rival(f"{programme.policy}, own programme", about, case))
    about = "the most popular experts of the training sequences, never moved (the TIDE paper calls it Fiddler)"
    rivals.append(_Rival("static", about, _uniform(runs, "static", budget, None)))
    about = "every missed expert fetched and kept, as mixtral-offloading does"
    rivals.append(_Rival("lru", about, _uniform(runs, "lru", budget, None)))
    return rivals


def _best_static(rival: _Rival, ranked: Sequence[tuple[Case, RunResult]]) -> _Rival:
    """The static baseline is the best static placement that was found, with uneven budgets or even ones."""
    if rival.name != "static":
        return rival
    return rival._replace(case=next((case for case, _ in ranked if case.policy == "static"), rival.case))


# --- the report ---


def _score(runs: Runs, found: _Found) -> tuple[Baseline, ...]:
    """The baselines on the tuned and the held-out sequences, fastest first."""
    cases = [found.winner, *(rival.case for rival in found.rivals)]
    if _HELD_OUT in runs.setting.workloads:
        runs.results([case._replace(sequences=_HELD_OUT) for case in cases])
    baselines = [
        Baseline(
            name=rival.name,
            description=rival.description,
            is_reference=rival.is_reference,
            predicted=runs.result(rival.case),
            held_out=_held_out(runs, rival.case),
        )
        for rival in found.rivals
    ]
    return tuple(sorted(baselines, key=lambda baseline: baseline.predicted.makespan_ns))


def _held_out(runs: Runs, case: Case) -> RunResult | None:
    is_held_out = _HELD_OUT in runs.setting.workloads
    return runs.result(case._replace(sequences=_HELD_OUT)) if is_held_out else None


def _programmes(runs: Runs, found: _Found) -> tuple[Programme, ...]:
    """What each integer programme chose, and how it does as a whole on the sequences of the table."""
    sequences = _table_part(runs.setting)
    cases = [Case(name, choice.budget, choice.interval, sequences) for name, choice in found.choices.items()]
    results = runs.results(cases)
    return tuple(
        Programme(
            policy=case.policy,
            budget=case.budget,
            refresh_interval=case.interval,
            solver=found.choices[case.policy].report,
            resimulated_s=result.makespan_s,
            num_columns=len(found.tables[case.policy].columns),
        )
        for case, result in zip(cases, results, strict=True)
    )


def _make_plan(
    runs: Runs, found: _Found, trace: Trace, split: Split, objective: str, max_tokens: int, room: Room
) -> Plan:
    setting, winner = runs.setting, found.winner
    report = found.choices[winner.policy].report
    held_out = _held_out(runs, winner)
    return Plan(
        model=ModelSizes.of(setting.model),
        hardware=Machine.of(setting.hardware),
        trace=Routing(
            model=trace.model_name,
            origin=trace.origin,
            fingerprint=trace.fingerprint,
            training=split.training,
            profiled=split.profiled,
            held_out=split.held_out,
        ),
        objective=objective,
        execution=setting.execution.name,
        context=setting.workloads[_TUNED].context,
        policy=winner.policy,
        budget=winner.budget,
        refresh_interval=winner.interval,
        placement=_placement(setting, winner),
        miss_rule=make_policy(winner.policy, winner.interval, setting.popularity).miss_action,
        max_tokens=max_tokens,
        reserve_bytes=room.memory.reserve,
        predicted=Prediction.of(runs.result(winner)),
        held_out=None if held_out is None else Prediction.of(held_out),
        proof=Proof(
            solver=report.solver,
            status=report.status,
            objective_s=report.objective_s,
            bound_s=report.bound_s,
            gap=report.gap,
        ),
        tide_code=tide_code(winner, setting.model.block_length),
        seed=setting.seed,
        tool_version=tool_version(),
    )


def _placement(setting: Setting, case: Case) -> Placement | None:
    if case.policy != "static":
        return None
    static = make_policy(case.policy, case.interval, setting.popularity)
    return static.initial(Shape(setting.model.num_experts, case.budget))


def tide_code(case: Case, block_length: int) -> TideCode:
    """The two numbers of the released TIDE code that come nearest to `case`.

    It knows one budget for all layers, and one interval; it always refreshes, at least on each block's first step.
    """
    total = sum(case.budget)
    budget_rule = f"the {total} slots of the plan, spread evenly over {len(case.budget)} layers and rounded down"
    if case.interval is not None:
        steps, steps_rule = _median(case.interval, case.budget), "the median interval, weighted by budget"
    elif case.policy == "lru":
        steps, steps_rule = 1, "the shortest, as the plan moves experts in every forward"
    else:
        steps, steps_rule = (
            block_length,
            "the block length, hence as seldom as that code can, as the plan never refreshes",
        )
    return TideCode(
        max_gpu_experts_per_layer=total // len(case.budget),
        jump_steps=steps,
        derivation=f"max_gpu_experts_per_layer: {budget_rule}; jump_steps: {steps_rule}",
    )


def _median(intervals: Sequence[int], weights: Sequence[int]) -> int:
    """The smallest interval such that it and the shorter ones have at least half of the weight."""
    ranked = sorted(zip(intervals, weights, strict=True))
    passed = np.cumsum([weight for _, weight in ranked])
    return ranked[int(np.argmax(2 * passed >= passed[-1]))][0]
