"""The table that the integer programme chooses from: what each layer takes at each budget and interval.

One run with the same (budget, interval) pair in every layer fills one column for all layers at once. That a layer takes
as long beside other neighbours is exact as long as nothing is copied in the background. With background copies the
layers share one link, and it is an approximation; so whatever is chosen is simulated again as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tidesim.planner.candidates import Candidates
from tidesim.planner.integer_programme import Option
from tidesim.planner.runs import REFRESHING, Case, Outcome, Runs

Pair = tuple[int, int | None]  # budget, interval

# Intervals of one policy that are tried at all budgets, and how much slower than the best run they may be.
_KEPT_INTERVALS = 3
_KEPT_MARGIN = 0.15


@dataclass(frozen=True, slots=True)
class Table:
    """Uniform runs of one policy, by their (budget, interval)."""

    policy: str
    columns: Mapping[Pair, Outcome]

    @property
    def pairs(self) -> list[Pair]:
        """The (budget, interval) pairs."""
        return list(self.columns)

    @property
    def _any(self) -> Outcome:
        return next(iter(self.columns.values()))

    def options(self, *, has_blocks: bool = False) -> list[list[Option]]:
        """For each MoE layer, its time in every column; and if asked, what of it goes into each block."""
        num_layers = len(self._any.result.layer_parts_ns) - 1
        return [
            [
                Option(
                    *pair,
                    time_ns=sum(outcome.result.layer_parts_ns[layer]),
                    block_ns=tuple(outcome.block_ns[:, layer].tolist()) if has_blocks else (),
                )
                for pair, outcome in self.columns.items()
            ]
            for layer in range(num_layers)
        ]

    def layer_ns(self, layer: int, budget: int, interval: int | None) -> int:
        """A layer's time with these, between the columns with the nearest budgets of (nearly) the same interval."""
        intervals = {pair[1] for pair in self.columns}
        if interval not in intervals:
            interval = min(intervals, key=lambda other: abs((other or 0) - (interval or 0)))
        # Columns of budgets where nothing ever moves stand for every interval.
        times = {pair[0]: sum(out.result.layer_parts_ns[layer]) for pair, out in self.columns.items()}
        times |= {
            pair[0]: sum(out.result.layer_parts_ns[layer]) for pair, out in self.columns.items() if pair[1] == interval
        }
        known = sorted(times)
        return int(np.interp(budget, known, [times[slots] for slots in known]))

    @property
    def outside_ns(self) -> int:
        """Time outside the MoE layers, which no choice changes."""
        return sum(self._any.result.layer_parts_ns[-1])

    @property
    def outside_block_ns(self) -> tuple[int, ...]:
        """The same of each block."""
        return tuple(self._any.block_ns[:, -1].tolist())

    @property
    def generated_tokens(self) -> int:
        """Tokens that the sequences of the table generate."""
        return self._any.result.generated_tokens


def fill_tables(runs: Runs, candidates: Candidates, sequences: str) -> dict[str, Table]:
    """A table for each policy.

    First every interval is tried at the anchor budget. The other budgets are then run with those of a policy's
    intervals that came within 15 % of the best run of all, three at most, and with the policy's best one in any case.
    """
    num_experts = runs.setting.model.num_experts
    others = [budget for budget in candidates.budgets if budget != candidates.anchor]
    columns: dict[str, dict[Pair, Outcome]] = {name: {} for name in candidates.policies}

    def fill(pairs: Mapping[str, Sequence[Pair]]) -> None:
        wanted = [(name, pair) for name in candidates.policies for pair in pairs[name]]
        cases = [_column_case(runs, name, pair, sequences) for name, pair in wanted]
        for (name, pair), outcome in zip(wanted, runs.outcomes(cases), strict=True):
            columns[name][pair] = outcome

    every = {name: _intervals_of(name, candidates) for name in candidates.policies}
    fill({name: _pairs(name, [candidates.anchor], every[name], num_experts) for name in every})
    kept = _kept(columns)
    fill({name: _pairs(name, others, kept[name], num_experts) for name in kept})
    return {name: Table(name, dict(sorted(columns[name].items(), key=_by_pair))) for name in candidates.policies}


def _intervals_of(policy: str, candidates: Candidates) -> tuple[int | None, ...]:
    return candidates.intervals if policy in REFRESHING else (None,)


def _kept(columns: Mapping[str, Mapping[Pair, Outcome]]) -> dict[str, list[int | None]]:
    """The intervals of each policy to go on with, fastest first, by their runs at one budget."""
    times_ns = {
        name: {pair: outcome.result.makespan_ns for pair, outcome in column.items()} for name, column in columns.items()
    }
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


def _by_pair(item: tuple[Pair, Outcome]) -> tuple[int, int]:
    budget, interval = item[0]
    return budget, interval or 0
