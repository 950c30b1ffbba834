"""Who says in advance what experts a layer will use, within a forward whose earlier layers have run.

A predictor is asked when the router of a layer is done, about a later layer of the same forward. It may be told the
routing that is run (`Oracle`, `Noisy`), be read from what the network foretold (`Recorded`), or match what it saw so
far against sequences or forwards that ran before. Letters: F forwards, L MoE layers, E experts per layer, S maps kept.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.policies.interface import Counts, ForwardInfo, Mask, Shape
from tidesim.policies.pieces import Floats, Piece, Score, Visits
from tidesim.workload import ForwardKind, Workload

_TINY = 1e-30  # in place of a norm of 0, so that nothing is like what holds nothing


class Predictor(Piece):
    """Foretells the routing of later layers."""

    def predict(self, forward: ForwardInfo, layer: int, target: int) -> Floats:
        """How many tokens, or how much else, each expert of `target` will get in this forward, [E]; 0: not expected.

        It is asked once the router of `layer`, which is before `target`, is done. Where it knows nothing, all are 0.
        """
        raise NotImplementedError

    def confidence(self, forward: ForwardInfo, layer: int) -> float:
        """How far what it says after `layer` is to be trusted, 0..1."""
        return 1.0


# --- from the routing itself ---


class Oracle(Predictor):
    """Knows the routing of the workload that is run.

    Raise InputError at the beginning of a run if the workload has another shape, and later if it has fewer forwards.
    """

    def __init__(self, workload: Workload) -> None:
        self._counts = workload.counts

    def begin(self, shape: Shape) -> None:
        """Check that the workload may be the one that is run."""
        _check_shape(self._counts, shape, "the predictor's workload")

    def predict(self, forward: ForwardInfo, layer: int, target: int) -> Floats:
        """The tokens that each expert gets."""
        return _row(self._counts, forward, target)


class Noisy(Predictor):
    """Knows the routing, but gets some of it wrong: a predictor whose accuracy is chosen.

    Each pair of a token and an expert of the target is right with probability `accuracy`. If not, another expert is
    named, drawn evenly from those that nobody in the target is routed to; if there are none, nobody is named. So the
    share of pairs that are right is `accuracy`, in expectation. What is drawn depends on the seed, the forward,
    the layer that asks and its target, but not on what was asked before.

    Raise InputError as `Oracle` does, and if `accuracy` is not in 0..1.
    """

    def __init__(self, workload: Workload, accuracy: float, seed: int = 0) -> None:
        if not 0 <= accuracy <= 1:
            raise InputError(f"accuracy(={accuracy}) must be >= 0 and <= 1.")
        self._oracle, self._accuracy, self._seed = Oracle(workload), accuracy, seed

    def begin(self, shape: Shape) -> None:
        """See `Oracle`."""
        self._oracle.begin(shape)

    def predict(self, forward: ForwardInfo, layer: int, target: int) -> Floats:
        """The tokens that each expert gets, some of them moved to others."""
        true = self._oracle.predict(forward, layer, target).astype(np.int64)
        rng = np.random.default_rng([self._seed, forward.index, layer, target])
        right = rng.binomial(true, self._accuracy)
        unused = np.flatnonzero(true == 0)
        if len(unused):
            num_wrong = int(true.sum() - right.sum())
            right[unused] = rng.multinomial(num_wrong, np.full(len(unused), 1 / len(unused)))
        return right.astype(np.float64)


class Recorded(Predictor):
    """What the network itself foretold when it ran, of each layer from the layer before it.

    Parameters
    ----------
    lookahead : int32 [F, L, E], tokens for which the router of layer l names each expert when it is fed what layer
        l - 1 was fed. Only the next layer is known of. Raise InputError as `Oracle` does.
    """

    def __init__(self, lookahead: npt.NDArray[np.int32]) -> None:
        self._lookahead = lookahead

    def begin(self, shape: Shape) -> None:
        """Check that the recording may be of the workload that is run."""
        _check_shape(self._lookahead, shape, "lookahead")

    def predict(self, forward: ForwardInfo, layer: int, target: int) -> Floats:
        """Tokens foretold of the next layer."""
        if target != layer + 1:
            return np.zeros(self._lookahead.shape[2])
        return _row(self._lookahead, forward, target)


class Previous(Predictor):
    """What the target got in the previous forward of the same block. It needs no data.

    Nothing is known in the first forward that denoises a block; a prefill belongs to no block.
    """

    def begin(self, shape: Shape) -> None:
        """Nothing was seen."""
        self._last = np.zeros((shape.num_layers, shape.num_experts))
        self._block: list[tuple[int, int] | None] = [None] * shape.num_layers

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Remember what this layer got."""
        self._last[layer] = counts
        is_prefill = forward.kind == ForwardKind.PREFILL
        self._block[layer] = None if is_prefill else (forward.sequence, forward.block)

    def predict(self, forward: ForwardInfo, layer: int, target: int) -> Floats:
        """The target's tokens of one forward ago."""
        if self._block[target] != (forward.sequence, forward.block):
            return np.zeros(self._last.shape[1])
        tokens: Floats = self._last[target].copy()
        return tokens


# --- from what ran before ---


class NearestSequence(Predictor):
    """Matches the sequence so far against whole sequences (MoE-Infinity): the nearest one says what comes.

    Of a sequence it keeps the tokens that each expert got, [L, E], summed over its forwards. The nearest stored one has
    the highest cosine with it, averaged over layers (0 for a layer without tokens); of equal ones the first is taken,
    as it is before anything is known. What it holds for layer x, seen from layer l, weighs 1 - (x - l) / (L + 1).

    Parameters
    ----------
    corpus : the sequences to be matched against.
    compares : "all" layers, those of this forward that have run included, or the "later" ones alone, which earlier
        forwards of the sequence filled.
    floor : added to what each expert got, so that everybody is expected a little.

    Raise InputError at the beginning of a run if the corpus has another shape.
    """

    def __init__(self, corpus: Workload, compares: Literal["all", "later"] = "all", floor: float = 0.0) -> None:
        sequences = np.unique(corpus.sequence)
        sums = [corpus.counts[corpus.sequence == sequence].sum(axis=0) for sequence in sequences]
        self._maps = np.array(sums, np.float64).reshape(len(sums), *corpus.counts.shape[1:])  # [S, L, E]
        self._compares, self._floor = compares, floor
        self._norms = np.linalg.norm(self._maps, axis=2)  # [S, L]

    def begin(self, shape: Shape) -> None:
        """No sequence has begun."""
        _check_shape(self._maps, shape, "corpus")
        self._sequence: int | None = None
        self._so_far = np.zeros((shape.num_layers, shape.num_experts))
        self._cosines = np.zeros(self._norms.shape)  # [S, L]

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Add the counts, and compare this layer again."""
        if forward.sequence != self._sequence:
            self._sequence = forward.sequence
            self._so_far[:] = 0
            self._cosines[:] = 0
        row = self._so_far[layer]
        row += counts
        norms = self._norms[:, layer] * np.linalg.norm(row)
        self._cosines[:, layer] = self._maps[:, layer] @ row / np.maximum(norms, _TINY)

    def predict(self, forward: ForwardInfo, layer: int, target: int) -> Floats:
        """The nearest sequence's tokens, fading with the distance; nobody's if there are no sequences."""
        num_maps, L, E = self._maps.shape
        if not num_maps:
            return np.zeros(E)
        first = 0 if self._compares == "all" else layer + 1
        nearest = int(np.argmax(self._cosines[:, first:].mean(axis=1)))
        tokens: Floats = (self._maps[nearest, target] + self._floor) * (1 - (target - layer) / (L + 1))
        return tokens


class NearestForward(Predictor):
    """Matches the layers of this forward that have run against forwards that ran before (FineMoE's trajectories).

    Of a forward it keeps what share of its tokens each expert got in each layer, [L, E]. The nearest stored one has the
    highest cosine with this one over all layers so far, taken as one long row; of equal ones the first is taken.
    The cosine is the confidence. The shares of a layer x, seen from layer l, are divided by x - l.

    Raise InputError at the beginning of a run if `corpus`, which holds the forwards, has another shape.
    """

    def __init__(self, corpus: Workload) -> None:
        self._maps = shares(corpus.counts)  # [S, L, E]
        self._norms = np.sqrt(np.cumsum(np.square(self._maps).sum(axis=2), axis=1))  # [S, L], of the layers up to each

    def begin(self, shape: Shape) -> None:
        """No forward has begun."""
        _check_shape(self._maps, shape, "corpus")
        self._products, self._square = np.zeros(len(self._maps)), 0.0
        self._nearest, self._cosine = 0, 0.0

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """One more layer of this forward to compare."""
        if layer == 0:
            self._products[:], self._square = 0, 0.0
        row = shares(counts)
        self._products += self._maps[:, layer] @ row
        self._square += float(row @ row)
        if len(self._maps):
            cosines = self._products / np.maximum(self._norms[:, layer] * np.sqrt(self._square), _TINY)
            self._nearest = int(np.argmax(cosines))
            self._cosine = min(1.0, float(cosines[self._nearest]))

    def predict(self, forward: ForwardInfo, layer: int, target: int) -> Floats:
        """The nearest forward's shares, fading with the distance; nobody's if there are no forwards."""
        num_maps, _, E = self._maps.shape
        tokens: Floats = self._maps[self._nearest, target] / (target - layer) if num_maps else np.zeros(E)
        return tokens

    def confidence(self, forward: ForwardInfo, layer: int) -> float:
        """How near the nearest forward is: its cosine."""
        return self._cosine


class ExpectedVisits(Score):
    """The share of its layer that an expert was last expected to get, times its visits since it came in.

    The share is what `predictor` said when it was asked about the layer, from `nearest` layers before it at most. Both
    start again at 0 when the expert is evicted.
    """

    is_own = True

    def __init__(self, predictor: Predictor, nearest: int) -> None:
        self._predictor, self._nearest = predictor, nearest
        self._visits = Visits(is_kept=False)

    @property
    def parts(self) -> tuple[Piece, ...]:
        """The predictor and the visits."""
        return self._predictor, self._visits

    def begin(self, shape: Shape) -> None:
        """Nobody is expected."""
        super().begin(shape)
        self._share = np.zeros_like(self.table)

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """Take what is expected of the later layers now."""
        for target in range(layer + self._nearest, len(self.table)):
            self._share[target] = shares(self._predictor.predict(forward, layer, target))
        np.multiply(self._share, self._visits.table, out=self.table)

    def promoted(self, layer: int, expert: int) -> None:
        """One more visit."""
        self.table[layer, expert] = self._share[layer, expert] * self._visits.table[layer, expert]

    def evicted(self, layer: int, expert: int) -> None:
        """Start again."""
        self._share[layer, expert] = self.table[layer, expert] = 0


def shares(tokens: npt.NDArray[np.int32] | Floats) -> Floats:
    """What part of its layer's tokens each expert gets, [..., E] -> [..., E]; 0 where a layer has none."""
    totals = tokens.sum(axis=-1, keepdims=True)
    parts: Floats = tokens / np.maximum(totals, _TINY)
    return parts


def _row(table: npt.NDArray[np.int32], forward: ForwardInfo, layer: int) -> Floats:
    """[F, L, E] -> [E], as floats."""
    if forward.index >= len(table):
        raise InputError(
            f"the predictor knows of {len(table)} forwards, not of forward {forward.index}; make it for the workload "
            "that is run."
        )
    row: Floats = table[forward.index, layer].astype(np.float64)
    return row


def _check_shape(table: npt.NDArray[np.int32] | Floats, shape: Shape, name: str) -> None:
    wanted = (shape.num_layers, shape.num_experts)
    if table.shape[1:] != wanted:
        raise InputError(
            f"{name} has [L, E] = {list(table.shape[1:])}, but the network that is run has {list(wanted)}."
        )
