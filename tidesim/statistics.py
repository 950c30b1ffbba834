"""What the routing of a trace looks like, in the quantities that are published for real diffusion LLMs.

Two regimes are kept apart. Block-only: with a KV cache a forward routes the tokens of its own block. Full: without
one, as the published TIDE code runs, it routes the unchanged prefix again, so hit counts look far more stable. All
quantities are block-only and taken over denoise forwards, unless their name says otherwise.

Letters: F denoise forwards, L MoE layers, E experts, K top-k, n rows of a forward.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tidesim.counting import (
    Segments,
    add_prefix,
    block_segments,
    count_segments,
    read_segments,
    recorded_segments,
)
from tidesim.errors import TraceError
from tidesim.trace import Trace
from tidesim.workload import ForwardKind

MAX_LAG = 8
_HOT_SHARE = 1 / 8

Floats = npt.NDArray[np.float64]
Ints32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStatistics:
    """Statistics of one trace. None, or an empty tuple, where the trace is too short to say.

    Parameters
    ----------
    num_forwards : denoise forwards, F; prefill and commit forwards are counted nowhere below but in `popularity` and
        `used_share`.
    distinct_experts, distinct_experts_sd : experts that get at least one token, per layer and forward: mean, and
        standard deviation over forwards (its mean over layers). Measured for LLaDA2.0-mini by dMoE (arXiv 2605.30876).
    distinct_experts_uniform : the same if tokens drew uniformly, E (1 - (1 - K / E)^n).
    kept_share : of the K experts of a position in a layer, the share that it has in the next forward of its block too.
    kept_share_undisturbed : the same for positions not accepted in between. A trace does not say which ones were, so
        this is the intercept of a straight line through the forwards' kept shares against their accepted shares.
    shared_experts : experts that two positions of a block have in common in a layer, over all pairs and forwards.
    shared_experts_masked : the same, over the forwards in which every position of the block is masked.
    cosine_block, cosine_full : cosine between the hit counts of a layer in two denoise forwards of a sequence that lie
        1, 2, ... 8 apart, with and without a KV cache. `cosine_full` is empty if the trace cannot tell.
    tokens_per_forward : generated tokens per denoise forward.
    forwards_per_block_mean, _min, _max : denoise forwards of a block, over blocks that begin with every token masked.
    accepted_per_step : tokens accepted in a denoise forward.
    single_step_share : share of the denoise forwards that accept exactly one token.
    popularity : share of all routed tokens that go to the most used eighth of a layer's experts.
    used_share : share of a layer's experts that got a token at least once.
    lookahead_share : of the K experts of a position in a layer, the share that the layer's own router named when it was
        fed the input of the layer before. By layer, the first has none; by kind of forward, also prefill and commit
        forwards are told. None and empty if the trace keeps no look-ahead.
    lookahead_share_random : the same if K experts were named at random, K / E.
    """

    model_name: str
    origin: str
    fingerprint: str
    num_sequences: int
    num_forwards: int
    distinct_experts: float
    distinct_experts_sd: float
    distinct_experts_uniform: float
    distinct_experts_by_layer: tuple[float, ...]
    distinct_experts_sd_by_layer: tuple[float, ...]
    kept_share: float | None
    kept_share_undisturbed: float | None
    kept_share_by_layer: tuple[float, ...]
    shared_experts: float | None
    shared_experts_masked: float | None
    cosine_block: tuple[float, ...]
    cosine_full: tuple[float, ...]
    tokens_per_forward: float
    forwards_per_block_mean: float | None
    forwards_per_block_min: int | None
    forwards_per_block_max: int | None
    accepted_per_step: float
    single_step_share: float
    popularity: float
    popularity_by_layer: tuple[float, ...]
    used_share: float
    used_share_by_layer: tuple[float, ...]
    lookahead_share: float | None
    lookahead_share_random: float | None
    lookahead_share_by_layer: tuple[float | None, ...]
    lookahead_share_by_kind: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, all of them values that JSON knows."""
        return asdict(self)

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(self.to_dict(), allow_nan=False)


def trace_statistics(trace: Trace) -> TraceStatistics:
    """The statistics of a trace. Raise TraceError if it holds no denoise forward.

    One sequence is in memory at a time, and of all others a number for each forward and layer.
    """
    rows = trace.forwards[trace.forwards["kind"] == ForwardKind.DENOISE]
    if not len(rows):
        raise TraceError(f"{trace.path}: holds no denoise forward, so there is nothing to describe; record more.")
    segments = _segments(trace)
    tokens = (segments.stop - segments.start)[segments.kind == ForwardKind.DENOISE]
    counted = _count(trace, segments)
    per_block = _forwards_per_block(rows, trace.block_length)
    popularity, used = _popularity(counted.total), (counted.total > 0).mean(axis=1)
    return TraceStatistics(
        model_name=trace.model_name,
        origin=trace.origin,
        fingerprint=trace.fingerprint,
        num_sequences=len(trace.sequences),
        num_forwards=len(tokens),
        distinct_experts=float(counted.distinct.mean()),
        distinct_experts_sd=float(counted.distinct.std(axis=0).mean()),
        distinct_experts_uniform=_uniform(trace, tokens),
        distinct_experts_by_layer=_floats(counted.distinct.mean(axis=0)),
        distinct_experts_sd_by_layer=_floats(counted.distinct.std(axis=0)),
        **_kept(trace, segments, rows),
        **_shared(counted.shared, tokens, rows["masked_tokens"]),
        cosine_block=counted.cosine_block,
        cosine_full=counted.cosine_full,
        tokens_per_forward=int(trace.sequences["generated_tokens"].sum()) / len(tokens),
        forwards_per_block_mean=float(per_block.mean()) if len(per_block) else None,
        forwards_per_block_min=int(per_block.min()) if len(per_block) else None,
        forwards_per_block_max=int(per_block.max()) if len(per_block) else None,
        accepted_per_step=float(rows["accepted_tokens"].mean()),
        single_step_share=float((rows["accepted_tokens"] == 1).mean()),
        popularity=float(popularity.mean()),
        popularity_by_layer=_floats(popularity),
        used_share=float(used.mean()),
        used_share_by_layer=_floats(used),
        **_lookahead(trace, segments),
    )


# --- what is counted ---


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Counted:
    """What the counts of all forwards come to.

    Parameters
    ----------
    total : int64 [L, E], over all forwards, of every kind.
    distinct : int64 [F, L], experts with a token.
    shared : float64 [F, L], ordered pairs of positions that have an expert in common, over all experts.
    cosine_block, cosine_full : see `TraceStatistics`.
    """

    total: npt.NDArray[np.int64]
    distinct: npt.NDArray[np.int64]
    shared: Floats
    cosine_block: tuple[float, ...]
    cosine_full: tuple[float, ...]


def _segments(trace: Trace) -> Segments:
    """Every forward of an engine with a KV cache."""
    try:
        return block_segments(trace, recorded_segments(trace, np.arange(len(trace.sequences))))
    except TraceError as error:
        raise TraceError(f"{trace.path}: {error}") from None


def _count(trace: Trace, segments: Segments) -> _Counted:
    """Everything that counts say, from one sequence after another."""
    total = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    distinct, shared = [], []
    block, full = _Cosines(), _Cosines()
    for part, counts in _by_sequence(trace, segments):
        total += counts.sum(axis=0, dtype=np.int64)
        denoise = counts[part.kind == ForwardKind.DENOISE]
        distinct.append(np.count_nonzero(denoise, axis=2))
        # An expert with c of a forward's n tokens is shared by c (c - 1) of the n (n - 1) ordered pairs of positions.
        shared.append(np.einsum("fle,fle->fl", denoise, denoise - 1.0))
        block.add(denoise)
        full.add_full(trace, part, counts)
    return _Counted(
        total=total,
        distinct=np.concatenate(distinct),
        shared=np.concatenate(shared),
        cosine_block=block.means(),
        cosine_full=full.means(),
    )


def _by_sequence(trace: Trace, segments: Segments) -> Iterator[tuple[Segments, Ints32]]:
    """The forwards of one sequence after another, and their counts [f, L, E]: those that are kept, or counted now."""
    bounds = np.searchsorted(segments.sequence, np.arange(len(trace.sequences) + 1)).tolist()
    is_kept = trace.kept_counts(segments, np.arange(0)) is not None
    for number, (start, stop) in enumerate(pairwise(bounds)):
        part = segments.slice(start, stop)
        # Mapped anew each time: what was read of a map stays in memory until the map goes.
        kept = trace.kept_counts(segments, np.array([number])) if is_kept else None
        if kept is None:
            yield part, count_segments(trace.expert_ids, part, trace.num_layers, trace.num_experts)
        else:
            yield part, kept[start:stop].astype(np.int32)


class _Cosines:
    """Mean cosine over layers and pairs of forwards of one sequence that lie 1, 2, ... apart, as far as there are."""

    def __init__(self) -> None:
        self._sums, self._pairs = np.zeros(MAX_LAG), np.zeros(MAX_LAG, np.int64)
        self._is_known = True

    def add(self, counts: npt.NDArray[np.int32]) -> None:
        """The forwards of one sequence, [f, L, E]."""
        wide = counts.astype(np.float64)
        norms = np.sqrt(np.einsum("fle,fle->fl", wide, wide))  # [f, L]
        for lag in range(1, min(MAX_LAG, len(counts) - 1) + 1):
            dots = np.einsum("fle,fle->fl", wide[lag:], wide[:-lag])
            self._sums[lag - 1] += (dots / (norms[lag:] * norms[:-lag])).sum()
            self._pairs[lag - 1] += dots.size

    def add_full(self, trace: Trace, part: Segments, counts: npt.NDArray[np.int32]) -> None:
        """The same without a KV cache, from the forwards of one sequence with one.

        An imported trace may lack the commit forwards that this is rebuilt from. Then nothing is known.
        """
        if not self._is_known:
            return
        if not trace.kv_cache:
            recorded = recorded_segments(trace, part.sequence[:1])
            self.add(count_segments(trace.expert_ids, recorded, trace.num_layers, trace.num_experts))
            return
        try:
            self.add(add_prefix(counts, part, trace.block_length)[1])
        except TraceError:
            self._is_known = False

    def means(self) -> tuple[float, ...]:
        """By lag; up to the first without a pair."""
        num_lags = int(np.argmin(np.append(self._pairs, 0))) if self._is_known else 0
        return _floats(self._sums[:num_lags] / self._pairs[:num_lags])


# --- figures ---


def _floats(values: npt.NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _uniform(trace: Trace, tokens: npt.NDArray[np.int64]) -> float:
    E, K = trace.num_experts, trace.top_k
    return float((E * (1 - (1 - K / E) ** tokens)).mean())


def _forwards_per_block(rows: npt.NDArray[np.void], block_length: int) -> npt.NDArray[np.int64]:
    """Denoise forwards of each block that begins with all its tokens masked."""
    is_new = (np.diff(rows["sequence"], prepend=-1) != 0) | (np.diff(rows["block"], prepend=-1) != 0)
    first = np.flatnonzero(is_new)
    is_whole = rows["masked_tokens"][first] == block_length
    return np.asarray(np.diff(first, append=len(rows))[is_whole], np.int64)


def _popularity(total: npt.NDArray[np.int64]) -> Floats:
    """Share of a layer's routed tokens that go to its most used experts, [L], of `total` [L, E]."""
    ascending = np.sort(total, axis=1)
    num_hot = max(1, round(total.shape[1] * _HOT_SHARE))
    return np.asarray(ascending[:, -num_hot:].sum(axis=1) / ascending.sum(axis=1))


def _kept(trace: Trace, segments: Segments, rows: npt.NDArray[np.void]) -> dict[str, Any]:
    """Shares of experts kept from one denoise forward of a block to the next."""
    kept = _kept_by_forward(trace, segments.of_kind(ForwardKind.DENOISE))
    if not kept:
        return {"kept_share": None, "kept_share_undisturbed": None, "kept_share_by_layer": ()}
    shares = np.array(list(kept.values()))  # [pairs, L]
    accepted = rows["accepted_tokens"][list(kept)] / trace.block_length
    line = np.polyfit(accepted, shares.mean(axis=1), 1) if len(np.unique(accepted)) > 1 else None
    return {
        "kept_share": float(shares.mean()),
        "kept_share_undisturbed": None if line is None else float(line[1]),
        "kept_share_by_layer": _floats(shares.mean(axis=0)),
    }


def _kept_by_forward(trace: Trace, segments: Segments) -> dict[int, Floats]:
    """For each denoise forward with a successor in its block, the share that the successor keeps, by layer [L]."""
    kept = {}
    blocks = list(zip(segments.sequence, segments.block, segments.stop - segments.start, strict=True))
    ids = np.zeros((0, 0, 0), np.uint8)
    for forward, rows in enumerate(read_segments(trace.expert_ids, segments)):
        last, ids = ids, rows  # [n, L, K]
        if forward and blocks[forward] == blocks[forward - 1]:
            kept[forward - 1] = _is_among(last, ids).mean(axis=(0, 2))
    return kept


def _is_among(ids: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each of `ids` [..., K] is one of the `others` [..., K] of the same position and layer."""
    is_found = np.zeros(ids.shape, np.bool_)
    for slot in range(others.shape[-1]):  # some times faster than all at once, as K is small
        is_found |= ids == others[..., slot, None]
    return is_found


def _lookahead(trace: Trace, segments: Segments) -> dict[str, Any]:
    """Shares of experts that the layer before foretold, over the rows of each kind of forward."""
    names = ("lookahead_share", "lookahead_share_random")
    if not trace.has_lookahead:
        return {**dict.fromkeys(names), "lookahead_share_by_layer": (), "lookahead_share_by_kind": {}}
    shares = {}
    for kind in sorted(set(segments.kind.tolist())):
        rows = segments.of_kind(ForwardKind(kind))
        num_hits, num_rows = np.zeros(trace.num_layers - 1), 0
        pairs = zip(read_segments(trace.expert_ids, rows), read_segments(trace.lookahead_ids, rows), strict=True)
        for ids, foretold in pairs:  # [n, L, K], [n, L - 1, K]
            num_hits += _is_among(ids[:, 1:], foretold).sum(axis=(0, 2))
            num_rows += len(ids)
        shares[ForwardKind(kind)] = num_hits / (num_rows * trace.top_k)  # [L - 1]
    denoise = shares[ForwardKind.DENOISE]
    return {
        "lookahead_share": float(denoise.mean()),
        "lookahead_share_random": trace.top_k / trace.num_experts,
        "lookahead_share_by_layer": (None, *_floats(denoise)),
        "lookahead_share_by_kind": {kind.name.lower(): float(share.mean()) for kind, share in shares.items()},
    }


def _shared(pairs: Floats, tokens: npt.NDArray[np.int64], masked: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Experts that two positions have in common: `pairs` [F, L] of them share one, out of those of `tokens` [F]."""
    shared = pairs / np.maximum(tokens * (tokens - 1.0), 1)[:, None]  # [F, L]
    is_pair, is_masked = tokens > 1, (tokens > 1) & (masked == tokens)
    return {
        "shared_experts": float(shared[is_pair].mean()) if is_pair.any() else None,
        "shared_experts_masked": float(shared[is_masked].mean()) if is_masked.any() else None,
    }
