"""Workloads: a trace reduced to what a simulator eats, how many tokens each expert got in each forward.

The same recording serves two kinds of engine. With a KV cache ("block") a forward routes the rows of its own block;
without one ("full", as the published TIDE code runs) it routes the whole prefix again. Under the block-causal mask
the hidden states of a finished block never change, so the rows of a prefix route exactly as they did in the prefill
forward and in the commit forwards of the finished blocks. Hence each kind of workload can be had from each kind
of recording, exactly: by adding those rows up, or by slicing them out.

Letters: F forwards, L MoE layers, E experts, K top-k, B block length, N routed rows, M segments, P prompt tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import numpy.typing as npt

from tidesim.batches import Batches
from tidesim.errors import TraceError
from tidesim.windows import forget, taken, zeros

Context = Literal["block", "full"]
Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[Any]  # integers [F, L, E]
ReadIds = Callable[[int, int], npt.NDArray[Any]]  # first row, past the last -> ids [n, layers, K]

WINDOW_ROWS = 1 << 13  # routed rows held in memory at once
_COLUMNS = ("sequence", "block", "step", "kind", "context_tokens")
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
        prompt_tokens = _most_tokens(self.tokens[is_start], self.context_tokens[is_start]) - self.block_length
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
            max_tokens=self.max_tokens if self.batch_size > 1 else _most_tokens(cut["tokens"], cut["context_tokens"]),
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


def _most_tokens(tokens: npt.NDArray[Any], context_tokens: npt.NDArray[Any]) -> int:
    return int((tokens + context_tokens).max(initial=0))


class Recording(Protocol):
    """What a workload is made from: the parts of an open `Trace` that this module reads."""

    path: Path
    sequences: npt.NDArray[np.void]
    forwards: npt.NDArray[np.void]
    offsets: Ints
    model_name: str
    num_layers: int
    num_experts: int
    top_k: int
    block_length: int
    kv_cache: bool
    origin: str
    fingerprint: str

    def expert_ids(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Experts of the routed rows start:stop, [stop - start, L, K]."""

    def lookahead_ids(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Experts of layer l + 1 that the input of layer l foretold for those rows, [stop - start, L - 1, K]."""

    def kept_counts(self, every: "Segments", chosen: Ints) -> Counts | None:
        """Counts [F, L, E] of `every` forward of an engine with a KV cache, those of the `chosen` sequences in order.

        None if they are not kept.
        """


def build_workload(
    recording: Recording, context: Context, sequences: Sequence[int] | None, has_lookahead: bool, is_mapped: bool
) -> Workload:
    """The workload of an engine with a KV cache ("block") or without one ("full"); see `Trace.workload`."""
    if context not in get_args(Context):
        raise ValueError(f"context(={context!r}) must be 'block' or 'full'.")
    chosen = _chosen(recording, sequences)
    try:
        segments, counts, tokens = _count(recording, context, chosen, is_mapped)
    except TraceError as error:
        raise TraceError(f"{recording.path}: {error}") from None
    if is_mapped:
        counts = counts.view()
        counts.flags.writeable = False
    lookahead = _count_lookahead(recording, context, chosen) if has_lookahead else None
    is_denoise = segments.kind == ForwardKind.DENOISE
    first_block = recording.sequences["prompt_tokens"] // recording.block_length
    return Workload(
        counts=counts if is_mapped else counts.astype(np.int32, copy=False),
        kind=segments.kind.astype(np.uint8),
        sequence=segments.sequence.astype(np.int32),
        block=segments.block.astype(np.int32),
        step=segments.step.astype(np.int32),
        is_first_block=segments.block == first_block[segments.sequence],
        tokens=tokens.astype(np.int32),
        context_tokens=segments.context_tokens.astype(np.int32),
        attended_pairs=tokens * (segments.context_tokens + tokens),
        logit_tokens=np.where(is_denoise, np.minimum(tokens, recording.block_length), 0).astype(np.int32),
        generated_tokens=int(recording.sequences["generated_tokens"][chosen].sum()),
        num_sequences=len(chosen),
        max_tokens=_most_tokens(tokens, segments.context_tokens),
        model_name=recording.model_name,
        num_experts=recording.num_experts,
        top_k=recording.top_k,
        block_length=recording.block_length,
        origin=recording.origin,
        context=context,
        fingerprint=recording.fingerprint,
        lookahead=lookahead,
    )


def _chosen(recording: Recording, sequences: Sequence[int] | None) -> Ints:
    num_sequences = len(recording.sequences)
    if sequences is None:
        return np.arange(num_sequences, dtype=np.int64)
    chosen = np.array(sorted(sequences), np.int64)
    if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < num_sequences:
        raise ValueError(f"sequences(={list(sequences)}) must be in 0..{num_sequences - 1}, as in {recording.path}.")
    if len(np.unique(chosen)) != len(chosen):
        raise ValueError(f"sequences(={list(sequences)}) must name each sequence once.")
    return chosen


def _count(recording: Recording, context: Context, chosen: Ints, is_narrow: bool) -> tuple["Segments", Counts, Ints]:
    """The forwards of a context, their counts [F, L, E], and the rows that each routes [F].

    Counts that are kept are mapped where the `chosen` sequences lie side by side, and are as narrow as they are there;
    those that a prefix is added to are so too if `is_narrow`.
    """
    segments = recorded_segments(recording, chosen)
    if context == "full" and not recording.kv_cache:
        rows = segments.stop - segments.start
        sizes = (recording.num_layers, recording.num_experts, _counts_dtype(recording, rows, is_narrow))
        return segments, count_segments(recording.expert_ids, segments, *sizes), rows
    segments = block_segments(recording, segments)
    counts = block_counts(recording, segments, chosen)
    if context == "block":
        return segments, counts, segments.stop - segments.start
    rows = segments.stop - segments.start + segments.block * recording.block_length
    dtype = _counts_dtype(recording, rows, is_narrow)
    denoise, counts = add_prefix(counts, segments, recording.block_length, dtype)
    return denoise, counts, rows[segments.kind == ForwardKind.DENOISE]


def _counts_dtype(recording: Recording, rows: Ints, is_narrow: bool) -> np.dtype[Any]:
    """What holds the counts of forwards with so many rows."""
    most = recording.top_k * int(rows.max(initial=0))  # a row may name an expert twice
    return np.min_scalar_type(most) if is_narrow else np.dtype(np.int32)


def block_counts(recording: Recording, segments: "Segments", chosen: Ints) -> Counts:
    """Counts [F, L, E] of the `segments` of the `chosen` sequences: those that are kept, or counted now."""
    everybody = np.arange(len(recording.sequences))
    try:
        every = block_segments(recording, recorded_segments(recording, everybody))
    except TraceError:
        return _counted(recording, recording.expert_ids, segments, recording.num_layers)  # others are at fault
    kept = recording.kept_counts(every, chosen)
    if kept is None:
        return _counted(recording, recording.expert_ids, segments, recording.num_layers)
    index = np.flatnonzero(np.isin(every.sequence, chosen))
    if not len(index) or index[-1] - index[0] + 1 == len(index):
        first = int(index[0]) if len(index) else 0
        return kept[first : first + len(index)]
    return taken(kept, index)


def _counted(recording: Recording, read: ReadIds, segments: "Segments", num_layers: int) -> Counts:
    return count_segments(read, segments, num_layers, recording.num_experts)


def _count_lookahead(recording: Recording, context: Context, chosen: Ints) -> npt.NDArray[np.int32]:
    """Tokens for which each expert was foretold, [F, L, E]; none in the first layer."""
    segments, num_layers = recorded_segments(recording, chosen), recording.num_layers - 1
    is_prefix_missing = context == "full" and recording.kv_cache
    if context == "block":
        segments = block_segments(recording, segments)
    counts = _counted(recording, recording.lookahead_ids, segments, num_layers)  # [F, L - 1, E]
    if is_prefix_missing:
        counts = add_prefix(counts, segments, recording.block_length)[1]
    return np.insert(counts, 0, 0, axis=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """The forwards of a workload as runs of recorded rows: forward i routed the rows start[i]:stop[i].

    Runs are disjoint and ascending. All arrays are int64 [M].
    """

    start: Ints
    stop: Ints
    sequence: Ints
    block: Ints
    step: Ints
    kind: Ints
    context_tokens: Ints

    def __len__(self) -> int:
        return len(self.start)

    def slice(self, start: int, stop: int) -> "Segments":
        """The forwards start:stop."""
        return Segments(**{name: getattr(self, name)[start:stop] for name in ("start", "stop", *_COLUMNS)})

    def of_kind(self, kind: ForwardKind) -> "Segments":
        """The forwards of one kind."""
        is_kind = self.kind == kind
        return Segments(**{name: getattr(self, name)[is_kind] for name in ("start", "stop", *_COLUMNS)})


def recorded_segments(recording: Recording, chosen: Ints) -> Segments:
    """The forwards of the `chosen` sequences as they were recorded."""
    forwards = recording.forwards
    index = np.flatnonzero(np.isin(forwards["sequence"], chosen))
    columns = {name: forwards[name][index].astype(np.int64) for name in _COLUMNS}
    return Segments(start=recording.offsets[index], stop=recording.offsets[index + 1], **columns)


def block_segments(recording: Recording, recorded: Segments) -> Segments:
    """The forwards that an engine with a KV cache runs, as they were recorded or cut out of a recording without one.

    Then the last B rows of a forward are its denoise rows. Block j's rows in the first forward of the next block are
    those of j's commit forward. The first floor(P / B) * B rows of a sequence's first forward are its prefill.

    Raise TraceError if a forward without a cache did not route exactly the blocks up to its own.
    """
    if recording.kv_cache:
        return recorded
    block_length = recording.block_length
    rows = recorded.stop - recorded.start
    bad = np.flatnonzero(rows != (recorded.block + 1) * block_length)
    if len(bad):
        i = int(bad[0])
        raise TraceError(
            f"sequence {recorded.sequence[i]}, block {recorded.block[i]}, step {recorded.step[i]}: a forward without "
            f"a KV cache must route (block + 1) * {block_length} rows, not {rows[i]}; use context='full'."
        )
    is_first = np.diff(recorded.sequence, prepend=-1) != 0
    is_next = (np.diff(recorded.block, prepend=-1) != 0) & ~is_first
    prompt_blocks = recording.sequences["prompt_tokens"][recorded.sequence] // block_length
    prefill = np.flatnonzero(is_first & (prompt_blocks > 0))
    commit = np.flatnonzero(is_next)
    done = recorded.block[commit - 1]
    everything = np.arange(len(rows))
    parts = (  # which forwards, then what they hold: kind, block, step, first row within the forward, rows
        (prefill, ForwardKind.PREFILL, prompt_blocks[prefill], 0, 0, prompt_blocks[prefill] * block_length),
        (commit, ForwardKind.COMMIT, done, recorded.step[commit - 1] + 1, done * block_length, block_length),
        (everything, ForwardKind.DENOISE, recorded.block, recorded.step, rows - block_length, block_length),
    )
    slices = [_slice(recorded, *part) for part in parts]
    names = ("start", "stop", *_COLUMNS)
    joined = {name: np.concatenate([getattr(piece, name) for piece in slices]) for name in names}
    order = np.argsort(joined["start"])
    return Segments(**{name: column[order] for name, column in joined.items()})


def _slice(
    recorded: Segments, index: Ints, kind: int, block: Ints, step: Ints | int, first: Ints | int, num_rows: Ints | int
) -> Segments:
    """Rows first:first + num_rows of the recorded forwards `index`, as forwards of an engine with a KV cache."""
    start = recorded.start[index] + first
    return Segments(
        start=start,
        stop=start + num_rows,
        sequence=recorded.sequence[index],
        block=block,
        step=np.broadcast_to(step, index.shape),
        kind=np.full(index.shape, kind),
        context_tokens=np.broadcast_to(first, index.shape),
    )


def count_segments(
    read: ReadIds, segments: Segments, num_layers: int, num_experts: int, dtype: npt.DTypeLike = np.int32
) -> Counts:
    """Tokens with each expert in each segment, [M, L, E], reading one window of rows [n, L, K] at a time.

    They must fit `dtype`.
    """
    L, E = num_layers, num_experts
    counts = zeros((len(segments), L, E), dtype)
    layer = np.arange(L)[:, None]  # [L, 1]
    for lo, hi, start, stop in _windows(segments):
        row = np.arange(start, stop)
        segment = np.searchsorted(segments.start[lo:hi], row, side="right") - 1  # [n]
        is_wanted = row < segments.stop[lo:hi][segment]
        ids = read(start, stop)[is_wanted].astype(np.int64)  # [n, L, K]
        key = (segment[is_wanted, None, None] * L + layer) * E + ids
        found = np.bincount(key.ravel(), minlength=(hi - lo) * L * E).reshape(hi - lo, L, E)
        np.add(counts[lo:hi], found, out=counts[lo:hi], casting="unsafe")
        forget(counts, is_shared=True)
    return counts


def _windows(segments: Segments) -> Iterator[tuple[int, int, int, int]]:
    """Windows of rows as (first segment, past the last, first row, past the last): few rows, all that are wanted."""
    for lo, hi in _groups(segments):
        stop = int(segments.stop[hi - 1])
        for start in range(int(segments.start[lo]), stop, WINDOW_ROWS):
            yield lo, hi, start, min(start + WINDOW_ROWS, stop)


def _groups(segments: Segments) -> Iterator[tuple[int, int]]:
    """Runs lo:hi of segments that lie within one window of rows, or of a single segment that is longer."""
    lo = 0
    while lo < len(segments):
        limit = int(segments.start[lo]) + WINDOW_ROWS
        hi = max(lo + 1, int(np.searchsorted(segments.stop, limit, side="right")))
        yield lo, hi
        lo = hi


def read_segments(read: ReadIds, segments: Segments) -> Iterator[npt.NDArray[Any]]:
    """The ids that `read` gives of one segment after another, [stop - start, L, K]."""
    for lo, hi in _groups(segments):
        first = int(segments.start[lo])
        rows = read(first, int(segments.stop[hi - 1]))
        for start, stop in zip(segments.start[lo:hi] - first, segments.stop[lo:hi] - first, strict=True):
            yield rows[start:stop]


def add_prefix(
    counts: Counts, segments: Segments, block_length: int, dtype: npt.DTypeLike = np.int32
) -> tuple[Segments, Counts]:
    """Denoise forwards of an engine without a KV cache, from the forwards of one that has it.

    A denoise forward of block b then routes the rows of the prefill, of the commits of all blocks before b, and its
    own. Returned are the denoise segments (no context any more) and their counts, which must fit `dtype`.

    Raise TraceError if the recorded prefill and commit forwards do not cover a prefix.
    """
    is_denoise = segments.kind == ForwardKind.DENOISE
    first = np.searchsorted(segments.sequence, segments.sequence)  # first forward of each forward's sequence
    cached = np.cumsum(np.where(is_denoise, 0, segments.stop - segments.start))
    cached -= np.append(0, cached)[first]
    want = segments.block * block_length
    bad = np.flatnonzero(is_denoise & (cached != want))
    if len(bad):
        i = int(bad[0])
        raise TraceError(
            f"sequence {segments.sequence[i]}, block {segments.block[i]}: prefill and commit forwards hold {cached[i]} "
            f"of {want[i]} earlier rows, so the full context cannot be rebuilt; use context='block'."
        )
    total = zeros((int(is_denoise.sum()), *counts.shape[1:]), dtype)
    prefix = np.zeros(counts.shape[1:], np.int32)
    done = 0
    for forward in range(len(segments)):
        if first[forward] == forward:  # a sequence begins
            forget(counts)
            forget(total, is_shared=True)
            prefix[:] = 0
        if is_denoise[forward]:
            np.add(prefix, counts[forward], out=total[done], casting="unsafe")
            done += 1
        else:
            prefix += counts[forward]
    denoise = segments.of_kind(ForwardKind.DENOISE)
    return replace(denoise, context_tokens=np.zeros_like(denoise.context_tokens)), total
