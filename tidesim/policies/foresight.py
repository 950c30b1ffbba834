"""How soon, and how often, an expert will be used again: a linear prediction from what was seen, fitted on a corpus.

Within a block most positions keep most of their experts from one forward to the next, so who was used lately will be
used again. Where a block begins that is worth little: all its positions are masked, and who is used then is much the
same in every block. What is known of an expert is put in numbers, and how much each of them says is learnt from the
sequences of a corpus, apart for prefill, for commit and for early and late denoising steps: least squares, with a
little weight decay (ridge regression; Hoerl and Kennard, Technometrics 1970).

Letters: L MoE layers, E experts per layer, N features.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.policies.interface import Counts, ForwardInfo, Mask, Shape, forwards_of
from tidesim.policies.pieces import Score
from tidesim.windows import windows
from tidesim.workload import ForwardKind, Workload

Floats = npt.NDArray[np.float64]
Layers = int | slice

HORIZON = 4  # forwards that are looked ahead
FADE = 0.7  # the weight of a forward over that of the one before it
_ALWAYS = sum(FADE**ahead for ahead in range(HORIZON))  # the worth of who is used in all of them
_RIDGE = 1e-6  # weight decay, per row that is fitted
_LAST_STEPS = (0, 1, 3, 7)  # denoising steps that end a situation; later ones are one more
_NUM_SITUATIONS = 2 + len(_LAST_STEPS) + 1
_NUM_FEATURES = 11


class Memory:
    """What is known of every expert of every layer, and the features [N] made of it.

    Features: 1; whether it is used now; how much, as log(1 + its share of the rows, of 32); how often lately, fading to
    1/2, 4/5 and 19/20 with each forward, the last in this sequence alone; how much lately, fading to 1/2; and the
    shares that used it, of this block's forwards, of this sequence's, of the corpus' and of the first steps of its
    blocks.

    Parameters
    ----------
    popularity, at_start : [L, E], those two shares of the corpus.
    """

    def __init__(self, popularity: Floats, at_start: Floats) -> None:
        self._known = popularity, at_start
        self._often = np.zeros((3, *popularity.shape))
        self._much, self._in_block, self._in_sequence = (np.zeros_like(popularity) for _ in range(3))
        self._since = [(-1, -1)] * len(popularity)
        self._num_seen = np.zeros((2, len(popularity), 1))

    def see(self, forward: ForwardInfo, layers: Layers, counts: npt.NDArray[np.int32]) -> Floats:
        """Take note of the counts of a layer [E], or of all layers [L, E]; the features [..., E, N] that follow."""
        self._begin(forward, layers)
        used = (counts > 0).astype(np.float64)
        much = np.log1p(counts * (32 / max(forward.tokens, 1)))
        for often, keep in zip(self._often, (0.5, 0.8, 0.95), strict=True):
            often[layers] = keep * often[layers] + (1 - keep) * used
        self._much[layers] = (self._much[layers] + much) / 2
        self._in_block[layers] += used
        self._in_sequence[layers] += used
        self._num_seen[:, layers] += 1
        in_block, in_sequence = self._num_seen[0, layers], self._num_seen[1, layers]
        return np.stack(
            [
                np.ones_like(used),
                used,
                much,
                *(often[layers] for often in self._often),
                self._much[layers],
                self._in_block[layers] / in_block,
                self._in_sequence[layers] / in_sequence,
                *(known[layers] for known in self._known),
            ],
            axis=-1,
        )

    def _begin(self, forward: ForwardInfo, layers: Layers) -> None:
        """Forget the block if another one begins, and the sequence likewise."""
        first = layers if isinstance(layers, int) else 0
        sequence, block = self._since[first]
        if (sequence, block) != (forward.sequence, forward.block):
            self._in_block[layers], self._num_seen[0, layers] = 0, 0
        if sequence != forward.sequence:
            self._in_sequence[layers], self._often[2, layers], self._num_seen[1, layers] = 0, 0, 0
        self._since[first] = forward.sequence, forward.block


def situation(forward: ForwardInfo) -> int:
    """Which of the predictions holds after this forward."""
    if forward.kind != ForwardKind.DENOISE:
        return int(forward.kind == ForwardKind.COMMIT)
    return 2 + int(np.searchsorted(_LAST_STEPS, forward.step))


class Foresight(Score):
    """The forwards, of the next few of a sequence, that are expected to use an expert, each weighed by how soon it is.

    Parameters
    ----------
    corpus : sequences to learn from. Raise InputError if there are none.

    Attributes
    ----------
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
        memory, forwards = Memory(self.popularity, self.at_start), forwards_of(corpus)
        wanted = uses_to_come(corpus)
        squares = np.zeros((_NUM_SITUATIONS, _NUM_FEATURES, _NUM_FEATURES))
        products, num_rows = np.zeros((_NUM_SITUATIONS, _NUM_FEATURES)), np.zeros(_NUM_SITUATIONS)
        for forward, counts, uses in zip(forwards, corpus.counts, wanted, strict=True):
            # Mapped counts are narrower, and are taken as they would be in memory.
            features = memory.see(forward, slice(None), counts.astype(np.int32, copy=False))
            features = features.reshape(-1, _NUM_FEATURES)  # [L * E, N]
            which = situation(forward)
            squares[which] += features.T @ features
            products[which] += features.T @ uses.ravel()
            num_rows[which] += len(features)
        decay = _RIDGE * np.maximum(num_rows, 1)[:, None, None] * np.eye(_NUM_FEATURES)
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
        self._memory = Memory(self.popularity, self.at_start)
        self.rows = np.ones(self.table.shape, np.int64)
        self.table[:] = self.at_start

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Look ahead from here."""
        features = self._memory.see(forward, layer, counts)
        self.rows[layer] = np.where(counts > 0, counts, self.rows[layer])
        self.table[layer] = np.clip(features @ self._weights[situation(forward)], 0.0, _ALWAYS)


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
