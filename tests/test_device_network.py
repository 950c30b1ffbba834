"""The network of an accelerator, with the CPU in its place: what the plain network computes, captured or not."""

import pytest

pytest.importorskip("torch")

import torch
from accelerator_stand_in import StandIn
from engine_cases import SMALL, small_network

from tidesim.engine.device_network import MOST_ROOMS, DeviceNetwork
from tidesim.engine.model import Experts, KVCache, LLaDA2, Routing, block_causal_mask

B = 8
L = SMALL.num_hidden_layers - SMALL.first_k_dense_replace


class OnHost:
    """Experts that are told on the host which of them were chosen, as those of the engine are."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts

    def __call__(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self._experts(x, Routing(routing.expert_ids.clone(), routing.expert_weights.clone()))


def device_network(has_graphs: bool) -> DeviceNetwork:
    network = DeviceNetwork(small_network(seed=3), StandIn(has_graphs))
    for moe in network.moe_layers:
        experts = moe.experts
        del moe.experts  # a module cannot be replaced by what is none
        moe.experts = OnHost(experts)
    return network


def forwards(network: LLaDA2, tokens: torch.Tensor, is_cached: bool) -> list[tuple[torch.Tensor, list[Routing]]]:
    """Prefill of two blocks, two steps and a commit of each other block; or, without a cache, the same as a whole."""
    size = len(tokens)
    positions, mask = torch.arange(size), block_causal_mask(size, B)
    cache = network.new_cache(size) if is_cached else None
    made = []

    def forward(start: int, stop: int) -> None:
        rows = slice(start, stop)
        needs_mask = stop - start > B
        shown = mask[rows, :stop] if needs_mask else None
        hidden, routings = network(tokens[None, rows], positions[rows], shown, cache)
        made.append((hidden.clone(), routings))

    with torch.inference_mode():
        if cache is not None:
            forward(0, 2 * B)
            cache.length = 2 * B
        for block in range(2, size // B):
            first = block * B if cache is not None else 0
            for _ in range(3):
                forward(first, (block + 1) * B)
            if cache is not None:
                cache.length += B
    return made


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "whole"])
@pytest.mark.parametrize("has_graphs", [True, False], ids=["graphs", "eager"])
def test_it_computes_what_the_plain_network_does(has_graphs: bool, is_cached: bool, monkeypatch) -> None:
    monkeypatch.setattr("tidesim.engine.device_network._SHORTEST_SPAN", 32)  # several spans in one sequence
    network = device_network(has_graphs)
    plain = small_network(seed=3)
    for seed, num_blocks in ((0, 7), (1, 5), (2, 9)):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(SMALL.vocab_size, (num_blocks * B,), generator=generator)
        for found, expected in zip(
            forwards(network, tokens, is_cached), forwards(plain, tokens, is_cached), strict=True
        ):
            torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
            assert len(found[1]) == L
            for one, other in zip(found[1], expected[1], strict=True):
                assert torch.equal(one.expert_ids, other.expert_ids)
                torch.testing.assert_close(one.expert_weights, other.expert_weights, atol=1e-4, rtol=1e-4)
    assert len(network._rooms) <= MOST_ROOMS


def test_a_block_is_captured_once_for_each_span_and_a_prefill_never() -> None:
    network = device_network(has_graphs=True)
    forwards(network, torch.arange(7 * B), is_cached=True)
    (room,) = network._rooms.values()
    assert (room.kind.num_rows, room.kind.span, len(room.again)) == (B, 64, L + 1)
    again = list(room.again)
    forwards(network, torch.arange(8 * B), is_cached=True)
    assert room.again == again


def test_a_longer_cache_is_another_and_a_shorter_one_the_same() -> None:
    network = device_network(has_graphs=True)
    cache = network.new_cache(100)
    assert cache.keys[0].shape == (1, SMALL.num_key_value_heads, 128, SMALL.head_dim)
    cache.length = 8
    assert network.new_cache(128) is cache
    assert cache.length == 0
    assert network.new_cache(129) is not cache


def test_a_cache_of_somebody_else_is_used_and_not_captured() -> None:
    network = device_network(has_graphs=True)
    own, other = network.new_cache(64), KVCache(SMALL, 64, network.norm.weight)
    for cache in (own, other):
        network(torch.arange(B)[None], torch.arange(B), None, cache)
    assert torch.equal(own.keys[-1], other.keys[-1])
    assert len(network._rooms) == 1


def test_several_sequences_are_refused() -> None:
    network = device_network(has_graphs=False)
    with pytest.raises(ValueError, match="2 sequences"):
        network(torch.zeros(2, B, dtype=torch.long), torch.arange(B))
