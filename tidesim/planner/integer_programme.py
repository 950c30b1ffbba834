"""The integer programme behind a plan: one (budget, interval) pair for each MoE layer, out of a table of times.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). With x[l, p] = 1 if
layer l takes its option p:

    minimise    sum over l, p of time[l, p] * x[l, p]
    subject to  sum over p of x[l, p] = 1                       for every layer l
                sum over l, p of budget[l, p] * x[l, p] <= slots

It is written with PuLP and solved by HiGHS or CBC. What a solver says of itself is not taken on trust: PuLP calls a
solve that ran out of time "Optimal", and HiGHS' presolve calls an unbounded problem infeasible.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pulp

from tidesim.errors import PlanError

SolverName = Literal["highs", "cbc"]
# The largest coefficient of the objective that the solvers see. HiGHS stops within 1e-6 of the best objective, and CBC
# asks a new solution to be better by 1e-5 at least, so "optimal" is exact to 1e-8 of that coefficient with some room.
_LARGEST_COEFFICIENT = 1e4
_TOLERANCE = 1e-8 * _LARGEST_COEFFICIENT


class InfeasibleError(PlanError):
    """No choice meets the constraints."""


class UnboundedError(PlanError):
    """The objective can fall without end: something in the problem is not a time or not a choice."""


class Option(NamedTuple):
    """What a layer may take: `budget` slots and a refresh every `interval` steps (None: never), for `time_ns`."""

    budget: int
    interval: int | None
    time_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverReport:
    """What a solver made of a table.

    Parameters
    ----------
    solver : "highs" or "cbc".
    status : "optimal": proven best, to 1e-8 of the largest difference between two times of one layer. "feasible": the
        time limit came first, this is the best choice so far. "uniform": the time limit came before any choice, or the
        best so far was worse than the best uniform one, which was taken instead.
    objective_s : sum of the chosen options' times.
    bound_s : no choice out of the table that fits has a smaller sum.
    gap : (objective - bound) / objective.
    solve_s : what solving took.
    """

    solver: str
    status: Literal["optimal", "feasible", "uniform"]
    objective_s: float
    bound_s: float
    gap: float
    solve_s: float

    def to_dict(self) -> dict[str, object]:
        """Every field by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Choice:
    """One option for each layer, and the solver's report on them."""

    options: tuple[Option, ...]
    report: SolverReport

    @property
    def budget(self) -> tuple[int, ...]:
        """The budget of each layer."""
        return tuple(option.budget for option in self.options)

    @property
    def interval(self) -> tuple[int, ...] | None:
        """The interval of each layer; None if they never refresh."""
        intervals = [option.interval for option in self.options if option.interval is not None]
        return tuple(intervals) or None


def choose(
    table: Sequence[Sequence[Option]],
    slots: int,
    *,
    fixed_ns: int = 0,
    solver: SolverName = "highs",
    time_limit_s: float = 60.0,
) -> Choice:
    """The options, one for each layer, with the least total time whose budgets add up to at most `slots`.

    Parameters
    ----------
    table : the options of each layer, at least one each.
    slots : experts that fit on the device, over all layers.
    fixed_ns : time that no choice changes, added to every sum.
    time_limit_s : the best choice that is known then is returned, and the report says so.

    Raise InfeasibleError if not even the smallest budgets fit, InputError if there is no such solver, ValueError if a
    layer has no option or a time is negative.
    """
    _check_table(table, time_limit_s)
    frontiers = [frontier(options) for options in table]
    problem, picks = _problem(frontiers, slots)
    start_s = time.perf_counter()
    try:
        status, bound = solve(problem, solver, time_limit_s)
    except InfeasibleError:
        smallest = sum(options[0].budget for options in frontiers)
        raise InfeasibleError(
            f"the smallest budgets take {smallest} slots over {len(table)} layers, and slots(={slots}) are there; "
            f"allow smaller budgets, such as 0, or make room for {smallest - slots} more."
        ) from None
    solve_s = time.perf_counter() - start_s
    # Nothing beats every layer's fastest option, whatever the solver knows.
    least_ns = sum(options[-1].time_ns for options in frontiers)
    bound_ns = fixed_ns + least_ns + max(0.0, (bound - _TOLERANCE) * _unit_ns(frontiers))
    found = _decode(picks, frontiers, slots) if status != "none" else None
    chosen, label = _best_known(found, best_uniform(table, slots), status)
    total_ns = fixed_ns + sum(option.time_ns for option in chosen)
    return Choice(chosen, _report(solver, label, total_ns, bound_ns, solve_s))


def _report(
    solver: SolverName,
    status: Literal["optimal", "feasible", "uniform"],
    total_ns: int,
    bound_ns: float,
    solve_s: float,
) -> SolverReport:
    bound_ns = min(bound_ns, total_ns)
    return SolverReport(
        solver=solver,
        status=status,
        objective_s=total_ns / 1e9,
        bound_s=bound_ns / 1e9,
        gap=(total_ns - bound_ns) / total_ns if total_ns else 0.0,
        solve_s=solve_s,
    )


def frontier(options: Sequence[Option]) -> list[Option]:
    """The options that no other one beats or equals in both budget and time, by rising budget and falling time.

    The others can be left out: whoever takes one may take the better one instead. Of equal ones the first stays.
    """
    best: list[Option] = []
    for option in sorted(options, key=lambda option: (option.budget, option.time_ns)):
        if not best or option.time_ns < best[-1].time_ns:
            best.append(option)
    return best


def best_uniform(table: Sequence[Sequence[Option]], slots: int) -> tuple[Option, ...] | None:
    """The best choice that gives every layer the same budget and interval; None if no such choice fits."""
    uniform: dict[tuple[int, int | None], list[Option]] = {}
    for options in table:
        slowest_first = sorted(options, key=lambda option: -option.time_ns)
        for pair, option in {(option.budget, option.interval): option for option in slowest_first}.items():
            uniform.setdefault(pair, []).append(option)
    fitting = [
        tuple(options)
        for (budget, _), options in uniform.items()
        if len(options) == len(table) and budget * len(table) <= slots
    ]
    return min(fitting, key=lambda options: sum(option.time_ns for option in options), default=None)


# --- the problem ---


def _check_table(table: Sequence[Sequence[Option]], time_limit_s: float) -> None:
    if not table or not all(table):
        raise ValueError("table must have at least one layer, and each layer at least one option.")
    for layer, options in enumerate(table):
        for option in options:
            if option.time_ns < 0 or option.budget < 0:
                raise ValueError(f"layer {layer}: {option} must have a budget and a time >= 0.")
    if not 0 < time_limit_s < math.inf:
        raise PlanError(f"time_limit_s(={time_limit_s}) must be > 0 and finite.")


def _unit_ns(frontiers: Sequence[Sequence[Option]]) -> float:
    """Nanoseconds that 1.0 in the objective stands for."""
    return max(1.0, max(options[0].time_ns - options[-1].time_ns for options in frontiers)) / _LARGEST_COEFFICIENT


def _problem(frontiers: Sequence[Sequence[Option]], slots: int) -> tuple[pulp.LpProblem, list[list[Any]]]:
    """The programme, and the variable of each option. Each time counts from its layer's fastest option."""
    problem = pulp.LpProblem("tidesim_plan", pulp.LpMinimize)
    picks = [
        [problem.add_variable(f"pick_{layer}_{index}", cat="Binary") for index in range(len(options))]
        for layer, options in enumerate(frontiers)
    ]
    unit_ns = _unit_ns(frontiers)
    problem.setObjective(
        pulp.lpSum(
            (option.time_ns - options[-1].time_ns) / unit_ns * pick
            for options, row in zip(frontiers, picks, strict=True)
            for option, pick in zip(options, row, strict=True)
        )
    )
    _take_one_option(problem, picks)
    _stay_within_memory(problem, picks, frontiers, slots)
    return problem, picks


def _take_one_option(problem: pulp.LpProblem, picks: Sequence[Sequence[Any]]) -> None:
    """Every layer takes exactly one option: sum over p of x[l, p] = 1 for every layer l."""
    for layer, row in enumerate(picks):
        problem.addConstraint(pulp.lpSum(row) == 1, f"one_option_{layer}")


def _stay_within_memory(
    problem: pulp.LpProblem, picks: Sequence[Sequence[Any]], frontiers: Sequence[Sequence[Option]], slots: int
) -> None:
    """The experts fit: sum over l, p of budget[l, p] * x[l, p] <= slots.

    It is sum of budget * expert_bytes <= device memory - other weights - KV cache - transient peak - reserve, divided
    by expert_bytes: all experts have one size, so rounding the right side down loses nothing.
    """
    used = pulp.lpSum(
        option.budget * pick
        for options, row in zip(frontiers, picks, strict=True)
        for option, pick in zip(options, row, strict=True)
    )
    problem.addConstraint(used <= slots, "memory")


def _decode(picks: Sequence[Sequence[Any]], frontiers: Sequence[Sequence[Option]], slots: int) -> tuple[Option, ...]:
    chosen = []
    for options, row in zip(frontiers, picks, strict=True):
        taken = [option for option, pick in zip(options, row, strict=True) if pick.value() > 0.5]
        assert len(taken) == 1, f"the solver took {len(taken)} options of a layer"
        chosen += taken
    assert sum(option.budget for option in chosen) <= slots, "the solver took more than fits"
    return tuple(chosen)


def _best_known(
    found: tuple[Option, ...] | None, uniform: tuple[Option, ...] | None, status: str
) -> tuple[tuple[Option, ...], Literal["optimal", "feasible", "uniform"]]:
    """The better of what the solver found and the best uniform choice, and which it is."""
    if found is not None and status == "optimal":
        return found, "optimal"
    known = [choice for choice in (found, uniform) if choice is not None]
    if not known:
        raise PlanError("the time limit came before any choice was found, and no uniform budget fits; allow more time.")
    best = min(known, key=lambda choice: sum(option.time_ns for option in choice))
    return best, "feasible" if best is found else "uniform"


# --- the solvers ---


def solve(
    problem: pulp.LpProblem, solver: SolverName, time_limit_s: float
) -> tuple[Literal["optimal", "feasible", "none"], float]:
    """Solve `problem`; how far it got ("none": no choice in time), and a lower bound of its objective.

    Raise InfeasibleError or UnboundedError, InputError if there is no such solver.
    """
    problem.solve(_solver(solver, time_limit_s))
    outcome = problem.sol_status
    if outcome == pulp.LpSolutionOptimal:
        # An objective without terms has no value.
        return "optimal", float(pulp.value(problem.objective) or 0.0)
    if outcome in (pulp.LpSolutionInfeasible, pulp.LpSolutionUnbounded):
        raise _why_unsolved(problem, solver, time_limit_s)
    status: Literal["feasible", "none"] = "feasible" if outcome == pulp.LpSolutionIntegerFeasible else "none"
    return status, _bound(problem, solver, time_limit_s)


def _solver(name: SolverName, time_limit_s: float, *, is_relaxed: bool = False) -> pulp.LpSolver:
    options = {"msg": False, "mip": not is_relaxed, "timeLimit": time_limit_s, "gapRel": 0.0, "threads": 1}
    if name == "highs":
        return pulp.HiGHS(**options)
    if name == "cbc":
        # The CBC that comes with PuLP, where there is one for this platform; else the `cbc` on the PATH.
        bundled = Path(pulp.PULP_CBC_CMD.pulp_cbc_path)
        return pulp.COIN_CMD(path=str(bundled) if bundled.exists() else None, **options)
    raise PlanError(f"no solver {name!r}; there are {', '.join(get_args(SolverName))}.")


def _why_unsolved(problem: pulp.LpProblem, solver: SolverName, time_limit_s: float) -> PlanError:
    """Tell infeasible from unbounded: without an objective, only an infeasible problem has no solution."""
    feasible = problem.copy()
    feasible.setObjective(pulp.lpSum([]))
    feasible.solve(_solver(solver, time_limit_s))
    if feasible.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return UnboundedError("the objective has no lower bound; every option must have a finite time >= 0.")
    return InfeasibleError("no choice meets all constraints; loosen one of them.")


def _bound(problem: pulp.LpProblem, solver: SolverName, time_limit_s: float) -> float:
    """A lower bound after a solve that was cut off: the solver's own, or else that of the relaxation.

    CBC through PuLP does not hand out its bound, and HiGHS has none if it stopped before the root.
    """
    if solver == "highs":
        bound = float(problem.solverModel.getInfo().mip_dual_bound)
        if math.isfinite(bound):
            return bound
    relaxed = problem.copy()
    relaxed.solve(_solver(solver, time_limit_s, is_relaxed=True))
    return float(pulp.value(relaxed.objective) or 0.0) if relaxed.sol_status == pulp.LpSolutionOptimal else 0.0
