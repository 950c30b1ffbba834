"""One run, from its inputs to its result."""

from collections.abc import Callable, Sequence

from tidesim.errors import InputError
from tidesim.execution import Costs, Execution, check_memory
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.policies import Policy, Shape
from tidesim.residency import check_budgets, per_layer
from tidesim.result import Decision, Interval, RunResult, one_or_each
from tidesim.simulator.actors import Run
from tidesim.workload import Workload


def simulate(
    workload: Workload,
    model: MoEConfig,
    hardware: Hardware,
    policy: Policy,
    *,
    budget: int | Sequence[int],
    execution: Execution,
    seed: int | None = None,
    decisions: Callable[[Decision], None] | None = None,
    timeline: list[Interval] | None = None,
    reserve_bytes: int | None = None,
    is_memory_checked: bool = True,
    expected: Hardware | None = None,
) -> RunResult:
    """Run `workload` under `policy`, with the sizes of `model`, on `hardware`.

    Parameters
    ----------
    budget : expert slots on the device, one number or one per MoE layer. They are filled before the clock starts.
    seed : only for the record; nothing here is random.
    decisions : called with one `Decision` per forward and MoE layer, in order.
    timeline : an empty list, filled with what ran when, in order of their starts; see `result.Interval`.
    reserve_bytes, is_memory_checked : see `execution.check_memory`, which is left out if the latter is False, for
        questions about machines that do not exist.
    expected : the profile that the policy decides by, if it does and takes the machine for another than `hardware`.

    Raise InputError if workload, model and execution do not fit together, BudgetError if the experts do not fit the
    machine, ValueError if the policy's moves are not possible.
    """
    _check_fit(workload, model, execution)
    budgets = per_layer(budget, model.num_layers, "budget")
    check_budgets(budgets, model.num_experts)
    if is_memory_checked:
        scratch = policy.scratch_experts(model.num_experts)
        most = (workload.max_tokens, reserve_bytes, scratch, workload.batch_size)
        check_memory(model, hardware, execution, budgets, *most)
    max_rows = int(workload.tokens.max())
    costs = Costs(model, hardware, execution, max_rows)
    known = costs if expected is None else Costs(model, expected, execution, max_rows)
    run = Run(workload, costs, policy, Shape(model.num_experts, budgets, known), decisions, timeline)
    run.play()
    is_same_model = workload.model_name == model.name
    return RunResult(
        policy=policy.name,
        budget=one_or_each(budgets),
        refresh_interval=policy.refresh_interval,
        execution=execution.name,
        context=workload.context,
        hardware=hardware.name,
        model=model.name if is_same_model else f"routing of {workload.model_name} at the sizes of {model.name}",
        trace_origin=workload.origin,
        seed=seed,
        num_forwards=workload.num_forwards,
        generated_tokens=workload.generated_tokens,
        batch_size=workload.batch_size,
        **run.books.totals(costs),
    )


def _check_fit(workload: Workload, model: MoEConfig, execution: Execution) -> None:
    if not workload.num_forwards:
        raise InputError("the workload has no forward; record at least one sequence.")
    if (workload.num_experts, workload.top_k) != (model.num_experts, model.top_k):
        raise InputError(
            f"the workload routes to {workload.top_k} of {workload.num_experts} experts, {model.name} to {model.top_k} "
            f"of {model.num_experts}; take a trace of a model with the same experts and top-k."
        )
    if workload.num_layers != model.num_layers:
        raise InputError(
            f"the workload has {workload.num_layers} MoE layers and {model.name} has {model.num_layers}; "
            f"use workload.tiled({model.num_layers})."
        )
    num_rows = workload.tokens[:, None]
    if (workload.counts.sum(axis=2) != num_rows * model.top_k).any() or (workload.counts.max(axis=2) > num_rows).any():
        raise InputError("the counts of the workload do not fit its tokens and top-k; build it with Trace.workload().")
    if workload.context != execution.context:
        raise InputError(
            f"execution {execution.name!r} {'keeps a' if execution.kv_cache else 'has no'} KV cache; "
            f"it needs a workload with context {execution.context!r}, not {workload.context!r}."
        )
