"""One run, or many on the same routing, from their inputs to their results."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from threading import Lock
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.execution import Costs
from tidesim.hardware import BUSY, Hardware
from tidesim.moe import MoEConfig
from tidesim.paper_run import PaperRun, RunSettings, check_counts, copied
from tidesim.policies import Policy, gain_kernel
from tidesim.replay import ages, drift
from tidesim.replay.bits import words_of
from tidesim.replay.clock import BUSY as LINK_BUSY
from tidesim.replay.clock import D2H, DEVICE_BUSY, FIRST_ROOM, H2D, HOST_BUSY, new_clock, play, stop
from tidesim.replay.prices import NO_COSTS, NO_PRICES, Prices, fixed_of, prices_of
from tidesim.replay.routing import NO_ROUTING, Routing, routing_of
from tidesim.replay.rules import ruled
from tidesim.replay.script import NO_DECISIONS, NO_SCRIPT, Decisions, Script, decide
from tidesim.replay.step_costs import StepCosts
from tidesim.replay.stretches import Stretch, play_all
from tidesim.result import RunResult
from tidesim.windows import forget, spans
from tidesim.workers import Workers
from tidesim.workload import Workload

Ints = npt.NDArray[np.int64]

_KEPT_DECISIONS = 16
_KEPT_PRICES = 8
_KEPT_SCRIPT_BYTES = 1 << 26  # of one of them; longer ones are decided anew
_KEPT_ROUTING_BYTES = 1 << 28  # what is beyond is read anew for each run


def replay(
    workload: Workload,
    model: MoEConfig,
    hardware: Hardware,
    policy: Policy,
    *,
    spent: Ints | None = None,
    **settings: Unpack[RunSettings],
) -> RunResult:
    """What `simulate` says of the same arguments, to the nanosecond.

    For more than one run on a workload, `Replayer` reads its routing once. Raise what `simulate` raises, and InputError
    if device, host and copies slow each other down on `hardware`.
    """
    return Replayer(workload).run(model, hardware, policy, spent=spent, **settings)


class Replayer:
    """A workload, read once to be replayed many times.

    What a policy decides by the routing alone is asked once, and timed on every machine: for that, hand in the same
    policy object again.

    Raise InputError if the counts of `workload` do not fit its tokens and top-k.
    """

    def __init__(self, workload: Workload) -> None:
        check_counts(workload)
        self.workload = workload
        self._stretches = spans(workload.counts.shape)
        self._num_steps = int(workload.step.max()) + 1
        self._routings: list[Routing] = []  # of the first stretches
        self._room_bytes = _KEPT_ROUTING_BYTES
        self._prices: list[tuple[Costs, Prices]] = []  # the latest last
        self._lock = Lock()  # of what is kept, as threads may share it
        # By policy object, which is kept alive so that nobody else gets its identity; the latest come last.
        self._decided: dict[tuple[int, tuple[int, ...], bool], tuple[Policy, Decisions]] = {}

    def run(
        self,
        model: MoEConfig,
        hardware: Hardware,
        policy: Policy,
        *,
        spent: Ints | None = None,
        **settings: Unpack[RunSettings],
    ) -> RunResult:
        """One run; see `replay`."""
        if is_contended(hardware):
            raise InputError(
                f"profile {hardware.name!r} says how much device, host and copies slow each other down (contention); "
                "that is for the event simulator: use simulate(), or --engine simpy."
            )
        paper = PaperRun(workload=self.workload, model=model, hardware=hardware, policy=policy, **settings)
        noted = np.zeros((0, 0), np.int64) if spent is None else spent
        return paper.result(self._timed(paper, noted))

    def step_costs(
        self, model: MoEConfig, hardware: Hardware, policy: Policy, **settings: Unpack[RunSettings]
    ) -> StepCosts:
        """What each layer takes at each step of a block, by the step of its last refresh; see `ages`.

        The schedule of `policy` does not matter. Raise InputError if it does not refresh, or has no rule to do it by.
        """
        paper = PaperRun(workload=self.workload, model=model, hardware=hardware, policy=policy, **settings)
        decisions = self._decide(paper)
        if decisions.rule is None or decisions.rule.name not in ("top-counts", "hottest-for-coldest"):
            raise InputError(f"policy {policy.name!r} has no refresh steps to choose; take 'tide' or 'tide-as-coded'.")
        every_step = replace(decisions.rule.schedule, refresh_interval=1, refresh_steps=None)
        decisions = replace(decisions, rule=replace(decisions.rule, schedule=every_step))
        prices, fixed = self._priced(paper.costs), fixed_of(paper.costs, decisions.scratch)
        parts = ((self._routing(number), prices.during(span)) for number, span in enumerate(self._stretches))
        return ages.fill_step_costs(parts, fixed, decisions, self.workload.num_experts, self._num_steps)

    def _timed(self, paper: PaperRun, spent: Ints) -> Mapping[str, Any]:
        """What a `RunResult` counts and times."""
        decisions = self._decide(paper)
        num_experts = paper.model.num_experts
        resident = np.stack([words_of(ids, num_experts) for ids in decisions.placement.experts])
        prices, fixed = self._priced(paper.costs), fixed_of(paper.costs, decisions.scratch)
        clock, makespan_ns = play_all(
            self._read(prices, self._scripts(decisions, paper), spent),
            fixed,
            ruled(decisions, num_experts, self._num_steps),
            new_clock(resident, FIRST_ROOM),
        )
        tally: list[int] = clock.tally.tolist()
        hits, misses, promotions, evictions, drops = tally[:DEVICE_BUSY]
        links = clock.links[:, LINK_BUSY].tolist()
        return {
            "hits": hits,
            "misses": misses,
            "promotions": promotions,
            "evictions": evictions,
            "drops": drops,
            **copied(paper.costs, promotions + drops, evictions),
            "makespan_ns": makespan_ns,
            "layer_parts_ns": tuple(map(tuple, clock.parts.tolist())),
            "busy_ns": {"device": tally[DEVICE_BUSY], "host": tally[HOST_BUSY], "h2d": links[H2D], "d2h": links[D2H]},
        }

    def _read(self, prices: Prices, scripts: Iterator[Script], spent: Ints) -> Iterator[Stretch]:
        """All forwards, stretch by stretch."""
        for number, (script, span) in enumerate(zip(scripts, self._stretches, strict=True)):
            yield Stretch(self._routing(number), prices.during(span), script, spent[span])

    def _priced(self, costs: Costs) -> Prices:
        """What all forwards may take, kept for the latest machines."""
        with self._lock:
            for known, prices in self._prices:
                if known is costs:
                    return prices
            prices = prices_of(self.workload, costs)
            self._prices = [*self._prices[1 - _KEPT_PRICES :], (costs, prices)]
            return prices

    def _routing(self, number: int) -> Routing:
        """The routing of one stretch, kept as long as there is room."""
        with self._lock:
            if number < len(self._routings):
                return self._routings[number]
            if number == len(self._routings) and self._room_bytes > 0:
                routing = self._read_routing(number)
                if routing.num_bytes <= self._room_bytes:
                    self._routings.append(routing)
                self._room_bytes -= routing.num_bytes
                return routing
        return self._read_routing(number)

    def _read_routing(self, number: int) -> Routing:
        routing = routing_of(self.workload, self._stretches[number])
        forget(self.workload.counts)
        return routing

    def _decide(self, paper: PaperRun) -> Decisions:
        """What the policy decides, from memory if it was asked before and goes by the routing alone."""
        with self._lock:
            known = self._decided.get(_key(paper))
        if known is not None:
            return known[1]
        policy, is_background = paper.policy, _is_background(paper)
        decisions = decide(self.workload, policy, paper.shape, self._stretches, is_background=is_background)
        if decisions.scripts is None:
            self._keep(paper, decisions)
        return decisions

    def _scripts(self, decisions: Decisions, paper: PaperRun) -> Iterator[Script]:
        """The moves in each stretch; they are kept if they are all known in the end and do not take much memory."""
        if decisions.scripts is None:
            yield from repeat(NO_SCRIPT, len(self._stretches))
            return
        scripts, num_bytes = [], 0
        for script in decisions.scripts:
            num_bytes += sum(column.nbytes for column in script)
            if num_bytes <= _KEPT_SCRIPT_BYTES:
                scripts.append(script)
            yield script
        if num_bytes <= _KEPT_SCRIPT_BYTES:
            self._keep(paper, replace(decisions, scripts=scripts))

    def _keep(self, paper: PaperRun, decisions: Decisions) -> None:
        """Remember what a policy decided that goes by the routing alone."""
        if not paper.policy.is_routing_only:
            return
        with self._lock:
            self._decided[_key(paper)] = (paper.policy, decisions)
            if len(self._decided) > _KEPT_DECISIONS:
                del self._decided[next(iter(self._decided))]


def _key(paper: PaperRun) -> tuple[int, tuple[int, ...], bool]:
    """What decisions depend on, beside the routing."""
    return id(paper.policy), paper.budgets, _is_background(paper)


def _is_background(paper: PaperRun) -> bool:
    return paper.execution.copies == "background"


def is_contended(hardware: Hardware) -> bool:
    """Whether device, host and copies slow each other down on `hardware`."""
    contention = hardware.contention
    pairs = [(who, beside) for who in BUSY for beside in BUSY if who != beside]
    return contention is not None and any(contention.share(*pair) < 1 for pair in pairs)


def is_compiled() -> bool:
    """Whether a run can begin at once; if not, the first one compiles what replays it."""
    dispatcher: Any = play
    return bool(dispatcher.signatures) or any(Path(dispatcher.stats.cache_path).glob("clock.play-*.nbi"))


def compile_now(workers: int | None = 1) -> None:
    """Compile what replays a run, unless that is on disk: before processes start that would each do it.

    The parts are compiled side by side by so many `workers`, see `Workers`.
    """
    with Workers(None, workers) as pool:
        parts = (_compile_clock, gain_kernel.compile_now, ages.compile_now, drift.compile_now)
        list(pool.map(_compile_part, parts))


def _compile_part(_: None, part: Callable[[], None]) -> None:
    part()


def _compile_clock() -> None:
    clock = new_clock(words_of((), 1)[np.newaxis], FIRST_ROOM)
    play(NO_ROUTING, NO_PRICES, NO_COSTS, NO_SCRIPT, ruled(NO_DECISIONS, 1, 1), clock, np.zeros((0, 0), np.int64), 0)
    stop(NO_COSTS, clock, 0)
