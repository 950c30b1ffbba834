"""The routing of a workload as compiled code reads it: only the experts that have rows, sorted by how many.

Most experts of a forward share their number of rows with others, so durations, which depend on that number alone, need
be looked up once for a group. Letters: F forwards, L MoE layers, E experts, P pairs of a layer of a forward and an
expert that has rows in it, G groups of such experts with equal rows.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.replay.compiling import compiled
from tidesim.workload import Workload

Ints = npt.NDArray[np.int64]


class Routing(NamedTuple):
    """Which experts have rows, layer by layer and forward by forward.

    Parameters
    ----------
    first : int64 [F * L + 1], where the experts of each layer of each forward begin, and
    first_group : where its groups do.
    experts : uint16 [P], most rows first, of equals the lower id. ascending : uint16 [P], the same by ids.
    group_end : int64 [G], where a group's experts end. group_rows : int32 [G], rows of each of them, falling.
    kind, step, is_first_block, tokens : as in `Workload`, [F].
    num_pairs : int64 [F], routed pairs of each layer.
    """

    first: Ints
    first_group: Ints
    experts: npt.NDArray[np.uint16]
    ascending: npt.NDArray[np.uint16]
    group_end: Ints
    group_rows: npt.NDArray[np.int32]
    kind: npt.NDArray[np.uint8]
    step: npt.NDArray[np.int32]
    is_first_block: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int32]
    num_pairs: Ints


def routing_of(workload: Workload) -> Routing:
    """The routing of `workload`; reads its counts twice."""
    counts = np.ascontiguousarray(workload.counts).reshape(-1, workload.num_experts)
    bucket = np.zeros(int(workload.tokens.max(initial=0)) + 2, np.int64)
    first, first_group = np.zeros((2, len(counts) + 1), np.int64)
    _count(counts, bucket, first, first_group)
    experts, ascending = np.empty((2, first[-1]), np.uint16)
    group_end, group_rows = np.empty(first_group[-1], np.int64), np.empty(first_group[-1], np.int32)
    _fill(counts, bucket, first, experts, ascending, group_end, group_rows)
    return Routing(
        first=first,
        first_group=first_group,
        experts=experts,
        ascending=ascending,
        group_end=group_end,
        group_rows=group_rows,
        kind=workload.kind,
        step=workload.step,
        is_first_block=workload.is_first_block,
        tokens=workload.tokens,
        num_pairs=workload.tokens.astype(np.int64) * workload.top_k,
    )


@compiled
def _count(counts: Any, bucket: Any, first: Any, first_group: Any) -> None:
    """How many experts have rows, and how many different numbers of rows there are; `bucket` is a buffer."""
    for row in range(len(counts)):
        num_experts, num_groups = 0, 0
        for rows in counts[row]:
            if rows > 0:
                num_experts += 1
                num_groups += bucket[rows] != row + 1
                bucket[rows] = row + 1
        first[row + 1] = first[row] + num_experts
        first_group[row + 1] = first_group[row] + num_groups


@compiled
def _fill(counts: Any, bucket: Any, first: Any, experts: Any, ascending: Any, group_end: Any, group_rows: Any) -> None:
    """A counting sort of each row."""
    group = 0
    for row in range(len(counts)):
        most, at = 0, first[row]
        for expert in range(counts.shape[1]):
            if counts[row, expert] > 0:
                most = max(most, counts[row, expert])
                ascending[at] = expert
                at += 1
        bucket[: most + 1] = 0
        for number in range(first[row], at):
            bucket[counts[row, ascending[number]]] += 1
        end = first[row]
        for rows in range(most, 0, -1):
            size = bucket[rows]
            bucket[rows] = end
            if size > 0:
                end += size
                group_end[group], group_rows[group] = end, rows
                group += 1
        for number in range(first[row], at):
            rows = counts[row, ascending[number]]
            experts[bucket[rows]] = ascending[number]
            bucket[rows] += 1
