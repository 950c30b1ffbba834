"""tidesim's own policy: an expert moves when the time that it will save exceeds what the move costs now.

TIDE (arXiv 2605.20179) asks how often to choose the resident experts afresh, and answers with one number for the whole
run, tuned on the machine. Between two refreshes nothing moves and the link is idle, and at a refresh everything moves
at once, whether or not it will be of use. Here every forward and layer decides for itself, with the times that the
machine's profile predicts:

1. *What is an expert worth?* The forwards, of the next few, that are expected to use it (`foresight`), times what one
   avoided miss with its rows saves. Counts of the block, the sequence and a corpus go into the expectation, and
   placements outlive blocks: where one ends, it turns to the experts that blocks begin with.
2. *Just in time.* When the router is done it is known who is missing. The link can fetch some of them while the host
   computes the others, and the device runs each as it arrives. As many are fetched as make the layer shortest, given
   also what those that stay will save later: first those that save most, now and later. With the host beside the device
   and copies in the background both work until they meet, and a copy costs nothing as long as the host is the longer
   side.
3. *Who stays?* An expert that was fetched stays if it is worth more than the resident that is worth least, whose place
   it takes. Otherwise it goes through scratch memory and is forgotten. So a budget below what a forward touches does
   no harm, where a cache would evict what it needs next.
4. *Idle link.* If the link would have nothing to do before the next layer's router is done, the best absent expert of
   that layer comes in, provided that it is worth more than the worst resident there. If it is used at once, its fetch
   has merely begun earlier; and what the next block will want comes while this one ends.
5. *Prefill* needs nearly all experts once. It is decided by the same sums; that its use says little about what comes
   next is in the expectation, which is learnt apart for it.

It never looks at a clock: times are predicted and added up on paper, so simulator and engine make the same moves. Ties:
fewer fetches, and the lower id.
"""

from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.policies.composition import MostPopular
from tidesim.policies.foresight import Foresight, situation
from tidesim.policies.interface import (
    ALL_ON_HOST,
    NOBODY,
    Ahead,
    Counts,
    ForwardInfo,
    Mask,
    MissAction,
    Policy,
    Serving,
    Shape,
    Written,
    forwards_of,
)
from tidesim.residency import Moves, Placement
from tidesim.workload import Workload


class Gain(Policy):
    """See the module.

    Parameters
    ----------
    corpus : sequences to learn from what is used again.

    Raise InputError at the beginning of a run without predicted times, or with a corpus of another shape.
    """

    name = "gain"
    miss_action: MissAction = "split"
    is_routing_only = False
    scratch = 2

    def __init__(self, corpus: Workload) -> None:
        self._foresight = Foresight(corpus)

    def initial(self, shape: Shape) -> Placement:
        """The experts that blocks begin with, as far as there are slots."""
        if shape.costs is None:
            raise InputError("policy 'gain' decides by predicted times; give the machine's profile.")
        # Importing numba takes longer than most commands, so only who decides by it waits for it.
        self._kernel: Any = import_module("tidesim.policies.gain_kernel")
        self._kernel.compile_now()
        self._budgets, self._costs = shape.budgets, shape.costs
        self._calls: dict[int, npt.NDArray[np.int64]] = {}  # by rows of a forward
        times = self._kernel.times_of(shape.costs)
        self._dense_ns: list[int] = times.dense.tolist()  # by rows
        self._answer: Any = self._kernel.new_answer(shape.num_experts)
        # As the compiled functions take them.
        self._paper = tuple(times), np.zeros(3, np.int64)
        self._plain_answer = tuple(self._answer)
        # What is handed in may be read-only or narrower, and would be compiled for apart.
        self._counts, self._here = np.zeros(shape.num_experts, np.int32), np.zeros(shape.num_experts, np.bool_)
        self._foresight.begin(shape)
        return MostPopular(self._foresight.at_start)(shape)

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """See `Policy`."""
        self._counts[:] = counts
        self._foresight.observe(forward, layer, self._counts, is_resident)
        self._kernel.pass_dense(self._paper[1], self._dense_ns[forward.tokens])

    def serve(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Serving:
        """Fetch as many of `missed` as make the layer shortest, and keep those that are worth a slot."""
        answer, foresight, rows, here = self._answer, self._foresight, self._counts, self._here
        rows[:], here[:] = counts, is_resident[layer]
        keep, drop, evict = self._kernel.serve(
            foresight.table,
            foresight.rows,
            *self._paper,
            self._plain_answer,
            self._call_ns(forward.tokens),
            layer,
            self._budgets[layer],
            rows,
            here,
        )
        if not keep and not drop:
            return ALL_ON_HOST
        moves = Moves(tuple(answer.keep[:keep].tolist()), tuple(answer.evict[:evict].tolist()))
        return Serving(moves, tuple(answer.drop[:drop].tolist()))

    def ahead(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Sequence[Ahead]:
        """One expert of the next layer, if the link would be idle: the best absent one for the worst resident."""
        foresight, here = self._foresight, self._here
        target = (layer + 1) % len(is_resident)
        here[:] = is_resident[target]
        known = foresight.table, foresight.rows
        best, worst = self._kernel.ahead(*known, *self._paper, here, target, self._budgets[target], forward.tokens)
        if best == NOBODY:
            return ()
        return [Ahead(target, Moves((best,), () if worst == NOBODY else (worst,)))]

    def write(self, workload: Workload, forwards: slice, is_resident: Mask) -> Written | None:
        """See `Policy`. A class that is derived from this one may answer otherwise, and is asked."""
        if type(self) is not Gain:
            return None
        chosen = forwards_of(workload)[forwards]
        calls = {tokens: self._call_ns(tokens) for tokens in {forward.tokens for forward in chosen}}
        begins = dict(zip(calls, accumulate(map(len, calls.values()), initial=0), strict=False))
        columns = [(one.sequence, one.block, situation(one), one.tokens, begins[one.tokens]) for one in chosen]
        counts = np.array(workload.counts[forwards], np.int32, order="C")
        first = np.zeros(counts.shape[0] * counts.shape[1] + 1, np.int64)
        # One for each layer of each forward comes ahead, and at most all that are used are fetched.
        moves = np.empty((len(first) + np.count_nonzero(counts), 4), np.int32)
        self._kernel.write(
            self._foresight.memory,
            *self._paper,
            self._plain_answer,
            np.concatenate(list(calls.values())),
            np.array(self._budgets, np.int64),
            np.array(columns, np.int64),
            counts,
            is_resident,
            first,
            moves,
        )
        return Written(first, moves[: first[-1]].copy())

    def _call_ns(self, tokens: int) -> npt.NDArray[np.int64]:
        """What calling the host takes in a forward of so many rows, by the pairs that are left to it."""
        if tokens not in self._calls:
            self._calls[tokens] = self._kernel.call_ns(self._costs, tokens)
        return self._calls[tokens]
