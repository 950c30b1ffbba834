"""What one recording says about engines with and without a KV cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import COMMIT, DENOISE, PREFILL, E, L, decode, writer
from hypothesis import given, settings
from hypothesis import strategies as st

from tidesim.errors import TraceError
from tidesim.trace import SequenceRouting, Trace, Workload


def assert_same(left: Workload, right: Workload) -> None:
    for name in Workload.__dataclass_fields__:
        if name != "fingerprint":
            a, b = getattr(left, name), getattr(right, name)
            assert np.array_equal(a, b), name
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None), name


@pytest.mark.parametrize("context", ["block", "full"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.tuples(st.integers(0, 11), st.lists(st.integers(1, 3), min_size=1, max_size=4)), max_size=3),
)
def test_both_kinds_of_recording_give_the_same_workload(
    tmp_path_factory: pytest.TempPathFactory, context: Any, seed: int, shapes: list[tuple[int, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(seed)
    with (
        writer(folder / "cached.h5", has_lookahead=True) as cached,
        writer(folder / "uncached.h5", kv_cache=False, has_lookahead=True) as uncached,
    ):
        for prompt_tokens, steps in shapes:
            with_cache, without = decode(rng, prompt_tokens, steps, has_lookahead=True)
            cached.append(with_cache)
            uncached.append(without)
    with Trace.open(folder / "cached.h5") as one, Trace.open(folder / "uncached.h5") as two:
        assert_same(one.workload(context, has_lookahead=True), two.workload(context, has_lookahead=True))


def test_workload_of_a_cached_recording_counts_each_forward(path: Path, sequence: SequenceRouting) -> None:
    with Trace.open(path) as trace:
        workload = trace.workload("block", sequences=[1])
    assert workload.kind.tolist() == [PREFILL, DENOISE, DENOISE, COMMIT, DENOISE, DENOISE, DENOISE]
    assert workload.sequence.tolist() == [1] * 7
    assert workload.block.tolist() == [2, 2, 2, 2, 3, 3, 3]
    assert workload.step.tolist() == [0, 0, 1, 2, 0, 1, 2]
    assert workload.is_first_block.tolist() == [True] * 4 + [False] * 3
    assert workload.tokens.tolist() == [8, 4, 4, 4, 4, 4, 4]
    assert workload.context_tokens.tolist() == [0, 8, 8, 8, 12, 12, 12]
    assert workload.logit_tokens.tolist() == [0, 4, 4, 0, 4, 4, 4]
    assert (workload.generated_tokens, workload.num_sequences, workload.max_tokens) == (7, 1, 16)
    start = 0
    for forward, num_rows in enumerate(workload.tokens):
        for layer in range(L):
            expected = np.zeros(E, int)
            np.add.at(expected, sequence.expert_ids[start : start + num_rows, layer], 1)
            assert workload.counts[forward, layer].tolist() == expected.tolist()
        start += num_rows


def test_full_workload_routes_the_whole_prefix_in_every_step(path: Path, sequence: SequenceRouting) -> None:
    with Trace.open(path) as trace:
        workload = trace.workload("full", sequences=[0])
    assert workload.tokens.tolist() == [12, 12, 16, 16, 16]
    assert workload.context_tokens.tolist() == [0] * 5
    assert workload.max_tokens == 16
    ids = sequence.expert_ids
    rows = np.concatenate([ids[:8], ids[16:20], ids[28:32]])  # prefill, commit of block 2, last step of block 3
    expected = np.stack([np.bincount(rows[:, layer].ravel(), minlength=E) for layer in range(L)])
    assert np.array_equal(workload.counts[-1], expected)


@pytest.fixture
def ahead(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, np.ndarray]:
    """A trace of one sequence with its look-ahead, and what that foretells of layer 1, [32, K]."""
    sequence = decode(rng, prompt_tokens=9, steps=[2, 3], has_lookahead=True)[0]
    assert sequence.lookahead_ids is not None
    with writer(tmp_path / "ahead.h5", has_lookahead=True) as out:
        out.append(sequence)
    return tmp_path / "ahead.h5", sequence.lookahead_ids[:, 0]


def test_look_ahead_is_counted_for_the_layer_that_it_foretells(ahead: tuple[Path, np.ndarray]) -> None:
    path, ids = ahead
    with Trace.open(path) as trace:
        block, full = (trace.workload(context, has_lookahead=True) for context in ("block", "full"))
        for workload in (block, full):
            assert_same(replace(workload, lookahead=None), trace.workload(workload.context))

    def counts(*rows: slice) -> list[int]:
        return np.bincount(np.concatenate([ids[each] for each in rows]).ravel(), minlength=E).tolist()

    prefill, commit = slice(0, 8), slice(16, 20)
    first, second = [slice(8, 12), slice(12, 16)], [slice(20, 24), slice(24, 28), slice(28, 32)]
    for workload, expected in (
        (block, [counts(rows) for rows in (prefill, *first, commit, *second)]),
        (full, [counts(prefill, rows) for rows in first] + [counts(prefill, commit, rows) for rows in second]),
    ):
        assert workload.lookahead is not None
        assert workload.lookahead.dtype == np.int32
        assert workload.lookahead.shape == workload.counts.shape
        assert not workload.lookahead[:, 0].any()
        assert workload.lookahead[:, 1].tolist() == expected


def test_look_ahead_stays_with_its_forwards_and_layers(ahead: tuple[Path, np.ndarray]) -> None:
    with Trace.open(ahead[0]) as trace:
        whole = trace.workload("block", has_lookahead=True)
    assert whole.lookahead is not None
    cut = whole.first(3).tiled(5)
    assert cut.lookahead is not None
    assert cut.lookahead.shape == cut.counts.shape == (3, 5, E)
    for layer in (1, 3):
        assert np.array_equal(cut.lookahead[:, layer], whole.lookahead[:3, 1])
    assert not cut.lookahead[:, [0, 2, 4]].any()


def test_a_workload_has_no_look_ahead_unless_asked_for(path: Path, ahead: tuple[Path, np.ndarray]) -> None:
    with Trace.open(ahead[0]) as trace:
        assert trace.workload().lookahead is None
        assert trace.workload().first(2).tiled(3).lookahead is None
    with Trace.open(path) as trace, pytest.raises(TraceError, match=r"trace.h5: keeps no look-ahead.* --lookahead"):
        trace.workload("block", has_lookahead=True)


def test_full_workload_is_refused_when_a_commit_is_missing(tmp_path: Path, sequence: SequenceRouting) -> None:
    kept = [forward for forward in sequence.forwards if forward.kind != COMMIT]
    with writer(tmp_path / "x.h5") as out:
        out.append(replace(sequence, forwards=kept, expert_ids=np.delete(sequence.expert_ids, np.s_[16:20], axis=0)))
    with Trace.open(tmp_path / "x.h5") as trace:
        assert trace.workload("block").num_forwards == 6
        with pytest.raises(TraceError, match=r"x.h5: sequence 0, block 3: .* hold 8 of 12 .* context='block'"):
            trace.workload("full")


def test_block_workload_is_refused_when_forwards_are_not_whole_blocks(
    tmp_path: Path, sequence: SequenceRouting
) -> None:
    with writer(tmp_path / "x.h5", kv_cache=False) as out:
        out.append(sequence)
    with Trace.open(tmp_path / "x.h5") as trace, pytest.raises(TraceError, match="must route"):
        trace.workload("block")


def test_counts_do_not_depend_on_the_reading_window(
    ahead: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = ahead
    with Trace.open(path) as trace:
        whole = trace.workload("full", has_lookahead=True)
        for rows in (1, 3, 7):
            monkeypatch.setattr("tidesim.counting.WINDOW_ROWS", rows)
            monkeypatch.setattr("tidesim.trace.reading.WINDOW_ROWS", rows)
            assert_same(whole, trace.workload("full", has_lookahead=True))
            with Trace.open(path) as again:
                assert again.fingerprint == trace.fingerprint


@pytest.mark.parametrize("sequences", [[2], [-1], [0, 0]])
def test_workload_refuses_sequences_that_are_not_there(path: Path, sequences: list[int]) -> None:
    with Trace.open(path) as trace, pytest.raises(ValueError, match="sequences"):
        trace.workload("block", sequences)


def test_tiled_workload_repeats_the_layers(path: Path) -> None:
    with Trace.open(path) as trace:
        workload = trace.workload()
    tiled = workload.tiled(5)
    assert tiled.num_layers == 5
    for layer in range(5):
        assert np.array_equal(tiled.counts[:, layer], workload.counts[:, layer % L])
    with pytest.raises(ValueError, match="num_layers"):
        workload.tiled(0)


def test_an_empty_trace_gives_an_empty_workload(tmp_path: Path) -> None:
    with writer(tmp_path / "empty.h5"):
        pass
    with Trace.open(tmp_path / "empty.h5") as trace:
        for context in ("block", "full"):
            assert trace.workload(context).counts.shape == (0, L, E)  # type: ignore[arg-type]
