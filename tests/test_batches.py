"""Sequences that run together: what their merged forwards hold, and what they cost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hand_made import COMMIT, DENOISE, PREFILL, decode, writer
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence import timed_by_hand
from test_workload import assert_same
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.ceiling import time_ceiling
from tidesim.execution import Costs, device_memory, execution
from tidesim.hardware import load_hardware
from tidesim.moe import load_moe_config
from tidesim.policies import policy
from tidesim.simulator import simulate
from tidesim.timing import timed
from tidesim.trace import Trace, Workload

P, D, C = PREFILL, DENOISE, COMMIT


def unequal(folder: Path, context: str) -> Workload:
    """Three sequences: two prompt blocks, then blocks of 2 and 3 steps; no prompt block, 1 and 2 steps; 1 step."""
    rng = np.random.default_rng(3)
    with writer(folder / "unequal.h5", has_lookahead=True, overwrite=True) as out:
        for prompt_tokens, steps in ((9, [2, 3]), (2, [1, 2]), (5, [1])):
            out.append(decode(rng, prompt_tokens, steps, has_lookahead=True)[0])
    with Trace.open(folder / "unequal.h5") as trace:
        return trace.workload(context, has_lookahead=True)  # type: ignore[arg-type]


def forwards_by_sequence(workload: Workload) -> list[np.ndarray]:
    return [np.flatnonzero(workload.sequence == number) for number in np.unique(workload.sequence)]


def test_a_batch_of_one_is_the_workload_itself(tmp_path: Path) -> None:
    for context in ("block", "full"):
        workload = unequal(tmp_path, context)
        assert_same(workload.batched(1), workload)


def test_two_sequences_with_a_cache_run_forward_by_forward(tmp_path: Path) -> None:
    workload = unequal(tmp_path, "block")
    assert workload.kind.tolist() == [P, D, D, C, D, D, D, D, C, D, D, P, D]
    merged = workload.batched(2)
    # First  sequence: prefill 8 | 4 + 8, 4 + 8 | commit 4 + 8 | 4 + 12, 4 + 12, 4 + 12
    # Second sequence: 4 + 0 | commit 4 + 0 | 4 + 4, 4 + 4      Third, alone: prefill 4 | 4 + 4
    assert merged.sequence.tolist() == [0] * 7 + [2] * 2
    assert merged.kind.tolist() == [D, D, D, D, D, D, D, P, D]
    assert merged.block.tolist() == [2, 2, 2, 2, 3, 3, 3, 1, 1]
    assert merged.step.tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 0]
    assert merged.is_first_block.tolist() == [True] * 4 + [False] * 3 + [True] * 2
    assert merged.tokens.tolist() == [12, 8, 8, 8, 4, 4, 4, 4, 4]
    assert merged.context_tokens.tolist() == [0, 8, 12, 12, 12, 12, 12, 0, 4]
    assert merged.attended_pairs.tolist() == [64 + 16, 48 + 16, 48 + 32, 48 + 32, 64, 64, 64, 16, 32]
    assert merged.logit_tokens.tolist() == [4, 4, 8, 4, 4, 4, 4, 0, 4]
    assert (merged.batch_size, merged.num_sequences, merged.max_tokens) == (2, 3, 16 + 8)
    assert merged.generated_tokens == workload.generated_tokens
    assert np.array_equal(merged.counts[0], workload.counts[0] + workload.counts[7])
    assert np.array_equal(merged.counts[3], workload.counts[3] + workload.counts[10])
    assert np.array_equal(merged.counts[4:7], workload.counts[4:7])
    assert np.array_equal(merged.counts[7:], workload.counts[11:])
    assert merged.lookahead is not None
    assert workload.lookahead is not None
    assert np.array_equal(merged.lookahead[1], workload.lookahead[1] + workload.lookahead[8])


def test_two_sequences_without_a_cache_run_forward_by_forward(tmp_path: Path) -> None:
    workload = unequal(tmp_path, "full")
    assert workload.tokens.tolist() == [12, 12, 16, 16, 16, 4, 8, 8, 8]
    merged = workload.batched(2)
    assert merged.kind.tolist() == [D] * 6
    assert merged.block.tolist() == [2, 2, 3, 3, 3, 1]
    assert merged.step.tolist() == [0, 1, 0, 1, 2, 0]
    assert merged.tokens.tolist() == [16, 20, 24, 16, 16, 8]
    assert not merged.context_tokens.any()
    assert merged.attended_pairs.tolist() == [144 + 16, 144 + 64, 256 + 64, 256, 256, 64]
    assert merged.logit_tokens.tolist() == [8, 8, 8, 4, 4, 4]
    assert merged.max_tokens == 24
    assert np.array_equal(merged.counts[2], workload.counts[2] + workload.counts[7])


def test_once_the_first_sequence_has_ended_the_next_one_says_which_forward_it_is() -> None:
    rows = [[1, 1, 1, 1, 1, 1, 0, 0]]
    workload = toy_workload(rows, rows, rows, rows, rows, steps=[0, 1, 0, 1, 2])
    workload = replace(
        workload, sequence=np.array([4, 4, 6, 6, 6], np.int32), block=np.array([1, 1, 9, 9, 9], np.int32)
    )
    merged = workload.batched(2)
    assert merged.sequence.tolist() == [4, 4, 4]
    assert merged.block.tolist() == [1, 1, 9]
    assert merged.step.tolist() == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_is_lost_and_nothing_runs_twice(lengths: list[int], batch_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_forwards = sum(lengths)
    picks = np.argsort(rng.random((num_forwards, 2, 3, 8)), axis=-1)[..., :2]
    counts = (picks[..., None] == np.arange(8)).sum(axis=(2, 3))
    kinds = "".join(rng.choice(list("pdc"), num_forwards))
    workload = toy_workload(*counts, kinds=kinds)
    workload = replace(
        workload,
        sequence=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        num_sequences=len(lengths),
        context_tokens=rng.integers(0, 9, num_forwards).astype(np.int32),
        lookahead=workload.counts[:, ::-1].copy(),
    )
    workload = replace(
        workload, attended_pairs=workload.tokens * (workload.context_tokens + workload.tokens).astype(np.int64)
    )
    merged = workload.batched(batch_size)
    for name in ("counts", "lookahead", "tokens", "context_tokens", "attended_pairs", "logit_tokens"):
        before, after = getattr(workload, name), getattr(merged, name)
        assert np.array_equal(before.sum(axis=0), after.sum(axis=0)), name
        assert before.dtype == after.dtype, name
    assert (merged.generated_tokens, merged.num_sequences) == (workload.generated_tokens, len(lengths))
    assert (merged.counts.sum(axis=2) == 2 * merged.tokens[:, None]).all()
    groups = [lengths[at : at + batch_size] for at in range(0, len(lengths), batch_size)]
    assert merged.num_forwards == sum(map(max, groups))
    if batch_size >= len(lengths):
        parts = forwards_by_sequence(workload)
        for forward in range(merged.num_forwards):
            mine = [part[forward] for part in parts if len(part) > forward]
            assert np.array_equal(merged.counts[forward], workload.counts[mine].sum(axis=0))
            assert merged.attended_pairs[forward] == workload.attended_pairs[mine].sum()
            assert (merged.kind[forward] == D) == (D in workload.kind[mine])
            assert merged.kind[forward] in workload.kind[mine]


@pytest.mark.parametrize("context", ["block", "full"])
def test_it_does_not_matter_which_kind_of_engine_recorded_the_sequences(tmp_path: Path, context: str) -> None:
    rng = np.random.default_rng(5)
    with writer(tmp_path / "with.h5") as cached, writer(tmp_path / "without.h5", kv_cache=False) as uncached:
        for prompt_tokens, steps in ((9, [2, 3]), (2, [1, 2]), (5, [1])):
            one, other = decode(rng, prompt_tokens, steps)
            cached.append(one)
            uncached.append(other)
    with Trace.open(tmp_path / "with.h5") as one, Trace.open(tmp_path / "without.h5") as two:
        assert_same(*(trace.workload(context).batched(2) for trace in (one, two)))  # type: ignore[arg-type]


def test_layers_and_forwards_of_a_batch_can_be_chosen(tmp_path: Path) -> None:
    workload = unequal(tmp_path, "block")
    assert_same(workload.batched(2).tiled(5), workload.tiled(5).batched(2))
    cut = workload.batched(2).first(3)
    assert np.array_equal(cut.attended_pairs, workload.batched(2).attended_pairs[:3])
    assert (cut.num_sequences, cut.batch_size, cut.max_tokens) == (2, 2, 24)
    assert workload.batched(2).first(8).num_sequences == 3
    assert workload.first(3).attended_pairs.tolist() == [64, 48, 48]


def test_what_makes_no_batch_is_refused(tmp_path: Path) -> None:
    workload = unequal(tmp_path, "block")
    with pytest.raises(ValueError, match=r"batch_size\(=0\) must be >= 1"):
        workload.batched(0)
    with pytest.raises(ValueError, match="batched already, by 2"):
        workload.batched(2).batched(2)


def test_more_than_there_are_are_all_of_them(tmp_path: Path) -> None:
    workload = unequal(tmp_path, "block")
    assert_same(workload.batched(100), workload.batched(3))
    assert workload.batched(100).batch_size == 3


# --- what it costs ---


def twice(workload: Workload) -> Workload:
    """Its one sequence, and the same one again."""
    columns = {
        name: np.concatenate([getattr(workload, name)] * 2)
        for name in ("counts", "kind", "block", "step", "is_first_block", "tokens", "context_tokens", "attended_pairs")
    }
    return replace(
        workload,
        **columns,
        logit_tokens=np.tile(workload.logit_tokens, 2),
        sequence=np.repeat(np.arange(2, dtype=np.int32), workload.num_forwards),
        generated_tokens=2 * workload.generated_tokens,
        num_sequences=2,
    )


@pytest.mark.parametrize("name", ["all-host", "all-device", "static", "lru", "tide"])
@pytest.mark.parametrize("how", ["overlapped", "tide-as-coded"])
def test_two_equal_sequences_together_take_once_to_twice_the_time(name: str, how: str) -> None:
    used, model = execution(how), load_moe_config("llada2-tiny")
    with Trace.open("llada2-tiny") as trace:
        alone = trace.workload(used.context, [0]).first(40)
    params = {"popularity": alone.counts.sum(axis=0)} if name == "static" else {}

    def makespan(workload: Workload) -> int:
        budget = model.num_experts if name == "all-device" else 8
        made = policy(name, **params)
        machine = load_hardware("rtx4090")
        return timed(workload, model, machine, made, budget=budget, execution=used).makespan_ns

    together = makespan(twice(alone).batched(2))
    assert makespan(alone) <= together <= 2 * makespan(alone)


def test_sequences_of_a_batch_attend_to_themselves_alone() -> None:
    model, machine, used = load_moe_config("llada2.0-mini"), load_hardware("rtx4090"), execution("overlapped")
    costs = Costs(model, machine, used, 4096)
    tokens, context = np.array([2048, 2048]), np.array([100_000, 300])
    alone = tokens * (context + tokens)
    assert np.array_equal(costs.layer_ns(tokens, context), costs.layer_ns(tokens, context, alone))
    assert np.array_equal(costs.entry_ns(tokens, context), costs.entry_ns(tokens, context, alone))
    both = costs.layer_ns(tokens.sum(), context.sum(), alone.sum())[0]
    assert both < costs.layer_ns(tokens.sum(), context.sum())[0]
    # Bound by operations, it takes what both take: nothing is shared but the weights.
    assert both == pytest.approx(costs.layer_ns(tokens, context)[0].sum(), abs=2)


@pytest.mark.parametrize("copies", ["blocking", "background"])
def test_simulator_and_recurrence_time_batches_alike(tmp_path: Path, copies: str) -> None:
    workload = unequal(tmp_path, "block").batched(2)
    model = replace(TOY, num_layers=2, num_experts=16, num_dense_layers=1)
    used, machine = toy_execution(copies=copies), toy_hardware()
    run = simulate(workload, model, machine, policy("lru"), budget=6, execution=used, is_memory_checked=False)
    parts, busy = timed_by_hand(workload, model, machine, policy("lru"), [6, 6], used)
    assert run.layer_parts_ns == parts
    assert run.busy_ns == busy
    assert run.batch_size == 2
    ceiling = time_ceiling(workload, Costs(model, machine, used, 16), 6)
    assert ceiling.makespan_ns <= run.makespan_ns


def test_memory_is_kept_for_every_sequence_of_a_batch() -> None:
    machine, used = toy_hardware(), toy_execution()
    one = device_memory(TOY, machine, used, 2, 12, 0)
    four = device_memory(TOY, machine, used, 2, 48, 0, batch_size=4)
    assert (four.kv_cache, four.transient) == (4 * one.kv_cache, 4 * one.transient)
    assert (four.experts, four.non_experts) == (one.experts, one.non_experts)
