"""How far a plan is to be trusted, and why it is as fast as it is.

It is judged on held-out sequences: against its rivals, the best of many choices in hindsight, and what no policy can
beat. It is explained by what its run waits for, what more of something would give, and what is simpler and as good.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidesim.alternatives import Candidate, moving_of, near_optimal
from tidesim.ceiling import Ceiling, time_ceiling
from tidesim.critical_path import CriticalPath, critical_path
from tidesim.execution import Costs
from tidesim.planner.runs import Case, Runs, Setting
from tidesim.planner.scoring import Judgement, Regret, Sample, judge, regret, sample_of
from tidesim.planner.tide_programme import TideProgramme
from tidesim.what_if import ShadowPrice, shadow_prices

# What one may give up for something simpler.
WITHIN = 0.02
_SHOWN = 5  # alternatives
_MOST_TASKS = 7_500  # on whose critical path a plan is explained: fewer than a run is explained on


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
        path=critical_path(
            *(workload, model, hardware, setting.policy(winner)),
            **settings,
            is_memory_checked=False,
            most_tasks=_MOST_TASKS,
        ),
        prices=shadow_prices(
            *(workload, model, hardware, lambda budget: setting.policy(winner._replace(budget=budget))),
            **settings,
            reserve_bytes=reserve_bytes,
            each=runs.each,
        ),
        alternatives=tuple(_distinct(near_optimal([_candidate(runs, case) for case in ranked], WITHIN))[:_SHOWN]),
    )


# Choices that are tried in hindsight, the best by the tuned sequences; and seconds for the ceiling, whose every iterate
# is one.
_FAMILY = 12
_CEILING_S = 2.0


def ceiling_over(setting: Setting, winner: Case) -> Ceiling:
    """What no policy can beat on the held-out sequences with the memory of `winner`."""
    workload = setting.workloads[setting.held_out]
    costs = Costs(setting.model, setting.hardware, setting.execution, int(workload.tokens.max()))
    return time_ceiling(workload, costs, winner.budget, is_pooled=True, time_limit_s=_CEILING_S)


def judge_plan(
    runs: Runs,
    winner: Case,
    ranked: Sequence[Case],
    rivals: Mapping[str, Case],
    tokens: Sequence[int],
    ceiling: Callable[[], Ceiling],
) -> Judgement:
    """`winner` on the held-out sequences, which generate so many `tokens` each; `ceiling` is asked for last."""
    setting = runs.setting
    named = {_described(case): case for case in reversed((winner, *ranked))}
    family = [*list(reversed(named.values()))[:_FAMILY], *rivals.values()]

    def sample(case: Case) -> Sample:
        return _sample(runs, case, tokens)

    runs.outcomes(case._replace(sequences=setting.held_out) for case in family)
    return judge(
        sample(winner),
        {name: sample(case) for name, case in rivals.items()},
        family={_described(case): sample(case) for case in dict.fromkeys(family)},
        ceiling=ceiling(),
        seed=setting.seed,
    )


def judge_tide(runs: Runs, programme: TideProgramme, intervals: Sequence[int], tokens: Sequence[int]) -> Regret:
    """What the choice of TIDE's own programme loses to the best of `intervals`, all replayed on the held-out sequences,
    which generate so many `tokens` each."""
    model, held_out = runs.setting.model, runs.setting.held_out

    def sample(interval: int) -> Sample:
        case = Case.uniform(programme.policy, programme.budget, interval, held_out, model.num_layers)
        return _sample(runs, case, tokens)

    family = {f"a refresh every {each} step{'s' * (each > 1)}": sample(each) for each in intervals}
    return regret(sample(programme.interval), family)


def _sample(runs: Runs, case: Case, tokens: Sequence[int]) -> Sample:
    """`case` on the held-out sequences."""
    return sample_of(runs.outcomes([case._replace(sequences=runs.setting.held_out)])[0].sequence_ns, tokens)


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The fastest of those that are called alike."""
    fastest: dict[str, Candidate] = {}
    for candidate in candidates:
        known = fastest.setdefault(candidate.description, candidate)
        if candidate.tok_per_s > known.tok_per_s:
            fastest[candidate.description] = candidate
    return list(fastest.values())


def _candidate(runs: Runs, case: Case) -> Candidate:
    return Candidate(
        description=_described(case),
        moving=moving_of(runs.setting.policy(case)),
        budget=case.budget,
        refresh_interval=case.interval,
        params={} if case.steps is None else {"refresh_steps": case.steps},
        tok_per_s=runs.result(case).tok_per_s,
    )


def _described(case: Case) -> str:
    budget = str(case.budget[0]) if len(set(case.budget)) == 1 else f"{min(case.budget)} to {max(case.budget)}"
    interval = ""
    if case.interval is not None:
        steps = sorted(set(case.interval))
        interval = f", every {steps[0]}" + (f" to {steps[-1]}" if len(steps) > 1 else "") + " steps"
    if case.steps is not None:
        lengths = sorted(set(map(len, case.steps)))
        interval = f", at {lengths[0]}" + (f" to {lengths[-1]}" if len(lengths) > 1 else "") + " listed steps"
    return f"{case.policy}, {budget} experts a layer{interval}"
