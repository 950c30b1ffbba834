"""What everything takes, as tables that compiled code looks up.

Letters: F forwards, E experts, T rows of a forward, K top-k, R most rows of a forward.
"""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from tidesim.execution import Costs
from tidesim.workload import Workload

Ints = npt.NDArray[np.int64]


class Prices(NamedTuple):
    """Durations in ns that depend on a forward or on numbers of rows.

    Parameters
    ----------
    entry, dense, head : [F, 2], kernels and unhidden launches before the layers, in each layer, and after them.
    alone : [R + 1, 2], the same of one expert that runs alone, by its rows; 0 for none.
    loop : [R + 1], kernels of one of several resident experts, by its rows.
    experts_bytes, experts_flops : [E + 1] by experts that have rows, [R * K + 1] by their rows: the two sides of a
        grouped kernel's roofline.
    host : [R + 1], one missed expert, by its rows.
    call, first_call : what a layer's host part costs besides, by missed pairs, for each number of rows of a forward;
        that of forward f begins at first_call[f].
    """

    entry: Ints
    dense: Ints
    head: Ints
    alone: Ints
    loop: Ints
    experts_bytes: Ints
    experts_flops: Ints
    host: Ints
    call: Ints
    first_call: Ints

    def during(self, span: slice) -> Self:
        """The same of some forwards alone."""
        return self._replace(**{name: getattr(self, name)[span] for name in ("entry", "dense", "head", "first_call")})


class Fixed(NamedTuple):
    """Durations in ns that depend on nothing, and how the software runs.

    Parameters
    ----------
    grouped : what a grouped kernel takes besides its experts. expert_launch : launching one expert's ops in a loop.
    promote, evict : copies. has_write_back : whether an evicted expert is copied.
    scratch : experts that fit into scratch memory.
    is_loop, has_curve : whether resident experts run one by one; whether they take their own times in a group too.
    is_async : whether launches hide behind kernels.
    is_background, is_parallel : copies beside the main process; the host beside the device.
    """

    grouped: int
    expert_launch: int
    promote: int
    evict: int
    has_write_back: bool
    scratch: int
    is_loop: bool
    has_curve: bool
    is_async: bool
    is_background: bool
    is_parallel: bool


# The prices of no forward, and of nothing else.
NO_PRICES = Prices(*np.zeros((4, 1, 2), np.int64), *np.zeros((6, 1), np.int64))
NO_COSTS = Fixed(0, 0, 0, 0, False, 0, False, False, False, False, False)


def prices_of(workload: Workload, costs: Costs) -> Prices:
    """All that the forwards of `workload` may take."""
    call, first_call = _calls(workload, costs)
    attention = (workload.tokens, workload.context_tokens, workload.attended_pairs)
    alone = _pairs(*costs.alone_ns(costs.loop_ns))
    alone[0] = 0
    return Prices(
        entry=_pairs(*costs.entry_ns(*attention)),
        dense=_pairs(*costs.layer_ns(*attention)),
        head=_pairs(*costs.head_ns(workload.tokens, workload.logit_tokens)),
        alone=alone,
        loop=costs.loop_ns,
        experts_bytes=costs.grouped_bytes_ns,
        experts_flops=costs.grouped_flops_ns,
        host=costs.host_expert_ns,
        call=call,
        first_call=first_call,
    )


def fixed_of(costs: Costs, scratch: int) -> Fixed:
    """What does not depend on a workload, with room for `scratch` experts in scratch memory."""
    execution = costs.execution
    return Fixed(
        grouped=costs.grouped_overhead_ns,
        expert_launch=costs.expert_launch_ns,
        promote=costs.promote_ns,
        evict=costs.evict_ns,
        has_write_back=costs.evict_bytes > 0,
        scratch=scratch,
        is_loop=execution.kernels == "loop",
        has_curve=costs.has_expert_curve,
        is_async=execution.is_async,
        is_background=execution.copies == "background",
        is_parallel=execution.host == "parallel",
    )


def _pairs(kernel_ns: Ints, launch_ns: Ints) -> Ints:
    """Two arrays [F], the second of which may be one number, side by side."""
    return np.stack(np.broadcast_arrays(kernel_ns, launch_ns), axis=1).astype(np.int64)


def _calls(workload: Workload, costs: Costs) -> tuple[Ints, Ints]:
    """See `Prices`: a table for each number of rows that a forward has."""
    tables, begins, length = [], {}, 0
    for num_rows in np.unique(workload.tokens).tolist():
        pairs = np.arange(num_rows * workload.top_k + 1)
        # A row with several missed experts travels once.
        tables.append(costs.host_call_ns(np.minimum(num_rows, pairs), pairs))
        begins[num_rows], length = length, length + len(pairs)
    return np.concatenate(tables), np.array([begins[num_rows] for num_rows in workload.tokens.tolist()], np.int64)
