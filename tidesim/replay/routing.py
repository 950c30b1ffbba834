"""The routing of a workload as compiled code reads it: only the experts that have rows, sorted by how many.

Most experts of a forward share their number of rows with others, so they are kept as groups of equal rows too, each a
set of bits: what is asked of a group is then a few operations on words, however many experts it has. Letters:
F forwards, L MoE layers, E experts, P pairs of a layer of a forward and an expert that has rows in it, G groups of such
experts with equal rows, W words of a set of experts.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.compiling import compiled
from tidesim.replay.bits import STRIDE, Words, num_words, put
from tidesim.workload import Workload

Ints = npt.NDArray[np.int64]


class Routing(NamedTuple):
    """Which experts have rows, layer by layer and forward by forward.

    Parameters
    ----------
    first : int64 [F * L + 1], where the experts of each layer of each forward begin, and
    first_group : where its groups do.
    experts : uint16 [P], most rows first, of equals the lower id. rows : int32 [P], of each of them.
    active : uint64 [F * L, W], who has rows.
    groups : uint64 [G, W], by falling rows. group_rows, group_size : int32 [G], rows of each expert, and experts.
    kind, step, is_first_block, tokens : as in `Workload`, [F].
    num_pairs : int64 [F], routed pairs of each layer.
    """

    first: Ints
    first_group: Ints
    experts: npt.NDArray[np.uint16]
    rows: npt.NDArray[np.int32]
    active: Words
    groups: Words
    group_rows: npt.NDArray[np.int32]
    group_size: npt.NDArray[np.int32]
    kind: npt.NDArray[np.uint8]
    step: npt.NDArray[np.int32]
    is_first_block: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int32]
    num_pairs: Ints

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(array.nbytes for array in self)


def _no_routing() -> Routing:
    """Of no forward of a layer."""
    few, ints, words = np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros((0, STRIDE), np.uint64)
    small, truths = np.zeros(0, np.uint8), np.zeros(0, np.bool_)
    return Routing(
        *(ints, ints, few.astype(np.uint16), few, words, words, few, few, small, few, truths, few, ints[:0]),
    )


NO_ROUTING = _no_routing()


def routing_of(workload: Workload, part: slice) -> Routing:
    """The routing of some forwards of `workload`; reads their counts twice."""
    counts, tokens = (
        np.ascontiguousarray(workload.counts[part]).reshape(-1, workload.num_experts),
        workload.tokens[part],
    )
    bucket = np.zeros(int(tokens.max(initial=0)) + 2, np.int64)
    first, first_group = np.zeros((2, len(counts) + 1), np.int64)
    _count(counts, bucket, first, first_group)
    num_groups, words = first_group[-1], num_words(workload.num_experts)
    routing = Routing(
        first=first,
        first_group=first_group,
        experts=np.empty(first[-1], np.uint16),
        rows=np.empty(first[-1], np.int32),
        active=np.zeros((len(counts), words), np.uint64),
        groups=np.zeros((num_groups, words), np.uint64),
        group_rows=np.empty(num_groups, np.int32),
        group_size=np.empty(num_groups, np.int32),
        kind=workload.kind[part],
        step=workload.step[part],
        is_first_block=workload.is_first_block[part],
        tokens=tokens,
        num_pairs=tokens.astype(np.int64) * workload.top_k,
    )
    _fill(counts, bucket, routing)
    return routing


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
def _fill(counts: Any, bucket: Any, routing: Any) -> None:
    """A counting sort of each row."""
    group = 0
    for row in range(len(counts)):
        most, begin = 0, routing.first[row]
        for expert in range(counts.shape[1]):
            most = max(most, counts[row, expert])
        bucket[: most + 1] = 0
        for expert in range(counts.shape[1]):
            bucket[counts[row, expert]] += 1
        end = begin
        for rows in range(most, 0, -1):
            size = bucket[rows]
            bucket[rows] = end
            if size > 0:
                end += size
                routing.group_rows[group], routing.group_size[group] = rows, size
                group += 1
        for expert in range(counts.shape[1]):
            rows = counts[row, expert]
            if rows > 0:
                put(routing.active[row], expert)
                routing.experts[bucket[rows]], routing.rows[bucket[rows]] = expert, rows
                bucket[rows] += 1
        pair = begin
        for at in range(routing.first_group[row], group):
            for _ in range(routing.group_size[at]):
                put(routing.groups[at], routing.experts[pair])
                pair += 1
