"""The LLaDA2 network (LLaDA2.0 and 2.1): one file that shows its shapes.

Letters: N sequences, T tokens, D hidden size, V vocabulary, H query heads, G key/value heads, C head size,
L MoE layers, E experts, K top-k, I expert width, S cached tokens.

All weights are `[out, in]`. Three roundings are part of the architecture and are kept: a norm rounds to the model
dtype before it multiplies its weight; the router works in float32 throughout; the K expert outputs of a token are
summed in float32, in the order of their scores, and rounded once. Source: LLaDA2.0 technical report and the
published `LLaDA2MoeModelLM` layout of its checkpoints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidesim.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """What the network computes, read from a Hugging Face `config.json`; field names are those of the file."""

    num_hidden_layers: int
    first_k_dense_replace: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    partial_rotary_factor: float
    rope_theta: float
    rms_norm_eps: float
    vocab_size: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Take our fields from `config`; unknown keys are ignored, since every exporter adds its own.

        Raise ModelError for a missing field or for a variant of the architecture that this file does not compute.
        """
        missing = sorted(name for name in cls.__dataclass_fields__ if config.get(name) is None)
        if missing:
            raise ModelError(f"config.json lacks {', '.join(missing)}; a LLaDA2 MoE config is expected.")
        unsupported = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "rope_scaling": config.get("rope_scaling") is not None,
            "use_bias": bool(config.get("use_bias", False)),
            "use_qkv_bias": bool(config.get("use_qkv_bias", False)),
            "use_qk_norm": not config.get("use_qk_norm", True),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "expert_capacity": config.get("expert_capacity") is not None,
        }
        wrong = [f"{key}={config[key]!r}" for key, is_wrong in unsupported.items() if is_wrong]
        if wrong:
            raise ModelError(f"config.json asks for {', '.join(wrong)}, which this network (LLaDA2.0/2.1) has not.")
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that rotate; the others pass through."""
        return int(self.head_dim * self.partial_rotary_factor)


class Routing(NamedTuple):
    """What one MoE layer chose: ids [T, K] in descending score, weights [T, K] float32 that sum to the scale.

    `lookahead_ids` [T, K], where they were asked for: what the router of the next layer would choose for the input of
    this one. The last layer has none.
    """

    expert_ids: Tensor
    expert_weights: Tensor
    lookahead_ids: Tensor | None = None


class KVCache:
    """Keys and values of the finished blocks, per layer: [N, G, max_tokens, C]. `length` tokens are filled."""

    def __init__(self, config: NetworkConfig, max_tokens: int, like: Tensor, num_sequences: int = 1) -> None:
        shape = (num_sequences, config.num_key_value_heads, max_tokens, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.length = 0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class Rotary:
    """Rotation tables by absolute position. The frequencies stay float32 whatever the model is cast to."""

    def __init__(self, config: NetworkConfig) -> None:
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
        self.inv_freq = 1.0 / config.rope_theta**exponents  # [C' / 2], C' the rotating part of a head

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None] * self.inv_freq.to(positions.device)  # [T, C' / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [T, C']
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of each head, halves paired (not neighbours). x [N, heads, T, C]."""
    size = cos.shape[-1]
    turning, still = torch.split(x, [size, x.shape[-1] - size], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    return torch.cat((turning * cos + half * sin, still), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: query head h reads key/value head h // (H / G)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=False)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        N, T, _ = x.shape
        heads = self.query_key_value(x).view(N, T, -1, self.head_dim).transpose(1, 2)  # [N, H + 2G, T, C]
        query, key, value = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        query = rotate(self.query_layernorm(query), *rotary)  # [N, H, T, C]
        key = rotate(self.key_layernorm(key), *rotary)  # [N, G, T, C]
        if cache is not None:
            # The rows go in behind the finished blocks; only the caller moves `length`, and so keeps or drops them.
            end = cache.length + T
            cache.keys[layer][:, :, cache.length : end] = key
            cache.values[layer][:, :, cache.length : end] = value
            key, value = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]  # [N, G, S + T, C]
        repeats = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # [N, H, T, C]
        return cast(Tensor, self.dense(mixed.transpose(1, 2).reshape(N, T, -1)))


class MLP(nn.Module):
    """Gated MLP: the dense layers' feed-forward part, and the shared expert."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Router(nn.Module):
    """Sigmoid router with group limit. The expert bias takes part in the choice, never in the weights."""

    expert_bias: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.num_groups, self.top_groups = config.n_group, config.topk_group
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor

    def forward(self, x: Tensor) -> Routing:
        scores = torch.sigmoid(functional.linear(x.float(), self.weight.float()))  # [T, E]
        choice = scores.detach() + self.expert_bias.float()
        groups = choice.view(len(x), self.num_groups, -1)  # [T, groups, E / groups]
        group_scores = groups.topk(2, dim=-1).values.sum(-1)  # a group is worth its two best experts
        kept = group_scores.topk(self.top_groups, dim=-1).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        choice = groups.masked_fill(dropped[:, :, None], float("-inf")).flatten(1)  # [T, E]
        expert_ids = choice.topk(self.top_k, dim=-1).indices  # [T, K]
        weights = scores.gather(1, expert_ids)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(expert_ids, weights * self.scale)


class Experts(Protocol):
    """The routed experts of one layer, wherever they live."""

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's expert outputs. x [T, D] -> [T, D] float32."""


class StackedExperts(nn.Module):
    """All experts of a layer in two tensors, run as padded batched matmuls; trainable.

    The load is uneven (masked positions look alike, and so share experts), so experts are sorted by load and each part
    of `PARTS` is padded to its own busiest expert; one padding for all would multiply the work.
    """

    PARTS = (1 / 32, 1 / 8, 1 / 2, 1.0)  # where the parts end, as shares of the experts from the busiest on

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        E, D, I = config.num_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.gate_up = nn.Parameter(torch.empty(E, 2 * I, D))
        self.down = nn.Parameter(torch.empty(E, D, I))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        E, (T, K) = len(self.gate_up), routing.expert_ids.shape
        pair_experts = routing.expert_ids.flatten()  # [T * K]
        counts = torch.bincount(pair_experts, minlength=E)
        by_load = counts.argsort(descending=True, stable=True)  # [E]
        parts = self._parts(counts[by_load].tolist())
        # Where each expert's rows begin in the padded batch, and from there where each pair's row stands.
        first_row = torch.empty_like(counts)
        num_rows = 0
        for start, stop, rows in parts:
            first_row[by_load[start:stop]] = num_rows + rows * torch.arange(stop - start, device=x.device)
            num_rows += rows * (stop - start)
        by_expert = pair_experts.argsort(stable=True)
        sorted_experts = pair_experts[by_expert]
        rank = torch.arange(T * K, device=x.device) - (counts.cumsum(0) - counts)[sorted_experts]
        slots = torch.empty_like(pair_experts)
        slots[by_expert] = first_row[sorted_experts] + rank
        tokens = torch.full((num_rows,), T, device=x.device, dtype=torch.long)  # T: the zero row that pads
        tokens[slots] = torch.arange(T * K, device=x.device) // K
        padded = torch.cat((x, x.new_zeros(1, x.shape[1]))).index_select(0, tokens)  # [num_rows, D]
        used = by_load[: parts[-1][1]]
        widths = [stop - start for start, stop, _ in parts]
        batches = torch.split(padded, [width * rows for width, (_, _, rows) in zip(widths, parts, strict=True)])
        gate_ups = torch.split(self.gate_up.index_select(0, used).transpose(1, 2), widths)
        downs = torch.split(self.down.index_select(0, used).transpose(1, 2), widths)
        outputs = []
        for batch, gate_up, down in zip(batches, gate_ups, downs, strict=True):
            gate, up = torch.bmm(batch.view(len(gate_up), -1, x.shape[1]), gate_up).chunk(2, dim=-1)  # [part, rows, I]
            outputs.append(torch.bmm(functional.silu(gate) * up, down).flatten(0, 1))  # [part * rows, D]
        picked = torch.cat(outputs).index_select(0, slots).view(T, K, -1).float()  # [T, K, D]
        return (picked * routing.expert_weights[:, :, None]).sum(1)  # [T, D]

    def _parts(self, loads: list[int]) -> list[tuple[int, int, int]]:
        """(first, last + 1, rows) of each part of the experts sorted by load; idle experts are in none."""
        num_used = sum(load > 0 for load in loads)
        ends = sorted({min(num_used, math.ceil(share * len(loads))) for share in self.PARTS})
        return [(start, stop, loads[start]) for start, stop in pairwise([0, *ends])]


class MappedExperts:
    """Experts that stay in the mapped checkpoint file and are read one by one as they are routed to.

    Nothing is copied ahead: the operating system pages weights in, so a checkpoint larger than memory runs.
    `weights[expert]` is the (gate, up, down) of one expert, in the file's dtype.
    """

    def __init__(self, weights: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.weights = weights

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        outputs = x.new_zeros((*routing.expert_ids.shape, x.shape[1]))  # [T, K, D]
        for expert in set(routing.expert_ids.flatten().tolist()):
            tokens, slots = torch.where(routing.expert_ids == expert)
            gate, up, down = (weight.to(x.device, x.dtype) for weight in self.weights[expert])
            rows = x[tokens]
            hidden = functional.silu(functional.linear(rows, gate)) * functional.linear(rows, up)
            outputs[tokens, slots] = functional.linear(hidden, down)
        return (outputs.float() * routing.expert_weights[:, :, None]).sum(1)


class MoE(nn.Module):
    """Router, routed experts and shared expert of one layer. `experts` is set by whoever loads the weights."""

    experts: Experts

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, x: Tensor, next_router: Router | None = None) -> tuple[Tensor, Routing]:
        rows = x.flatten(0, 1)  # [N * T, D]
        routing = look_ahead(self.gate(rows), rows, next_router)
        routed = self.experts(rows, routing).to(x.dtype).view(x.shape)
        return routed + self.shared_experts(x), routing


def look_ahead(routing: Routing, x: Tensor, next_router: Router | None) -> Routing:
    """`routing` of the rows x [T, D], with what `next_router` would choose for them, if there is one."""
    if next_router is None:
        return routing
    return routing._replace(lookahead_ids=next_router(x).expert_ids)


class Layer(nn.Module):
    def __init__(self, config: NetworkConfig, is_dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MLP | MoE = MLP(config.hidden_size, config.intermediate_size) if is_dense else MoE(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        next_router: Router | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.input_layernorm(x), rotary, mask, cache, layer)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, routing = self.mlp(normed, next_router)
            return x + out, routing
        return x + self.mlp(normed), None


class Likeliest(nn.Module):
    """The likeliest token of each row of logits and its probability. [B, V] -> [B], [B]."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(logits, dim=-1)
        tokens = probabilities.argmax(dim=-1)
        return tokens, probabilities.gather(1, tokens[:, None])[:, 0]


class LLaDA2(nn.Module):
    """The network: tokens in, hidden states and each MoE layer's routing out; `logits` for the rows that need them."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, is_dense=layer < config.first_k_dense_replace) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.likeliest = Likeliest()
        self.rotary = Rotary(config)

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE parts, in layer order."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        has_lookahead: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """Hidden states [N, T, D] after the final norm, and the routing of every MoE layer (rows N * T).

        `mask` [T, S + T] is True where a token may look; None lets every token see all. With a `cache` the keys and
        values are written behind its `length`; add T to `length` to keep them. With `has_lookahead` each layer's
        routing also holds what the next router makes of its input.
        """
        x = self.word_embeddings(tokens)  # [N, T, D]
        rotary = self.rotary.tables(positions, x.dtype)
        next_routers = [moe.gate for moe in self.moe_layers[1:]] if has_lookahead else []
        routings: list[Routing] = []
        for index, layer in enumerate(self.layers):
            next_router = next_routers[len(routings)] if len(routings) < len(next_routers) else None
            x, routing = layer(x, rotary, mask, cache, index, next_router)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings

    def new_cache(self, max_tokens: int) -> KVCache:
        """An empty cache for a sequence of `max_tokens` tokens; those of earlier sequences may be used no more."""
        return KVCache(self.config, max_tokens, self.norm.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, computed in the model dtype and handed out in float32. [..., D] -> [..., V]."""
        return cast(Tensor, self.lm_head(hidden)).float()


def block_causal_mask(num_tokens: int, block_length: int, device: torch.device | None = None) -> Tensor:
    """[T, T] bool: token i may look at token j iff j's block is not later than i's."""
    blocks = torch.arange(num_tokens, device=device) // block_length
    return blocks[:, None] >= blocks[None, :]
