"""What a trace file must keep: every finished sequence, and nothing that contradicts itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidesim.errors import TraceError
from tidesim.trace import (
    ATTRIBUTES,
    DATASETS,
    FORWARDS,
    SEQUENCES,
    ForwardKind,
    ForwardRouting,
    SequenceRouting,
    Trace,
    TraceWriter,
    Workload,
)

L, E, K, B = 2, 16, 2, 4
CONFIG = {
    "num_hidden_layers": L + 1,
    "first_k_dense_replace": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 4,
    "num_experts": E,
    "num_experts_per_tok": K,
    "num_shared_experts": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 32,
}
PREFILL, DENOISE, COMMIT = ForwardKind.PREFILL, ForwardKind.DENOISE, ForwardKind.COMMIT


def writer(path: Path, *, kv_cache: bool = True, **changes: Any) -> TraceWriter:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "model_name": "hand-made",
        "block_length": B,
        "sampler": {"threshold": 0.95},
        "seed": 7,
        "origin": "recorded",
        "kv_cache": kv_cache,
    }
    return TraceWriter(path, **(arguments | changes))


def decode(rng: np.random.Generator, prompt_tokens: int, steps: list[int]) -> tuple[SequenceRouting, SequenceRouting]:
    """One answer of a block-causal network, as an engine with a KV cache records it and as one without.

    `steps` are the denoising steps of each decoded block. A finished block routes in the same way ever after.
    """
    first = prompt_tokens // B
    finished = [rng.integers(E, size=(B, L, K)) for _ in range(first + len(steps))]
    forwards: tuple[list[ForwardRouting], list[ForwardRouting]] = ([], [])
    ids: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(side: int, kind: ForwardKind, block: int, step: int, rows: list[np.ndarray], context: int) -> None:
        ids[side].extend(rows)
        num_rows = sum(map(len, rows))
        forwards[side].append(
            ForwardRouting(
                block=block,
                step=step,
                kind=kind,
                context_tokens=context,
                routed_tokens=num_rows,
                masked_tokens=1 if kind == DENOISE else 0,
                accepted_tokens=1 if kind == DENOISE else 0,
                wall_ns=len(ids[side]),
            )
        )

    if first:
        add(0, PREFILL, first, 0, finished[:first], 0)
    for block, num_steps in enumerate(steps, first):
        for step in range(num_steps):
            rows = rng.integers(E, size=(B, L, K))
            add(0, DENOISE, block, step, [rows], block * B)
            add(1, DENOISE, block, step, [*finished[:block], rows], 0)
        if block < first + len(steps) - 1:
            add(0, COMMIT, block, num_steps, [finished[block]], block * B)
    tokens = np.arange(prompt_tokens + len(steps) * B - prompt_tokens % B, dtype=np.int32)
    parts = [
        SequenceRouting(
            prompt_ids=tokens[:prompt_tokens],
            generated_ids=tokens[prompt_tokens:],
            forwards=forwards[side],
            expert_ids=np.concatenate(ids[side]),
        )
        for side in (0, 1)
    ]
    return parts[0], parts[1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def sequence(rng: np.random.Generator) -> SequenceRouting:
    return decode(rng, prompt_tokens=9, steps=[2, 3])[0]


@pytest.fixture
def path(tmp_path: Path, sequence: SequenceRouting) -> Path:
    file = tmp_path / "trace.h5"
    with writer(file) as out:
        out.append(sequence)
        out.append(sequence)
    return file


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as caught, Trace.open(path):
        pass
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what was written is read -------------------------------------------------------------------------------------


def test_everything_written_is_read_back(path: Path, sequence: SequenceRouting) -> None:
    with Trace.open(path) as trace:
        assert (trace.num_layers, trace.num_experts, trace.top_k, trace.block_length) == (L, E, K, B)
        assert (trace.model_name, trace.origin, trace.seed, trace.version) == ("hand-made", "recorded", 7, 1)
        assert trace.is_complete
        assert trace.kv_cache
        assert trace.hf_config == CONFIG
        assert trace.sampler == {"threshold": 0.95}
        assert trace.sequences["id"].tolist() == [0, 1]
        assert trace.sequences["prompt_tokens"].tolist() == [9, 9]
        assert trace.sequences["first_forward"].tolist() == [0, 7]
        assert trace.forwards["kind"].tolist() == [0, 1, 1, 2, 1, 1, 1] * 2
        assert trace.forwards["routed_tokens"].tolist() == [8, 4, 4, 4, 4, 4, 4] * 2
        assert trace.offsets.tolist() == np.append(0, np.cumsum(trace.forwards["routed_tokens"])).tolist()
        assert np.array_equal(trace.expert_ids(32, 64), sequence.expert_ids)
        assert trace.tokens(1).tolist() == list(range(16))
        assert not trace.forwards.flags.writeable


def test_a_file_holds_exactly_what_the_tables_describe(path: Path) -> None:
    with h5py.File(path) as file:
        assert sorted(file.attrs) == sorted(field.name for field in ATTRIBUTES)
        assert file["sequences"].dtype.names == tuple(field.name for field in SEQUENCES)
        assert file["forwards"].dtype.names == tuple(field.name for field in FORWARDS)
        assert h5py.check_enum_dtype(file["forwards"].dtype["kind"]) == {"prefill": 0, "denoise": 1, "commit": 2}
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert set(names) == {field.name for field in DATASETS} - {"routing/weights"}


def test_ids_are_as_narrow_as_the_number_of_experts_allows(tmp_path: Path, rng: np.random.Generator) -> None:
    for num_experts, dtype in ((256, "uint8"), (257, "uint16")):
        file = tmp_path / f"{num_experts}.h5"
        with writer(file, config=CONFIG | {"num_experts": num_experts}) as out:
            out.append(replace(decode(rng, 0, [1])[0], expert_ids=np.full((B, L, K), num_experts - 1)))
        with Trace.open(file) as trace:
            assert trace.expert_ids(0, B).dtype == dtype
            assert trace.expert_ids(0, B).max() == num_experts - 1


def test_private_trace_keeps_lengths_but_no_tokens(tmp_path: Path, sequence: SequenceRouting) -> None:
    with writer(tmp_path / "private.h5", is_private=True) as out:
        out.append(sequence)
    with h5py.File(tmp_path / "private.h5") as file:
        assert "tokens" not in file
    with Trace.open(tmp_path / "private.h5") as trace:
        assert trace.sequences["generated_tokens"].tolist() == [7]
        with pytest.raises(TraceError, match="keeps no tokens"):
            trace.tokens(0)


def test_weights_are_kept_when_asked_for(tmp_path: Path, sequence: SequenceRouting) -> None:
    weights = np.linspace(0, 1, sequence.expert_ids.size).reshape(sequence.expert_ids.shape)
    with writer(tmp_path / "weights.h5", has_weights=True) as out:
        with pytest.raises(TraceError, match="has_weights"):
            out.append(sequence)
        out.append(replace(sequence, weights=weights))
    with Trace.open(tmp_path / "weights.h5") as trace:
        assert np.array_equal(trace.weights(8, 12), weights[8:12].astype(np.float16))
    with writer(tmp_path / "none.h5"):
        pass
    with Trace.open(tmp_path / "none.h5") as trace, pytest.raises(TraceError, match="--weights"):
        trace.weights(0, 0)


def test_fingerprint_follows_the_routing_and_nothing_else(tmp_path: Path, sequence: SequenceRouting) -> None:
    other = sequence.expert_ids.copy()
    other[-1, -1, -1] ^= 1
    slower = [replace(forward, wall_ns=forward.wall_ns + 1) for forward in sequence.forwards]
    variants = {
        "a": sequence,
        "slower": replace(sequence, forwards=slower),
        "retold": replace(sequence, prompt_ids=sequence.prompt_ids + 1),
        "rerouted": replace(sequence, expert_ids=other),
        "longer": replace(sequence, prompt_ids=np.arange(10)),
    }
    found = {}
    for name, variant in variants.items():
        with writer(tmp_path / name, seed=len(name)) as out:
            out.append(variant)
        with Trace.open(tmp_path / name) as trace:
            found[name] = trace.fingerprint
    assert found["a"] == found["slower"] == found["retold"]
    assert len(set(found.values())) == 3


# --- workloads ----------------------------------------------------------------------------------------------------


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
    with writer(folder / "cached.h5") as cached, writer(folder / "uncached.h5", kv_cache=False) as uncached:
        for prompt_tokens, steps in shapes:
            with_cache, without = decode(rng, prompt_tokens, steps)
            cached.append(with_cache)
            uncached.append(without)
    with Trace.open(folder / "cached.h5") as one, Trace.open(folder / "uncached.h5") as two:
        assert_same(one.workload(context), two.workload(context))


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
    path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    with Trace.open(path) as trace:
        whole = trace.workload("full")
        for rows in (1, 3, 7):
            monkeypatch.setattr("tidesim.workload.WINDOW_ROWS", rows)
            monkeypatch.setattr("tidesim.trace.WINDOW_ROWS", rows)
            assert_same(whole, trace.workload("full"))
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
