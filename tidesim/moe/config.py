"""The sizes of one network, and the parameters, bytes and operations that follow from them.

`MoEConfig` knows nothing about hardware or weights. What it assumes of a network: grouped-query attention or DeepSeek's
latent one, dense first layers, then MoE layers with one router, routed experts of three matrices (gate, up, down) and
an always-on shared expert. `families` reads its fields from the `config.json` of a Hugging Face model folder.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from tidesim.errors import ModelError
from tidesim.moe.families import DEFAULT_BLOCK_LENGTH, read_sizes
from tidesim.moe.parts import LLADA2_LAYOUT, LatentAttention, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Sizes of one network. Counts of layers are split: `num_dense_layers` first, then `num_layers` MoE layers.

    `weight_bits` scales the bytes of routed experts only (16 as published), for what-if questions about
    quantised experts; everything else stays at 16 bits. `latent` stands in the place of keys and values by head;
    `num_kv_heads` and `head_dim` are then those of the queries.
    """

    name: str
    num_dense_layers: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    num_shared_experts: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    block_length: int = DEFAULT_BLOCK_LENGTH
    weight_bits: int = 16
    layout: Layout = LLADA2_LAYOUT
    latent: LatentAttention | None = None

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8, 16):
            raise ModelError(f"weight_bits(={self.weight_bits}) must be 4, 8 or 16.")
        if self.num_layers < 1:
            raise ModelError(f"{self.name}: the network has no MoE layer, so there is no expert to place.")
        if not 0 < self.top_k <= self.num_experts:
            raise ModelError(f"top_k(={self.top_k}) must be in 1..num_experts(={self.num_experts}).")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], name: str) -> Self:
        """Read the sizes from a Hugging Face `config.json`. Unknown keys are ignored, as checkpoints add their own.

        Raise ModelError naming every required key that is missing or is not a whole number >= 0, or saying why the
        sizes of this network cannot be told.
        """
        return cls(name=name, **read_sizes(config, name))

    def with_weight_bits(self, weight_bits: int) -> Self:
        """The same network with its routed experts stored at `weight_bits` (4, 8 or 16) per weight."""
        return replace(self, weight_bits=weight_bits)

    def sizes(self) -> dict[str, Any]:
        """Every field but the name, ready for JSON. Parts that are as in LLaDA2 are left out, so that what was written
        before there were others stays the same.
        """
        mine = asdict(self)
        del mine["name"]
        for part, usual in (("layout", LLADA2_LAYOUT), ("latent", None)):
            if getattr(self, part) == usual:
                del mine[part]
        return mine

    # --- parameters ---------------------------------------------------------------------------------------

    @property
    def attention_params(self) -> int:
        """Parameters of one layer's attention with its norms: queries, keys, values, output, and two layer norms."""
        layer_norms = 2 * self.hidden_size
        if self.latent is not None:
            return layer_norms + self.latent.params(self.hidden_size, self.num_heads)
        num_projected = self.num_heads + 2 * self.num_kv_heads
        projections = (num_projected + self.num_heads) * self.head_dim * self.hidden_size
        norms = {None: 0, "head": 2, "full": self.num_heads + self.num_kv_heads}[self.layout.qk_norm] * self.head_dim
        biases = num_projected * self.head_dim if self.layout.has_qkv_bias else 0
        return projections + layer_norms + norms + biases

    @property
    def router_params(self) -> int:
        """Parameters of one router: one row per expert, and the expert bias where there is one."""
        return self.num_experts * (self.hidden_size + self.layout.has_router_bias)

    @property
    def shared_params(self) -> int:
        """Parameters of one layer's shared expert: one gated MLP, `num_shared_experts` times as wide, and its gate."""
        gate = self.hidden_size * self.layout.has_shared_gate
        return 3 * self.hidden_size * self.moe_intermediate_size * self.num_shared_experts + gate

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: gate, up and down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def dense_mlp_params(self) -> int:
        """Parameters of the MLP of one dense layer."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def vocab_params(self) -> int:
        """Parameters of the embedding, and as many again of lm_head unless they are tied."""
        return self.vocab_size * self.hidden_size

    @property
    def non_expert_params(self) -> int:
        """Parameters outside the routed experts: what always lives on the device."""
        layers = self.num_dense_layers + self.num_layers
        moe = self.num_layers * (self.router_params + self.shared_params)
        dense = self.num_dense_layers * self.dense_mlp_params
        vocab = self.vocab_params * (1 if self.layout.is_tied else 2)
        return layers * self.attention_params + moe + dense + vocab + self.hidden_size

    @property
    def total_params(self) -> int:
        """Parameters of the whole network."""
        return self.non_expert_params + self.num_layers * self.num_experts * self.expert_params

    @property
    def attention_flops_per_pair(self) -> int:
        """Operations of one query and one token that it attends to, in one layer: the score, and the sum of values."""
        if self.latent is not None:
            return self.latent.flops_per_pair(self.num_heads)
        return 4 * self.num_heads * self.head_dim

    # --- bytes --------------------------------------------------------------------------------------------

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert, at `weight_bits` per weight."""
        return self.expert_params * self.weight_bits // 8

    @property
    def non_expert_bytes(self) -> int:
        """Bytes of everything outside the routed experts, at 16 bits per weight."""
        return 2 * self.non_expert_params

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of keys and values that one token leaves in one layer's KV cache."""
        if self.latent is not None:
            return 2 * self.latent.cached_width
        return 2 * 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in the KV cache, over all layers."""
        return self.kv_bytes_per_token_layer * (self.num_dense_layers + self.num_layers)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state: what a missed token moves to the host, and back."""
        return 2 * self.hidden_size

    def experts_bytes(self, budget: int) -> int:
        """Bytes of `budget` experts in each MoE layer."""
        return self.num_layers * budget * self.expert_bytes
