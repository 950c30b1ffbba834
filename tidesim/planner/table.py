"""The table that the integer programme chooses from: what each layer takes at each budget and interval.

One run with the same (budget, interval) pair in every layer fills one column for all layers at once. That a layer takes
as long beside other neighbours is exact as long as nothing is copied in the background. With background copies the
layers share one link, and it is an approximation; so whatever is chosen is simulated again as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tidesim.planner.candidates import Candidates
from tidesim.planner.integer_programme import Option
from tidesim.planner.runs import REFRESHING, Case, Runs
from tidesim.result import RunResult

Pair = tuple[int, int | None]  # budget, interval

# Intervals of one policy that are tried at all budgets, and how much slower than the best run they may be.
_KEPT_INTERVALS = 3
_KEPT_MARGIN = 0.15


@dataclass(frozen=True, slots=True)
class Table:
    """Uniform runs of one policy, by their (budget, interval)."""

    policy: str
    columns: Mapping[Pair, RunResult]

    def options(self) -> list[list[Option]]:
        """For each MoE layer, its time in every column."""
        num_layers = len(next(iter(self.columns.values())).layer_parts_ns) - 1
        return [
            [Option(*pair, time_ns=sum(result.layer_parts_ns[layer])) for pair, result in self.columns.items()]
            for layer in range(num_layers)
        ]

    @property
    def outside_ns(self) -> int:
        """Time outside the MoE layers, which no choice changes."""
        return sum(next(iter(self.columns.values())).layer_parts_ns[-1])

    def fastest(self, slots: int) -> Pair:
        """The fastest column whose budget fits in every layer at once."""
        num_layers = len(next(iter(self.columns.values())).layer_parts_ns) - 1
        fitting = {pair: result for pair, result in self.columns.items() if pair[0] * num_layers <= slots}
        return min(fitting, key=lambda pair: fitting[pair].makespan_ns)


def fill_tables(runs: Runs, candidates: Candidates, sequences: str) -> dict[str, Table]:
    """A table for each policy.

    First every interval is tried at the anchor budget. The other budgets are then run with those of a policy's
    intervals that came within 15 % of the best run of all, three at most, and with the policy's best one in any case.
    """
    num_experts = runs.setting.model.num_experts
    others = [budget for budget in candidates.budgets if budget != candidates.anchor]
    columns: dict[str, dict[Pair, RunResult]] = {name: {} for name in candidates.policies}

    def fill(pairs: Mapping[str, Sequence[Pair]]) -> None:
        wanted = [(name, pair) for name in candidates.policies for pair in pairs[name]]
        cases = [_column_case(runs, name, pair, sequences) for name, pair in wanted]
        for (name, pair), result in zip(wanted, runs.results(cases), strict=True):
            columns[name][pair] = result

    every = {name: _intervals_of(name, candidates) for name in candidates.policies}
    fill({name: _pairs(name, [candidates.anchor], every[name], num_experts) for name in every})
    kept = _kept(columns)
    fill({name: _pairs(name, others, kept[name], num_experts) for name in kept})
    return {name: Table(name, dict(sorted(columns[name].items(), key=_by_pair))) for name in candidates.policies}


def _intervals_of(policy: str, candidates: Candidates) -> tuple[int | None, ...]:
    return candidates.intervals if policy in REFRESHING else (None,)


def _kept(columns: Mapping[str, Mapping[Pair, RunResult]]) -> dict[str, list[int | None]]:
    """The intervals of each policy to go on with, fastest first, by their runs at one budget."""
    times_ns = {name: {pair: run.makespan_ns for pair, run in column.items()} for name, column in columns.items()}
    limit_ns = (1 + _KEPT_MARGIN) * min(time_ns for column in times_ns.values() for time_ns in column.values())
    kept = {}
    for name, column in times_ns.items():
        ranked = sorted(column, key=column.__getitem__)
        near = [pair for pair in ranked if column[pair] <= limit_ns] or ranked[:1]
        kept[name] = [interval for _, interval in near[:_KEPT_INTERVALS]]
    return kept


def _pairs(policy: str, budgets: Sequence[int], intervals: Sequence[int | None], num_experts: int) -> list[Pair]:
    """The columns for these budgets. With none or all of the experts on the device, one interval stands for all."""
    pairs: list[Pair] = []
    for budget in budgets:
        if budget == 0 and policy == "lru":
            continue  # it fetches into slots
        is_idle = budget in (0, num_experts)
        pairs += [(budget, interval) for interval in (intervals[:1] if is_idle else intervals)]
    return pairs


def _column_case(runs: Runs, policy: str, pair: Pair, sequences: str) -> Case:
    """The run of a column. Where all policies do the same, they share one."""
    model = runs.setting.model
    budget, interval = pair
    if budget == 0:
        policy, interval = "all-host", None
    elif budget == model.num_experts:
        policy, interval = "all-device", None
    return Case.uniform(policy, budget, interval, sequences, model.num_layers)


def _by_pair(item: tuple[Pair, RunResult]) -> tuple[int, int]:
    budget, interval = item[0]
    return budget, interval or 0
