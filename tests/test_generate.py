"""Decoding: both cache modes agree, schedules are kept, and every forward is recorded."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from engine_cases import SMALL, small_network

from tidesim.engine import generate as decoding
from tidesim.engine.generate import Generation, Sampler, generate
from tidesim.engine.model import LLaDA2
from tidesim.errors import InputError
from tidesim.trace import ForwardKind, Trace, TraceWriter

B, MASK, END = 8, 2, 0
PREFILL, DENOISE, COMMIT = ForwardKind.PREFILL, ForwardKind.DENOISE, ForwardKind.COMMIT


@pytest.fixture(scope="module")
def network() -> LLaDA2:
    return small_network(seed=11)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(10, SMALL.vocab_size, size=length)]


def answer(
    network: LLaDA2,
    prompt: list[int],
    *,
    end_id: int = END,
    seed: int = 0,
    has_lookahead: bool = False,
    **settings: object,
) -> Generation:
    sampler = Sampler(**{"block_length": B, "steps": B, "gen_length": 16, "threshold": 0.2, **settings})
    rng = torch.Generator().manual_seed(seed)
    return generate(network, prompt, sampler, mask_id=MASK, end_id=end_id, rng=rng, has_lookahead=has_lookahead)


@pytest.mark.parametrize("num_prompt", [3, B - 1, B, B + 1, 2 * B, 2 * B + 5])
@pytest.mark.parametrize("gen_length", [16, 13])
def test_cached_and_uncached_decoding_give_the_same_tokens(network: LLaDA2, num_prompt: int, gen_length: int) -> None:
    prompt = prompt_of(num_prompt, seed=num_prompt)
    cached = answer(network, prompt, gen_length=gen_length)
    uncached = answer(network, prompt, gen_length=gen_length, kv_cache=False)
    assert cached.tokens == uncached.tokens
    assert [f.accepted_tokens for f in cached.forwards if f.kind == DENOISE] == [
        f.accepted_tokens for f in uncached.forwards
    ]


def test_without_the_commit_forward_the_cache_is_stale(network: LLaDA2, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = decoding._Decoder._forward

    def skipping(self: decoding._Decoder, block: int, step: int, kind: ForwardKind, *rest: int) -> object:
        return None if kind is COMMIT else forward(self, block, step, kind, *rest)

    honest = [answer(network, prompt_of(9, seed), gen_length=24).tokens for seed in range(4)]
    monkeypatch.setattr(decoding._Decoder, "_forward", skipping)
    assert [answer(network, prompt_of(9, seed), gen_length=24).tokens for seed in range(4)] != honest


def test_uncached_windows_grow_block_by_block(network: LLaDA2) -> None:
    # Five prompt tokens leave three masks in the first block; a threshold of 1 accepts one token a step.
    generation = answer(network, prompt_of(5), gen_length=12, threshold=1.0, kv_cache=False, end_id=-1)
    rows = [forward.routed_tokens for forward in generation.forwards]
    assert rows == [8] * 3 + [16] * 8 + [24] * 8
    assert len(generation.tokens) == 12


def test_cached_forwards_come_in_order_with_their_rows_and_context(network: LLaDA2) -> None:
    generation = answer(network, prompt_of(2 * B + 3), threshold=1.0, gen_length=13, end_id=-1)
    seen = [(f.kind, f.block, f.step, f.routed_tokens, f.context_tokens) for f in generation.forwards]
    assert seen == [
        (PREFILL, 2, 0, 16, 0),
        *[(DENOISE, 2, step, 8, 16) for step in range(5)],
        (COMMIT, 2, 5, 8, 16),
        *[(DENOISE, 3, step, 8, 24) for step in range(8)],
    ]
    assert [f.masked_tokens for f in generation.forwards if f.kind == DENOISE] == [5, 4, 3, 2, 1, *range(8, 0, -1)]
    assert all(f.wall_ns > 0 for f in generation.forwards)
    for forward, routings in zip(generation.forwards, generation.routings, strict=True):
        assert [tuple(layer.expert_ids.shape) for layer in routings] == [(forward.routed_tokens, 4)] * 2


@pytest.mark.parametrize("kv_cache", [True, False])
def test_look_ahead_is_the_next_router_on_the_input_of_this_one(kv_cache: bool) -> None:
    network = small_network(seed=4, config=replace(SMALL, num_hidden_layers=4))
    settings = {"gen_length": 20, "kv_cache": kv_cache}
    plain = answer(network, prompt_of(2 * B + 3), **settings)
    inputs: list[torch.Tensor] = []
    for moe in network.moe_layers:
        moe.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].flatten(0, 1)))
    generation = answer(network, prompt_of(2 * B + 3), has_lookahead=True, **settings)
    assert generation.tokens == plain.tokens
    routers = [moe.gate for moe in network.moe_layers]
    seen = iter(inputs)
    for routings, others in zip(generation.routings, plain.routings, strict=True):
        for layer, (routing, other) in enumerate(zip(routings, others, strict=True)):
            rows = next(seen)
            assert torch.equal(routing.expert_ids, routers[layer](rows).expert_ids)
            assert torch.equal(routing.expert_ids, other.expert_ids)
            assert torch.equal(routing.expert_weights, other.expert_weights)
            assert other.lookahead_ids is None
            if layer + 1 < len(routers):
                assert routing.lookahead_ids is not None
                assert torch.equal(routing.lookahead_ids, routers[layer + 1](rows).expert_ids)
            else:
                assert routing.lookahead_ids is None
    stored = generation.sequence_routing(has_lookahead=True).lookahead_ids
    assert stored is not None
    first = generation.routings[0][1].lookahead_ids
    assert first is not None
    assert stored.shape == (sum(forward.routed_tokens for forward in generation.forwards), 2, 4)
    assert stored[: len(first), 1].tolist() == first.tolist()


def test_looking_ahead_asks_each_router_but_the_first_once_more(network: LLaDA2) -> None:
    num_asked = Counter[int]()
    hooks = [
        moe.gate.register_forward_hook(lambda *_, layer=layer: num_asked.update([layer]))
        for layer, moe in enumerate(network.moe_layers)
    ]
    num_forwards = len(answer(network, prompt_of(5)).forwards)
    assert num_asked == {0: num_forwards, 1: num_forwards}
    answer(network, prompt_of(5), has_lookahead=True)
    assert num_asked == {0: 2 * num_forwards, 1: 3 * num_forwards}
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 40])
def test_every_block_is_filled_within_its_steps(network: LLaDA2, steps: int) -> None:
    generation = answer(network, prompt_of(B), steps=steps, threshold=1.0, end_id=-1)
    per_block = Counter(f.block for f in generation.forwards if f.kind == DENOISE)
    assert set(per_block.values()) == {min(steps, B)}
    for block in per_block:
        accepted = [f.accepted_tokens for f in generation.forwards if f.kind == DENOISE and f.block == block]
        sampler = Sampler(block_length=B, steps=steps, gen_length=16)
        assert accepted == [sampler.quota(step) for step in range(len(accepted))]
        assert sum(accepted) == B


def test_the_threshold_is_strict_and_a_low_one_accepts_everything_at_once(network: LLaDA2) -> None:
    everything = answer(network, prompt_of(B), threshold=0.0, end_id=-1)
    assert [f.accepted_tokens for f in everything.forwards if f.kind == DENOISE] == [B, B]
    one_by_one = answer(network, prompt_of(B), threshold=1.0, end_id=-1)
    assert {f.accepted_tokens for f in one_by_one.forwards if f.kind == DENOISE} == {1}


def test_the_mask_token_is_never_written(network: LLaDA2) -> None:
    for temperature in (0.0, 2.0):
        assert MASK not in answer(network, prompt_of(4), temperature=temperature, threshold=0.0, gen_length=28).tokens


def test_end_of_text_cuts_the_answer_but_not_in_the_prompt(network: LLaDA2) -> None:
    free = answer(network, prompt_of(6), gen_length=26, end_id=-1).tokens
    end = free[7]  # some token of the second block
    cut = answer(network, prompt_of(6), gen_length=26, end_id=end)
    assert cut.tokens == free[: free.index(end) + 1]
    assert max(f.block for f in cut.forwards) <= 1 + (6 + free.index(end)) // B
    with_end = [*prompt_of(5), end]
    assert len(answer(network, with_end, gen_length=10, end_id=end).tokens) >= 1


def test_greedy_decoding_ignores_the_seed_and_sampling_follows_it(network: LLaDA2) -> None:
    prompt = prompt_of(6)
    assert answer(network, prompt, seed=1).tokens == answer(network, prompt, seed=2).tokens
    hot = [answer(network, prompt, seed=seed, temperature=3.0, end_id=-1).tokens for seed in (1, 1, 2)]
    assert hot[0] == hot[1]
    assert hot[0] != hot[2]


def test_finished_blocks_are_reported_as_they_come(network: LLaDA2) -> None:
    seen: list[list[int]] = []
    sampler = Sampler(block_length=B, steps=B, gen_length=20, threshold=0.5)
    generation = generate(network, prompt_of(6), sampler, mask_id=MASK, end_id=-1, on_block=seen.append)
    assert [len(tokens) for tokens in seen] == [2, 10, 18, 20]
    assert seen[-1] == generation.tokens
    assert all(generation.tokens[: len(tokens)] == tokens for tokens in seen)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([], "empty"), ([5, MASK, 6], "mask token"), ([5, SMALL.vocab_size], "prompt ids"), ([-1], "prompt ids")],
)
def test_a_prompt_that_cannot_be_answered_is_refused(network: LLaDA2, prompt: list[int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        answer(network, prompt)


@pytest.mark.parametrize(
    "settings",
    [{"gen_length": 0}, {"steps": 0}, {"threshold": 1.5}, {"threshold": float("nan")}, {"temperature": -1.0}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Sampler(**settings)


def test_a_cached_recording_rebuilds_the_uncached_one_exactly(network: LLaDA2, tmp_path: Path) -> None:
    hf_config = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    counts = {}
    for kv_cache in (True, False):
        with TraceWriter(
            tmp_path / f"{kv_cache}.h5",
            config=hf_config,
            model_name="small",
            block_length=B,
            sampler={},
            seed=0,
            origin="recorded",
            kv_cache=kv_cache,
            has_lookahead=True,
        ) as writer:
            for length in (3, 8, 21):
                generation = answer(network, prompt_of(length), gen_length=20, kv_cache=kv_cache, has_lookahead=True)
                writer.append(generation.sequence_routing(has_lookahead=True))
        with Trace.open(tmp_path / f"{kv_cache}.h5") as trace:
            workloads = [trace.workload(context, has_lookahead=True) for context in ("block", "full")]
            counts[kv_cache] = [each for workload in workloads for each in (workload.counts, workload.lookahead)]
    for cached, uncached in zip(counts[True], counts[False], strict=True):
        np.testing.assert_array_equal(cached, uncached)
