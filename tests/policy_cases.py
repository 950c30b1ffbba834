"""Runs of a policy by itself: forwards by hand or at random, what moves in them, and what is decided layer by layer."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from toy import TOY, toy_execution, toy_hardware

from tidesim.execution import Costs
from tidesim.policies import ForwardInfo, Policy, Shape
from tidesim.residency import NO_MOVES, Moves, Residency
from tidesim.workload import ForwardKind

DENOISE, COMMIT, PREFILL = ForwardKind.DENOISE, ForwardKind.COMMIT, ForwardKind.PREFILL

# A step of a run: which forward, and how many tokens each expert of each layer got, [L, E].
Step = tuple[ForwardInfo, np.ndarray]


def forward(
    index: int = 0, *, kind: ForwardKind = ForwardKind.DENOISE, block: int = 1, step: int = 0, first: bool = False
) -> ForwardInfo:
    return ForwardInfo(index, 0, kind, block, step, first, tokens=4)


def run(
    policy: Policy,
    budgets: Sequence[int],
    steps: Iterable[Step],
    *,
    is_background: bool = False,
    costs: Costs | None = None,
):
    """Every non-empty move as (forward, layer, promote, evict), in order; the residency guards each of them."""
    steps = list(steps)
    num_experts = steps[0][1].shape[1]
    start = policy.initial(Shape(num_experts, tuple(budgets), costs))
    residency = Residency(num_experts, budgets, start, is_pooled=policy.scope == "network")
    log = []

    def refresh(info, layer, counts):
        moves = policy.refresh(info, layer, counts, residency.everybody)
        residency.apply(layer, moves)
        return [(layer, moves)]

    def serve(info, layer, counts):
        missed = np.flatnonzero((counts > 0) & ~residency.is_resident(layer)).tolist()
        serving = policy.serve(info, layer, missed, counts, residency.everybody)
        serving.check(layer, policy.scratch_experts(num_experts))
        residency.fetch(layer, serving.keep)
        return [(layer, serving.keep)]

    def ahead(info, layer, counts):
        there = policy.ahead(info, layer, counts, residency.everybody)
        for other, moves in there:
            residency.apply(other, moves)
        return there

    for info, table in steps:
        for layer, counts in enumerate(table):
            counts.flags.writeable = False
            policy.observe(info, layer, counts, residency.everybody)
            parts = (serve, ahead, refresh) if is_background else (refresh, serve, ahead)
            for there, moves in [found for part in parts for found in part(info, layer, counts)]:
                if moves:
                    log.append((info.index, there, moves.promote, moves.evict))
    return log, residency


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[int], list[Step]]:
    """Budgets, and forwards of all kinds over several blocks."""
    num_layers, num_experts = draw(st.integers(1, 2)), draw(st.integers(2, 9))
    budgets = draw(st.lists(st.integers(1, num_experts), min_size=num_layers, max_size=num_layers))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps: list[Step] = [
        (forward(0, kind=ForwardKind.PREFILL, first=True), rng.integers(0, 4, (num_layers, num_experts)))
    ]
    for block in range(1, draw(st.integers(1, 3)) + 1):
        length = draw(st.integers(1, 4))
        for step in range(length + 1):
            kind = ForwardKind.COMMIT if step == length else ForwardKind.DENOISE
            info = forward(len(steps), kind=kind, block=block, step=step, first=block == 1)
            steps.append((info, rng.integers(0, 4, (num_layers, num_experts)) * rng.integers(0, 2, num_experts)))
    return budgets, [(info, table.astype(np.int32)) for info, table in steps]


class Answer(NamedTuple):
    """What was decided for one layer of one forward: experts to keep, to drop and for the host, and the refresh."""

    keep: Moves
    drop: tuple[int, ...]
    host: tuple[int, ...]
    refresh: Moves = NO_MOVES


def steps_of(
    *tables: Sequence[Sequence[int]], kinds: Sequence[ForwardKind] | None = None, tokens: int = 32
) -> list[Step]:
    """One forward for each table of counts [L, E]."""
    made = [ForwardInfo(i, 0, kind, 1, i, False, tokens) for i, kind in enumerate(kinds or [DENOISE] * len(tables))]
    return [(info, np.array(table, np.int32)) for info, table in zip(made, tables, strict=True)]


def answers(made: Policy, budgets: Sequence[int], steps: Iterable[Step], costs: Costs | None = None) -> list[Answer]:
    """What the policy decides with blocking copies, layer by layer of each forward."""
    steps = list(steps)
    start = made.initial(Shape(steps[0][1].shape[1], tuple(budgets), costs))
    residency = Residency(steps[0][1].shape[1], budgets, start, is_pooled=made.scope == "network")
    log = []
    for info, table in steps:
        for layer, counts in enumerate(table):
            made.observe(info, layer, counts, residency.everybody)
            refresh = made.refresh(info, layer, counts, residency.everybody)
            residency.apply(layer, refresh)
            missed = np.flatnonzero((counts > 0) & ~residency.is_resident(layer)).tolist()
            serving = made.serve(info, layer, missed, counts, residency.everybody)
            serving.check(layer, made.scratch_experts(len(counts)))
            residency.fetch(layer, serving.keep)
            log.append(Answer(serving.keep, serving.drop, tuple(serving.on_host(missed)), refresh))
    return log


def costs_of(machine=None, num_experts=8, **changes) -> Costs:
    """Of the toy network: a promotion takes 310, a missed expert of n rows 570 + 200 n."""
    model = replace(TOY, num_experts=num_experts)
    return Costs(model, machine or toy_hardware(), toy_execution(**changes), max_rows=40)
