"""What a run does with a model's experts: taken from a plan, or chosen by hand."""

from collections.abc import Sequence
from typing import NamedTuple

from tidesim.engine.live import LiveModel, engine_execution
from tidesim.errors import BudgetError, InputError, PlanError
from tidesim.execution import GIB, Costs, DeviceMemory, Execution, execution
from tidesim.hardware import Hardware, load_hardware
from tidesim.planner import Plan
from tidesim.policies import Policy
from tidesim.residency import check_budgets, per_layer


class Choice(NamedTuple):
    """Who decides, with how many slots in each MoE layer, how the engine runs, and how much memory it may take.

    `memory_bytes` is the device's; None: nobody said how much there is. What a plan holds in reserve there is for what
    an engine takes beyond the planner's reckoning, so only the whole is checked. `hardware` is the profile whose
    predicted times the policy may decide by.
    """

    policy: Policy
    budgets: tuple[int, ...]
    execution: Execution
    memory_bytes: int | None
    hardware: Hardware | None = None

    def costs(self, live: LiveModel, max_rows: int) -> Costs | None:
        """The predicted times of forwards of up to `max_rows` rows, as a simulator has them; None without a profile."""
        return None if self.hardware is None else Costs(live.sizes, self.hardware, self.execution, max_rows)

    def check_memory(self, live: LiveModel, max_tokens: int) -> DeviceMemory:
        """What sequences of `max_tokens` tokens take. Raise BudgetError, with every figure, if there is not as much."""
        scratch = self.policy.scratch_experts(live.sizes.num_experts)
        need = live.memory(self.budgets, self.execution, max_tokens, scratch)
        limits = [limit for limit in (self.memory_bytes, live.memory_bytes) if limit is not None]
        if limits and need.total > min(limits):
            parts = {
                "experts": need.experts,
                "other weights": need.non_experts,
                "KV cache": need.kv_cache,
                "transient peak": need.transient,
            }
            listed = " + ".join(f"{name} {num_bytes / GIB:.3f}" for name, num_bytes in parts.items())
            raise BudgetError(
                f"{live.sizes.name} with sequences of {max_tokens} tokens needs {listed} = {need.total / GIB:.3f} GiB "
                f"on the device, which has {min(limits) / GIB:.3f} GiB; plan for a smaller budget or shorter sequences."
            )
        return need


def planned(plan: Plan, live: LiveModel, hardware: Hardware | None = None) -> Choice:
    """What `plan` says.

    A policy that decides by predicted times needs the profile that the plan was made with: `hardware`, or the shipped
    one of the plan's name. Raise PlanError if the plan was made for another model or with another profile, InputError
    if the engine cannot follow it or there is no such profile.
    """
    plan.check(live.sizes)
    # A plan for the other context than its execution's own says so in the name.
    how = execution(plan.execution.removesuffix(" with KV cache").removesuffix(" without KV cache"))
    own = engine_execution(live.kind, how, kv_cache=plan.context == "block")
    made = plan.make_policy()
    known = None if made.is_routing_only else _profile(plan, hardware)
    return Choice(made, plan.budget, own, plan.hardware.device_memory_bytes, known)


def _profile(plan: Plan, hardware: Hardware | None) -> Hardware:
    """The profile that `plan` was made with."""
    name = plan.hardware.name
    if hardware is None:
        try:
            hardware = load_hardware(name)
        except InputError:
            raise InputError(
                f"policy {plan.policy!r} decides by predicted times, and no profile called {name!r} is shipped; give "
                "the one that the plan was made with, --hardware PROFILE."
            ) from None
    if hardware.fingerprint != plan.hardware.fingerprint:
        raise PlanError(
            f"policy {plan.policy!r} decides by predicted times, and the plan was made with another profile of "
            f"{name!r} than this one; give that one, --hardware PROFILE, or plan again."
        )
    return hardware


def by_hand(
    policy: Policy, budget: int | Sequence[int], how: Execution, live: LiveModel, hardware: Hardware | None = None
) -> Choice:
    """A policy and its budget, without a plan; `hardware` is the profile for policies that decide by predicted times.

    Raise BudgetError or InputError for budgets that do not fit the model, an execution that the engine cannot follow,
    or a policy that needs a profile and has none.
    """
    if hardware is None and not policy.is_routing_only:
        raise InputError(
            f"policy {policy.name!r} decides by predicted times; give the machine's profile, --hardware PROFILE "
            "(`tidesim calibrate` measures one)."
        )
    budgets = per_layer(budget, live.sizes.num_layers, "budget")
    check_budgets(budgets, live.sizes.num_experts)
    own = engine_execution(live.kind, how, kv_cache=how.kv_cache)
    return Choice(policy, budgets, own, live.memory_bytes, hardware)
