"""Corpora, forwards and times of a toy machine for tests of tidesim's own policy.

In ns: a copy takes 310, a resident or fetched expert 100, a missed one of n rows 570 + 200 n.
"""

from collections.abc import Sequence

import numpy as np
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.execution import Costs
from tidesim.policies import ForwardInfo
from tidesim.workload import ForwardKind

DENOISE, COMMIT, PREFILL = ForwardKind.DENOISE, ForwardKind.COMMIT, ForwardKind.PREFILL


def info(index=0, *, sequence=0, block=1, step=0, kind=DENOISE, tokens=3) -> ForwardInfo:
    return ForwardInfo(index, sequence, kind, block, step, False, tokens)


def sequences_of(*used: Sequence[Sequence[int]], steps: Sequence[int] | None = None):
    """A workload of one layer: `used[s][f]` are the rows of each expert in forward f of sequence s, all of block 1."""
    lengths = [len(forwards) for forwards in used]
    return toy_workload(
        *([row] for forwards in used for row in forwards),
        sequence=np.repeat(np.arange(len(used)), lengths).astype(np.int32),
        steps=[step for length in lengths for step in range(length)] if steps is None else steps,
        num_sequences=len(used),
    )


def costs_of(machine=None, **changes) -> Costs:
    changes = {"copies": "background", "host": "parallel"} | changes
    return Costs(TOY, machine or toy_hardware(), toy_execution(**changes), max_rows=40)
