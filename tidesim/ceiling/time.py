"""The least time that any policy takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np

from tidesim.ceiling.ascent import ascend
from tidesim.ceiling.relaxation import RelaxedRun
from tidesim.errors import InputError
from tidesim.execution import Costs
from tidesim.residency import check_budgets, per_layer
from tidesim.workload import Workload

# Sums of a few thousand floats are off by less, relative to their size.
_FLOAT_SLACK = 1e-11


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """A bound on the throughput of every policy.

    Parameters
    ----------
    makespan_ns : no policy needs less.
    generated_tokens : those of the workload.
    budgets : slots of each layer, [L].
    is_pooled : whether all layers may share the slots of all.
    num_iterations, is_settled : after how many iterations the search for the best bound ended, and whether more would
        hardly have raised it. If not, it was out of time: the bound holds all the same, and is looser.
    """

    makespan_ns: int
    generated_tokens: int
    budgets: tuple[int, ...]
    is_pooled: bool
    num_iterations: int
    is_settled: bool

    @property
    def tok_per_s(self) -> float:
        """No policy generates more."""
        return self.generated_tokens / (self.makespan_ns * 1e-9)


def time_ceiling(
    workload: Workload,
    costs: Costs,
    budget: int | Sequence[int],
    *,
    is_pooled: bool = False,
    time_limit_s: float | None = None,
) -> Ceiling:
    """A time below which no policy can run `workload` with the durations of `costs`.

    It holds for every policy that `simulate` can run, in every run of the same workload, costs and budgets: whoever is
    resident, fetched, kept, evicted or prefetched when, and whichever missed experts the host computes. It knows all
    of the routing, and grants more than an engine has:

    - An expert that is copied for one forward and then dropped needs no slot and no eviction. Only who is resident
      across the boundary of two forwards takes a slot; the first residents are free.
    - A resident may be computed by the host too, where that is faster.
    - In the background, copies fit into the forward that they begin in, or anywhere between there and the first use;
      evictions are never waited for, with write-back either.
    - Blocking copies with a parallel host all run beside it, those of a refresh too, and evictions take no time.
    - Memory that device, host and copies share slows nobody.
    - A share of an expert may be moved, and kernels, launches and calls share their fixed parts; see `relaxation`.

    Parameters
    ----------
    costs : of the execution that runs the workload, for at least as many rows.
    budget : slots, one number or one per MoE layer.
    is_pooled : whether all layers may share the slots of all.
    time_limit_s : when to stop looking for a better bound; None: when hardly any better one is to be found. How good
        the bound is then depends on how fast the machine is.

    Raise InputError if workload and costs do not fit together or there is no forward, BudgetError if a budget is not
    in 0..E.
    """
    budgets = per_layer(budget, workload.num_layers, "budget")
    check_budgets(budgets, workload.num_experts)
    _check_fit(workload, costs)
    slots = np.array([sum(budgets)] if is_pooled else budgets, np.float64)
    found = ascend(RelaxedRun(workload, costs), slots, time_limit_s)
    return Ceiling(
        makespan_ns=floor(found.bound_ns * (1 - _FLOAT_SLACK)),
        generated_tokens=workload.generated_tokens,
        budgets=budgets,
        is_pooled=is_pooled,
        num_iterations=found.num_iterations,
        is_settled=found.is_settled,
    )


def _check_fit(workload: Workload, costs: Costs) -> None:
    if not workload.num_forwards:
        raise InputError("the workload has no forward; record at least one sequence.")
    model, most_rows = costs.model, int(workload.tokens.max())
    if (workload.num_layers, workload.num_experts) != (model.num_layers, model.num_experts):
        raise InputError(
            f"the workload has {workload.num_layers} MoE layers of {workload.num_experts} experts, {model.name} has "
            f"{model.num_layers} of {model.num_experts}; use workload.tiled() or another trace."
        )
    if most_rows > costs.max_rows:
        raise InputError(f"the costs reach {costs.max_rows} rows, the workload routes {most_rows}; ask for more.")
