"""Plans: which policy, budgets and refresh intervals to use for a model on a machine, by the routing of a trace."""

from tidesim.planner.integer_programme import InfeasibleError, UnboundedError
from tidesim.planner.plan_fields import OBJECTIVES
from tidesim.planner.plan_file import Plan
from tidesim.planner.plan_report import Baseline, PlanReport, Programme, split_sequences
from tidesim.planner.planning import plan
from tidesim.planner.tide_programme import TideProgramme, tide_programme

__all__ = [
    "OBJECTIVES",
    "Baseline",
    "InfeasibleError",
    "Plan",
    "PlanReport",
    "Programme",
    "TideProgramme",
    "UnboundedError",
    "plan",
    "split_sequences",
    "tide_programme",
]
