"""The most hits that a cache can have which is filled on demand, by one linear programme for each layer.

Letters: F forwards, L MoE layers, E experts, I intervals, B slots.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tidesim.errors import TidesimError
from tidesim.residency import check_budgets, per_layer
from tidesim.windows import windows
from tidesim.workload import Workload

Ints = npt.NDArray[np.int64]


def hit_ceiling(workload: Workload, budget: int | Sequence[int]) -> int:
    """The most hits, routed (token, expert) pairs whose expert is resident, of any cache that is filled on demand.

    Such a cache takes an expert into a slot only in a forward that routes to it, and these pairs are misses; it need
    not take it. Its first residents are free. Knowing all of the routing beforehand it would have so many hits.

    It bounds the policies that fetch what they miss, and background refreshes that promote nobody but experts that the
    same forward routed to. It bounds none that promotes before it counts (a refresh with blocking copies) or ahead
    of the routing (prefetch, or a refresh by counters that remember other forwards).

    Parameters
    ----------
    budget : slots, one number or one per MoE layer.

    Raise InputError or BudgetError if the budgets do not fit the workload.
    """
    budgets = per_layer(budget, workload.num_layers, "budget")
    check_budgets(budgets, workload.num_experts)
    return sum(_layer_hits(_of_layer(workload, layer), slots) for layer, slots in enumerate(budgets))


def _of_layer(workload: Workload, layer: int) -> npt.NDArray[np.int32]:
    """The counts of one layer, [F, E]."""
    counts = np.concatenate([workload.counts[:0, layer], *(part[:, layer] for _, part in windows(workload.counts))])
    return counts.astype(np.int32, copy=False)


def _layer_hits(counts: npt.NDArray[np.int32], slots: int) -> int:
    """The most hits in one layer, `counts` [F, E].

    Keeping an expert from one use to the next, or from the start to its first, brings the later use's pairs. At most B
    are kept over each gap between neighbouring forwards. In each column the ones of that matrix are consecutive,
    so it is totally unimodular, and the best corner of the relaxed programme is whole.
    """
    from scipy import sparse  # they take a while to import
    from scipy.optimize import linprog

    num_forwards = len(counts)
    begin, end, pairs = _intervals(counts)
    if not slots or not len(pairs):
        return 0
    length = end - begin
    columns = np.repeat(np.arange(len(pairs)), length)
    gaps = np.arange(len(columns)) - np.repeat(np.cumsum(length) - length, length) + np.repeat(begin, length)
    kept: Any = sparse.csr_matrix((np.ones(len(columns)), (gaps, columns)), (num_forwards, len(pairs)))
    solved = linprog(-pairs, A_ub=kept, b_ub=np.full(num_forwards, slots), bounds=(0, 1), method="highs")
    if solved.fun is None:
        raise TidesimError(f"the solver gave up on the most hits of a layer: {solved.message}")
    return round(-solved.fun)


def _intervals(counts: npt.NDArray[np.int32]) -> tuple[Ints, Ints, Ints]:
    """First gap, the gap after the last, and the later use's pairs of each interval, [I] each.

    Gap f comes before forward f.
    """
    expert, forward = np.nonzero(counts.T)
    is_first = np.diff(expert, prepend=-1) != 0
    begin = np.where(is_first, 0, np.roll(forward, 1) + 1)
    return begin, forward + 1, counts.T[expert, forward].astype(np.int64)
