"""From recorded rows to the counts of a workload.

The same recording serves two kinds of engine. With a KV cache ("block") a forward routes the rows of its own block;
without one ("full", as the published TIDE code runs) it routes the whole prefix again. Under the block-causal mask
the hidden states of a finished block never change, so the rows of a prefix route exactly as they did in the prefill
forward and in the commit forwards of the finished blocks. Hence each kind of workload can be had from each kind
of recording, exactly: by adding those rows up, or by slicing them out.

Letters: F forwards, L MoE layers, E experts, K top-k, B block length, N routed rows, M segments, P prompt tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import numpy.typing as npt

from tidesim.errors import TraceError
from tidesim.windows import forget, taken, zeros
from tidesim.workload import Context, Counts, ForwardKind, Workload, most_tokens

Ints = npt.NDArray[np.int64]
ReadIds = Callable[[int, int], npt.NDArray[Any]]  # first row, past the last -> ids [n, layers, K]

WINDOW_ROWS = 1 << 13  # routed rows held in memory at once
_COLUMNS = ("sequence", "block", "step", "kind", "context_tokens")


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
        max_tokens=most_tokens(tokens, segments.context_tokens),
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
