"""What is written down about a run while it is going on."""

from collections.abc import Callable, Mapping
from typing import Any

import simpy

from tidesim.execution import Costs
from tidesim.paper_run import copied
from tidesim.result import PARTS, RESOURCES, Decision, Interval


class Books:
    """Where the time of a run went, who was busy when, and what was decided.

    Parameters
    ----------
    decisions, timeline : see `simulate`.
    """

    def __init__(
        self,
        env: simpy.Environment,
        num_layers: int,
        decisions: Callable[[Decision], None] | None,
        timeline: list[Interval] | None,
    ) -> None:
        self._env, self._decisions, self._timeline = env, decisions, timeline
        self.hits = self.misses = self.promotions = self.evictions = self.drops = 0
        self._parts_ns = {layer: dict.fromkeys(PARTS, 0) for layer in (*range(num_layers), None)}
        self._busy_ns = dict.fromkeys(RESOURCES, 0)
        # What each resource is doing: since when, and where that stands in the timeline.
        self._doing: dict[str, tuple[int, int]] = {}

    @property
    def now_ns(self) -> int:
        """The clock, in whole nanoseconds."""
        return int(self._env.now)

    def spend(self, layer: int | None, part: str, since_ns: int) -> None:
        """The main process spent the time since `since_ns` on `part`."""
        self._parts_ns[layer][part] += self.now_ns - since_ns

    def begin(self, resource: str, name: str, duration_ns: int, forward: int, layer: int | None) -> None:
        """`resource` begins something that takes `duration_ns` alone."""
        self._doing[resource] = self.now_ns, len(self._timeline or ())
        if self._timeline is not None:
            end_ns = self.now_ns + duration_ns
            self._timeline.append(Interval(resource, name, self.now_ns, end_ns, forward, layer))

    def end(self, resource: str) -> None:
        """`resource` has done what it began last."""
        start_ns, row = self._doing.pop(resource)
        self._busy_ns[resource] += self.now_ns - start_ns
        if self._timeline is not None:
            self._timeline[row] = self._timeline[row]._replace(end_ns=self.now_ns)

    def close(self) -> None:
        """The run is over, maybe while a copy engine is in the middle of a copy: that is busy up to here."""
        for resource, (start_ns, row) in self._doing.items():
            self._busy_ns[resource] += self.now_ns - start_ns
            if self._timeline is not None:
                # Alone it would be done then, beside others no sooner than now.
                interval = self._timeline[row]
                self._timeline[row] = interval._replace(end_ns=max(interval.end_ns, self.now_ns))
        if self._timeline is not None:
            # Whether a copy starts in the run's last instant or just after it is a matter of event order.
            self._timeline[:] = [interval for interval in self._timeline if interval.start_ns < self.now_ns]

    def count(self, decision: Decision) -> None:
        """Write down what was decided for one layer of one forward."""
        self.hits += decision.hits
        self.misses += decision.misses
        self.promotions += decision.num_promotions
        self.evictions += decision.num_evictions
        self.drops += len(decision.drop)
        if self._decisions is not None:
            self._decisions(decision)

    def totals(self, costs: Costs) -> Mapping[str, Any]:
        """What a `RunResult` counts and times."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "promotions": self.promotions,
            "evictions": self.evictions,
            "drops": self.drops,
            **copied(costs, self.promotions + self.drops, self.evictions),
            "makespan_ns": self.now_ns,
            "layer_parts_ns": tuple(tuple(parts.values()) for parts in self._parts_ns.values()),
            "busy_ns": self._busy_ns,
        }

    def recount(self, num_pairs: int, num_gained: int) -> None:
        """Check the books: all `num_pairs` routed pairs are there, and `num_gained` residents more than at first."""
        assert self.hits + self.misses == num_pairs
        assert self.promotions - self.evictions == num_gained
        assert sum(sum(parts.values()) for parts in self._parts_ns.values()) == self.now_ns
