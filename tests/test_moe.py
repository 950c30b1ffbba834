"""Sizes of the published networks, and configs that are none."""

import json
from pathlib import Path

import pytest

from tidesim.errors import ModelError
from tidesim.moe import MoEConfig, load_moe_config, read_hf_config
from tidesim.shipped import find_shipped


@pytest.mark.parametrize(
    ("name", "total", "non_expert", "expert_bytes", "kv_bytes", "layers"),
    [
        ("llada2.0-mini", 16_255_643_392, 954_822_400, 6_291_456, 40_960, (1, 19)),
        ("llada2.0-flash", 102_889_705_216, 3_031_715_584, 25_165_824, 65_536, (1, 31)),
    ],
)
def test_published_sizes_are_met_to_the_parameter(
    name: str, total: int, non_expert: int, expert_bytes: int, kv_bytes: int, layers: tuple[int, int]
) -> None:
    model = load_moe_config(name)
    assert model.name == name
    assert (model.num_dense_layers, model.num_layers) == layers
    assert model.total_params == total
    assert model.non_expert_params == non_expert
    assert model.non_expert_bytes == 2 * non_expert
    assert model.expert_bytes == expert_bytes
    assert model.kv_bytes_per_token == kv_bytes
    assert model.experts_bytes(model.num_experts) == 2 * (total - non_expert)


def test_fewer_bits_shrink_the_routed_experts_alone() -> None:
    model = load_moe_config("llada2.0-mini")
    assert model.with_weight_bits(4).expert_bytes * 4 == model.expert_bytes
    assert model.with_weight_bits(8).non_expert_bytes == model.non_expert_bytes
    with pytest.raises(ModelError, match="weight_bits"):
        model.with_weight_bits(3)


def test_unknown_keys_are_ignored_and_bad_ones_are_all_named() -> None:
    config = read_hf_config(find_shipped("models", "llada2.0-mini"))
    assert MoEConfig.from_hf({**config, "quantum": True}, "m").num_experts == 256
    broken = {**config, "num_experts": "256", "head_dim": True}
    del broken["vocab_size"]
    with pytest.raises(ModelError, match="head_dim, num_experts, vocab_size"):
        MoEConfig.from_hf(broken, "m")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first_k_dense_replace": 20}, "no MoE layer"),
        ({"num_experts_per_tok": 257}, "top_k"),
        ({"num_experts_per_tok": 0}, "top_k"),
        ({"hidden_size": -1}, "hidden_size"),
    ],
)
def test_a_network_without_experts_to_place_is_refused(change: dict[str, int], said: str) -> None:
    config = read_hf_config(find_shipped("models", "llada2.0-mini"))
    with pytest.raises(ModelError, match=said):
        MoEConfig.from_hf({**config, **change}, "m")


def test_models_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    config = read_hf_config(find_shipped("models", "llada2.0-mini"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert load_moe_config(str(folder)).name == "mine"
    assert load_moe_config(str(folder / "config.json")).name == "mine"
    with pytest.raises(ModelError, match=r"did you mean .*llada2\.0-mini"):
        load_moe_config("llada2.0-mimi")
    with pytest.raises(ModelError, match=r"there is no config\.json"):
        load_moe_config(str(tmp_path))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="a JSON object is expected"):
        load_moe_config(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_moe_config(str(folder))
