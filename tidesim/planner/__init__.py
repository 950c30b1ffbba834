"""Plans: which policy, budgets and refresh intervals to use for a model on a machine, by the routing of a trace."""

from tidesim.planner.integer_programme import InfeasibleError, UnboundedError
from tidesim.planner.objectives import Objective
from tidesim.planner.plan_fields import OBJECTIVES, POLICY_NAMES
from tidesim.planner.plan_file import Plan
from tidesim.planner.plan_report import Baseline, PlanReport, Programme, split_sequences
from tidesim.planner.planning import Demand, plan
from tidesim.planner.ranking import MachineRanking, Ranked, rank_machines
from tidesim.planner.tide_programme import TideProgramme, tide_programme

__all__ = [
    "OBJECTIVES",
    "POLICY_NAMES",
    "Baseline",
    "Demand",
    "InfeasibleError",
    "MachineRanking",
    "Objective",
    "Plan",
    "PlanReport",
    "Programme",
    "Ranked",
    "TideProgramme",
    "UnboundedError",
    "plan",
    "rank_machines",
    "split_sequences",
    "tide_programme",
]
