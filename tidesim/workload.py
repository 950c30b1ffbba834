"""Workloads: a trace reduced to what a simulator eats, how many tokens each expert got in each forward.

Letters: F forwards, L MoE layers, E experts, K top-k, B block length.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from tidesim.batches import Batches

Context = Literal["block", "full"]
Counts = npt.NDArray[Any]  # integers [F, L, E]
# Columns of a workload: in a batch, of one of its sequences, or added up over all.
_OF_ONE = ("kind", "sequence", "block", "step", "is_first_block")
_OF_ALL = ("tokens", "context_tokens", "attended_pairs", "logit_tokens")


class ForwardKind(IntEnum):
    """What a forward is for: fill the cache with prompt blocks, denoise a block, or cache a finished block."""

    PREFILL = 0
    DENOISE = 1
    COMMIT = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """How many tokens each expert got in each forward; no token, no weight, no time.

    Parameters
    ----------
    counts : int32 [F, L, E], tokens routed to each expert; mapped ones are unsigned and narrower, see `Trace.workload`.
    kind : uint8 [F], a `ForwardKind`.
    sequence, block, step : int32 [F]; sequences keep their number in the trace.
    is_first_block : bool [F], whether the forward works on the first decoded block of its sequence.
    tokens : int32 [F], rows that the forward routes.
    context_tokens : int32 [F], cached tokens that it attends to besides.
    attended_pairs : int64 [F], pairs of a row and a token that it attends to: tokens * (context_tokens + tokens), of a
        batch the sum of that over its sequences, as no sequence attends to another one.
    logit_tokens : int32 [F], rows that go through lm_head: at most B of a sequence that denoises, else 0.
    generated_tokens : tokens generated, over all sequences.
    max_tokens : most tokens that the KV cache holds at once: those that one forward attends to, its rows and its
        context. A batch holds the caches of all its sequences until the last of them has ended.
    context : "block" (KV cache: a forward routes its own block) or "full" (no cache: it routes the whole prefix).
    fingerprint : that of the trace.
    lookahead : int32 [F, L, E] or None, tokens for which the router of layer l names each expert when it is fed the
        input of layer l - 1; all zero where no layer comes before, as nothing foretells the first one.
    batch_size : most sequences that run together, see `batched`.
    """

    counts: npt.NDArray[np.int32]
    kind: npt.NDArray[np.uint8]
    sequence: npt.NDArray[np.int32]
    block: npt.NDArray[np.int32]
    step: npt.NDArray[np.int32]
    is_first_block: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int32]
    context_tokens: npt.NDArray[np.int32]
    attended_pairs: npt.NDArray[np.int64]
    logit_tokens: npt.NDArray[np.int32]
    generated_tokens: int
    num_sequences: int
    max_tokens: int
    model_name: str
    num_experts: int
    top_k: int
    block_length: int
    origin: str
    context: Context
    fingerprint: str
    lookahead: npt.NDArray[np.int32] | None = None
    batch_size: int = 1

    @property
    def num_forwards(self) -> int:
        """F, the number of forwards."""
        return len(self.counts)

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return int(self.counts.shape[1])

    def first(self, num_forwards: int | None) -> Self:
        """The first so many forwards, or all of them; `generated_tokens` shrinks in proportion to denoise forwards.

        Raise ValueError if `num_forwards` < 1.
        """
        if num_forwards is None or num_forwards >= self.num_forwards:
            return self
        if num_forwards < 1:
            raise ValueError(f"num_forwards(={num_forwards}) must be >= 1.")
        return self._only(slice(0, num_forwards))

    def answering(self, gen_length: int | None) -> Self:
        """The same sequences with answers of at most `gen_length` tokens, in whole blocks; None changes nothing.

        What comes later is left out, and `generated_tokens` shrinks in proportion to denoise forwards. `max_tokens` is
        that of the longest prompt with such an answer, also where the answers here are shorter. Raise ValueError if
        `gen_length` < 1, or if this workload is batched already.
        """
        if gen_length is None:
            return self
        if gen_length < 1:
            raise ValueError(f"gen_length(={gen_length}) must be >= 1.")
        if self.batch_size > 1:
            raise ValueError("the workload is batched already; cut the one that it came from.")
        denoise = np.flatnonzero(self.kind == ForwardKind.DENOISE)
        first_block = np.zeros(int(self.sequence.max(initial=0)) + 1, np.int64)
        # Each sequence's first denoising forward is written last.
        first_block[self.sequence[denoise[::-1]]] = self.block[denoise[::-1]]
        num_blocks = -(-gen_length // self.block_length)
        is_kept = self.block < first_block[self.sequence] + num_blocks
        is_start = np.isin(np.arange(self.num_forwards), denoise) & (self.block == first_block[self.sequence])
        prompt_tokens = most_tokens(self.tokens[is_start], self.context_tokens[is_start]) - self.block_length
        return replace(self._only(is_kept), max_tokens=prompt_tokens + num_blocks * self.block_length)

    def _only(self, part: slice | npt.NDArray[np.bool_]) -> Self:
        """Some of the forwards."""
        cut = {name: getattr(self, name)[part] for name in ("counts", *_OF_ONE, *_OF_ALL)}
        is_denoise = self.kind == ForwardKind.DENOISE
        share = is_denoise[part].sum() / max(1, is_denoise.sum())
        return replace(
            self,
            **cut,
            lookahead=None if self.lookahead is None else self.lookahead[part],
            generated_tokens=round(self.generated_tokens * share),
            num_sequences=min(self.num_sequences, self.batch_size * len(np.unique(cut["sequence"]))),
            max_tokens=self.max_tokens if self.batch_size > 1 else most_tokens(cut["tokens"], cut["context_tokens"]),
        )

    def batched(self, batch_size: int) -> Self:
        """The same sequences run `batch_size` at a time, in their order; the last batch may have fewer.

        The sequences of a batch begin together and run in lock step: its forward i holds the rows of the i-th forward
        of each of its sequences, so every weight is read once for all of them, and an expert that several ask for has
        the rows of all. Rows are not padded. As sequences accept tokens at their own pace, one may be caching a
        finished block, or its prompt, while another denoises: such forwards run as one, too. Who has ended takes no
        part any more, and nobody new joins until the whole batch has ended. Each sequence attends to itself alone.

        Counts, look-ahead, tokens, context, attended pairs and rows for lm_head add up. To a policy, a batch is what a
        sequence is: `sequence` is the batch's first, all the time. `block`, `step` and `is_first_block` are those of
        its first sequence that still runs, and `kind` is DENOISE if any sequence denoises, else that of the same one.
        So a policy that refreshes every so many steps keeps the time of one sequence: others may begin their blocks in
        between, and the forward in which that sequence caches a block counts as one more step of it.

        Raise ValueError if `batch_size` < 1, or if this workload is batched already.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size(={batch_size}) must be >= 1.")
        if self.batch_size > 1:
            raise ValueError(f"the workload is batched already, by {self.batch_size}; batch the one that it came from.")
        batch_size = min(batch_size, len(np.unique(self.sequence)))
        if batch_size <= 1:
            return self
        batches = Batches.of(self.sequence, batch_size)
        columns: dict[str, Any] = {name: getattr(self, name)[batches.leader] for name in _OF_ONE}
        columns["kind"][batches.any(self.kind == ForwardKind.DENOISE)] = ForwardKind.DENOISE
        columns["sequence"] = self.sequence[batches.first]
        columns |= {name: batches.sums(getattr(self, name)) for name in ("counts", *_OF_ALL)}
        return replace(
            self,
            **columns,
            lookahead=None if self.lookahead is None else batches.sums(self.lookahead),
            max_tokens=batches.sum_of_peaks(self.tokens.astype(np.int64) + self.context_tokens),
            batch_size=batch_size,
        )

    def tiled(self, num_layers: int) -> Self:
        """The same workload for a network of `num_layers` MoE layers: its layer i is layer i % L of this one.

        So nothing foretells a layer that repeats the first. Raise ValueError if `num_layers` < 1.
        """
        if num_layers < 1:
            raise ValueError(f"num_layers(={num_layers}) must be >= 1.")
        if num_layers == self.num_layers:
            return self
        layers = np.arange(num_layers) % self.num_layers
        lookahead = None if self.lookahead is None else self.lookahead[:, layers]
        return replace(self, counts=self.counts[:, layers], lookahead=lookahead)


def most_tokens(tokens: npt.NDArray[Any], context_tokens: npt.NDArray[Any]) -> int:
    """The most tokens that one forward attends to."""
    return int((tokens + context_tokens).max(initial=0))
