"""The search for a plan: tables, their programmes, whole runs of what comes out, and a look around the best of them.

A programme takes layers for independent, and with background copies they are not: they share a link. So its choice is
run as a whole, beside simpler ones; and then whatever differs from the best run in one thing is run too, as long as
that makes it better. Runs are ranked by the objective's times and by nothing else: a higher hit rate may cost more
copies than it saves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidesim.planner.baselines import Rival, find_rivals, tide_programmes
from tidesim.planner.candidates import Candidates, slots_for
from tidesim.planner.integer_programme import Aim, Choice, InfeasibleError, SolverName, choose
from tidesim.planner.listed_steps import listed_cases
from tidesim.planner.objectives import Objective
from tidesim.planner.runs import Case, Outcome, Runs
from tidesim.planner.table import Table, fill_tables
from tidesim.planner.tide_programme import TideProgramme

# Rounds of the look around the best run, and neighbours that are run in each: fewer where a run takes a hundred times
# as long, as the policy is asked and follows no compiled rule.
_ROUNDS = 4
_NEIGHBOURS = 12
_NEIGHBOURS_ASKED = 4


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Parameters
    ----------
    tables, choices : by policy, its table and its programme's choice: what comes nearest, if no sum of the table does
        what is asked.
    tide : TIDE's own choices. rivals : the baselines.
    winner : the best run. ranked : every run that a plan may be, best first, the winner included.
    start : the best run before the look around. num_neighbours : how many were run there.
    """

    tables: Mapping[str, Table]
    choices: Mapping[str, Choice]
    tide: tuple[TideProgramme, ...]
    rivals: Sequence[Rival]
    winner: Case
    ranked: Sequence[Case]
    start: Case
    num_neighbours: int


def search(
    runs: Runs,
    candidates: Candidates,
    slots: int,
    objective: Objective,
    *,
    tuned: str,
    table_part: str,
    solver: SolverName,
    time_limit_s: float,
) -> Found:
    """The best plan for `objective` on the sequences `tuned`, with tables filled on `table_part`.

    Raise InfeasibleError, with what comes nearest, if no run does what is demanded.
    """
    tables = fill_tables(runs, candidates, table_part)
    choices = _choices(runs, tables, slots, objective, solver, time_limit_s)
    tide = tide_programmes(runs, candidates, tuned)
    rivals = find_rivals(runs, candidates, tide, slots, tuned)
    contenders = [Case(name, choice.budget, choice.interval, tuned) for name, choice in choices.items()]
    num_layers = runs.setting.model.num_layers
    for name, table in tables.items():
        for pair in table.pairs:
            if pair[0] * num_layers <= slots_for(name, slots):
                contenders.append(Case.uniform(name, *pair, tuned, num_layers))
    contenders += [rival.case for rival in rivals if candidates.may_choose(rival.case.policy, rival.case.interval)]
    even = (candidates.uniform,) * num_layers
    budgets = {name: (choice.budget, even) for name, choice in choices.items() if candidates.uniform}
    contenders += listed_cases(runs, candidates, budgets, tuned, table_part)
    ranked = _ranked(runs, objective, contenders)
    start = ranked[0]
    runs.outcomes(rival.case for rival in rivals)
    seen = _look_around(runs, objective, tables, slots, start)
    ranked = _ranked(runs, objective, [*ranked, *seen])
    winner = ranked[0]
    unmet = objective.why_unmet(winner, runs.outcomes([winner])[0])
    if unmet:
        raise InfeasibleError(
            f"no plan does what is asked on {runs.setting.hardware.name}: {unmet} by the best there is "
            f"(policy {winner.policy!r}, {sum(winner.budget)} experts on the device); ask for no more than that."
        )
    return Found(
        tables, choices, tide, [_best_static(rival, ranked) for rival in rivals], winner, ranked, start, len(seen)
    )


def _choices(
    runs: Runs,
    tables: Mapping[str, Table],
    slots: int,
    objective: Objective,
    solver: SolverName,
    time_limit_s: float,
) -> dict[str, Choice]:
    """What each policy's programme chooses."""

    def choice(name: str) -> Choice:
        table = tables[name]
        aim = objective.aim(table.generated_tokens)
        settings: dict[str, Any] = {
            "fixed_ns": table.outside_ns,
            "fixed_block_ns": table.outside_block_ns if aim.has_blocks else (),
            "solver": solver,
            "time_limit_s": time_limit_s,
        }
        what = (table.options(has_blocks=aim.has_blocks), slots_for(name, slots))
        try:
            return choose(*what, aim=aim, **settings)
        except InfeasibleError:
            # Sums over a table may be wrong about what can be done; so what comes nearest is run, too.
            nearest = Aim("slowest block" if aim.most_block_ns is not None else "time")
            return choose(*what, aim=nearest, **settings)

    return {name: choice(name) for name in tables}


def _ranked(runs: Runs, objective: Objective, cases: Sequence[Case]) -> list[Case]:
    """All different cases, run, best first; of equals the one that came first."""
    distinct = list(dict.fromkeys(cases))
    outcomes: dict[Case, Outcome] = dict(zip(distinct, runs.outcomes(distinct), strict=True))
    return sorted(distinct, key=lambda case: objective.rank(case, outcomes[case]))


def _best_static(rival: Rival, ranked: Sequence[Case]) -> Rival:
    """The static baseline is the best static placement that was found, with uneven budgets or even ones."""
    if rival.name != "static":
        return rival
    return rival._replace(case=next((case for case in ranked if case.policy == "static"), rival.case))


# --- around the best ---


def _look_around(runs: Runs, objective: Objective, tables: Mapping[str, Table], slots: int, start: Case) -> list[Case]:
    """Neighbours of `start`, and of the best of them, as long as one is better; all that were run."""
    best, seen, is_asked = start, {start}, runs.setting.policy(start).rule is None
    for _ in range(_ROUNDS):
        near = neighbours(best, tables[best.policy], slots_for(best.policy, slots))
        new = [case for case in near if case not in seen][: _NEIGHBOURS_ASKED if is_asked else _NEIGHBOURS]
        seen.update(new)
        ahead = _ranked(runs, objective, [best, *new])[0]
        if ahead == best:
            break
        best = ahead
    return sorted(seen - {start})


def neighbours(case: Case, table: Table, slots: int) -> list[Case]:
    """Cases that differ from `case` in one thing, the most promising by the table first.

    One thing is: a layer's next larger budget, and if there is no room for it another layer's next smaller one in turn;
    or the next interval of the table, longer or shorter, in all layers.
    """
    bigger, smaller = _steps(case, table, 1), _steps(case, table, -1)
    free = slots - sum(case.budget)
    promising: list[tuple[int, Case]] = []
    for layer, (up, gain_ns) in bigger.items():
        more = up - case.budget[layer]
        if more <= free:
            promising.append((-gain_ns, _with(case, {layer: up})))
        for other, (down, other_ns) in smaller.items():
            if other != layer and more <= free + case.budget[other] - down:
                promising.append((-gain_ns - other_ns, _with(case, {layer: up, other: down})))
    promising += [(-gain_ns, _with(case, {layer: down})) for layer, (down, gain_ns) in smaller.items()]
    promising.sort(key=lambda pair: pair[0])
    return [*_other_intervals(case, table), *(near for _, near in promising)]


def _steps(case: Case, table: Table, by: int) -> dict[int, tuple[int, int]]:
    """The next budget of each layer, and the time that it saves by the table (less than 0: costs)."""
    budgets = sorted({budget for budget, _ in table.pairs})
    found = {}
    for layer, budget in enumerate(case.budget):
        then = _next_of(budgets, budget, by)
        if then != budget:
            interval = None if case.interval is None else case.interval[layer]
            now_ns, then_ns = (table.layer_ns(layer, slots, interval) for slots in (budget, then))
            found[layer] = then, now_ns - then_ns
    return found


def _with(case: Case, changes: Mapping[int, int]) -> Case:
    return case._replace(budget=tuple(changes.get(layer, budget) for layer, budget in enumerate(case.budget)))


def _other_intervals(case: Case, table: Table) -> list[Case]:
    """The same with the next longer, and the next shorter, of the table's intervals in every layer."""
    listed = sorted({interval for _, interval in table.pairs if interval is not None})
    found = []
    for by in (1, -1):
        intervals = [_next_of(listed, interval, by) for interval in case.interval or ()]
        if tuple(intervals) != (case.interval or ()):
            found.append(case._replace(interval=tuple(intervals)))
    return found


def _next_of(listed: Sequence[int], value: int, by: int) -> int:
    """The next of `listed` beyond `value`, up or down; `value` itself at the end."""
    ahead = [other for other in listed if (other - value) * by > 0]
    return value if not ahead else min(ahead) if by > 0 else max(ahead)
