"""Synthetic traces must look like the published figures; each test states the tolerance it allows."""

from collections.abc import Iterator
from datetime import datetime, tzinfo
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tidesim.errors import InputError, TraceError
from tidesim.moe import MoEConfig, read_hf_config
from tidesim.shipped import find_shipped
from tidesim.statistics import TraceStatistics, trace_statistics
from tidesim.synthesize import DEFAULT, _denoise, _first, _Router, synthesize
from tidesim.trace import ForwardKind, Trace

SHIPPED = "llada2.0-mini-synthetic"
MINI = read_hf_config(find_shipped("models", "llada2.0-mini"))


def make(path: Path, shape: str = "llada2.0-mini", **changes: Any) -> Trace:
    config = read_hf_config(find_shipped("models", shape))
    arguments: dict[str, Any] = {"model_name": shape, "num_sequences": 2, "prompt_tokens": 40, "gen_length": 32}
    synthesize(config, path, **(arguments | changes))
    return Trace.open(path)


@pytest.fixture(scope="module")
def shipped() -> Iterator[Trace]:
    with Trace.open(SHIPPED) as trace:
        yield trace


@pytest.fixture(scope="module")
def found(shipped: Trace) -> TraceStatistics:
    return trace_statistics(shipped)


# --- the shipped trace against the published figures --------------------------------------------------------------

PUBLISHED = [
    ("distinct_experts", 65.9, 71.5),  # dMoE: the range over four tasks, no tolerance
    ("distinct_experts_sd", 10, 12),  # dMoE: no tolerance
    ("distinct_experts_uniform", 163 - 0.5, 163 + 0.5),  # arithmetic: rounding
    ("kept_share", 0.77 - 0.03, 0.77 + 0.03),  # inferred for LLaDA2.0-mini
    ("tokens_per_forward", 2.55 - 0.15, 2.55 + 0.15),  # LLaDA2.0 report: one s.d. over seeds of 16 sequences is 0.12
    ("accepted_per_step", 2.55 - 0.15, 2.6 + 0.15),
    ("single_step_share", 0.5 - 0.05, 0.5 + 0.05),  # "about half of the steps"
    ("forwards_per_block_mean", 12.5 - 0.75, 12.5 + 0.75),  # 32 / 2.55, with the tolerance of tokens_per_forward
    ("forwards_per_block_max", 1, 32),  # never above
    ("popularity", 0.25, 0.50),  # DeepSeek-V3 and R1: the range over layers, no tolerance
]


@pytest.mark.parametrize(("name", "least", "most"), PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_shipped_trace_meets_the_published_figure(found: TraceStatistics, name: str, least: float, most: float) -> None:
    assert least <= getattr(found, name) <= most


def test_hit_counts_without_a_cache_are_as_stable_as_published(found: TraceStatistics) -> None:
    assert found.cosine_full[0] == pytest.approx(0.985, abs=0.003)
    assert found.cosine_full[4] > 0.95
    assert all(near > far for near, far in pairwise(found.cosine_full))
    assert all(full > block for full, block in zip(found.cosine_full, found.cosine_block, strict=True))


def test_deviation_over_forwards_is_as_published_in_the_published_layer(found: TraceStatistics) -> None:
    assert 10 <= found.distinct_experts_sd_by_layer[10] <= 12


def test_popularity_is_within_the_published_range_in_every_layer(found: TraceStatistics) -> None:
    assert all(0.25 <= share <= 0.50 for share in found.popularity_by_layer)


def test_sequences_differ_in_ease_as_tasks_do(shipped: Trace) -> None:
    is_denoise = shipped.forwards["kind"] == ForwardKind.DENOISE
    num_forwards = np.bincount(shipped.forwards["sequence"][is_denoise])
    tokens_per_forward = shipped.sequences["generated_tokens"] / num_forwards
    assert 1.24 <= tokens_per_forward.min() < 2 < 3 < tokens_per_forward.max() <= 5.16


def test_bursts_come_late_in_a_block(shipped: Trace) -> None:
    rows = shipped.forwards[shipped.forwards["kind"] == ForwardKind.DENOISE]
    early = rows["accepted_tokens"][rows["masked_tokens"] > 2 / 3 * shipped.block_length]
    late = rows["accepted_tokens"][
        (rows["masked_tokens"] < 1 / 2 * shipped.block_length) & (rows["masked_tokens"] > 1 / 4 * shipped.block_length)
    ]
    assert late.mean() > 1.3 * early.mean()


def test_early_layers_collapse_while_everything_is_masked(shipped: Trace) -> None:
    workload = shipped.workload("block")
    is_denoise = workload.kind == ForwardKind.DENOISE
    masked = shipped.forwards["masked_tokens"][is_denoise] / shipped.block_length
    distinct = np.count_nonzero(workload.counts[is_denoise], axis=2)
    early, late = distinct[:, :3].mean(axis=1), distinct[:, -3:].mean(axis=1)
    assert early[masked == 1].mean() < 0.9 * late[masked == 1].mean()
    assert early[masked < 0.5].mean() == pytest.approx(late[masked < 0.5].mean(), rel=0.05)


def test_two_masked_positions_share_as_many_experts_as_published() -> None:
    """3.3 to 3.5 of 8, no tolerance, over all pairs of masked positions of 30 blocks."""
    config = MoEConfig.from_hf(MINI, "mini")
    rng = np.random.default_rng(5)
    popularity = rng.lognormal(sigma=DEFAULT.popularity_sd, size=(config.num_layers, config.num_experts))
    router = _Router(config, DEFAULT, popularity, rng)
    shared = []
    for block in range(30):
        for step in _denoise(router, block, np.ones(config.block_length, np.bool_), 0.0):
            ids = step.expert_ids[step.is_masked]
            num_pairs = len(ids) * (len(ids) - 1)
            if num_pairs:
                counts = np.apply_along_axis(
                    np.bincount, 0, ids.transpose(0, 2, 1).reshape(-1, ids.shape[1]), None, 256
                )
                shared.append((counts * (counts - 1)).sum(axis=0).mean() / num_pairs)
    assert 3.3 <= np.mean(shared) <= 3.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_other_seeds_meet_the_figures_too(tmp_path: Path, seed: int) -> None:
    """More sequences, so the figures that vary with the sequence are held to half of the tolerance."""
    with make(tmp_path / "more.h5", num_sequences=64, prompt_tokens=96, gen_length=128, seed=seed) as trace:
        more = trace_statistics(trace)
    for name, least, most in PUBLISHED:
        assert least <= getattr(more, name) <= most, name
    assert more.tokens_per_forward == pytest.approx(2.55, abs=0.075)
    assert more.cosine_full[0] == pytest.approx(0.985, abs=0.003)
    assert more.cosine_full[4] > 0.95


# --- the shipped file ---------------------------------------------------------------------------------------------


def test_shipped_trace_is_small_whole_and_says_what_it_is(shipped: Trace) -> None:
    assert shipped.path.stat().st_size <= 5_000_000
    assert shipped.is_complete
    assert (shipped.origin, shipped.model_name, shipped.seed) == ("synthetic", "llada2.0-mini", 0)
    assert shipped.is_private
    assert len(shipped.sequences) >= 12  # enough to plan on some and to score on others
    assert shipped.hf_config == MINI


@pytest.mark.slow
def test_shipped_trace_is_what_the_documented_command_makes(tmp_path: Path, shipped: Trace) -> None:
    with make(tmp_path / "again.h5", num_sequences=16, prompt_tokens=96, gen_length=128, seed=0) as again:
        assert again.fingerprint == shipped.fingerprint


# --- the generator ------------------------------------------------------------------------------------------------


def test_a_seed_fixes_the_trace(tmp_path: Path) -> None:
    with make(tmp_path / "a.h5") as a, make(tmp_path / "b.h5") as b, make(tmp_path / "c.h5", seed=1) as c:
        assert a.fingerprint == b.fingerprint != c.fingerprint


def test_a_sequence_does_not_depend_on_how_many_follow(tmp_path: Path) -> None:
    with make(tmp_path / "one.h5", num_sequences=1) as one, make(tmp_path / "three.h5", num_sequences=3) as three:
        assert np.array_equal(three.expert_ids(0, one.num_rows), one.expert_ids(0, one.num_rows))
        assert np.array_equal(three.forwards[: len(one.forwards)], one.forwards)


def test_forwards_follow_the_rules_of_block_diffusion_with_a_cache(tmp_path: Path) -> None:
    with make(tmp_path / "trace.h5", num_sequences=4, prompt_tokens=30, gen_length=70) as trace:
        B = trace.block_length
        assert trace.kv_cache
        for row in trace.sequences:
            forwards = trace.forwards[row["first_forward"] : row["first_forward"] + row["num_forwards"]]
            num_prompt, first = int(row["prompt_tokens"]), int(row["prompt_tokens"]) // B
            last = (num_prompt + int(row["generated_tokens"])) // B - 1
            assert (num_prompt + row["generated_tokens"]) % B == 0
            kinds = forwards["kind"].tolist()
            assert kinds.count(ForwardKind.PREFILL) == (1 if first else 0)
            assert forwards["block"][forwards["kind"] == ForwardKind.COMMIT].tolist() == list(range(first, last))
            for block in range(first, last + 1):
                steps = forwards[(forwards["block"] == block) & (forwards["kind"] == ForwardKind.DENOISE)]
                assert steps["step"].tolist() == list(range(len(steps)))
                assert steps["masked_tokens"][0] == min(B, (block + 1) * B - num_prompt)
                assert np.array_equal(
                    steps["masked_tokens"][1:], (steps["masked_tokens"] - steps["accepted_tokens"])[:-1]
                )
                assert steps["accepted_tokens"].min() >= 1
                assert steps["accepted_tokens"].sum() == steps["masked_tokens"][0]
        full = trace.workload("full")
        assert np.array_equal(full.counts.sum(axis=2), np.repeat(full.tokens[:, None], trace.num_layers, axis=1) * 8)


def test_without_a_cache_the_same_routing_is_recorded_with_its_prefix(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_sequences": 3, "prompt_tokens": 70, "gen_length": 70}
    with make(tmp_path / "with.h5", **sizes) as cached, make(tmp_path / "without.h5", kv_cache=False, **sizes) as trace:
        assert not trace.kv_cache
        assert set(trace.forwards["kind"].tolist()) == {ForwardKind.DENOISE}
        for context in ("block", "full"):
            one, other = cached.workload(context), trace.workload(context)
            for name in ("counts", "kind", "sequence", "block", "step", "tokens", "context_tokens"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), (context, name)


def test_a_token_never_gets_an_expert_twice(tmp_path: Path) -> None:
    with make(tmp_path / "trace.h5", num_sequences=1) as trace:
        ids = np.sort(trace.expert_ids(0, trace.num_rows), axis=2)
        assert (np.diff(ids.astype(int), axis=2) > 0).all()


def test_other_shapes_have_their_own_layers(tmp_path: Path) -> None:
    with make(tmp_path / "flash.h5", "llada2.0-flash", num_sequences=1, gen_length=16) as trace:
        assert (trace.num_layers, trace.num_experts, trace.top_k) == (31, 256, 8)


def test_few_experts_are_no_obstacle(tmp_path: Path) -> None:
    config = MINI | {"num_experts": 4, "num_experts_per_tok": 4, "num_hidden_layers": 2, "block_length": 8}
    synthesize(config, tmp_path / "few.h5", model_name="few", num_sequences=1, prompt_tokens=1, gen_length=1)
    with Trace.open(tmp_path / "few.h5") as trace:
        assert trace.block_length == 8
        assert trace_statistics(trace).distinct_experts == 4


def test_a_trace_does_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2000, 1, 1, tzinfo=tz)

    monkeypatch.setattr("tidesim.trace.writing.datetime", Stopped)
    for workers in (1, 2):
        told: list[tuple[int, int]] = []
        make(
            tmp_path / f"{workers}.h5",
            "llada2-tiny",
            num_sequences=10,
            workers=workers,
            progress=lambda *numbers, told=told: told.append(numbers),
        ).close()
        assert told == [(done, 10) for done in range(1, 11)]
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()
    with pytest.raises(ValueError, match=r"workers\(=0\) must be >= 1"):
        make(tmp_path / "0.h5", workers=0)
    assert not (tmp_path / "0.h5").exists()


@pytest.mark.parametrize("seed", range(3))
def test_who_comes_first_is_found_as_by_sorting_everybody(seed: int) -> None:
    times = np.random.default_rng(seed).standard_exponential((3, 2, 16), np.float32)
    expected = np.argsort(times, axis=-1)
    for num in (1, 5, 16):
        assert np.array_equal(_first(times, num, np.empty_like(times)), expected[..., :num])
    times[1, 1, :9] = 0.25  # more arrive together than are wanted
    first = _first(times, 5, np.empty_like(times))
    assert [len(set(row)) for row in first.reshape(-1, 5).tolist()] == [5] * 6
    assert np.array_equal(np.take_along_axis(times, first, axis=-1), np.sort(times, axis=-1)[..., :5])


def test_progress_is_told_after_every_sequence(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    make(tmp_path / "trace.h5", num_sequences=3, gen_length=1, progress=lambda *numbers: told.append(numbers)).close()
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["num_sequences", "prompt_tokens", "gen_length"])
def test_numbers_below_one_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}\(=0\) must be >= 1"):
        make(tmp_path / "trace.h5", **{name: 0})
    assert not (tmp_path / "trace.h5").exists()


def test_a_negative_seed_and_an_existing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seed"):
        make(tmp_path / "trace.h5", seed=-1)
    make(tmp_path / "trace.h5", gen_length=1).close()
    with pytest.raises(TraceError, match="exists already"):
        make(tmp_path / "trace.h5")
    make(tmp_path / "trace.h5", gen_length=1, overwrite=True).close()
