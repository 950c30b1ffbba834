"""Why a plan is as fast as it is: what its run waits for, what more would give, and what is simpler and as good."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidesim.alternatives import Candidate, moving_of, near_optimal
from tidesim.critical_path import CriticalPath, critical_path
from tidesim.planner.runs import Case, Runs
from tidesim.what_if import ShadowPrice, shadow_prices

# What one may give up for something simpler.
WITHIN = 0.02
_SHOWN = 5  # alternatives


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Of one plan, on the sequences that it was tuned on.

    Parameters
    ----------
    path : what the run waits for.
    prices : what more memory, a faster link and so on would give, the largest gain first.
    alternatives : runs within `WITHIN` of the fastest, the simplest first.
    """

    path: CriticalPath
    prices: tuple[ShadowPrice, ...]
    alternatives: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON."""
        return {
            "critical_path": self.path.to_dict(),
            "shadow_prices": [price.to_dict() for price in self.prices],
            "alternatives": [candidate.to_dict() for candidate in self.alternatives],
        }


def explain(runs: Runs, winner: Case, ranked: Sequence[Case], reserve_bytes: int | None) -> Explanation:
    """Explain `winner`, beside all that were `ranked`."""
    setting = runs.setting
    workload, model, hardware = setting.workloads[winner.sequences], setting.model, setting.hardware
    settings: dict[str, Any] = {"budget": winner.budget, "execution": setting.execution, "seed": setting.seed}
    return Explanation(
        path=critical_path(workload, model, hardware, setting.policy(winner), **settings, is_memory_checked=False),
        prices=shadow_prices(
            *(workload, model, hardware, lambda budget: setting.policy(winner._replace(budget=budget))),
            **settings,
            reserve_bytes=reserve_bytes,
        ),
        alternatives=tuple(_distinct(near_optimal([_candidate(runs, case) for case in ranked], WITHIN))[:_SHOWN]),
    )


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The fastest of those that are called alike."""
    fastest: dict[str, Candidate] = {}
    for candidate in candidates:
        known = fastest.setdefault(candidate.description, candidate)
        if candidate.tok_per_s > known.tok_per_s:
            fastest[candidate.description] = candidate
    return list(fastest.values())


def _candidate(runs: Runs, case: Case) -> Candidate:
    budget = str(case.budget[0]) if len(set(case.budget)) == 1 else f"{min(case.budget)} to {max(case.budget)}"
    interval = ""
    if case.interval is not None:
        steps = sorted(set(case.interval))
        interval = f", every {steps[0]}" + (f" to {steps[-1]}" if len(steps) > 1 else "") + " steps"
    return Candidate(
        description=f"{case.policy}, {budget} experts a layer{interval}",
        moving=moving_of(runs.setting.policy(case)),
        budget=case.budget,
        refresh_interval=case.interval,
        tok_per_s=runs.result(case).tok_per_s,
    )
