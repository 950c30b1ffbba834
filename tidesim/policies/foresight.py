"""How soon, and how often, an expert will be used again: a linear prediction from what was seen, fitted on a corpus.

Within a block most positions keep most of their experts from one forward to the next, so who was used lately will be
used again. Where a block begins that is worth little: all its positions are masked, and who is used then is much the
same in every block. What is known of an expert is put in numbers, and how much each of them says is learnt from the
sequences of a corpus, apart for prefill, for commit and for early and late denoising steps: least squares, with a
little weight decay (ridge regression; Hoerl and Kennard, Technometrics 1970).

Features: 1; whether it is used now; how much, as log(1 + its share of the rows, of 32); how often lately, fading to
1/2, 4/5 and 19/20 with each forward, the last in this sequence alone; how much lately, fading to 1/2; and the shares
that used it, of this block's forwards, of this sequence's, of the corpus' and of the first steps of its blocks.

Letters: L MoE layers, E experts per layer, N features.
"""

from bisect import bisect_left
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.policies.interface import Counts, ForwardInfo, Mask, Shape, forwards_of
from tidesim.policies.pieces import Score
from tidesim.windows import windows
from tidesim.workload import ForwardKind, Workload

Floats = npt.NDArray[np.float64]

HORIZON = 4  # forwards that are looked ahead
FADE = 0.7  # the weight of a forward over that of the one before it
ALWAYS = sum(FADE**ahead for ahead in range(HORIZON))  # the worth of who is used in all of them
_RIDGE = 1e-6  # weight decay, per row that is fitted
_LAST_STEPS = (0, 1, 3, 7)  # denoising steps that end a situation; later ones are one more
_NUM_SITUATIONS = 2 + len(_LAST_STEPS) + 1
NUM_FEATURES = 11


def situation(forward: ForwardInfo) -> int:
    """Which of the predictions holds after this forward."""
    if forward.kind != ForwardKind.DENOISE:
        return int(forward.kind == ForwardKind.COMMIT)
    return 2 + bisect_left(_LAST_STEPS, forward.step)


class Foresight(Score):
    """The forwards, of the next few of a sequence, that are expected to use an expert, each weighed by how soon it is.

    Parameters
    ----------
    corpus : sequences to learn from. Raise InputError if there are none.

    Attributes
    ----------
    memory : what the compiled functions read and write.
    rows : int64 [L, E], the rows that each expert got when it was used last, from the beginning of a run on; 1 before.
    """

    def __init__(self, corpus: Workload) -> None:
        if not corpus.num_forwards:
            raise InputError("the corpus holds no forward; give at least one sequence to learn from.")
        is_start = (corpus.kind == ForwardKind.DENOISE) & (corpus.step == 0)
        self.popularity: Floats = _share_used(corpus, np.ones_like(is_start))
        self.at_start: Floats = _share_used(corpus, is_start) if is_start.any() else self.popularity
        self._weights = self._fit(corpus)

    def _fit(self, corpus: Workload) -> Floats:
        """The weights [situations, N] that predict the corpus best, whatever the layer."""
        kernel = _kernel()
        shape, nothing = self.popularity.shape, np.zeros((_NUM_SITUATIONS, NUM_FEATURES))
        memory = tuple(kernel.new_memory(self.popularity, self.at_start, nothing))
        rows, features = np.zeros(shape, np.int32), np.zeros((shape[0], NUM_FEATURES, shape[1]))  # [L, N, E]
        squares = np.zeros((_NUM_SITUATIONS, NUM_FEATURES, NUM_FEATURES))
        products, num_rows = np.zeros((_NUM_SITUATIONS, NUM_FEATURES)), np.zeros(_NUM_SITUATIONS)
        for forward, counts, uses in zip(forwards_of(corpus), corpus.counts, uses_to_come(corpus), strict=True):
            rows[:] = counts
            for layer, (mine, found) in enumerate(zip(rows, features, strict=True)):
                kernel.see(memory, layer, forward.sequence, forward.block, forward.tokens, mine, found)
            which = situation(forward)
            squares[which] += (features @ features.swapaxes(1, 2)).sum(axis=0)
            products[which] += (features @ uses[:, :, np.newaxis]).sum(axis=0)[:, 0]
            num_rows[which] += uses.size
        decay = _RIDGE * np.maximum(num_rows, 1)[:, None, None] * np.eye(NUM_FEATURES)
        weights = np.linalg.solve(squares + decay, products[:, :, None])[:, :, 0]
        # A situation that the corpus never shows goes by all others together.
        everywhere = np.linalg.solve(squares.sum(axis=0) + decay.sum(axis=0), products.sum(axis=0))
        fitted: Floats = np.where(num_rows[:, None] > 0, weights, everywhere)
        return fitted

    def begin(self, shape: Shape) -> None:
        """Expect those who begin blocks. Raise InputError if the corpus has another shape."""
        super().begin(shape)
        if self.popularity.shape != self.table.shape:
            raise InputError(
                f"the corpus counts {list(self.popularity.shape)} experts [L, E]; the run has {list(self.table.shape)}."
            )
        kernel = _kernel()
        self._look_ahead = kernel.look_ahead
        memory = kernel.new_memory(self.popularity, self.at_start, self._weights)
        self.memory, self.table, self.rows = tuple(memory), memory.table, memory.rows

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Look ahead from here. `counts` must be an array of its own, of 32 bits each."""
        where = forward.sequence, forward.block, situation(forward), forward.tokens
        self._look_ahead(self.memory, layer, *where, counts)


def _kernel() -> Any:
    # Importing numba takes longer than most commands, so only who decides by it waits for it.
    return import_module("tidesim.policies.foresight_kernel")


def _share_used(corpus: Workload, is_chosen: Mask) -> Floats:
    """The share of the chosen forwards [F] that use each expert, [L, E]."""
    num_used = np.zeros(corpus.counts.shape[1:], np.int64)
    for span, counts in windows(corpus.counts):
        num_used += np.count_nonzero(counts[is_chosen[span]], axis=0)
    return num_used / np.count_nonzero(is_chosen)


def uses_to_come(workload: Workload) -> Iterator[Floats]:
    """What `Foresight` predicts of each forward, [L, E]: uses in the next of its sequence, by how soon they are."""
    sequence, counts = workload.sequence.tolist(), workload.counts
    for forward in range(len(counts)):
        uses = np.zeros(counts.shape[1:])
        for ahead in range(1, min(HORIZON + 1, len(counts) - forward)):
            if sequence[forward + ahead] == sequence[forward]:
                uses += FADE ** (ahead - 1) * (counts[forward + ahead] > 0)
        yield uses
