"""The network against an independent dense reference, and against every published way of getting it wrong."""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch
from engine_cases import SMALL, small_network
from torch import Tensor
from torch.nn import functional

from tidesim.engine.model import KVCache, LLaDA2, NetworkConfig, Routing, StackedExperts, block_causal_mask
from tidesim.errors import ModelError

B = 8


class Reference:
    """The same function written token by token and head by head, with a switch for each known mistake."""

    def __init__(self, network: LLaDA2, mistake: str = "") -> None:
        self.network, self.config, self.mistake = network, network.config, mistake

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.network.word_embeddings.weight[tokens]
        for layer in self.network.layers:
            x = x + self.attention(layer.attention, self.norm(x, layer.input_layernorm))
            normed = self.norm(x, layer.post_attention_layernorm)
            x = x + (self.moe(layer.mlp, normed) if hasattr(layer.mlp, "gate") else self.gated(layer.mlp, normed))
        return self.norm(x, self.network.norm) @ self.network.lm_head.weight.T

    def norm(self, x: Tensor, module: torch.nn.Module) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps) * module.weight

    def gated(self, mlp: torch.nn.Module, x: Tensor) -> Tensor:
        gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
        return (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T

    def rotate(self, vector: Tensor, position: int) -> Tensor:
        size = self.config.rotary_dim
        if self.mistake == "rotary full":
            size = self.config.head_dim
        denominator = self.config.head_dim if self.mistake == "rotary denominator" else size
        out = vector.clone()
        half = size // 2
        for j in range(half):
            angle = position * self.config.rope_theta ** (-2 * j / denominator)
            a, b = (2 * j, 2 * j + 1) if self.mistake == "rotary interleaved" else (j, j + half)
            out[a] = vector[a] * math.cos(angle) - vector[b] * math.sin(angle)
            out[b] = vector[b] * math.cos(angle) + vector[a] * math.sin(angle)
        return out

    def attention(self, module: torch.nn.Module, x: Tensor) -> Tensor:
        config, T = self.config, len(x)
        H, G, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = x @ module.query_key_value.weight.T
        if self.mistake == "qkv interleaved":
            per = H // G
            parts = qkv.view(T, G, per + 2, C)
            q, k, v = parts[:, :, :per].reshape(T, H, C), parts[:, :, per], parts[:, :, per + 1]
        else:
            q, k, v = (p.view(T, -1, C) for p in qkv.split((H * C, G * C, G * C), dim=-1))
        order = (self.turn, self.norm) if self.mistake == "norm after rotary" else (self.norm, self.turn)
        for step in order:
            q, k = step(q, module.query_layernorm), step(k, module.key_layernorm)
        out = torch.zeros(T, H, C)
        for i in range(T):
            if self.mistake == "no mask":
                seen = list(range(T))
            elif self.mistake == "token-causal mask":
                seen = list(range(i + 1))
            else:
                seen = [j for j in range(T) if j // B <= i // B]
            for h in range(H):
                g = h % G if self.mistake == "tiled heads" else h // (H // G)
                scores = torch.stack([q[i, h] @ k[j, g] for j in seen]) / math.sqrt(C)
                out[i, h] = torch.softmax(scores, 0) @ v[seen, g]
        return out.reshape(T, H * C) @ module.dense.weight.T

    def turn(self, heads: Tensor, _: torch.nn.Module) -> Tensor:
        return torch.stack([torch.stack([self.rotate(head, i) for head in row]) for i, row in enumerate(heads)])

    def moe(self, module: torch.nn.Module, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            scores = torch.sigmoid(module.gate.weight @ row)
            choice = scores if self.mistake == "no bias" else scores + module.gate.expert_bias
            chosen = self.choose(choice)
            weights = (choice if self.mistake == "bias in weights" else scores)[chosen]
            weights = weights / weights.sum() * self.config.routed_scaling_factor
            out = torch.zeros_like(row)
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up = (module.experts.gate_up[expert] @ row).chunk(2)
                out = out + weight * (module.experts.down[expert] @ (functional.silu(gate) * up))
            rows.append(out)
        return torch.stack(rows) + self.gated(module.shared_experts, x)

    def choose(self, choice: Tensor) -> list[int]:
        size = self.config.num_experts // self.config.n_group
        groups = [choice[g * size : (g + 1) * size].sort(descending=True).values for g in range(self.config.n_group)]
        worth = [float(g[0] if self.mistake == "group max" else g[:2].sum()) for g in groups]
        best = sorted(range(len(worth)), key=worth.__getitem__, reverse=True)[: self.config.topk_group]
        allowed = (
            range(len(choice))
            if self.mistake == "no groups"
            else [e for g in best for e in range(g * size, (g + 1) * size)]
        )
        return sorted(allowed, key=lambda e: float(choice[e]), reverse=True)[: self.config.num_experts_per_tok]


MISTAKES = (
    "qkv interleaved",
    "rotary interleaved",
    "rotary full",
    "rotary denominator",
    "norm after rotary",
    "tiled heads",
    "no bias",
    "bias in weights",
    "no groups",
    "group max",
    "no mask",
    "token-causal mask",
)


@pytest.fixture(scope="module")
def network() -> LLaDA2:
    return small_network(seed=1)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (3 * B,), generator=torch.Generator().manual_seed(2))


def run(network: LLaDA2, tokens: Tensor) -> Tensor:
    positions = torch.arange(len(tokens))
    with torch.inference_mode():
        hidden, _ = network(tokens[None], positions, mask=block_causal_mask(len(tokens), B))
        return network.logits(hidden[0])


def test_logits_equal_an_independent_reference(network: LLaDA2, tokens: Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(run(network, tokens), Reference(network).logits(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_known_mistake_moves_the_logits(network: LLaDA2, tokens: Tensor, mistake: str) -> None:
    with torch.inference_mode():
        wrong = Reference(network, mistake).logits(tokens)
    assert float((run(network, tokens) - wrong).abs().max()) > 0.1


def test_routed_experts_obey_the_group_limit_and_the_weights_sum_to_the_scale(network: LLaDA2, tokens: Tensor) -> None:
    with torch.inference_mode():
        _, routings = network(tokens[None], torch.arange(len(tokens)), mask=block_causal_mask(len(tokens), B))
    assert len(routings) == SMALL.num_hidden_layers - SMALL.first_k_dense_replace
    for routing in routings:
        groups = routing.expert_ids // (SMALL.num_experts // SMALL.n_group)
        for ids, in_groups in zip(routing.expert_ids.tolist(), groups.tolist(), strict=True):
            assert len(set(ids)) == SMALL.num_experts_per_tok
            assert len(set(in_groups)) <= SMALL.topk_group
        assert bool((routing.expert_weights > 0).all())
        expected = torch.full((len(tokens),), SMALL.routed_scaling_factor)
        torch.testing.assert_close(routing.expert_weights.sum(-1), expected)


def test_adding_a_constant_to_the_bias_changes_no_choice(network: LLaDA2, tokens: Tensor) -> None:
    gate = network.moe_layers[0].gate
    x = torch.randn(40, SMALL.hidden_size, generator=torch.Generator().manual_seed(3))
    before = gate(x)
    gate.expert_bias += 0.25  # exactly representable, so that no comparison is rounded differently
    after = gate(x)
    gate.expert_bias -= 0.25
    assert torch.equal(before.expert_ids, after.expert_ids)
    torch.testing.assert_close(before.expert_weights, after.expert_weights)


def test_raising_one_bias_never_lowers_that_experts_load(network: LLaDA2) -> None:
    gate = network.moe_layers[0].gate
    x = torch.randn(200, SMALL.hidden_size, generator=torch.Generator().manual_seed(4))
    saved, loads = gate.expert_bias.clone(), []
    for raised in (0.0, 0.05, 0.2, 1.0):
        gate.expert_bias[:] = saved
        gate.expert_bias[5] += raised
        loads.append(int((gate(x).expert_ids == 5).sum()))
    gate.expert_bias[:] = saved
    assert loads == sorted(loads)
    assert loads[-1] > loads[0]


def test_a_block_never_sees_later_ones_but_sees_all_of_itself(network: LLaDA2, tokens: Tensor) -> None:
    plain = run(network, tokens)
    changed = tokens.clone()
    changed[2 * B - 1] = (changed[2 * B - 1] + 1) % SMALL.vocab_size  # last token of the second block
    moved = (run(network, changed) - plain).abs().amax(-1)
    assert float(moved[:B].max()) < 1e-4
    assert float(moved[B : 2 * B - 1].min()) > 1e-4
    torch.testing.assert_close(run(network, tokens[: 2 * B]), plain[: 2 * B], atol=1e-4, rtol=1e-4)


def test_cached_forwards_equal_the_uncached_one(network: LLaDA2, tokens: Tensor) -> None:
    plain = run(network, tokens)
    cache = KVCache(SMALL, len(tokens), network.word_embeddings.weight)
    with torch.inference_mode():
        for start in range(0, len(tokens), B):
            positions = torch.arange(start, start + B)
            hidden, _ = network(tokens[None, start : start + B], positions, cache=cache)
            cache.length += B
            torch.testing.assert_close(network.logits(hidden[0]), plain[start : start + B], atol=1e-4, rtol=1e-4)


def test_rotary_frequencies_stay_float32_and_hit_the_published_values() -> None:
    mini = replace(SMALL, head_dim=128, partial_rotary_factor=0.5, rope_theta=600000.0)
    network = LLaDA2(mini).to(torch.bfloat16)
    inv_freq = network.rotary.inv_freq
    assert inv_freq.dtype == torch.float32
    assert len(inv_freq) == 32
    torch.testing.assert_close(inv_freq[[0, 1, -1]], torch.tensor([1.0, 0.65983, 2.5259e-6]), atol=1e-5, rtol=1e-4)


def test_experts_give_the_same_output_however_uneven_the_load(network: LLaDA2) -> None:
    experts = network.moe_layers[0].experts
    assert isinstance(experts, StackedExperts)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, SMALL.hidden_size, generator=generator)
    ids = torch.stack([torch.randperm(SMALL.num_experts, generator=generator)[:4] for _ in range(64)])
    ids[:60] = torch.tensor([3, 9, 27, 1])  # sixty rows crowd onto four experts
    routing = Routing(ids, torch.rand(64, 4, generator=generator))
    together = experts(x, routing)
    alone = torch.cat(
        [experts(x[i : i + 1], Routing(ids[i : i + 1], routing.expert_weights[i : i + 1])) for i in range(64)]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("n_group"), "n_group"),
        (lambda c: c.update(hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda c: c.update(rope_scaling={"type": "yarn"}), "rope_scaling"),
        (lambda c: c.update(expert_capacity=48), "expert_capacity=48"),
    ],
)
def test_a_config_of_another_network_is_refused(change: Callable[[dict[str, object]], object], said: str) -> None:
    config: dict[str, object] = json.loads(
        json.dumps({name: getattr(SMALL, name) for name in NetworkConfig.__dataclass_fields__})
    )
    change(config)
    with pytest.raises(ModelError, match=said):
        NetworkConfig.from_hf(config)
