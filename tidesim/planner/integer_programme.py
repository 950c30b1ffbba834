"""The integer programme behind a plan: one (budget, interval) pair for each MoE layer, out of a table of times.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). With x[l, p] = 1 if
layer l takes its option p:

    minimise    sum over l, p of time[l, p] * x[l, p]
    subject to  sum over p of x[l, p] = 1                       for every layer l
                sum over l, p of budget[l, p] * x[l, p] <= slots

and, if asked, with a bound on the time of every block k (an answer's next 32 tokens, say):

                sum over l, p of block_time[k, l, p] * x[l, p] <= bound        for every block k

What is minimised may also be the slowest block, or the slots that a bound on the whole time takes.

It is written with PuLP and solved by HiGHS or CBC. What a solver says of itself is not taken on trust: PuLP calls a
solve that ran out of time "Optimal", and HiGHS' presolve calls an unbounded problem infeasible.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pulp

from tidesim.errors import PlanError

SolverName = Literal["highs", "cbc"]
# How much more than a bound allows a choice may take, in units of the objective: less than a ns where layers differ by
# less than 10 s, and more than a solver is off by when it is held to a bound that a solution meets exactly.
_SLACK = 1e-5
# The largest coefficient of the objective that the solvers see. HiGHS stops within 1e-6 of the best objective, and CBC
# asks a new solution to be better by 1e-5 at least, so "optimal" is exact to 1e-8 of that coefficient with some room.
_LARGEST_COEFFICIENT = 1e4
_TOLERANCE = 1e-8 * _LARGEST_COEFFICIENT


class InfeasibleError(PlanError):
    """No choice meets the constraints."""


class UnboundedError(PlanError):
    """The objective can fall without end: something in the problem is not a time or not a choice."""


class Option(NamedTuple):
    """What a layer may take: `budget` slots and a refresh every `interval` steps (None: never), for `time_ns`.

    `block_ns` is what of that goes into each block, if anybody asks for blocks.
    """

    budget: int
    interval: int | None
    time_ns: int
    block_ns: tuple[int, ...] = ()


Minimised = Literal["time", "slowest block", "slots"]


class Aim(NamedTuple):
    """What is minimised, and how long the whole (`most_ns`) and each block (`most_block_ns`) may take at most."""

    minimised: Minimised = "time"
    most_ns: int | None = None
    most_block_ns: int | None = None

    @property
    def has_blocks(self) -> bool:
        """Whether blocks matter."""
        return self.minimised == "slowest block" or self.most_block_ns is not None


LEAST_TIME = Aim()
Meets = Callable[[tuple[Option, ...]], bool]
Value = Callable[[tuple[Option, ...]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverReport:
    """What a solver made of a table.

    Parameters
    ----------
    solver : "highs" or "cbc".
    status : "optimal": proven best, to 1e-8 of the largest difference between two times of one layer. "feasible": the
        time limit came first, this is the best choice so far. "uniform": the time limit came before any choice, or the
        best so far was worse than the best uniform one, which was taken instead.
    minimised : see `Aim`.
    objective : of the chosen options: their times' sum or the slowest block, in s, or their slots.
    bound : no choice out of the table that meets the constraints has a smaller objective.
    gap : (objective - bound) / objective.
    time_s : sum of the chosen options' times.
    solve_s : what solving took.
    """

    solver: str
    status: Literal["optimal", "feasible", "uniform"]
    minimised: Minimised
    objective: float
    bound: float
    gap: float
    time_s: float
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
    aim: Aim = LEAST_TIME,
    fixed_ns: int = 0,
    fixed_block_ns: Sequence[int] = (),
    solver: SolverName = "highs",
    time_limit_s: float = 60.0,
) -> Choice:
    """The options, one for each layer, that are best for `aim` and whose budgets add up to at most `slots`.

    Parameters
    ----------
    table : the options of each layer, at least one each.
    slots : experts that fit on the device, over all layers.
    aim : by default the least total time. Of choices whose slowest blocks are alike, the one with least time is taken.
    fixed_ns, fixed_block_ns : time that no choice changes, added to every sum, and to that of each block.
    time_limit_s : the best choice that is known then is returned, and the report says so.

    Raise InfeasibleError if no choice meets the constraints, with the nearest one that can be met, InputError if there
    is no such solver, ValueError if a layer has no option or a time is negative.
    """
    check_table(table, time_limit_s)
    task = _Task(table, slots, aim, fixed_ns, fixed_block_ns)
    start_s = time.perf_counter()
    try:
        status, bound = solve(task.problem, solver, time_limit_s)
    except InfeasibleError:
        raise InfeasibleError(_why_infeasible(task, solver, time_limit_s)) from None
    found = task.decode() if status != "none" else None
    if aim.minimised == "slowest block" and status == "optimal" and found is not None:
        # Blocks below the slowest one are of no account to it, but they are time.
        least = Aim("time", most_block_ns=task.slowest_block_ns(found))
        found = choose(*(table, slots), aim=least, **task.fixed, solver=solver, time_limit_s=time_limit_s).options
    solve_s = time.perf_counter() - start_s
    uniform = best_uniform(table, slots, task.meets, task.value)
    chosen, label = _best_known(found, uniform, status, task.value)
    return Choice(chosen, _report(solver, label, task, chosen, bound, solve_s))


def _report(
    solver: SolverName,
    status: Literal["optimal", "feasible", "uniform"],
    task: "_Task",
    chosen: tuple[Option, ...],
    solver_bound: float,
    solve_s: float,
) -> SolverReport:
    scale = 1.0 if task.aim.minimised == "slots" else 1e9
    objective = task.value(chosen)
    bound = min(task.bound(solver_bound), objective)
    return SolverReport(
        solver=solver,
        status=status,
        minimised=task.aim.minimised,
        objective=objective / scale,
        bound=bound / scale,
        gap=(objective - bound) / objective if objective else 0.0,
        time_s=task.time_ns(chosen) / 1e9,
        solve_s=solve_s,
    )


def _why_infeasible(task: "_Task", solver: SolverName, time_limit_s: float) -> str:
    """The constraint that cannot be met, and the nearest that can."""
    smallest = sum(min(option.budget for option in options) for options in task.table)
    if smallest > task.slots:
        return (
            f"the smallest budgets take {smallest} slots over {len(task.table)} layers, and slots(={task.slots}) are "
            f"there; allow smaller budgets, such as 0, or make room for {smallest - task.slots} more."
        )
    settings: dict[str, Any] = {**task.fixed, "solver": solver, "time_limit_s": time_limit_s}
    if task.aim.most_block_ns is not None:
        nearest = choose(task.table, task.slots, aim=Aim("slowest block"), **settings).report
        return (
            f"no choice has every block done in {task.aim.most_block_ns / 1e9:.4g} s; the best one takes "
            f"{nearest.objective:.4g} s for its slowest block."
        )
    nearest = choose(task.table, task.slots, **settings).report
    most_s = (task.aim.most_ns or 0) / 1e9
    return f"no choice takes at most {most_s:.4g} s; the fastest one takes {nearest.objective:.4g} s."


def frontier(options: Sequence[Option]) -> list[Option]:
    """The options that no other one beats or equals in both budget and time, by rising budget and falling time.

    The others can be left out: whoever takes one may take the better one instead. Of equal ones the first stays.
    """
    best: list[Option] = []
    for option in sorted(options, key=lambda option: (option.budget, option.time_ns)):
        if not best or option.time_ns < best[-1].time_ns:
            best.append(option)
    return best


def best_uniform(
    table: Sequence[Sequence[Option]], slots: int, meets: Meets | None = None, value: Value | None = None
) -> tuple[Option, ...] | None:
    """The best choice that gives every layer the same budget and interval; None if no such choice fits.

    `meets` says whether a choice meets all other constraints, `value` what is minimised, by default the whole time.
    """
    uniform: dict[tuple[int, int | None], list[Option]] = {}
    for options in table:
        slowest_first = sorted(options, key=lambda option: -option.time_ns)
        for pair, option in {(option.budget, option.interval): option for option in slowest_first}.items():
            uniform.setdefault(pair, []).append(option)
    fitting = [
        tuple(options)
        for (budget, _), options in uniform.items()
        if len(options) == len(table) and budget * len(table) <= slots and (meets is None or meets(tuple(options)))
    ]
    return min(fitting, key=value or _total_ns, default=None)


def _total_ns(options: Sequence[Option]) -> int:
    return sum(option.time_ns for option in options)


# --- the problem ---


def check_table(table: Sequence[Sequence[Option]], time_limit_s: float) -> None:
    """Raise ValueError if a layer has no option or an option a negative number, PlanError if the limit is none."""
    if not table or not all(table):
        raise ValueError("table must have at least one layer, and each layer at least one option.")
    for layer, options in enumerate(table):
        for option in options:
            if option.time_ns < 0 or option.budget < 0 or min(option.block_ns, default=0) < 0:
                raise ValueError(f"layer {layer}: {option} must have a budget and times >= 0.")
    if not 0 < time_limit_s < math.inf:
        raise PlanError(f"time_limit_s(={time_limit_s}) must be > 0 and finite.")


class _Task:
    """A table and an aim as a problem, and back again.

    The options that are sure to be beaten are left out. Each time counts from its layer's fastest option, in units that
    make the largest coefficient `_LARGEST_COEFFICIENT`.
    """

    def __init__(
        self,
        table: Sequence[Sequence[Option]],
        slots: int,
        aim: Aim,
        fixed_ns: int,
        fixed_block_ns: Sequence[int],
    ) -> None:
        self.table, self.slots, self.aim = table, slots, aim
        self.fixed: dict[str, Any] = {"fixed_ns": fixed_ns, "fixed_block_ns": fixed_block_ns}
        self._fixed_ns, self._fixed_block_ns = fixed_ns, fixed_block_ns
        self._options = [list(dict.fromkeys(options)) if aim.has_blocks else frontier(options) for options in table]
        self._least_ns = [min(option.time_ns for option in options) for options in self._options]
        spreads = [max(option.time_ns for option in options) for options in self._options]
        spread_ns = max(most - least for most, least in zip(spreads, self._least_ns, strict=True))
        self._unit_ns = max(1.0, spread_ns) / _LARGEST_COEFFICIENT
        self.problem, self._picks = self._build()

    # --- what a choice comes to ---

    def time_ns(self, options: Sequence[Option]) -> int:
        """The whole time."""
        return self._fixed_ns + _total_ns(options)

    def slowest_block_ns(self, options: Sequence[Option]) -> int:
        """The time of the slowest block; 0 without any."""
        blocks = zip(self._fixed_block_ns, *(option.block_ns for option in options), strict=True)
        return max((sum(parts) for parts in blocks), default=0)

    def value(self, options: Sequence[Option]) -> int:
        """What is minimised."""
        if self.aim.minimised == "slots":
            return sum(option.budget for option in options)
        return self.slowest_block_ns(options) if self.aim.minimised == "slowest block" else self.time_ns(options)

    def meets(self, options: Sequence[Option]) -> bool:
        """Whether all constraints are met, that of the slots included."""
        most_ns, most_block_ns = self.aim.most_ns, self.aim.most_block_ns
        return (
            sum(option.budget for option in options) <= self.slots
            and (most_ns is None or self.time_ns(options) <= most_ns)
            and (most_block_ns is None or self.slowest_block_ns(options) <= most_block_ns)
        )

    def bound(self, solver_bound: float) -> float:
        """The solver's bound in ns, or slots, less what it may be off by."""
        if self.aim.minimised == "slots":
            # Slots are whole numbers.
            return math.ceil(solver_bound - 1e-6)
        unit_ns = (solver_bound - _TOLERANCE) * self._unit_ns
        if self.aim.minimised == "slowest block":
            return max(0.0, unit_ns)
        # Nothing beats every layer's fastest option, whatever the solver knows.
        return self._fixed_ns + sum(self._least_ns) + max(0.0, unit_ns)

    def decode(self) -> tuple[Option, ...]:
        """What the solver took."""
        chosen = []
        for options, row in zip(self._options, self._picks, strict=True):
            taken = [option for option, pick in zip(options, row, strict=True) if pick.value() > 0.5]
            assert len(taken) == 1, f"the solver took {len(taken)} options of a layer"
            chosen += taken
        assert sum(option.budget for option in chosen) <= self.slots, "the solver took more than fits"
        return tuple(chosen)

    # --- the problem ---

    def _build(self) -> tuple[pulp.LpProblem, list[list[Any]]]:
        problem = pulp.LpProblem("tidesim_plan", pulp.LpMinimize)
        picks = [
            [problem.add_variable(f"pick_{layer}_{index}", cat="Binary") for index in range(len(options))]
            for layer, options in enumerate(self._options)
        ]
        pairs = [
            (option, pick, least_ns)
            for options, row, least_ns in zip(self._options, picks, self._least_ns, strict=True)
            for option, pick in zip(options, row, strict=True)
        ]
        used = pulp.lpSum(option.budget * pick for option, pick, _ in pairs)
        lost = pulp.lpSum((option.time_ns - least_ns) / self._unit_ns * pick for option, pick, least_ns in pairs)
        blocks = [
            fixed_ns / self._unit_ns
            + pulp.lpSum(option.block_ns[k] / self._unit_ns * pick for option, pick, _ in pairs)
            for k, fixed_ns in enumerate(self._fixed_block_ns if self.aim.has_blocks else ())
        ]
        self._minimise(problem, lost, used, blocks)
        _take_one_option(problem, picks)
        _stay_within_memory(problem, used, self.slots)
        if self.aim.most_ns is not None:
            _end_in_time(problem, lost, (self.aim.most_ns - self._fixed_ns - sum(self._least_ns)) / self._unit_ns)
        if self.aim.most_block_ns is not None:
            _end_blocks_in_time(problem, blocks, self.aim.most_block_ns / self._unit_ns)
        return problem, picks

    def _minimise(self, problem: pulp.LpProblem, lost: Any, used: Any, blocks: Sequence[Any]) -> None:
        """Set the objective: time lost against each layer's fastest option, slots, or the slowest block."""
        if self.aim.minimised == "slots":
            problem.setObjective(used)
        elif self.aim.minimised == "time":
            problem.setObjective(lost)
        else:
            slowest = problem.add_variable("slowest_block", lowBound=0)
            problem.setObjective(slowest + 0)
            for k, block in enumerate(blocks):
                problem.addConstraint(block <= slowest, f"slowest_{k}")


def _take_one_option(problem: pulp.LpProblem, picks: Sequence[Sequence[Any]]) -> None:
    """Every layer takes exactly one option: sum over p of x[l, p] = 1 for every layer l."""
    for layer, row in enumerate(picks):
        problem.addConstraint(pulp.lpSum(row) == 1, f"one_option_{layer}")


def _stay_within_memory(problem: pulp.LpProblem, used: Any, slots: int) -> None:
    """The experts fit: sum over l, p of budget[l, p] * x[l, p] <= slots.

    It is sum of budget * expert_bytes <= device memory - other weights - KV cache - transient peak - reserve, divided
    by expert_bytes: all experts have one size, so rounding the right side down loses nothing.
    """
    problem.addConstraint(used <= slots, "memory")


def _end_in_time(problem: pulp.LpProblem, lost: Any, most: float) -> None:
    """All of it ends in time: sum over l, p of (time[l, p] - least time[l]) * x[l, p] <= what the bound leaves."""
    problem.addConstraint(lost <= most + _SLACK, "whole_time")


def _end_blocks_in_time(problem: pulp.LpProblem, blocks: Sequence[Any], most: float) -> None:
    """Every block ends in time: sum over l, p of block_time[k, l, p] * x[l, p] <= bound for every block k."""
    for k, block in enumerate(blocks):
        problem.addConstraint(block <= most + _SLACK, f"block_{k}")


def _best_known(
    found: tuple[Option, ...] | None, uniform: tuple[Option, ...] | None, status: str, value: Value
) -> tuple[tuple[Option, ...], Literal["optimal", "feasible", "uniform"]]:
    """The better of what the solver found and the best uniform choice, and which it is."""
    if found is not None and status == "optimal":
        return found, "optimal"
    known = [choice for choice in (found, uniform) if choice is not None]
    if not known:
        raise PlanError("the time limit came before any choice was found, and no uniform budget fits; allow more time.")
    best = min(known, key=value)
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
