"""The routing of a workload as compiled code reads it: only the experts that have rows, one after another.

Letters: F forwards, L MoE layers, E experts, P pairs of a layer of a forward and an expert that has rows in it.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from tidesim.workload import Workload

Ints = npt.NDArray[np.int64]


class Routing(NamedTuple):
    """Which experts have rows, ascending ids, layer by layer and forward by forward.

    Parameters
    ----------
    first : int64 [F * L + 1], where the experts of each layer of each forward begin.
    experts : uint16 [P]. rows : int32 [P], tokens of each.
    kind, step, is_first_block, tokens : as in `Workload`, [F].
    """

    first: Ints
    experts: npt.NDArray[np.uint16]
    rows: npt.NDArray[np.int32]
    kind: npt.NDArray[np.uint8]
    step: npt.NDArray[np.int32]
    is_first_block: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int32]


def routing_of(workload: Workload) -> Routing:
    """The routing of `workload`; takes about as long as reading its counts once."""
    counts = np.ascontiguousarray(workload.counts).reshape(-1, workload.num_experts)
    first = np.zeros(len(counts) + 1, np.int64)
    _count(counts, first)
    experts, rows = np.empty(first[-1], np.uint16), np.empty(first[-1], np.int32)
    _fill(counts, first, experts, rows)
    return Routing(first, experts, rows, workload.kind, workload.step, workload.is_first_block, workload.tokens)


@njit(cache=True, nogil=True)
def _count(counts: Any, first: Any) -> None:
    for row in range(len(counts)):
        number = 0
        for expert in range(counts.shape[1]):
            number += counts[row, expert] > 0
        first[row + 1] = first[row] + number


@njit(cache=True, nogil=True)
def _fill(counts: Any, first: Any, experts: Any, rows: Any) -> None:
    for row in range(len(counts)):
        at = first[row]
        for expert in range(counts.shape[1]):
            if counts[row, expert] > 0:
                experts[at], rows[at] = expert, counts[row, expert]
                at += 1
