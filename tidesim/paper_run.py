"""A run on paper, whoever times it: its inputs, checked, and the record of what came of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict

import numpy as np

from tidesim.errors import InputError
from tidesim.execution import Costs, Execution, check_memory
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.policies import Policy, Shape
from tidesim.residency import check_budgets, per_layer
from tidesim.result import RunResult, one_or_each
from tidesim.trace.fitting import how_to_fit
from tidesim.windows import windows
from tidesim.workload import Workload

# The latest costs: of runs that follow each other many have the same, and differ in policies and budgets.
_kept: tuple[Costs, ...] = ()
_MOST_KEPT = 8


class RunSettings(TypedDict, total=False):
    """What may be said of a run besides what is run on what; see `simulator.simulate`, which explains each."""

    budget: Required[int | Sequence[int]]
    execution: Required[Execution]
    seed: int | None
    reserve_bytes: int | None
    is_memory_checked: bool
    expected: Hardware | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRun:
    """What is run, with what, and on what; for the parameters see `simulator.simulate`. Counts are checked apart.

    Attributes
    ----------
    budgets : slots of each MoE layer. costs : what everything takes. shape : what the policy is told.

    Raise InputError if workload, model and execution do not fit together, BudgetError if the experts do not fit the
    machine.
    """

    workload: Workload
    model: MoEConfig
    hardware: Hardware
    policy: Policy
    budget: int | Sequence[int]
    execution: Execution
    seed: int | None = None
    reserve_bytes: int | None = None
    is_memory_checked: bool = True
    expected: Hardware | None = None
    budgets: tuple[int, ...] = field(init=False)
    costs: Costs = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        workload, model, hardware, execution = self.workload, self.model, self.hardware, self.execution
        _check_fit(workload, model, execution)
        budgets = per_layer(self.budget, model.num_layers, "budget")
        check_budgets(budgets, model.num_experts)
        if self.is_memory_checked:
            scratch = self.policy.scratch_experts(model.num_experts)
            most = (workload.max_tokens, self.reserve_bytes, scratch, workload.batch_size)
            check_memory(model, hardware, execution, budgets, *most)
        max_rows = int(workload.tokens.max())
        costs = _costs_of(model, hardware, execution, max_rows)
        known = costs if self.expected is None else _costs_of(model, self.expected, execution, max_rows)
        for name, value in (
            ("budgets", budgets),
            ("costs", costs),
            ("shape", Shape(model.num_experts, budgets, known)),
        ):
            object.__setattr__(self, name, value)

    def result(self, totals: Mapping[str, Any]) -> RunResult:
        """The record, with `totals` counted and timed: the fields of `RunResult` from `hits` on."""
        workload, model, policy = self.workload, self.model, self.policy
        is_same_model = workload.model_name == model.name
        return RunResult(
            policy=policy.name,
            budget=one_or_each(self.budgets),
            refresh_interval=policy.refresh_interval,
            refresh_steps=policy.refresh_steps,
            execution=self.execution.name,
            context=workload.context,
            hardware=self.hardware.name,
            model=model.name if is_same_model else f"routing of {workload.model_name} at the sizes of {model.name}",
            trace_origin=workload.origin,
            seed=self.seed,
            num_forwards=workload.num_forwards,
            generated_tokens=workload.generated_tokens,
            batch_size=workload.batch_size,
            **totals,
        )


def _costs_of(model: MoEConfig, hardware: Hardware, execution: Execution, max_rows: int) -> Costs:
    """What everything takes, reckoned unless it is kept."""
    global _kept
    for costs in _kept:
        known = (costs.max_rows, costs.execution, costs.model, costs.hardware)
        if known == (max_rows, execution, model, hardware):
            return costs
    costs = Costs(model, hardware, execution, max_rows)
    _kept = (costs, *_kept[: _MOST_KEPT - 1])
    return costs


def check_counts(workload: Workload) -> None:
    """Raise InputError if the counts of `workload` do not fit its tokens and top-k, or there are none."""
    if not workload.num_forwards:
        raise InputError("the workload has no forward; record at least one sequence.")
    for span, counts in windows(workload.counts):
        num_rows = workload.tokens[span, None]
        num_pairs = counts.sum(axis=2, dtype=np.int64)
        if (num_pairs != num_rows * workload.top_k).any() or (counts.max(axis=2) > num_rows).any():
            raise InputError(
                "the counts of the workload do not fit its tokens and top-k; build it with Trace.workload()."
            )


def copied(costs: Costs, num_in: int, num_out: int) -> dict[str, int]:
    """Copies and bytes of `num_in` experts that come to the device, and `num_out` that leave it."""
    copies_of = ((num_in, costs.promote_bytes), (num_out, costs.evict_bytes))
    num_copied = sum(num_experts for num_experts, num_bytes in copies_of if num_bytes)
    return {
        "num_copies": num_copied * costs.execution.copies_per_expert,
        "h2d_bytes": num_in * costs.promote_bytes,
        "d2h_bytes": num_out * costs.evict_bytes,
    }


def _check_fit(workload: Workload, model: MoEConfig, execution: Execution) -> None:
    if (workload.num_experts, workload.top_k) != (model.num_experts, model.top_k):
        raise InputError(
            f"the workload routes to {workload.top_k} of {workload.num_experts} experts, {model.name} to {model.top_k} "
            f"of {model.num_experts}; take a trace of a model with the same experts and top-k: "
            f"{how_to_fit(model.num_experts, model.top_k)}."
        )
    if workload.num_layers != model.num_layers:
        raise InputError(
            f"the workload has {workload.num_layers} MoE layers and {model.name} has {model.num_layers}; "
            f"use workload.tiled({model.num_layers})."
        )
    if workload.context != execution.context:
        raise InputError(
            f"execution {execution.name!r} {'keeps a' if execution.kv_cache else 'has no'} KV cache; "
            f"it needs a workload with context {execution.context!r}, not {workload.context!r}."
        )
