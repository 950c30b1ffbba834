"""Predictors that say what a test wants, and what a policy that fetches ahead does, forward by forward."""

import numpy as np
from toy import toy_workload

from tidesim.policies import ForwardInfo, Shape, forwards_of
from tidesim.policies.predictors import (
    Predictor,
)
from tidesim.residency import Residency
from tidesim.workload import ForwardKind


def forward(index=0, *, sequence=0, kind=ForwardKind.DENOISE, block=1) -> ForwardInfo:
    return ForwardInfo(index, sequence, kind, block, step=0, is_first_block=False, tokens=2)


def begun(predictor: Predictor, num_layers: int, num_experts: int) -> Predictor:
    """With its parts begun too."""
    for piece in (*predictor.parts, predictor):
        piece.begin(Shape(num_experts, (1,) * num_layers))
    return predictor


def see(predictor: Predictor, info: ForwardInfo, layer: int, row) -> None:
    predictor.observe(info, layer, np.array(row, np.int32), np.zeros((9, len(row)), np.bool_))


class Foretold(Predictor):
    """Says what a table [L, E] has, whatever runs."""

    def __init__(self, table, confidence=1.0):
        self.table, self.sure = np.array(table, np.float64), confidence

    def predict(self, forward, layer, target):
        return self.table[target]

    def confidence(self, forward, layer):
        return self.sure


def moves_of(made, budgets, tables, **changes):
    """What is done, by forward and layer: fetched and kept, their victims, fetched and dropped, ahead as tuples.

    The misses are checked to be served by the device.
    """
    workload = toy_workload(*tables, **changes)
    E = workload.num_experts
    residency = Residency(E, budgets, made.initial(Shape(E, tuple(budgets))), is_pooled=made.scope == "network")
    log = {}
    for info, table in zip(forwards_of(workload), workload.counts, strict=True):
        for layer, counts in enumerate(table):
            made.observe(info, layer, counts, residency.everybody)
            missed = np.flatnonzero((counts > 0) & ~residency.is_resident(layer)).tolist()
            serving = made.serve(info, layer, missed, counts, residency.everybody)
            serving.check(layer, made.scratch)
            assert serving.on_host(missed) == []
            residency.fetch(layer, serving.keep)
            ahead = made.ahead(info, layer, counts, residency.everybody)
            for there, moves in ahead:
                assert not residency.is_resident(there)[list(moves.promote)].any()
                residency.apply(there, moves)
            there = [(other, moves.promote, moves.evict) for other, moves in ahead]
            log[info.index, layer] = (serving.keep.promote, serving.keep.evict, serving.drop, there)
    return log
