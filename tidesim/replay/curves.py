"""What happens at every budget at once, where the policy allows it: hits and moves as curves over the budget.

Under some rules the residents at a budget are always among those at any larger one. Such a rule is told by one order of
a layer's experts, a stack: with B slots its first B are resident (Mattson et al., "Evaluation techniques for storage
hierarchies", 1970). One walk over the routing keeps the stack, and an expert that is used at depth d is a hit for all
budgets above d. Nothing is timed here: more hits may cost more copies than they save, so no curve ranks policies.

Letters: L MoE layers, E experts; B is a budget, 0 to E.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tidesim.paper_run import check_counts
from tidesim.policies import policy
from tidesim.replay.routing import routing_of
from tidesim.replay.stacks import first_depths, new_stacks, walk_recency, walk_refreshes
from tidesim.windows import spans
from tidesim.workload import Workload

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """What a replay counts at every budget, the same one in all layers; arrays are [L, E + 1], the budget last.

    Parameters
    ----------
    policy, refresh_interval : whose curve it is.
    hits, misses : routed pairs.
    promotions, drops : experts copied to stay, and to be forgotten after use. As many are evicted as are promoted.
    is_exact : where the other arrays say something. Elsewhere they are 0, and it takes a replay to know.
    """

    policy: str
    refresh_interval: int | None
    hits: Ints
    misses: Ints
    promotions: Ints
    drops: Ints
    is_exact: npt.NDArray[np.bool_]

    @property
    def hit_rate(self) -> npt.NDArray[np.float64]:
        """Share of all routed pairs that hit, [E + 1]; nan where that is not known for each layer."""
        rate = self.hits.sum(axis=0) / max(1, int((self.hits + self.misses).max(axis=1).sum()))
        return np.where(self.is_exact.all(axis=0), rate, np.nan)

    def to_dict(self) -> dict[str, Any]:
        """All layers together, as values that JSON knows: lists over the budget, with None where it is not known."""
        is_known: list[bool] = np.logical_and.reduce(self.is_exact, axis=0).tolist()
        names = ("hits", "misses", "promotions", "drops")
        values = {name: getattr(self, name).sum(axis=0).tolist() for name in names}
        values["hit_rate"] = self.hit_rate.tolist()
        known = {
            name: [one if is_one_known else None for one, is_one_known in zip(column, is_known, strict=True)]
            for name, column in values.items()
        }
        return {"policy": self.policy, "refresh_interval": self.refresh_interval, **known}


def lru_curve(workload: Workload | Iterable[Workload]) -> Curve:
    """What `policies.caches.lru` does at every budget. At budget 0, where it does not run, all is dropped after use.

    Parameters
    ----------
    workload : may come in parts, which follow each other in one run: then one at a time is in memory.

    Raise InputError if counts do not fit their tokens and top-k, ValueError if there is no part.
    """
    table: Ints | None = None
    for part in [workload] if isinstance(workload, Workload) else workload:
        check_counts(part)
        L, E = part.num_layers, part.num_experts
        if table is None:
            table, depth = np.zeros((3, L, E), np.int64), first_depths(L, E)
        for forwards in spans(part.counts.shape):
            walk_recency(routing_of(part, forwards), depth, *np.zeros((3, E), np.uint16), *table)
    if table is None:
        raise ValueError("workload must have a part at least.")
    rows, used, dropped = map(_deeper, table)
    return Curve(
        policy="lru",
        refresh_interval=None,
        hits=rows[:, :1] - rows,
        misses=rows,
        promotions=used - dropped,
        drops=dropped,
        is_exact=np.ones(rows.shape, np.bool_),
    )


def tide_curves(workload: Workload, refresh_intervals: Sequence[int], *, is_background: bool) -> tuple[Curve, ...]:
    """What `policies.tide.tide` does at every budget, at each of `refresh_intervals`.

    Its refresh leaves the B experts with most tokens so far. Of equal ones residents come before others, among
    residents the higher id and among the others the lower one: what is resident at one budget is so at all larger ones.

    Parameters
    ----------
    is_background : whether copies are made in the background: a refresh then comes behind its forward, not before it.

    Raise InputError if an interval is not a whole number >= 1, or counts do not fit their tokens and top-k.
    """
    return _refreshed("tide", workload, refresh_intervals, is_background)


def tide_as_coded_curves(
    workload: Workload, refresh_intervals: Sequence[int], *, is_background: bool
) -> tuple[Curve, ...]:
    """What `policies.tide.tide_as_coded` does at each of `refresh_intervals`, at the budgets for which this is exact.

    With a experts active in a refresh, a budget B <= a holds just the first B of them. Above that some residents are
    evicted and others stay in the order of a set. If that is the order of ids, as it is for B >= 77 and E <= 512, see
    `victims.SetOrder`, residents are nested all the same. For all other budgets it depends on what was put into the
    set before; so a layer is exact there only if no refresh with a < B ever promoted anybody.

    `is_background` and errors are as for `tide_curves`.
    """
    return _refreshed("tide-as-coded", workload, refresh_intervals, is_background)


# --- from counts by depth to curves ---


def _deeper(by_depth: Ints) -> Ints:
    """How many are at a depth of at least B, of numbers [L, E] by depth, for B = 0..E."""
    behind = np.cumsum(by_depth[:, ::-1], axis=1)[:, ::-1]
    return np.pad(behind, ((0, 0), (0, 1)))


def _refreshed(
    name: str, workload: Workload, refresh_intervals: Sequence[int], is_background: bool
) -> tuple[Curve, ...]:
    check_counts(workload)
    rule = policy(name, refresh_interval=tuple(refresh_intervals)).rule
    assert rule is not None
    stacks = new_stacks(len(refresh_intervals), workload.num_layers, workload.num_experts)
    intervals = np.array(refresh_intervals, np.int64)
    is_by_total = rule.name == "hottest-for-coldest"
    for forwards in spans(workload.counts.shape):
        routing = routing_of(workload, forwards)
        walk_refreshes(routing, intervals, rule.schedule.first_block, is_by_total, is_background, stacks)
    curves = []
    for interval, rows, moved, is_exact in zip(
        refresh_intervals, stacks.rows, stacks.moved, stacks.is_exact, strict=True
    ):
        misses = _deeper(rows)
        curve = Curve(
            policy=name,
            refresh_interval=interval,
            hits=(misses[:, :1] - misses) * is_exact,
            misses=misses * is_exact,
            promotions=np.cumsum(moved, axis=1)[:, :-1] * is_exact,
            drops=np.zeros_like(misses),
            is_exact=is_exact,
        )
        curves.append(curve)
    return tuple(curves)
