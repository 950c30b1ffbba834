"""What the config.json of each family of networks says of its sizes, in the words of `MoEConfig`.

A family is told by `model_type`. Each has a function here that names its keys. Variants whose sizes would come out
wrong are refused: weights that are stored in fewer than 16 bits, biases and windows that no function here counts, MoE
layers that are not the last ones.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tidesim.errors import ModelError
from tidesim.moe.parts import LatentAttention, Layout

# Every published LLaDA2 checkpoint decodes in blocks of 32.
DEFAULT_BLOCK_LENGTH = 32


class _Keys:
    """The keys of one config.json. What is wrong with them is collected, and told at once by `check`."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self._name = name
        self._bad: set[str] = set()
        self._refused: list[str] = []

    def count(self, key: str, default: int | None = None) -> int:
        """The whole number >= 0 under `key`, or `default` where it is missing or null."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        self._bad.add(key)
        return 1  # so that reading goes on, and finds everything else that is wrong

    def flag(self, key: str, default: bool = False) -> bool:
        """The truth value under `key`, or `default` where it is missing or null."""
        value = default if self.config.get(key) is None else self.config[key]
        if not isinstance(value, bool):
            self.refuse(f"{key}(={value!r:.40}) must be true or false")
        return bool(value)

    def refuse(self, reason: str) -> None:
        """Keep the reason why these sizes cannot be told."""
        self._refused.append(reason)

    def head_dim(self) -> int:
        """Dimensions of a head; where they are not named, the hidden size divided among the heads."""
        num_heads = max(1, self.count("num_attention_heads"))
        even, rest = divmod(self.count("hidden_size"), num_heads)
        if rest and self.config.get("head_dim") is None:
            self._bad.add("head_dim")
        return self.count("head_dim", even)

    def check(self) -> None:
        """Raise ModelError with everything that was found wrong."""
        if self._bad:
            missing = ", ".join(sorted(self._bad))
            raise ModelError(f"{self._name}: config.json must hold whole numbers >= 0 for {missing}.")
        if self._refused:
            raise ModelError(f"{self._name}: its sizes cannot be told: {'; '.join(self._refused)}.")


def read_sizes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of `MoEConfig` but for its name and `weight_bits`, from a Hugging Face `config.json`.

    Without a `model_type` the keys of LLaDA2 are read. Raise ModelError naming every required key that is missing or
    no whole number >= 0, or saying why the sizes of this network cannot be told.
    """
    model_type = config.get("model_type", "llada2_moe")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(_unknown(config, name, model_type))
    keys = _Keys(config, name)
    block_length = keys.count("block_length", keys.count("block_size", DEFAULT_BLOCK_LENGTH))
    sizes = {"block_length": block_length, **_shared_by_all(keys), **family(keys)}
    if config.get("quantization_config") is not None:
        keys.refuse(
            "quantization_config says that its weights are stored in fewer than 16 bits, and sizes are counted at 16; "
            "take the key out of a copy of the file, and give --weight-bits for the experts"
        )
    keys.check()
    num_layers = keys.count("num_hidden_layers") - sizes["num_dense_layers"]
    return {"num_layers": num_layers, **sizes}


def _unknown(config: Mapping[str, Any], name: str, model_type: object) -> str:
    """Why a config of another family cannot be read, and how its sizes can be given by hand."""
    hand = _Keys(config, name)
    _llada2(hand), _shared_by_all(hand)
    known = ", ".join(sorted(_FAMILIES))
    try:
        hand.check()
        missing = "all of which this file has"
    except ModelError as error:
        missing = f"of which this file lacks {str(error).rpartition(' for ')[2].removesuffix('.')}"
    return (
        f"{name}: model_type {model_type!r:.60} is not known; known are {known}. Give the sizes by hand: a config.json "
        f"without model_type, with whole numbers for {', '.join(_BY_HAND)}, {missing}."
    )


_BY_HAND = (
    "num_hidden_layers",
    "first_k_dense_replace (dense layers before the MoE layers)",
    "hidden_size",
    "intermediate_size (of a dense layer)",
    "moe_intermediate_size (of one expert)",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


# --- the families ---


def _shared_by_all(keys: _Keys) -> dict[str, Any]:
    return {
        "hidden_size": keys.count("hidden_size"),
        "top_k": keys.count("num_experts_per_tok"),
        "num_heads": keys.count("num_attention_heads"),
        "vocab_size": keys.count("vocab_size"),
    }


def _llada2(keys: _Keys) -> dict[str, Any]:
    """LLaDA2.0 and 2.1, and networks described by hand."""
    _refuse_if(keys, "use_bias")
    return {
        "num_dense_layers": keys.count("first_k_dense_replace"),
        "intermediate_size": keys.count("intermediate_size"),
        "moe_intermediate_size": keys.count("moe_intermediate_size"),
        "num_experts": keys.count("num_experts"),
        "num_shared_experts": keys.count("num_shared_experts"),
        "num_kv_heads": keys.count("num_key_value_heads"),
        "head_dim": keys.count("head_dim"),
        "layout": Layout(
            qk_norm="head" if keys.flag("use_qk_norm", True) else None,
            has_qkv_bias=keys.flag("use_qkv_bias"),
            has_router_bias=keys.flag("moe_router_enable_expert_bias", True),
            is_tied=keys.flag("tie_word_embeddings"),
        ),
    }


def _llada_moe(keys: _Keys) -> dict[str, Any]:
    """LLaDA-MoE, which calls itself "llada" as the dense LLaDA does."""
    _refuse_if(keys, "attention_bias")
    if keys.config.get("shared_expert_intermediate_size"):
        keys.refuse("shared_expert_intermediate_size is set, and no published LLaDA-MoE has a shared expert")
    num_dense = _leading_dense(keys, "moe_layer_freq")
    return {
        "num_dense_layers": num_dense,
        "intermediate_size": keys.count("dense_intermediate_size", None if num_dense else 0),
        "moe_intermediate_size": keys.count("expert_intermediate_size"),
        "num_experts": keys.count("num_experts"),
        "num_shared_experts": 0,
        "num_kv_heads": keys.count("num_key_value_heads"),
        "head_dim": keys.head_dim(),
        "layout": Layout(
            qk_norm="head" if keys.flag("qk_layernorm") else None,
            has_router_bias=keys.flag("moe_router_enable_expert_bias"),
            is_tied=keys.flag("tie_word_embeddings"),
        ),
    }


def _qwen3_moe(keys: _Keys) -> dict[str, Any]:
    """Qwen3-MoE, and SDAR's diffusion networks that go on from it."""
    _refuse_if(keys, "attention_bias")
    _refuse_if(keys, "use_sliding_window")
    return {
        **_qwen_layers(keys),
        "num_shared_experts": 0,
        "head_dim": keys.head_dim(),
        "layout": Layout(has_router_bias=False, is_tied=keys.flag("tie_word_embeddings")),
    }


def _qwen2_moe(keys: _Keys) -> dict[str, Any]:
    """Qwen1.5-MoE and Qwen2-MoE: one shared expert, as wide as several routed ones, with a gate of its own."""
    _refuse_if(keys, "use_sliding_window")
    layers = _qwen_layers(keys)
    shared = keys.count("shared_expert_intermediate_size")
    num_shared, rest = divmod(shared, max(1, layers["moe_intermediate_size"]))
    if rest:
        keys.refuse(f"shared_expert_intermediate_size(={shared}) must be a multiple of moe_intermediate_size")
    return {
        **layers,
        "num_shared_experts": num_shared,
        "head_dim": keys.head_dim(),
        "layout": Layout(
            qk_norm=None,
            has_qkv_bias=keys.flag("qkv_bias", True),
            has_router_bias=False,
            has_shared_gate=shared > 0,
            is_tied=keys.flag("tie_word_embeddings"),
        ),
    }


def _mixtral(keys: _Keys) -> dict[str, Any]:
    if keys.config.get("sliding_window") is not None:
        keys.refuse("sliding_window is set, and windows of attention are not counted")
    return {
        "num_dense_layers": 0,
        "intermediate_size": 0,
        "moe_intermediate_size": keys.count("intermediate_size"),
        "num_experts": keys.count("num_local_experts"),
        "num_shared_experts": 0,
        "num_kv_heads": keys.count("num_key_value_heads"),
        "head_dim": keys.head_dim(),
        "layout": Layout(qk_norm=None, has_router_bias=False, is_tied=keys.flag("tie_word_embeddings")),
    }


def _olmoe(keys: _Keys) -> dict[str, Any]:
    _refuse_if(keys, "attention_bias")
    return {
        "num_dense_layers": 0,
        "intermediate_size": 0,
        "moe_intermediate_size": keys.count("intermediate_size"),
        "num_experts": keys.count("num_experts"),
        "num_shared_experts": 0,
        "num_kv_heads": keys.count("num_key_value_heads"),
        "head_dim": keys.head_dim(),
        "layout": Layout(qk_norm="full", has_router_bias=False, is_tied=keys.flag("tie_word_embeddings")),
    }


def _deepseek(keys: _Keys) -> dict[str, Any]:
    """DeepSeek-V2 and V3, and Kimi-K2. Layers that foretell further tokens (MTP) are not counted: nothing runs them."""
    _refuse_if(keys, "attention_bias")
    if keys.count("moe_layer_freq", 1) != 1:
        keys.refuse("moe_layer_freq must be 1: MoE layers must be the last ones, without gaps")
    latent = LatentAttention(
        query_rank=keys.count("q_lora_rank", 0),
        kv_rank=keys.count("kv_lora_rank"),
        rope_dim=keys.count("qk_rope_head_dim"),
        nope_dim=keys.count("qk_nope_head_dim"),
        value_dim=keys.count("v_head_dim"),
    )
    default = "greedy" if keys.config.get("model_type") == "deepseek_v2" else "noaux_tc"
    return {
        "num_dense_layers": keys.count("first_k_dense_replace"),
        "intermediate_size": keys.count("intermediate_size"),
        "moe_intermediate_size": keys.count("moe_intermediate_size"),
        "num_experts": keys.count("n_routed_experts"),
        "num_shared_experts": keys.count("n_shared_experts", 0),
        "num_kv_heads": keys.count("num_attention_heads"),
        "head_dim": latent.nope_dim + latent.rope_dim,
        "latent": latent,
        "layout": Layout(
            qk_norm=None,
            has_router_bias=keys.config.get("topk_method", default) == "noaux_tc",
            is_tied=keys.flag("tie_word_embeddings"),
        ),
    }


def _qwen_layers(keys: _Keys) -> dict[str, Any]:
    if keys.count("decoder_sparse_step", 1) != 1:
        keys.refuse("decoder_sparse_step must be 1: MoE layers must be the last ones, without gaps")
    dense = keys.config.get("mlp_only_layers") or []
    if dense != list(range(len(dense) if isinstance(dense, list) else 0)):
        keys.refuse(f"mlp_only_layers(={dense!r:.40}) must be the first layers: MoE layers must be the last ones")
        dense = []
    return {
        "num_dense_layers": len(dense),
        "intermediate_size": keys.count("intermediate_size", None if dense else 0),
        "moe_intermediate_size": keys.count("moe_intermediate_size"),
        "num_experts": keys.count("num_experts"),
        "num_kv_heads": keys.count("num_key_value_heads"),
    }


def _leading_dense(keys: _Keys, key: str) -> int:
    """How many layers are dense before the MoE layers begin, from a list with a 1 for each MoE layer (or nothing)."""
    kinds = keys.config.get(key)
    if kinds is None or kinds == 1:
        return 0
    if isinstance(kinds, list) and len(kinds) == keys.count("num_hidden_layers"):
        num_dense = kinds.count(0)
        if kinds == [0] * num_dense + [1] * (len(kinds) - num_dense):
            return num_dense
    keys.refuse(f"{key}(={kinds!r:.40}) must have a 0 or 1 for each layer, the 1s (MoE layers) last")
    return 0


def _refuse_if(keys: _Keys, key: str) -> None:
    if keys.flag(key):
        keys.refuse(f"{key} is true, and what it adds is not counted")


_FAMILIES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "llada": _llada_moe,
    "llada_moe": _llada_moe,
    "llada2_moe": _llada2,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "sdar_moe": _qwen3_moe,
}
