"""The shape of a mixture-of-experts network: how many parameters, bytes and operations each part has.

`MoEConfig` is read from the `config.json` of a Hugging Face model folder and knows nothing about hardware or
weights. Sizes follow the LLaDA2 architecture: grouped-query attention, dense first layers, then MoE layers with
one router, routed experts of three matrices (gate, up, down) and an always-on shared expert.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tidesim.errors import ModelError
from tidesim.shipped import find_shipped

# Field of MoEConfig -> key of config.json. A checkpoint may carry more keys; those are not ours to judge.
_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "num_shared_experts": "num_shared_experts",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
}
_DEFAULT_BLOCK_LENGTH = 32  # every published LLaDA2 checkpoint decodes in blocks of 32


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Sizes of one network. Counts of layers are split: `num_dense_layers` first, then `num_layers` MoE layers.

    `weight_bits` scales the bytes of routed experts only (16 as published), for what-if questions about
    quantised experts; everything else stays at 16 bits.
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
    block_length: int = _DEFAULT_BLOCK_LENGTH
    weight_bits: int = 16

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

        Raise ModelError naming every required key that is missing or is not a whole number >= 0.
        """
        wanted = {**_KEYS, "num_hidden_layers": "num_hidden_layers", "first_k_dense_replace": "first_k_dense_replace"}
        values: dict[str, Any] = {field: config.get(key) for field, key in wanted.items()}
        bad = [wanted[field] for field, value in values.items() if not _is_count(value)]
        if bad:
            raise ModelError(f"{name}: config.json must hold whole numbers >= 0 for {', '.join(sorted(bad))}.")
        total, dense = values.pop("num_hidden_layers"), values.pop("first_k_dense_replace")
        block_length = config.get("block_length", _DEFAULT_BLOCK_LENGTH)
        return cls(name=name, num_dense_layers=dense, num_layers=total - dense, block_length=block_length, **values)

    def with_weight_bits(self, weight_bits: int) -> Self:
        """The same network with its routed experts stored at `weight_bits` (4, 8 or 16) per weight."""
        return replace(self, weight_bits=weight_bits)

    # --- parameters ---------------------------------------------------------------------------------------

    @property
    def attention_params(self) -> int:
        """Parameters of one layer's attention with its norms: qkv, output, two layer norms, q and k norms."""
        projections = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        return projections + 2 * self.hidden_size + 2 * self.head_dim

    @property
    def router_params(self) -> int:
        """Parameters of one router: one row per expert and the expert bias."""
        return self.num_experts * self.hidden_size + self.num_experts

    @property
    def shared_params(self) -> int:
        """Parameters of one layer's shared expert: one gated MLP, `num_shared_experts` times as wide."""
        return 3 * self.hidden_size * self.moe_intermediate_size * self.num_shared_experts

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
        """Parameters of the embedding, and as many again of lm_head."""
        return self.vocab_size * self.hidden_size

    @property
    def non_expert_params(self) -> int:
        """Parameters outside the routed experts: what always lives on the device."""
        layers = self.num_dense_layers + self.num_layers
        moe = self.num_layers * (self.router_params + self.shared_params)
        dense = self.num_dense_layers * self.dense_mlp_params
        return layers * self.attention_params + moe + dense + 2 * self.vocab_params + self.hidden_size

    @property
    def total_params(self) -> int:
        """Parameters of the whole network."""
        return self.non_expert_params + self.num_layers * self.num_experts * self.expert_params

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


def load_moe_config(name: str) -> MoEConfig:
    """The `MoEConfig` of a model folder, a `config.json`, or a shipped model's name ("llada2.0-mini").

    Raise ModelError if there is no such model or its config.json cannot be read.
    """
    path = find_shipped("models", name, error=ModelError)
    return MoEConfig.from_hf(read_hf_config(path), (path if path.is_dir() else path.parent).resolve().name)


def read_hf_config(path: Path) -> dict[str, Any]:
    """The config.json at `path`, or inside the folder `path`. Raise ModelError if it is missing or not JSON."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no config.json; a Hugging Face model folder is expected.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: a JSON object is expected, not {type(config).__name__}.")
    return config


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
