"""Model folders: every layout that is published, and every way one can be broken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from engine_cases import SMALL, small_network
from safetensors.torch import load_file, save_file

from tidesim.engine.checkpoint import load_network, save_network
from tidesim.engine.model import LLaDA2, MappedExperts, block_causal_mask
from tidesim.errors import ModelError
from tidesim.moe import MoEConfig, read_hf_config

HF_CONFIG = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def network() -> LLaDA2:
    return small_network(seed=21)


@pytest.fixture
def folder(network: LLaDA2, tmp_path: Path) -> Path:
    save_network(network, HF_CONFIG, tmp_path / "small", torch.float32)
    return tmp_path / "small"


def logits(network: LLaDA2) -> torch.Tensor:
    tokens = torch.arange(16)
    with torch.inference_mode():
        hidden, _ = network(tokens[None], torch.arange(16), mask=block_causal_mask(16, 8))
        return network.logits(hidden[0])


def shard(folder: Path, tensors: Tensors) -> None:
    """Scatter the tensors over three files, so that one expert's matrices lie in different ones."""
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: files[i % 3] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def merge(folder: Path, tensors: Tensors) -> None:
    """Stack each layer's experts per matrix, as training frameworks store them."""
    merged = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(SMALL.first_k_dense_replace, SMALL.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            stack = [tensors[f"{prefix}.{e}.{matrix}.weight"] for e in range(SMALL.num_experts)]
            merged[f"{prefix}.{matrix}"] = torch.stack(stack)
    save_file(merged, folder / "model.safetensors")


@pytest.mark.parametrize("experts", ["stacked", "mapped", "auto"])
def test_a_saved_network_loads_as_it_was(network: LLaDA2, folder: Path, experts: str) -> None:
    loaded = load_network(folder, experts=experts)
    assert isinstance(loaded.moe_layers[0].experts, MappedExperts) == (experts == "mapped")
    torch.testing.assert_close(logits(loaded), logits(network), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [shard, merge])
def test_shards_and_merged_experts_load_the_same(
    network: LLaDA2, folder: Path, layout: Callable[[Path, Tensors], None]
) -> None:
    layout(folder, load_file(folder / "model.safetensors"))
    torch.testing.assert_close(logits(load_network(folder)), logits(network), atol=1e-5, rtol=1e-5)


def test_the_saved_parameters_are_those_that_the_config_counts(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    config = MoEConfig.from_hf(read_hf_config(folder), "small")
    assert sum(tensor.numel() for tensor in tensors.values()) == config.total_params


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_expert_bias_keeps_the_precision_of_the_file(folder: Path, stored: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("expert_bias")]:
        tensors[name] = tensors[name].to(stored)
    save_file(tensors, folder / "model.safetensors")
    loaded = load_network(folder, dtype=torch.bfloat16)
    bias = loaded.moe_layers[0].gate.expert_bias
    torch.testing.assert_close(bias, tensors["model.layers.1.mlp.gate.expert_bias"].float(), check_dtype=False)
    assert loaded.norm.weight.dtype == torch.bfloat16
    assert loaded.rotary.inv_freq.dtype == torch.float32


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


def misshape(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, folder / "model.safetensors")

    return change


def extra_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.input_layernorm.weight"] = torch.ones(SMALL.hidden_size)
    save_file(tensors, folder / "model.safetensors")


def cut_in_half(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_a_shard(folder: Path) -> None:
    shard(folder, load_file(folder / "model.safetensors"))
    (folder / "model-00002-of-00003.safetensors").unlink()


def garble_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove_weights, "no weights"),
        (
            drop("model.layers.1.mlp.experts.7.up_proj.weight"),
            r"layers\.1\.mlp\.experts\.7\.up_proj\.weight is missing",
        ),
        (drop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (misshape("lm_head.weight"), r"lm_head\.weight has shape \[127, 48\], expected \[128, 48\]"),
        (misshape("model.layers.2.mlp.experts.0.down_proj.weight"), r"experts\.0\.down_proj\.weight has shape"),
        (extra_layer, r"3 layers, yet the weights hold model\.layers\.3"),
        (cut_in_half, "not a readable safetensors file"),
        (lose_a_shard, "00002-of-00003.safetensors is named"),
        (garble_the_index, "weight_map"),
    ],
)
def test_a_broken_folder_is_refused_by_name(folder: Path, change: Callable[[Path], None], said: str) -> None:
    change(folder)
    with pytest.raises(ModelError, match=said):
        load_network(folder)


def test_mapped_experts_are_not_read_into_memory(folder: Path) -> None:
    loaded = load_network(folder, experts="mapped")
    experts = loaded.moe_layers[0].experts
    assert isinstance(experts, MappedExperts)
    file = (folder / "model.safetensors").resolve()
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    address = experts.weights[5][0].data_ptr()
    assert any(start <= address < stop for start, stop in ranges)
