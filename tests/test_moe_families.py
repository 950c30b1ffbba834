"""Sizes of the families of networks: totals against those published, and configs whose sizes cannot be told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidesim.errors import ModelError
from tidesim.moe import MoEConfig, load_moe_config, read_hf_config
from tidesim.shipped import find_shipped

LLADA2 = read_hf_config(find_shipped("models", "llada2.0-mini"))
LLADA_MOE = read_hf_config(find_shipped("models", "llada-moe-7b-a1b"))
SDAR = read_hf_config(find_shipped("models", "sdar-30b-a3b"))
# The keys that matter of each model's config.json on Hugging Face.
QWEN3_30B = {**SDAR, "model_type": "qwen3_moe"}
QWEN3_235B = {
    **QWEN3_30B,
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
}
QWEN15_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 32768,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "vocab_size": 32000,
}
OLMOE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
DEEPSEEK_V2 = {
    **DEEPSEEK_V3,
    "model_type": "deepseek_v2",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "first_k_dense_replace": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V2,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "q_lora_rank": None,
    "topk_method": "greedy",
}
FAMILIES = {
    "llada2_moe": LLADA2,
    "llada": LLADA_MOE,
    "qwen3_moe": QWEN3_30B,
    "qwen2_moe": QWEN15_MOE,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v2": DEEPSEEK_V2_LITE,
}


def read(config: dict[str, object]) -> MoEConfig:
    return MoEConfig.from_hf(config, "m")


@pytest.mark.parametrize(
    ("config", "total", "published_billions"),
    [
        # The last column is what each model card or README says, in billions.
        (LLADA_MOE, 7_356_880_896, 7),
        (QWEN3_30B, 30_532_122_624, 30.5),
        (QWEN3_235B, 235_093_634_560, 235),
        (QWEN15_MOE, 14_315_784_192, 14.3),
        (MIXTRAL, 46_702_792_704, 46.7),
        (OLMOE, 6_919_161_856, 6.9),
        (DEEPSEEK_V3, 671_026_419_200, 671),
        (DEEPSEEK_V2, 235_741_434_880, 236),
        (DEEPSEEK_V2_LITE, 15_706_484_224, 15.7),
    ],
)
def test_totals_are_those_published(config: dict[str, object], total: int, published_billions: float) -> None:
    model = read(config)
    assert model.total_params == total
    digits = len(str(published_billions).partition(".")[2])
    assert round(total / 1e9, digits) == published_billions


def test_every_parameter_of_a_small_latent_network_is_counted() -> None:
    model = read(
        DEEPSEEK_V3
        | {"hidden_size": 10, "intermediate_size": 7, "moe_intermediate_size": 3, "num_hidden_layers": 3}
        | {"first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 6, "kv_lora_rank": 5}
        | {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "n_routed_experts": 8, "vocab_size": 11}
    )
    queries = 10 * 6 + 6 + 6 * 2 * (4 + 2)
    keys_and_values = 10 * (5 + 2) + 5 + 5 * 2 * (4 + 3)
    attention = queries + keys_and_values + 2 * 3 * 10 + 2 * 10
    assert model.attention_params == attention
    moe = 8 * 10 + 8 + 3 * 10 * 3 * (1 + 8)
    assert model.total_params == 3 * attention + 3 * 10 * 7 + 2 * moe + 2 * 11 * 10 + 10
    assert model.kv_bytes_per_token_layer == 2 * (5 + 2)
    assert model.attention_flops_per_pair == 2 * 2 * ((5 + 2) + 5)


def test_small_parts_are_counted_where_they_are() -> None:
    qwen, olmoe, tied = read(QWEN15_MOE), read(OLMOE), read({**OLMOE, "tie_word_embeddings": True})
    assert qwen.attention_params == 4 * 2048**2 + 3 * 2048 + 2 * 2048  # q, k, v with biases, two layer norms
    assert qwen.shared_params == 3 * 2048 * 5632 + 2048  # and the gate of one row
    assert qwen.router_params == 60 * 2048
    assert olmoe.attention_params == 4 * 2048**2 + 2 * 2048 + 2 * 2048  # norms over all heads, two layer norms
    assert olmoe.total_params - tied.total_params == 50304 * 2048


def test_shipped_networks_say_where_their_sizes_are_from() -> None:
    for name in ("llada2.1-mini", "llada2.1-flash", "llada-moe-7b-a1b", "sdar-30b-a3b"):
        assert read_hf_config(find_shipped("models", name))["_source"]
    assert load_moe_config("llada2.1-flash").total_params == load_moe_config("flash").total_params
    assert load_moe_config("mini").name == "llada2.0-mini"
    # 12288 MiB of experts: what the weights of inclusionAI/LLaDA-MoE-7B-A1B-Instruct take in bf16.
    assert load_moe_config("llada-moe-7b-a1b").experts_bytes(64) == 12288 * 2**20
    assert (load_moe_config("sdar-30b-a3b").block_length, load_moe_config("llada-moe-7b-a1b").block_length) == (4, 32)


def test_parts_are_among_the_sizes_only_where_they_differ_from_llada2() -> None:
    assert not {"name", "layout", "latent"} & read(LLADA2).sizes().keys()
    assert "layout" in read(OLMOE).sizes()
    assert read(DEEPSEEK_V3).sizes()["latent"]["kv_rank"] == 512


def test_dense_layers_come_first() -> None:
    dense_first = read({**LLADA_MOE, "moe_layer_freq": [0, 0] + [1] * 14})
    assert (dense_first.num_dense_layers, dense_first.num_layers) == (2, 14)
    assert read({**QWEN3_30B, "mlp_only_layers": [0]}).num_dense_layers == 1


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (LLADA_MOE, {"moe_layer_freq": [1, 0] * 8}, "the 1s (MoE layers) last"),
        (LLADA_MOE, {"moe_layer_freq": [1, 1]}, "must have a 0 or 1 for each layer"),
        (LLADA_MOE, {"moe_layer_freq": [[]] * 16}, "must have a 0 or 1 for each layer"),
        (LLADA_MOE, {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size is set"),
        (QWEN3_30B, {"mlp_only_layers": [3]}, "mlp_only_layers(=[3]) must be the first layers"),
        (QWEN3_30B, {"decoder_sparse_step": 2}, "decoder_sparse_step must be 1"),
        (QWEN3_30B, {"attention_bias": True}, "attention_bias is true"),
        (QWEN3_30B, {"use_sliding_window": True}, "use_sliding_window is true"),
        (QWEN3_30B, {"tie_word_embeddings": "no"}, "must be true or false"),
        (QWEN15_MOE, {"shared_expert_intermediate_size": 5000}, "must be a multiple of moe_intermediate_size"),
        (MIXTRAL, {"sliding_window": 4096}, "sliding_window is set"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        (DEEPSEEK_V3, {"quantization_config": {"quant_method": "fp8"}}, "take the key out of a copy"),
        (MIXTRAL, {"num_attention_heads": 30}, "whole numbers >= 0 for head_dim"),
        (DEEPSEEK_V3, {"kv_lora_rank": None, "v_head_dim": "x"}, "whole numbers >= 0 for kv_lora_rank, v_head_dim"),
        (LLADA_MOE, {"num_experts": None}, "whole numbers >= 0 for num_experts"),
    ],
)
def test_sizes_that_cannot_be_told_are_refused(config: dict[str, object], change: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        read({**config, **change})
    assert said in str(caught.value)


def test_an_unknown_family_is_told_what_to_write_by_hand() -> None:
    config = {**QWEN3_30B, "model_type": "granitemoe"}
    with pytest.raises(ModelError) as caught:
        read(config)
    message = str(caught.value)
    assert "model_type 'granitemoe' is not known; known are deepseek_v2," in message
    assert "a config.json without model_type, with whole numbers for num_hidden_layers, first_k_dense" in message
    assert message.endswith("of which this file lacks first_k_dense_replace, num_shared_experts.")
    by_hand = {**config, "first_k_dense_replace": 0, "num_shared_experts": 0}
    with pytest.raises(ModelError, match="all of which this file has"):
        read(by_hand)
    del by_hand["model_type"]
    assert read(by_hand).expert_bytes == read(QWEN3_30B).expert_bytes


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 300) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data(), value=JSON)
def test_any_value_under_any_key_is_read_or_refused(family: str, data: st.DataObject, value: object) -> None:
    config = FAMILIES[family]
    key = data.draw(st.sampled_from([*config, "quantization_config", "mlp_only_layers"]))
    try:
        model = read({**config, key: value})
    except ModelError:
        return
    assert model.total_params >= model.non_expert_params >= 0
