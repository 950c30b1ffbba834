"""One run, or many on the same routing, from their inputs to their results."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from tidesim.errors import InputError
from tidesim.hardware import BUSY, Hardware
from tidesim.moe import MoEConfig
from tidesim.paper_run import PaperRun, RunSettings, check_counts, copied
from tidesim.policies import Policy
from tidesim.replay.bits import words_of
from tidesim.replay.clock import BUSY as LINK_BUSY
from tidesim.replay.clock import D2H, DEVICE_BUSY, FIRST_ROOM, H2D, HOST_BUSY, IS_FULL, Clock, new_clock, play, stop
from tidesim.replay.prices import Fixed, Prices, fixed_of, prices_of
from tidesim.replay.routing import NO_ROUTING, Routing, parts_of, routing_of
from tidesim.replay.rules import ruled
from tidesim.replay.script import NO_SCRIPT, Decisions, decide
from tidesim.residency import Placement
from tidesim.result import RunResult
from tidesim.workload import Workload

_KEPT_DECISIONS = 16  # a long workload's take tens of megabytes
_KEPT_ROUTING_BYTES = 1 << 30  # of a workload; what goes beyond is read again for each run


def replay(
    workload: Workload, model: MoEConfig, hardware: Hardware, policy: Policy, **settings: Unpack[RunSettings]
) -> RunResult:
    """What `simulate` says of the same arguments, to the nanosecond.

    For more than one run on a workload, `Replayer` reads its routing once. Raise what `simulate` raises, and InputError
    if device, host and copies slow each other down on `hardware`.
    """
    return Replayer(workload).run(model, hardware, policy, **settings)


class Replayer:
    """A workload, read once to be replayed many times.

    What a policy decides by the routing alone is asked once, and timed on every machine: for that, hand in the same
    policy object again.

    Raise InputError if the counts of `workload` do not fit its tokens and top-k.
    """

    def __init__(self, workload: Workload) -> None:
        check_counts(workload)
        self.workload = workload
        self._parts = parts_of(workload)
        self._routing: dict[int, Routing] = {}  # by part, as far as kept
        # By policy object, which is kept alive so that nobody else gets its identity; the latest come last.
        self._decided: dict[tuple[int, tuple[int, ...], bool], tuple[Policy, Decisions]] = {}

    def run(self, model: MoEConfig, hardware: Hardware, policy: Policy, **settings: Unpack[RunSettings]) -> RunResult:
        """One run; see `replay`."""
        return self.run_with_ends((), model, hardware, policy, **settings)[0]

    def run_with_ends(
        self,
        ends: Sequence[int],
        model: MoEConfig,
        hardware: Hardware,
        policy: Policy,
        **settings: Unpack[RunSettings],
    ) -> tuple[RunResult, tuple[int, ...]]:
        """One run, and its time in ns when the first `ends[0]` of its forwards are done, `ends[1]`, and so on.

        `ends` ascend, are > 0, and at most F.
        """
        if is_contended(hardware):
            raise InputError(
                f"profile {hardware.name!r} says how much device, host and copies slow each other down (contention); "
                "that is for the event simulator: use simulate(), or --engine simpy."
            )
        paper = PaperRun(workload=self.workload, model=model, hardware=hardware, policy=policy, **settings)
        totals, times_ns = self._timed(self._decide(paper), paper, ends)
        return paper.result(totals), times_ns

    def _decide(self, paper: PaperRun) -> Decisions:
        """What the policy decides, from memory if it was asked before and goes by the routing alone."""
        policy, is_background = paper.policy, paper.execution.copies == "background"
        key = (id(policy), paper.budgets, is_background)
        if key in self._decided:
            return self._decided[key][1]
        decisions = decide(self.workload, policy, paper.shape, is_background=is_background)
        if policy.is_routing_only:
            self._decided[key] = (policy, decisions)
            if len(self._decided) > _KEPT_DECISIONS:
                del self._decided[next(iter(self._decided))]
        return decisions

    def _timed(
        self, decisions: Decisions, paper: PaperRun, ends: Sequence[int]
    ) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        """What a `RunResult` counts and times, and the times at `ends`."""
        prices, fixed = prices_of(self.workload, paper.costs), fixed_of(paper.costs, decisions.scratch)
        clock, times_ns = self._play(decisions, prices, fixed, ends)
        tally: list[int] = clock.tally.tolist()
        hits, misses, promotions, evictions, drops = tally[:DEVICE_BUSY]
        links = clock.links[:, LINK_BUSY].tolist()
        totals = {
            "hits": hits,
            "misses": misses,
            "promotions": promotions,
            "evictions": evictions,
            "drops": drops,
            **copied(paper.costs, promotions + drops, evictions),
            "makespan_ns": times_ns[self.workload.num_forwards],
            "layer_parts_ns": tuple(map(tuple, clock.parts.tolist())),
            "busy_ns": {"device": tally[DEVICE_BUSY], "host": tally[HOST_BUSY], "h2d": links[H2D], "d2h": links[D2H]},
        }
        return totals, tuple(times_ns[end] for end in ends)

    def _play(
        self, decisions: Decisions, prices: Prices, fixed: Fixed, ends: Sequence[int]
    ) -> tuple[Clock, dict[int, int]]:
        """Walk the forwards, with more room for copies under way as long as there is too little.

        Returns the time, too, after so many forwards as `ends` say, and after all.
        """
        num_experts, num_layers, room = self.workload.num_experts, self.workload.num_layers, FIRST_ROOM
        residents = np.stack([words_of(ids, num_experts) for ids in decisions.placement.experts])
        while True:
            clock, rule, now_ns, times_ns = new_clock(residents, room), ruled(decisions, num_experts), 0, {}
            for number, part in enumerate(self._parts):
                routing = self._routing_of(number)
                for piece in _pieces(part, ends, self.workload.num_forwards):
                    script = decisions.script.cut(piece, num_layers)
                    its_own = routing.cut(slice(piece.start - part.start, piece.stop - part.start))
                    now_ns = play(its_own, prices.cut(piece), fixed, script, rule, clock, now_ns)
                    times_ns[piece.stop] = int(now_ns)
            stop(fixed, clock, now_ns)
            if not clock.links[:, IS_FULL].any():
                return clock, times_ns
            room *= 16

    def _routing_of(self, number: int) -> Routing:
        """The routing of a part, from memory if there is room to keep it."""
        if number in self._routing:
            return self._routing[number]
        routing = routing_of(self.workload, self._parts[number])
        if sum(kept.num_bytes for kept in self._routing.values()) + routing.num_bytes <= _KEPT_ROUTING_BYTES:
            self._routing[number] = routing
        return routing


def _pieces(part: slice, ends: Sequence[int], num_forwards: int) -> list[slice]:
    """`part` of all forwards, cut at `ends`."""
    stop = min(part.stop, num_forwards)
    cuts = [part.start, *(end for end in ends if part.start < end < stop), stop]
    return [slice(*piece) for piece in pairwise(cuts)]


def is_contended(hardware: Hardware) -> bool:
    """Whether device, host and copies slow each other down on `hardware`."""
    contention = hardware.contention
    pairs = [(who, beside) for who in BUSY for beside in BUSY if who != beside]
    return contention is not None and any(contention.share(*pair) < 1 for pair in pairs)


def is_compiled() -> bool:
    """Whether a run can begin at once; if not, the first one compiles what replays it."""
    dispatcher: Any = play
    return bool(dispatcher.signatures) or any(Path(dispatcher.stats.cache_path).glob("clock.play-*.nbi"))


def compile_now() -> None:
    """Compile what replays a run, unless that is on disk: before processes start that would each do it."""
    prices = Prices(*np.zeros((4, 1, 2), np.int64), *np.zeros((6, 1), np.int64))
    fixed = Fixed(0, 0, 0, 0, False, 0, False, False, False, False, False)
    decisions = Decisions(placement=Placement(((),)), budgets=(0,), scratch=0, rule=None, script=NO_SCRIPT)
    clock = new_clock(words_of((), 1)[np.newaxis], FIRST_ROOM)
    play(NO_ROUTING, prices, fixed, NO_SCRIPT, ruled(decisions, 1), clock, 0)
    stop(fixed, clock, 0)
