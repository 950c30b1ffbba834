"""Statistics of routing, against counting by hand and against slow loops that say what they mean."""

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import COMMIT, DENOISE, PREFILL, B, E, K, L, decode, writer

from tidesim.errors import TraceError
from tidesim.statistics import MAX_LAG, TraceStatistics, trace_statistics
from tidesim.trace import ForwardRouting, SequenceRouting, Trace


def of(path: Path) -> TraceStatistics:
    with Trace.open(path) as trace:
        return trace_statistics(trace)


def denoise(block: int, step: int, masked: int, accepted: int) -> ForwardRouting:
    return ForwardRouting(
        block=block,
        step=step,
        kind=DENOISE,
        context_tokens=block * B,
        routed_tokens=B,
        masked_tokens=masked,
        accepted_tokens=accepted,
    )


def one_sequence(forwards: list[ForwardRouting], ids: list[Any]) -> SequenceRouting:
    """A sequence without prompt, in which both layers route alike; `ids` are [B, K] for each forward."""
    return SequenceRouting(
        prompt_ids=np.zeros(0, np.int32),
        generated_ids=np.zeros(B * (forwards[-1].block + 1), np.int32),
        forwards=forwards,
        expert_ids=np.repeat(np.concatenate([np.array(rows) for rows in ids])[:, None], L, axis=1),
    )


@pytest.fixture
def by_hand(tmp_path: Path) -> TraceStatistics:
    """One block of four positions, decoded in three steps that accept 1, 1 and 2 tokens."""
    forwards = [denoise(0, 0, 4, 1), denoise(0, 1, 3, 1), denoise(0, 2, 2, 2)]
    ids = [
        [[0, 1], [0, 1], [0, 2], [0, 3]],  # experts 0 1 2 3 get 4 2 1 1 tokens
        [[4, 5], [0, 1], [0, 2], [0, 3]],  # the first position moved: 0 1 2 3 4 5 get 3 1 1 1 1 1
        [[4, 5], [0, 1], [2, 0], [3, 6]],  # expert 0 of the last position went, slots do not matter: 2 1 1 1 1 1 1
    ]
    with writer(tmp_path / "hand.h5") as out:
        out.append(one_sequence(forwards, ids))
    return of(tmp_path / "hand.h5")


def test_counts_by_hand(by_hand: TraceStatistics) -> None:
    assert (by_hand.num_sequences, by_hand.num_forwards) == (1, 3)
    assert by_hand.distinct_experts_by_layer == pytest.approx([(4 + 6 + 7) / 3] * L)
    assert by_hand.distinct_experts_sd == pytest.approx(np.std([4, 6, 7]))
    assert by_hand.distinct_experts_uniform == pytest.approx(E * (1 - (1 - K / E) ** B))
    assert by_hand.kept_share == pytest.approx(((6 / 8) + (7 / 8)) / 2)
    assert by_hand.shared_experts_masked == pytest.approx((6 + 1) / 6)  # expert 0 in 6 of 6 pairs, expert 1 in 1
    assert by_hand.shared_experts == pytest.approx((7 / 6 + 3 / 6 + 1 / 6) / 3)
    assert by_hand.tokens_per_forward == pytest.approx(4 / 3)
    assert by_hand.accepted_per_step == pytest.approx(4 / 3)
    assert by_hand.single_step_share == pytest.approx(2 / 3)
    assert (by_hand.forwards_per_block_min, by_hand.forwards_per_block_max) == (3, 3)
    assert by_hand.forwards_per_block_mean == 3
    assert by_hand.popularity == pytest.approx((4 + 3 + 2 + 4) / 24)  # the hottest 2 of 16 experts: 0 and 1
    assert by_hand.used_share == pytest.approx(7 / 16)


def test_cosines_by_hand(by_hand: TraceStatistics) -> None:
    first, second, third = np.array([[4, 2, 1, 1, 0, 0, 0], [3, 1, 1, 1, 1, 1, 0], [2, 1, 1, 1, 1, 1, 1]])

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected = [(cosine(first, second) + cosine(second, third)) / 2, cosine(first, third)]
    assert by_hand.cosine_block == pytest.approx(expected)
    assert by_hand.cosine_full == pytest.approx(expected)  # there is no prefix


def test_look_ahead_by_hand(tmp_path: Path) -> None:
    """Both experts of every prompt row are foretold, then one of each of three denoised rows and none of the last."""
    prefill = ForwardRouting(
        block=1,
        step=0,
        kind=PREFILL,
        context_tokens=0,
        routed_tokens=B,
        masked_tokens=0,
        accepted_tokens=0,
    )
    routed = np.array([[0, 1]] * B + [[2, 3]] * B)
    foretold = np.array([[1, 0]] * B + [[3, 9], [8, 2], [2, 5], [8, 9]])
    sequence = one_sequence([prefill, denoise(1, 0, B, B)], [routed[:B], routed[B:]])
    with writer(tmp_path / "ahead.h5", has_lookahead=True) as out:
        out.append(
            replace(sequence, prompt_ids=np.zeros(B, np.int32), lookahead_ids=np.repeat(foretold[:, None], L - 1, 1))
        )
    found = of(tmp_path / "ahead.h5")
    assert found.lookahead_share == pytest.approx(3 / 8)
    assert found.lookahead_share_by_layer == (None, pytest.approx(3 / 8))
    assert found.lookahead_share_by_kind == {"prefill": 1.0, "denoise": pytest.approx(3 / 8)}
    assert found.lookahead_share_random == K / E


def test_without_a_look_ahead_nothing_is_said_of_it(by_hand: TraceStatistics) -> None:
    assert (by_hand.lookahead_share, by_hand.lookahead_share_random) == (None, None)
    assert (by_hand.lookahead_share_by_layer, by_hand.lookahead_share_by_kind) == ((), {})


def test_everything_is_plain_json(by_hand: TraceStatistics) -> None:
    content = json.loads(by_hand.to_json())
    assert content == json.loads(json.dumps(by_hand.to_dict()))
    assert content["kept_share"] == by_hand.kept_share
    assert len(content["used_share_by_layer"]) == L


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The same three answers recorded with and without a KV cache."""
    rng = np.random.default_rng(0)
    with (
        writer(tmp_path / "cached.h5", has_lookahead=True) as cached,
        writer(tmp_path / "uncached.h5", kv_cache=False, has_lookahead=True) as uncached,
    ):
        for prompt_tokens, steps in ((0, [4, 12]), (9, [3, 1, 2]), (5, [1])):
            with_cache, without = decode(rng, prompt_tokens, steps, has_lookahead=True)
            cached.append(with_cache)
            uncached.append(without)
    return tmp_path / "cached.h5", tmp_path / "uncached.h5"


def test_statistics_do_not_depend_on_the_kind_of_recording(pair: tuple[Path, Path]) -> None:
    cached, uncached = (of(path).to_dict() for path in pair)
    del cached["fingerprint"], uncached["fingerprint"]
    assert cached == uncached


def test_vectorised_statistics_equal_slow_loops(pair: tuple[Path, Path]) -> None:
    found = of(pair[0])
    with Trace.open(pair[0]) as trace:
        ids, foretold = trace.expert_ids(0, trace.num_rows), trace.lookahead_ids(0, trace.num_rows)
        rows = [
            (row["sequence"], row["block"], ids[start : start + row["routed_tokens"]])
            for row, start in zip(trace.forwards, trace.offsets, strict=False)
            if row["kind"] == DENOISE
        ]
        full = trace.workload("full")
    kept = [
        len(set(a[position, layer]) & set(b[position, layer])) / K
        for (*key, a), (*next_key, b) in pairwise(rows)
        if key == next_key
        for position in range(B)
        for layer in range(L)
    ]
    assert found.kept_share == pytest.approx(np.mean(kept))
    foretold_share = [
        len(set(ids[row, layer]) & set(foretold[row, layer - 1])) / K
        for start, stop, kind in zip(trace.offsets[:-1], trace.offsets[1:], trace.forwards["kind"], strict=True)
        if kind == DENOISE
        for row in range(start, stop)
        for layer in range(1, L)
    ]
    assert found.lookahead_share == pytest.approx(np.mean(foretold_share))
    distinct = [[len(set(each[:, layer].ravel())) for layer in range(L)] for *_, each in rows]
    assert found.distinct_experts_by_layer == pytest.approx(np.mean(distinct, axis=0))
    assert found.distinct_experts_sd_by_layer == pytest.approx(np.std(distinct, axis=0))
    for lag in range(1, MAX_LAG + 1):
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for i, j in combinations(range(full.num_forwards), 2)
            if j - i == lag and full.sequence[i] == full.sequence[j]
            for a, b in zip(full.counts[i], full.counts[j], strict=True)
        ]
        assert found.cosine_full[lag - 1] == pytest.approx(np.mean(cosines))


def test_positions_just_accepted_are_told_apart(tmp_path: Path) -> None:
    """Every position keeps all experts but those just accepted, which keep none."""
    forwards, ids = [], []
    rows, fresh = np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), 8
    masked = B
    for step, accepted in enumerate((1, 2, 1)):
        forwards.append(denoise(0, step, masked, accepted))
        ids.append(rows.copy())
        rows[B - masked : B - masked + accepted] = [fresh, fresh + 1]
        masked, fresh = masked - accepted, fresh + 2
    with writer(tmp_path / "jumps.h5") as out:
        out.append(one_sequence(forwards, ids))
    found = of(tmp_path / "jumps.h5")
    assert found.kept_share == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found.kept_share_undisturbed == pytest.approx(1)


def test_what_a_short_trace_cannot_say_is_left_open(tmp_path: Path) -> None:
    with writer(tmp_path / "short.h5") as out:
        out.append(one_sequence([denoise(0, 0, 3, 3)], [[[0, 1]] * B]))
    found = of(tmp_path / "short.h5")
    assert found.kept_share is None
    assert found.kept_share_undisturbed is None
    assert found.forwards_per_block_mean is None  # the block began with a known token
    assert found.shared_experts_masked is None
    assert found.shared_experts == K
    assert found.cosine_block == found.cosine_full == ()


def test_full_regime_is_left_open_when_it_cannot_be_rebuilt(tmp_path: Path) -> None:
    sequence, _ = decode(np.random.default_rng(0), 0, [2, 2])
    forwards = [forward for forward in sequence.forwards if forward.kind != COMMIT]
    with writer(tmp_path / "holes.h5") as out:
        out.append(
            SequenceRouting(
                prompt_ids=sequence.prompt_ids,
                generated_ids=sequence.generated_ids,
                forwards=forwards,
                expert_ids=sequence.expert_ids[: len(forwards) * B],
            )
        )
    found = of(tmp_path / "holes.h5")
    assert found.cosine_full == ()
    assert len(found.cosine_block) == 3


def test_a_trace_without_denoise_forwards_is_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "empty.h5"):
        pass
    with pytest.raises(TraceError, match=r"empty.h5: holds no denoise forward"):
        of(tmp_path / "empty.h5")
