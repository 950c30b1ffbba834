"""What a plan is compared with: simpler choices with as many experts on the device, and references."""

from collections.abc import Sequence
from typing import NamedTuple

from tidesim.execution import Costs
from tidesim.planner.candidates import Candidates, slots_for, spread
from tidesim.planner.runs import REFRESHING, Case, Runs
from tidesim.planner.tide_programme import TideProgramme, tide_programme
from tidesim.policies import policy


class Rival(NamedTuple):
    """A baseline before it is run."""

    name: str
    description: str
    case: Case
    is_reference: bool = False


def tide_programmes(runs: Runs, candidates: Candidates, sequences: str) -> tuple[TideProgramme, ...]:
    """TIDE's own programme for each policy that refreshes, at the largest uniform budget; none if that is 0 or all."""
    setting = runs.setting
    if not 0 < candidates.uniform < setting.model.num_experts:
        return ()
    workload = setting.workloads[sequences]
    costs = Costs(setting.model, setting.hardware, setting.execution, int(workload.tokens.max()))
    return tuple(
        tide_programme(workload, costs, policy(name, refresh_interval=1), candidates.uniform)
        for name in _refreshing(candidates)
    )


def find_rivals(
    runs: Runs, candidates: Candidates, tide: Sequence[TideProgramme], slots: int, sequences: str
) -> list[Rival]:
    """The baselines, all but the references with the largest uniform budget, or as much of it as fits beside their
    scratch memory."""
    model = runs.setting.model

    def uniform(name: str, interval: int | None) -> Case:
        return Case.uniform(name, candidates.uniform, interval, sequences, model.num_layers)

    nobody = Case.uniform("all-host", 0, None, sequences, model.num_layers)
    rivals = [Rival("all-host", "no expert on the device", nobody, is_reference=True)]
    if slots == model.num_layers * model.num_experts:
        everybody = Case.uniform("all-device", model.num_experts, None, sequences, model.num_layers)
        rivals.append(Rival("all-device", "every expert on the device", everybody, is_reference=True))
    if not candidates.uniform:
        return rivals
    for name in _refreshing(candidates):
        about = f"policy {name!r}, a refresh at every step (the TIDE paper calls it Mixtral-Offload)"
        rivals.append(Rival(f"{name}, every step", about, uniform(name, 1)))
    for programme in tide:
        about = f"policy {programme.policy!r}, the interval that TIDE's own programme chooses"
        own = uniform(programme.policy, programme.interval)
        rivals.append(Rival(f"{programme.policy}, own programme", about, own))
    about = "the most popular experts of the training sequences, never moved (the TIDE paper calls it Fiddler)"
    rivals.append(Rival("static", about, uniform("static", None)))
    about = "every missed expert fetched, the most recently used ones kept"
    each = spread(min(candidates.uniform * model.num_layers, slots_for("lru", slots)), model.num_layers)
    if min(each):
        rivals.append(Rival("lru", about, Case("lru", each, None, sequences)))
    return rivals


def _refreshing(candidates: Candidates) -> list[str]:
    """The refreshing policies to compare with: TIDE as published always, others if they may be chosen."""
    return [name for name in REFRESHING if name == "tide" or name in candidates.policies]
