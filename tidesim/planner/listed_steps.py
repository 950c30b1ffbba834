"""Plans that refresh at listed steps of a block, beside those that refresh every so many steps.

The shortest paths say what is best for the costs of a step by the last refresh, for each layer and for all together;
and layers may take turns, so that their copies do not all ask for the link in the same forward. All of them are run as
a whole, like any other choice.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from tidesim import replay
from tidesim.planner.candidates import Candidates
from tidesim.planner.refresh_steps import common_steps, in_turn, steps_by_layer
from tidesim.planner.runs import REFRESHING, Case, Runs
from tidesim.policies import policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedSteps:
    """The fastest choice of a policy with listed refresh steps beside its fastest one with constant intervals.

    Parameters
    ----------
    refresh_steps : of each layer. refresh_interval : the constant ones, of each layer.
    budget, constant_budget : slots of each layer, with listed steps and with intervals.
    tok_per_s, constant_tok_per_s : of both, on the sequences that were planned on.
    held_out_tok_per_s, held_out_constant_tok_per_s : on held-out ones; None if there are none.
    """

    policy: str
    refresh_steps: tuple[tuple[int, ...], ...]
    refresh_interval: tuple[int, ...]
    budget: tuple[int, ...]
    constant_budget: tuple[int, ...]
    tok_per_s: float
    constant_tok_per_s: float
    held_out_tok_per_s: float | None
    held_out_constant_tok_per_s: float | None

    @property
    def gain(self) -> float:
        """Throughput with listed steps over that with constant intervals, less 1: where it was planned on."""
        return self.tok_per_s / self.constant_tok_per_s - 1

    @property
    def held_out_gain(self) -> float | None:
        """The same on held-out sequences."""
        if self.held_out_tok_per_s is None or self.held_out_constant_tok_per_s is None:
            return None
        return self.held_out_tok_per_s / self.held_out_constant_tok_per_s - 1

    def to_dict(self) -> dict[str, object]:
        """Every field and both gains by name."""
        return {**asdict(self), "gain": self.gain, "held_out_gain": self.held_out_gain}


def listed_cases(
    runs: Runs, candidates: Candidates, budgets: Mapping[str, Sequence[tuple[int, ...]]], tuned: str, part: str
) -> list[Case]:
    """Cases with listed steps for the refreshing policies among `budgets`, at each of their budgets.

    Paths are found by the costs on the sequences `part`; the cases are for `tuned`. None if intervals were asked for.
    """
    names = [name for name in REFRESHING if name in budgets]
    if not candidates.is_open or not names:
        return []
    setting, found = runs.setting, []
    replayer = replay.Replayer(setting.workloads[part])
    for name in names:
        for budget in dict.fromkeys(budgets[name]):
            costs = replayer.step_costs(
                setting.model,
                setting.hardware,
                policy(name),
                budget=budget,
                execution=setting.execution,
                is_memory_checked=False,
            )
            size = (costs.num_layers, costs.num_steps)
            ways = [steps_by_layer(costs), (common_steps(costs),) * costs.num_layers]
            ways += [in_turn(interval, *size) for interval in candidates.intervals if interval > 1]
            found += [Case(name, budget, None, tuned, steps) for steps in dict.fromkeys(ways)]
    return found


def compare_listed(runs: Runs, ranked: Sequence[Case]) -> tuple[ListedSteps, ...]:
    """For each policy that has both among `ranked`, the best first: listed steps beside constant intervals."""
    found = []
    for name in REFRESHING:
        own = [case for case in ranked if case.policy == name]
        listed = _first(case for case in own if case.steps is not None)
        constant = _first(case for case in own if case.interval is not None)
        if listed is None or constant is None:
            continue
        scores = [runs.held_out(case) for case in (listed, constant)]
        found.append(
            ListedSteps(
                policy=name,
                refresh_steps=listed.steps or (),
                refresh_interval=constant.interval or (),
                budget=listed.budget,
                constant_budget=constant.budget,
                tok_per_s=runs.result(listed).tok_per_s,
                constant_tok_per_s=runs.result(constant).tok_per_s,
                held_out_tok_per_s=None if scores[0] is None else scores[0].tok_per_s,
                held_out_constant_tok_per_s=None if scores[1] is None else scores[1].tok_per_s,
            )
        )
    return tuple(found)


def _first(cases: Iterable[Case]) -> Case | None:
    return next(iter(cases), None)
