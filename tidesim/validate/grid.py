"""Which choices are measured: policies x budgets x refresh intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from tidesim.engine.choice import Choice, by_hand, planned
from tidesim.engine.live import LiveModel
from tidesim.errors import InputError
from tidesim.execution import Execution
from tidesim.hardware import Hardware
from tidesim.planner import Plan
from tidesim.policies import POLICIES, parameters_of
from tidesim.policies.knowledge import Knowledge
from tidesim.result import one_or_each
from tidesim.workload import Workload


class Case(NamedTuple):
    """One choice to measure: a policy, its budget and its refresh interval if it has one, or what a plan says.

    `budget` and `refresh_interval` are one number for all layers or one for each; `predictor` is one of `PREDICTORS`,
    for a policy that goes by one.
    """

    policy: str
    budget: int | tuple[int, ...]
    refresh_interval: int | tuple[int, ...] | None
    plan: Plan | None = None
    predictor: str | None = None

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """What `plan` says."""
        interval = None if plan.refresh_interval is None else one_or_each(plan.refresh_interval)
        return cls(plan.policy, one_or_each(plan.budget), interval, plan)

    @property
    def label(self) -> str:
        """Short name for tables and pictures."""
        if self.plan is not None:
            return f"plan: {self.policy}"
        every = "" if self.refresh_interval is None else f" τ={self.refresh_interval}"
        foretold = "" if self.predictor is None else f", {self.predictor}"
        return f"{self.policy}{foretold}{every} B={self.budget}"

    def choice(self, live: LiveModel, execution: Execution, workload: Workload, hardware: Hardware) -> Choice:
        """The choice on a device; policies that learn from sequences know the workload itself beforehand.

        Raise InputError or PlanError for what the model or the engine cannot do.
        """
        if self.plan is not None:
            return planned(self.plan, live)
        params = {"refresh_interval": self.refresh_interval, "predictor": self.predictor}
        given = {name: value for name, value in params.items() if value is not None}
        made = Knowledge(workload=workload, corpus=workload).make(self.policy, given)
        return by_hand(made, self.budget, execution, live, hardware)


def grid(
    policies: Sequence[str],
    budgets: Sequence[int],
    intervals: Sequence[int],
    num_experts: int,
    predictor: str = "previous",
) -> list[Case]:
    """All combinations that make sense: policies that never refresh have no interval, all-host has no budget.

    `predictor` is for those that go by one. Raise InputError for an unknown policy, or numbers out of range.
    """
    for name in policies:
        if name not in POLICIES:
            raise InputError(f"no policy {name!r} in the grid; there are {', '.join(POLICIES)}.")
    if not all(0 <= budget <= num_experts for budget in budgets) or not all(interval >= 1 for interval in intervals):
        raise InputError(f"the grid's budgets must be in 0..{num_experts} and its intervals >= 1.")
    cases = []
    for name in policies:
        fixed = {"all-host": [0], "all-device": [num_experts]}.get(name)
        for budget in fixed or budgets:
            for interval in intervals if "refresh_interval" in parameters_of(name) else [None]:
                foretold = predictor if "predictor" in parameters_of(name) else None
                cases.append(Case(name, budget, interval, predictor=foretold))
    return cases


def read_grid(file: Path, num_experts: int, predictor: str = "previous") -> list[Case]:
    """The grid of a JSON file: `{"policies": [...], "budgets": [...], "intervals": [...]}`; `predictor` as in `grid`.

    Raise InputError for a file that is no such thing.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        policies, budgets, intervals = (list(content[name]) for name in ("policies", "budgets", "intervals"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f'{file}: must be JSON, {{"policies": [...], "budgets": [...], "intervals": [...]}}.'
        ) from None
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (*budgets, *intervals)):
        raise InputError(f"{file}: budgets and intervals must be whole numbers.")
    return grid(policies, budgets, intervals, num_experts, predictor)


def default_grid(num_experts: int) -> list[Case]:
    """All-host and every policy that a plan may choose, at three budgets and three intervals: 25 cases."""
    budgets = [num_experts * share // 8 for share in (1, 2, 4)]
    return grid(("all-host", "static", "lru", "tide", "tide-as-coded"), budgets, (1, 3, 8), num_experts)
