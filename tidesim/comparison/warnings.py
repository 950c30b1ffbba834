"""What to bear in mind when a comparison is read."""

from collections.abc import Iterator, Sequence

import numpy as np

from tidesim.execution import Costs
from tidesim.hardware import Hardware
from tidesim.result import RunResult
from tidesim.windows import windows
from tidesim.workload import Workload

# A resource that is busy for this share of the time decides how long everything takes.
SATURATED = 0.95
_EXPERT_CURVES = ("device.expert_curve", "host.expert_curve")

_AS_A_WHOLE = (
    "policies of other systems run under their systems' own executions: rows compare systems as a whole, engine and "
    "policy, and a row's share is of the ceiling of its own execution."
)


def warnings_about(
    runs: Sequence[tuple[Workload, Costs]],
    budget: int,
    fastest_first: Sequence[RunResult],
    *,
    has_own_executions: bool = False,
) -> tuple[str, ...]:
    """Every reason to read the results with care, a sentence each.

    `runs` has what ran, with its durations, under each execution; first the one that belongs to no system.
    """
    workload, costs = runs[0]
    beyond = [warning for run in runs for warning in _beyond_curves(*run)]
    return (
        *((_AS_A_WHOLE,) if has_own_executions else ()),
        *_small_budget(workload, budget),
        *_saturated(fastest_first),
        *dict.fromkeys(beyond),
        *_guesses(costs.hardware, costs.execution.home == "disk"),
    )


def _small_budget(workload: Workload, budget: int) -> Iterator[str]:
    """A budget below what a forward touches: a cache that fetches all misses evicts what it will need next."""
    active = np.concatenate([np.count_nonzero(counts, axis=2) for _, counts in windows(workload.counts)])  # [F, L]
    share = float(np.mean(active > budget))
    if share > 0.5:
        yield (
            f"the budget of {budget} is below the working set: a forward touches {np.median(active):.0f} experts of a "
            f"layer (median), and more than the budget in {share:.0%} of all cases. A cache that fetches every miss, "
            f"as lru does, then evicts what it needs next."
        )


def _saturated(fastest_first: Sequence[RunResult]) -> Iterator[str]:
    """A resource that is busy all the time in the fastest run, or a link that is in others."""
    names = {"h2d": "the link to the device", "host": "the host", "device": "the device"}
    best = fastest_first[0]
    for resource, what in names.items():
        if best.busy_share[resource] >= SATURATED:
            yield (
                f"{what} is busy for {best.busy_share[resource]:.0%} of the time under the fastest policy: it is what "
                f"limits this machine."
            )
    jammed = [result.policy for result in fastest_first[1:] if result.busy_share["h2d"] >= SATURATED]
    if jammed:
        listed = ", ".join(dict.fromkeys(jammed))
        yield f"the link to the device is busy for {SATURATED:.0%} of the time or more under {listed}."


def _beyond_curves(workload: Workload, costs: Costs) -> Iterator[str]:
    """Rows, or weights, that the profile's curves were not measured with."""
    hardware, execution = costs.hardware, costs.execution
    head_rows = workload.tokens if execution.logits == "all" else workload.logit_tokens
    reach = {"device.dense_curve": int(workload.tokens.max()), "device.head_curve": int(head_rows.max())}
    if costs.model.weight_bits == 16:
        reach |= dict.fromkeys(_EXPERT_CURVES, max(int(counts.max()) for _, counts in windows(workload.counts)))
    elif any(path in hardware.curves for path in _EXPERT_CURVES):
        yield (
            f"{hardware.name} was measured with weights of 16 bits, and experts of {costs.model.weight_bits} bits go "
            f"by its bandwidths alone."
        )
    for path, rows in reach.items():
        curve = hardware.curves.get(path)
        if curve is not None and rows > curve.rows[-1]:
            yield (
                f"{hardware.name}: {path} was measured up to {curve.rows[-1]} rows, and {rows} occur; its last rate "
                f"is used there."
            )


def _guesses(hardware: Hardware, is_disk: bool) -> Iterator[str]:
    """Figures that nobody measured and no rule gives."""
    guesses = [path for path, figure in hardware.sources.items() if figure.kind == "guess"]
    used = [path for path in guesses if is_disk or not path.startswith("links.nvme")]
    if used:
        yield f"{hardware.name}: {', '.join(used)} {'is a guess' if len(used) == 1 else 'are guesses'}."
