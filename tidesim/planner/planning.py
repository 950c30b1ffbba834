"""From a trace and a machine to a plan: fill tables, solve them, run what comes out, keep what is really best.

The steps of `plan`:

1. Split the sequences; all choosing is done on the training ones: expert popularity is counted on one half of them,
   and every candidate is run on the other.
2. Search (`search`): a table for each policy, its integer programme, whole runs of the choices and of simpler ones, and
   a look around the best of them.
3. Run the plan and the baselines on the held-out sequences.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidesim.ceiling import Ceiling
from tidesim.execution import Execution, check_memory
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.planner.candidates import find_candidates
from tidesim.planner.explaining import ceiling_over, explain, judge_plan, judge_tide
from tidesim.planner.integer_programme import SolverName
from tidesim.planner.listed_steps import compare_listed
from tidesim.planner.objectives import Objective
from tidesim.planner.plan_fields import POLICY_NAMES
from tidesim.planner.plan_file import Machine, ModelSizes, Plan, Prediction, Proof, Routing, TideCode
from tidesim.planner.plan_report import Baseline, PlanReport, Programme, Rescored, Split, split_sequences
from tidesim.planner.room import Room, measure_room
from tidesim.planner.runs import Case, Known, Runs, Setting, make_policy
from tidesim.planner.scoring import Judgement
from tidesim.planner.search import Found, search
from tidesim.policies import Shape
from tidesim.policies.foresight import learn
from tidesim.residency import Placement
from tidesim.result import tool_version
from tidesim.trace import Trace
from tidesim.windows import windows
from tidesim.workers import Progress
from tidesim.workload import Workload

_TUNED, _HELD_OUT, _TABLE = "tuned", "held-out", "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a plan is for, besides the objective.

    Parameters
    ----------
    batch_size : sequences that run together. gen_length : tokens that an answer may have; None: as many as in the
        trace. Longer answers of the trace are cut to it, and memory is set aside for it in any case.
    """

    batch_size: int = 1
    gen_length: int | None = None


AS_RECORDED = Demand()


def plan(
    trace: Trace,
    model: MoEConfig,
    hardware: Hardware,
    *,
    execution: Execution,
    objective: str | Objective = "throughput",
    demand: Demand = AS_RECORDED,
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
    is_explained: bool = False,
    progress: Progress | None = None,
) -> PlanReport:
    """Choose policy, budgets and refresh intervals for `model` on `hardware`, by the routing of `trace`.

    Parameters
    ----------
    trace : its layers are repeated if `model` has another number of them.
    execution : how the engine runs a forward.
    objective : one of `OBJECTIVES`, or one with its numbers.
    demand : how the model will be used.
    policies : those to choose from, of `plan_fields.POLICY_NAMES`.
    budgets : candidates for a layer's budget; by default 0, the largest uniform one that fits, and some around it.
    intervals : candidates for a layer's refresh interval; by default some of 1 to 32, and what TIDE's own programme
        chooses.
    held_out_share : share of the sequences that the plan is scored on and not made on; 0 for none.
    reserve_bytes : device memory to leave alone; see `execution.device_memory`.
    solver, time_limit_s : for each integer programme; after the limit the best choice so far is taken.
    table_visits : the tables are filled on the first tuned sequences, as many as visit (forwards x layers) at most
        so many layers, and at least one. Everything else is run on all of them.
    workers : threads or processes; see `Runs`.
    seed : of the split.
    is_explained : whether the report says why the plan is as fast as it is; it takes a second or two.
    progress : called with how many runs are done, and how many are known to be needed so far.

    Raise PlanError if the arguments allow no plan, InfeasibleError if memory or the objective's demands do not,
    InputError if trace, model and execution do not fit together.
    """
    start_s = time.perf_counter()
    wanted = Objective(name=objective) if isinstance(objective, str) else objective
    split = split_sequences(len(trace.sequences), held_out_share, seed)
    known, tuning, most_tokens = _known(trace, model, execution, split, demand)
    workloads = _workloads(trace, model, execution, split, table_visits, demand)
    max_tokens = max(most_tokens, *(workload.max_tokens for workload in workloads.values()))
    room = measure_room(model, hardware, execution, max_tokens, reserve_bytes, demand.batch_size)
    check_memory(model, hardware, execution, 0, max_tokens, reserve_bytes, batch_size=demand.batch_size)
    candidates = find_candidates(model, room.slots, workloads[_TUNED], policies, budgets, intervals)
    setting = Setting(
        workloads=workloads,
        known=known,
        tuning=tuning,
        held_out=_HELD_OUT,
        model=model,
        hardware=hardware,
        execution=execution,
        seed=seed,
    )
    with Runs(setting, workers=workers, progress=progress) as runs, ThreadPoolExecutor(1) as beside:
        found = search(
            runs,
            candidates,
            room.slots,
            wanted,
            tuned=_TUNED,
            table_part=_table_part(setting),
            solver=solver,
            time_limit_s=time_limit_s,
        )
        baselines = _score(runs, found)
        tokens = _tokens(runs, trace, split.held_out, demand) if is_explained else []
        ceiling = beside.submit(ceiling_over, setting, found.winner) if tokens else None
        explanation = explain(runs, found.winner, found.ranked, reserve_bytes) if is_explained else None
        chosen = _make_plan(runs, found, trace, split, wanted, max_tokens, room)
        return PlanReport(
            chosen=chosen,
            predicted=runs.result(found.winner),
            held_out=runs.held_out(found.winner),
            baselines=baselines,
            programmes=_programmes(runs, found),
            rescored=_rescored(runs, found),
            judgement=None if ceiling is None else _judgement(runs, found, tokens, ceiling.result),
            explanation=explanation,
            listed_steps=compare_listed(runs, found.ranked),
            tide=found.tide,
            tide_replayed=[judge_tide(runs, one, candidates.intervals, tokens) for one in found.tide] if tokens else [],
            split=split,
            trace_origin=trace.origin,
            memory=room.memory,
            slots=room.slots,
            table_forwards=workloads[_table_part(setting)].num_forwards,
            slowest_block_s=runs.outcomes([found.winner])[0].slowest_block_ns / 1e9,
            num_runs=runs.num_simulated,
            solve_s=sum(choice.report.solve_s for choice in found.choices.values()),
            total_s=time.perf_counter() - start_s,
        )


def _load(trace: Trace, model: MoEConfig, execution: Execution, sequences: Sequence[int], demand: Demand) -> Workload:
    workload = trace.workload(execution.context, sequences, is_mapped=True)
    return workload.tiled(model.num_layers).answering(demand.gen_length)


def _known(
    trace: Trace, model: MoEConfig, execution: Execution, split: Split, demand: Demand
) -> tuple[Known, Known, int]:
    """What the training sequences teach, what those that are profiled do, and the most tokens of the former."""
    training = _load(trace, model, execution, split.training, demand)
    profiled = _load(trace, model, execution, split.profiled, demand) if split.profiled else training
    batch = training.batched(demand.batch_size)
    return _taught(training, demand), _taught(profiled, demand), max(training.max_tokens, batch.max_tokens)


def _taught(workload: Workload, demand: Demand) -> Known:
    return Known(_popularity(workload), learn(workload.batched(demand.batch_size)))


def _popularity(workload: Workload) -> npt.NDArray[np.int64]:
    """[L, E], tokens that each expert got over all forwards."""
    counted = np.zeros(workload.counts.shape[1:], np.int64)
    for _, counts in windows(workload.counts):
        counted += counts.sum(axis=0, dtype=np.int64)
    return counted


def _workloads(
    trace: Trace, model: MoEConfig, execution: Execution, split: Split, table_visits: int, demand: Demand
) -> dict[str, Workload]:
    """The workload of each part; that of the table is left out if it is all that is tuned on."""
    parts = {_TUNED: _load(trace, model, execution, split.tuned, demand)}
    if split.held_out:
        parts[_HELD_OUT] = _load(trace, model, execution, split.held_out, demand)
    num_forwards = np.bincount(parts[_TUNED].sequence)[list(split.tuned)]
    visits = np.cumsum(num_forwards) * model.num_layers
    num_table = max(1, int(np.count_nonzero(visits <= table_visits)))
    # A batch is not cut.
    num_table = demand.batch_size * -(-num_table // demand.batch_size)
    if num_table < len(split.tuned):
        parts[_TABLE] = _load(trace, model, execution, split.tuned[:num_table], demand)
    return {name: workload.batched(demand.batch_size) for name, workload in parts.items()}


def _table_part(setting: Setting) -> str:
    return _TABLE if _TABLE in setting.workloads else _TUNED


# --- the report ---


def _score(runs: Runs, found: Found) -> tuple[Baseline, ...]:
    """The baselines on the tuned and the held-out sequences, fastest first."""
    cases = [found.winner, *(rival.case for rival in found.rivals)]
    if _HELD_OUT in runs.setting.workloads:
        runs.outcomes(case._replace(sequences=_HELD_OUT) for case in cases)
    baselines = [
        Baseline(
            name=rival.name,
            description=rival.description,
            is_reference=rival.is_reference,
            predicted=runs.result(rival.case),
            held_out=runs.held_out(rival.case),
        )
        for rival in found.rivals
    ]
    return tuple(sorted(baselines, key=lambda baseline: baseline.predicted.makespan_ns))


def _programmes(runs: Runs, found: Found) -> tuple[Programme, ...]:
    """What each integer programme chose, and how it does as a whole on the sequences of the table."""
    sequences = _table_part(runs.setting)
    cases = [Case(name, choice.budget, choice.interval, sequences) for name, choice in found.choices.items()]
    return tuple(
        Programme(
            policy=case.policy,
            budget=case.budget,
            refresh_interval=case.interval,
            solver=found.choices[case.policy].report,
            resimulated_s=outcome.result.makespan_s,
            num_columns=len(found.tables[case.policy].columns),
        )
        for case, outcome in zip(cases, runs.outcomes(cases), strict=True)
    )


def _rescored(runs: Runs, found: Found) -> Rescored:
    """What whole runs said of what the programmes chose."""
    programme = found.choices[found.winner.policy]
    own = Case(found.winner.policy, programme.budget, programme.interval, _TUNED)
    return Rescored(
        num_neighbours=found.num_neighbours,
        programme_s=runs.result(own).makespan_s,
        before_s=runs.result(found.start).makespan_s,
        after_s=runs.result(found.winner).makespan_s,
    )


def _tokens(runs: Runs, trace: Trace, sequences: Sequence[int], demand: Demand) -> list[int]:
    """What each of the `sequences` generates; those that run together are one."""
    model, execution = runs.setting.model, runs.setting.execution
    tokens = [_load(trace, model, execution, [sequence], demand).generated_tokens for sequence in sequences]
    return [sum(tokens[begin : begin + demand.batch_size]) for begin in range(0, len(tokens), demand.batch_size)]


def _judgement(runs: Runs, found: Found, tokens: Sequence[int], ceiling: Callable[[], Ceiling]) -> Judgement:
    """How the plan does on the held-out sequences, and how sure that is."""
    rivals = {rival.name: rival.case for rival in found.rivals if not rival.is_reference}
    return judge_plan(runs, found.winner, found.ranked, rivals, tokens, ceiling)


def _make_plan(
    runs: Runs, found: Found, trace: Trace, split: Split, objective: Objective, max_tokens: int, room: Room
) -> Plan:
    setting, winner = runs.setting, found.winner
    held_out = runs.held_out(winner)
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
        objective=objective.name,
        execution=setting.execution.name,
        context=setting.workloads[_TUNED].context,
        policy=winner.policy,
        budget=winner.budget,
        refresh_interval=winner.interval,
        refresh_steps=winner.steps,
        placement=_placement(setting, winner),
        learnt=setting.known.learnt if winner.policy == "gain" else None,
        miss_rule=setting.policy(winner).miss_action,
        max_tokens=max_tokens,
        reserve_bytes=room.memory.reserve,
        predicted=Prediction.of(runs.result(winner)),
        held_out=None if held_out is None else Prediction.of(held_out),
        proof=Proof.of(found.choices[winner.policy].report),
        tide_code=tide_code(winner, setting.model.block_length),
        seed=setting.seed,
        tool_version=tool_version(),
    )


def _placement(setting: Setting, case: Case) -> Placement | None:
    if case.policy != "static":
        return None
    static = make_policy(case.policy, setting.known)
    return static.initial(Shape(setting.model.num_experts, case.budget))


def tide_code(case: Case, block_length: int) -> TideCode:
    """The two numbers of the released TIDE code that come nearest to `case`.

    It knows one budget for all layers, and one interval; it always refreshes, at least on each block's first step.
    """
    total = sum(case.budget)
    budget_rule = f"the {total} slots of the plan, spread evenly over {len(case.budget)} layers and rounded down"
    if case.interval is not None:
        steps, steps_rule = _median(case.interval, case.budget), "the median interval, weighted by budget"
    elif case.steps is not None:
        gaps = [int(np.median(np.diff(row))) if len(row) > 1 else block_length for row in case.steps]
        steps, steps_rule = _median(gaps, case.budget), "the median step from refresh to refresh, weighted by budget"
    elif case.policy in ("lru", "gain"):
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
