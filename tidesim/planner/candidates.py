"""Which policies, budgets and intervals a plan may choose from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tidesim.errors import PlanError
from tidesim.moe import MoEConfig
from tidesim.planner.integer_programme import InfeasibleError
from tidesim.planner.plan_fields import POLICY_NAMES
from tidesim.policies.caches import lru
from tidesim.residency import check_budgets
from tidesim.workload import ForwardKind, Workload

INTERVALS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
# Budgets as shares of the average that fits: most choices are near it, and larger ones let layers be uneven.
_SHARES = (0.5, 0.75, 0.875, 1.0, 1.125, 1.25, 1.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What there is to choose from, all ascending.

    Parameters
    ----------
    budgets, intervals : for one layer.
    uniform : the largest of the budgets that fits in every layer at once.
    anchor : the budget at which all intervals are tried: `uniform` if that leaves something to choose.
    is_open : whether an interval beside these may be chosen too, if some baseline does well with it.
    """

    policies: tuple[str, ...]
    budgets: tuple[int, ...]
    intervals: tuple[int, ...]
    uniform: int
    anchor: int
    is_open: bool

    def may_choose(self, policy: str, intervals: Sequence[int] | None) -> bool:
        """Whether a plan may have this policy and these intervals."""
        return policy in self.policies and (self.is_open or set(intervals or ()) <= set(self.intervals))


def find_candidates(
    model: MoEConfig,
    slots: int,
    workload: Workload,
    policies: Sequence[str],
    budgets: Sequence[int] | None,
    intervals: Sequence[int] | None,
) -> Candidates:
    """The candidates when `slots` experts fit over all layers.

    `budgets` None means `default_budgets`, and `intervals` None `INTERVALS` and whatever else turns up.

    A policy that needs more slots than there are, as one that fetches needs a slot in every layer and one to drop
    experts from, is left out.
    Raise BudgetError if a budget is out of range, PlanError if an interval or policy is, InfeasibleError if no budget
    fits.
    """
    if budgets is None:
        budgets = default_budgets(slots, model.num_layers, model.num_experts)
    check_budgets(budgets, model.num_experts)
    listed = INTERVALS if intervals is None else intervals
    _check_names(policies, budgets, listed)
    chosen = tuple(sorted(set(budgets)))
    needed = {name: smallest_budget(name, chosen) for name in policies}
    able = tuple(
        name
        for name, budget in needed.items()
        if budget is not None and budget * model.num_layers <= slots_for(name, slots)
    )
    if not able:
        most = max(slots_for(name, slots) for name in policies)
        raise InfeasibleError(_too_large(model, most, [budget for budget in needed.values() if budget is not None]))
    fitting = [budget for budget in chosen if budget * model.num_layers <= slots]
    return Candidates(
        policies=able,
        budgets=chosen,
        intervals=distinct_intervals(listed, workload),
        uniform=max(fitting, default=0),
        anchor=_anchor(chosen, fitting, model.num_experts),
        is_open=intervals is None,
    )


def default_budgets(slots: int, num_layers: int, num_experts: int) -> tuple[int, ...]:
    """Budgets worth a look when `slots` experts fit over all layers.

    0, the largest uniform budget exactly, and some around the average, up to half as much again.
    """
    average = slots / num_layers
    around = {min(num_experts, round(share * average)) for share in _SHARES}
    # Where less than one expert a layer fits, some layers may still have one.
    few = {1, min(2, num_experts)} if slots and average < 2 else set()
    return tuple(sorted({0, slots // num_layers} | around | few))


def distinct_intervals(intervals: Sequence[int], workload: Workload) -> tuple[int, ...]:
    """`intervals`; of those that are no shorter than every block, which all mean the same, just the first."""
    longest = longest_block(workload)
    ascending = sorted(set(intervals))
    short = [interval for interval in ascending if interval < longest]
    return tuple(short + ascending[len(short) :][:1])


def longest_block(workload: Workload) -> int:
    """Most denoising steps of any block."""
    is_denoise = workload.kind == ForwardKind.DENOISE
    return int(np.max(workload.step[is_denoise], initial=-1)) + 1


def smallest_budget(policy: str, budgets: Sequence[int]) -> int | None:
    """The smallest of `budgets` that `policy` can do with, None if there is none."""
    needed = 1 if policy == "lru" else 0  # it fetches into slots
    return min((budget for budget in budgets if budget >= needed), default=None)


def slots_for(policy: str, slots: int) -> int:
    """How many of `slots` experts that fit `policy` has for its budgets: scratch memory takes some of them."""
    return slots - (lru().scratch if policy == "lru" else 0)


def spread(slots: int, num_layers: int) -> tuple[int, ...]:
    """`slots` over all layers, evenly; what does not divide goes to the first ones."""
    each, more = divmod(slots, num_layers)
    return tuple(each + (layer < more) for layer in range(num_layers))


def _too_large(model: MoEConfig, slots: int, smallest: Sequence[int]) -> str:
    largest = slots // model.num_layers
    way_out = f"allow a budget of {largest}" if largest else "allow a budget of 0, with another policy than 'lru'"
    if not smallest:
        return f"policy 'lru' fetches into slots and a budget of 0 has none; {way_out}."
    budget_bytes = min(smallest) * model.num_layers * model.expert_bytes
    return (
        f"a budget of {min(smallest)} in each of {model.num_layers} layers takes {budget_bytes} bytes, and "
        f"{slots * model.expert_bytes} bytes ({slots} experts) are left for them; {way_out}."
    )


def _check_names(policies: Sequence[str], budgets: Sequence[int], intervals: Sequence[int]) -> None:
    unknown = sorted(set(policies) - set(POLICY_NAMES))
    if unknown or not policies:
        raise PlanError(f"policies(={', '.join(unknown)}) must be some of {', '.join(POLICY_NAMES)}.")
    if not budgets or not intervals or min(intervals) < 1:
        raise PlanError(f"intervals(={list(intervals)}) must be whole numbers >= 1, and there must be a budget.")


def _anchor(budgets: Sequence[int], fitting: Sequence[int], num_experts: int) -> int:
    """The largest budget that fits and leaves something to choose."""
    choosing = [budget for budget in budgets if 0 < budget < num_experts]
    return max(set(choosing) & set(fitting), default=min(choosing, default=max(budgets)))
