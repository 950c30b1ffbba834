"""Which choices are measured: policies x budgets x refresh intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from tidesim.engine.choice import Choice, by_hand, planned
from tidesim.engine.live import LiveModel
from tidesim.errors import InputError
from tidesim.execution import Execution
from tidesim.planner import Plan
from tidesim.planner.runs import REFRESHING
from tidesim.policies import POLICIES, policy
from tidesim.result import one_or_each
from tidesim.workload import Workload


class Case(NamedTuple):
    """One choice to measure: a policy, its budget and its refresh interval if it has one, or what a plan says.

    `budget` and `refresh_interval` are one number for all layers or one for each.
    """

    policy: str
    budget: int | tuple[int, ...]
    refresh_interval: int | tuple[int, ...] | None
    plan: Plan | None = None

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
        return f"{self.policy}{every} B={self.budget}"

    def choice(self, live: LiveModel, execution: Execution, workload: Workload) -> Choice:
        """The choice on a device; the static policy knows how popular experts are in the workload.

        Raise InputError or PlanError for what the model or the engine cannot do.
        """
        if self.plan is not None:
            return planned(self.plan, live)
        params: dict[str, object] = {} if self.refresh_interval is None else {"refresh_interval": self.refresh_interval}
        if self.policy == "static":
            params["popularity"] = workload.counts.sum(axis=0)
        return by_hand(policy(self.policy, **params), self.budget, execution, live)


def grid(policies: Sequence[str], budgets: Sequence[int], intervals: Sequence[int], num_experts: int) -> list[Case]:
    """All combinations that make sense: policies that never refresh have no interval, all-host has no budget.

    Raise InputError for an unknown policy, or numbers out of range.
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
            cases += [Case(name, budget, interval) for interval in (intervals if name in REFRESHING else [None])]
    return cases


def read_grid(file: Path, num_experts: int) -> list[Case]:
    """The grid of a JSON file: `{"policies": [...], "budgets": [...], "intervals": [...]}`.

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
    return grid(policies, budgets, intervals, num_experts)


def default_grid(num_experts: int) -> list[Case]:
    """Every policy that the engine runs, at three budgets and three intervals: 28 cases."""
    budgets = [num_experts * share // 8 for share in (1, 2, 4)]
    return grid(("all-host", "static", "lru", "tide", "tide-as-coded"), budgets, (1, 3, 8), num_experts)
