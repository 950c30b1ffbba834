"""Model folders in Hugging Face layout: `config.json`, safetensors (one file or shards) and `tokenizer.json`.

Weights are memory-mapped and nothing in a folder is ever executed: no pickle, no remote code. Experts may be stored
split (one tensor per expert and matrix, as published) or merged (one stack per matrix, as training frameworks write).
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tidesim.engine.model import LLaDA2, MappedExperts, NetworkConfig, StackedExperts
from tidesim.errors import ModelError
from tidesim.moe import read_hf_config

ExpertStorage = Literal["auto", "stacked", "mapped"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MATRICES = ("gate_proj", "up_proj", "down_proj")


class Checkpoint:
    """The tensors of a model folder by name, mapped from their files and read when used.

    Raise ModelError if the folder holds no weights, or an index that names files or tensors that are not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {}
        self._file_of: dict[str, str] = {}
        for file in self._file_names():
            try:
                self._files[file] = safe_open(folder / file, framework="pt")
            except FileNotFoundError:
                raise ModelError(f"{folder}: shard {file} is named in {_INDEX} but is not there.") from None
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{folder / file}: not a readable safetensors file ({error}).") from None
            self._file_of.update(dict.fromkeys(self._files[file].keys(), file))

    def _file_names(self) -> list[str]:
        if (self.folder / _INDEX).is_file():
            try:
                weight_map = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
                return sorted(set(weight_map.values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ModelError(f"{self.folder / _INDEX}: an object with a weight_map is expected.") from None
        if (self.folder / _SINGLE).is_file():
            return [_SINGLE]
        raise ModelError(
            f"{self.folder}: no weights: neither {_SINGLE} nor {_INDEX} is there. Put the model's safetensors files "
            "into this folder, or name another model; llada2-tiny comes with its weights."
        )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The mapped tensor `name`. Raise ModelError if it is missing or is not of `shape`."""
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: tensor {name} is missing from the weights.")
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{self.folder}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}.")
        return tensor

    def layers_beyond(self, num_layers: int) -> list[str]:
        """Tensor names of layers that the config does not know: config and weights do not belong together."""
        numbered = (name.split(".") for name in self._file_of if name.startswith("model.layers."))
        return sorted({".".join(parts) for parts in numbered if int(parts[2]) >= num_layers})


def load_network(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    experts: ExpertStorage = "auto",
) -> LLaDA2:
    """The network of a model folder, ready for inference on `device`.

    Parameters
    ----------
    dtype
        What the network computes in; None keeps the dtype of the stored embedding. The expert bias and the rotary
        frequencies keep the precision that they are stored or computed in.
    experts
        "stacked" copies every expert into memory, "mapped" leaves them in the file and reads what is routed to,
        "auto" stacks if they take less than half of this machine's memory.

    Raise ModelError for a folder without weights, or with a tensor that is missing, misshapen or beyond the config.
    """
    checkpoint = Checkpoint(folder)
    network = load_without_experts(checkpoint, dtype, device)
    config, dtype = network.config, network.norm.weight.dtype
    is_stacked = experts == "stacked" or (experts == "auto" and _experts_fit(config, dtype))
    for layer, moe in zip(
        range(config.first_k_dense_replace, config.num_hidden_layers), network.moe_layers, strict=True
    ):
        weights = expert_weights(checkpoint, config, layer)
        moe.experts = _stack(config, weights, dtype, device) if is_stacked else MappedExperts(weights)
    return network


def load_without_experts(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LLaDA2:
    """The same network but for its routed experts, which are left for the caller to set.

    Raise ModelError as `load_network` does.
    """
    folder = checkpoint.folder
    config = NetworkConfig.from_hf(read_hf_config(folder))
    extra = checkpoint.layers_beyond(config.num_hidden_layers)
    if extra:
        raise ModelError(
            f"{folder}: config.json has {config.num_hidden_layers} layers, yet the weights hold {extra[0]}."
        )
    embedding = checkpoint.tensor("model.word_embeddings.weight", (config.vocab_size, config.hidden_size))
    dtype = dtype or embedding.dtype
    with torch.device("meta"):
        network = LLaDA2(config)
    network.rotary = type(network.rotary)(config)
    state = {
        name: checkpoint.tensor(name if name.startswith("lm_head") else f"model.{name}", tuple(tensor.shape)).to(
            device, tensor.dtype if name.endswith("expert_bias") else dtype
        )
        for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def random_without_experts(config: NetworkConfig, dtype: torch.dtype, rng: torch.Generator) -> LLaDA2:
    """A network of random weights but for its routed experts, scaled so that activations stay of one size."""
    with torch.device("meta"):
        network = LLaDA2(config)
    network.rotary = type(network.rotary)(config)
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("expert_bias"):
            state[name] = torch.zeros(tensor.shape)
        elif tensor.dim() == 1:
            state[name] = torch.ones(tensor.shape, dtype=dtype)
        else:
            state[name] = torch.empty(tensor.shape, dtype=dtype).normal_(0, tensor.shape[-1] ** -0.5, generator=rng)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def save_network(network: LLaDA2, hf_config: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Write `network` (stacked experts) as a model folder: split experts, one safetensors file, config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_named_tensors(network, dtype))
    save_file(tensors, folder / _SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(hf_config), indent=2) + "\n", encoding="utf-8")


def _named_tensors(network: LLaDA2, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in network.state_dict().items():
        if ".experts." in name:
            continue
        kept = tensor.float() if name.endswith("expert_bias") else tensor.to(dtype)
        yield (name if name.startswith("lm_head") else f"model.{name}"), kept.detach().cpu().contiguous()
    for layer, moe in enumerate(network.moe_layers, start=network.config.first_k_dense_replace):
        if not isinstance(moe.experts, StackedExperts):
            raise TypeError("only a network with stacked experts can be saved.")
        gate, up = moe.experts.gate_up.detach().to(dtype).chunk(2, dim=1)
        for matrix, stack in zip(_MATRICES, (gate, up, moe.experts.down.detach().to(dtype)), strict=True):
            for expert, weight in enumerate(stack):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight", weight.cpu().contiguous()


def expert_weights(checkpoint: Checkpoint, config: NetworkConfig, layer: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gate, up and down of every expert of `layer` (counted from the first of all layers), mapped from their files.

    Raise ModelError for a tensor that is missing or misshapen.
    """
    prefix = f"model.layers.{layer}.mlp.experts"
    E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes = dict(zip(_MATRICES, ((width, D), (width, D), (D, width)), strict=True))
    if f"{prefix}.gate_proj" in checkpoint:  # merged: one stack per matrix
        stacks = [checkpoint.tensor(f"{prefix}.{matrix}", (E, *shape)) for matrix, shape in shapes.items()]
        return [(gate, up, down) for gate, up, down in zip(*stacks, strict=True)]
    weights = []
    for expert in range(E):
        names = {matrix: f"{prefix}.{expert}.{matrix}.weight" for matrix in _MATRICES}
        gate, up, down = (checkpoint.tensor(names[matrix], shapes[matrix]) for matrix in _MATRICES)
        weights.append((gate, up, down))
    return weights


def _stack(
    config: NetworkConfig, weights: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, device: torch.device | str
) -> StackedExperts:
    with torch.device("meta"):
        stacked = StackedExperts(config)
    gate_up = torch.stack([torch.cat((gate, up)) for gate, up, _ in weights]).to(device, dtype)
    down = torch.stack([down for _, _, down in weights]).to(device, dtype)
    stacked.load_state_dict({"gate_up": gate_up, "down": down}, assign=True)
    return stacked


def _experts_fit(config: NetworkConfig, dtype: torch.dtype) -> bool:
    num_layers = config.num_hidden_layers - config.first_k_dense_replace
    params = num_layers * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
    return params * dtype.itemsize < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
