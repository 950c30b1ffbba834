"""Which machine? The best plan on each of several, beside one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidesim.errors import BudgetError, PlanError
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.planner.integer_programme import InfeasibleError
from tidesim.planner.objectives import Objective
from tidesim.planner.plan_report import PlanReport
from tidesim.planner.planning import plan
from tidesim.trace import Trace
from tidesim.workers import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A machine, and its plan's report or why there is none."""

    machine: str
    report: PlanReport | None
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON."""
        report = None if self.report is None else self.report.to_dict()
        return {"machine": self.machine, "report": report, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRanking:
    """Machines, the best for the objective first; those without a plan come last."""

    objective: str
    machines: tuple[Ranked, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON."""
        return {"objective": self.objective, "machines": [ranked.to_dict() for ranked in self.machines]}


def rank_machines(
    trace: Trace,
    model: MoEConfig,
    machines: Sequence[Hardware],
    *,
    objective: Objective,
    progress: Progress | None = None,
    **settings: Any,
) -> MachineRanking:
    """Plan for each of `machines` and rank them by what is scored: on held-out sequences, if there are any.

    `settings` are those of `plan`. A machine that is too small is ranked last, with the reason. Raise PlanError if two
    machines have one name, and what `plan` raises whatever the machine.
    """
    names = [machine.name for machine in machines]
    if len(set(names)) < len(names):
        raise PlanError(f"machines must have different names, not {', '.join(names)}.")
    found = []
    for machine in machines:
        try:
            report = plan(trace, model, machine, objective=objective, progress=progress, **settings)
        except (InfeasibleError, BudgetError) as error:
            found.append(Ranked(machine=machine.name, report=None, reason=str(error)))
        else:
            found.append(Ranked(machine=machine.name, report=report, reason=None))
    return MachineRanking(
        objective=objective.name, machines=tuple(sorted(found, key=lambda one: _place(one, objective)))
    )


def _place(ranked: Ranked, objective: Objective) -> tuple[bool, float]:
    """The smaller the better."""
    report = ranked.report
    if report is None:
        return True, 0.0
    if objective.name == "memory":
        return False, float(sum(report.chosen.budget))
    if objective.name == "latency":
        return False, report.slowest_block_s
    return False, -(report.held_out or report.predicted).tok_per_s
