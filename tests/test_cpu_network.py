"""The network on cores computes what the PyTorch modules compute."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from engine_cases import SMALL, small_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tidesim.engine import cores as cores_module
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_network import CpuLikeliest, on_cores
from tidesim.engine.layer_kernel import choose_experts
from tidesim.engine.model import KVCache, Likeliest, LLaDA2, Router, Routing, block_causal_mask
from tidesim.engine.tiles import no_progress


@pytest.fixture(scope="module")
def cores() -> Cores:
    return Cores(1)


@pytest.fixture
def every_call_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small it is."""
    monkeypatch.setattr(cores_module, "_LEAST_SHARE", 1)


def both(cores: Cores, seed: int = 3) -> tuple[LLaDA2, LLaDA2]:
    """The same network twice: as PyTorch runs it, and on cores."""
    plain, compiled = small_network(seed), small_network(seed)
    on_cores(compiled, cores)
    return plain, compiled


@pytest.mark.parametrize("num_tokens", [1, 8, 23, 24])
def test_hidden_states_logits_and_routing_agree(cores: Cores, num_tokens: int) -> None:
    plain, compiled = both(cores)
    tokens = torch.randint(SMALL.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    positions, mask = torch.arange(num_tokens), block_causal_mask(num_tokens, 8)
    with torch.inference_mode():
        expected, routings = plain(tokens, positions, mask, has_lookahead=True)
        found, others = compiled(tokens, positions, mask, has_lookahead=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled.logits(found), plain.logits(expected), rtol=1e-4, atol=1e-3)
    for one, other in zip(routings, others, strict=True):
        assert torch.equal(one.expert_ids, other.expert_ids)
        torch.testing.assert_close(one.expert_weights, other.expert_weights, rtol=1e-4, atol=1e-5)
    assert routings[0].lookahead_ids is not None
    assert others[0].lookahead_ids is not None
    assert torch.equal(routings[0].lookahead_ids, others[0].lookahead_ids)


def test_keys_and_values_go_behind_what_the_cache_holds(cores: Cores) -> None:
    plain, compiled = both(cores)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(SMALL.vocab_size, (1, 24), generator=generator)
    caches = [KVCache(SMALL, 24, network.norm.weight) for network in (plain, compiled)]
    with torch.inference_mode():
        for start in (0, 8, 16):
            rows = slice(start, start + 8)
            results = [
                network(tokens[:, rows], torch.arange(start, start + 8), None, cache)[0]
                for network, cache in zip((plain, compiled), caches, strict=True)
            ]
            torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
            for cache in caches:
                cache.length += 8
    for one, other in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_row_is_the_same_to_the_last_bit_with_a_cache_and_without(
    num_threads: int, every_call_is_shared: None
) -> None:
    """Also whatever else is computed beside it, and on however many threads."""
    network, alone = small_network(3), small_network(3)
    tokens = torch.randint(SMALL.vocab_size, (1, 24), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(24)
    with torch.inference_mode(), Cores(num_threads) as cores, Cores(1) as one:
        for each, its_cores in ((network, cores), (alone, one)):
            on_cores(each, its_cores)
            for moe in each.moe_layers:
                del moe.experts
                moe.experts = lambda x, routing: x * routing.expert_weights[:, :1]
        together = alone(tokens, positions, block_causal_mask(24, 8))
        cache = KVCache(SMALL, 24, network.norm.weight)
        for start in (0, 8, 16):
            rows = slice(start, start + 8)
            hidden, routings = network(tokens[:, rows], positions[rows], None, cache)
            cache.length += 8
            assert torch.equal(hidden, together[0][:, rows])
            for found, expected in zip(routings, together[1], strict=True):
                assert torch.equal(found.expert_ids, expected.expert_ids[rows])
                assert torch.equal(found.expert_weights, expected.expert_weights[rows])
            assert torch.equal(network.logits(hidden), alone.logits(together[0])[:, rows])


def routed(router: Router, x: torch.Tensor) -> Routing:
    """What a layer of compiled code would choose for x [T, D]."""
    ids = np.empty((len(x), router.top_k), np.int64)
    weights = np.empty((len(x), router.top_k), np.float32)
    logits = functional.linear(x, router.weight).detach().numpy()
    bias = router.expert_bias.numpy()
    choose_experts(no_progress(), 0, logits, bias, router.num_groups, router.top_groups, router.scale, ids, weights)
    return Routing(torch.from_numpy(ids), torch.from_numpy(weights))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 20))
def test_the_router_chooses_the_same_experts(seed: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = Router(SMALL)
    router.weight.data.normal_(0, 0.3, generator=generator)
    router.expert_bias.normal_(0, 0.3, generator=generator)
    x = torch.randn(num_rows, SMALL.hidden_size, generator=generator)
    with torch.inference_mode():
        expected, found = router(x), routed(router, x)
    assert torch.equal(found.expert_ids, expected.expert_ids)
    torch.testing.assert_close(found.expert_weights, expected.expert_weights, rtol=1e-4, atol=1e-6)


def test_equal_scores_go_to_the_lower_id() -> None:
    router = Router(SMALL)
    router.weight.data.zero_()
    found = routed(router, torch.zeros(2, SMALL.hidden_size))
    assert found.expert_ids.tolist() == [[0, 1, 2, 3]] * 2
    np.testing.assert_allclose(found.expert_weights.sum(1), SMALL.routed_scaling_factor, rtol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_likeliest_token_has_its_softmax_probability(num_threads: int, every_call_is_shared: None) -> None:
    logits = 5 * torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = float("-inf")
    logits[3, 10] = logits[3, 700] = 40.0
    with Cores(num_threads) as cores:
        expected, found = Likeliest()(logits), CpuLikeliest(cores)(logits)
    assert torch.equal(found[0], expected[0])
    assert found[0][3] == 10
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
