"""Routed experts in host memory: mapped from their files, or staged so that a promotion is one copy of one piece."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tidesim.engine.checkpoint import Checkpoint, expert_weights
from tidesim.engine.kernel import STORED, ExpertWeights
from tidesim.engine.model import NetworkConfig
from tidesim.errors import BudgetError, ModelError

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


def expert_numel(config: NetworkConfig) -> int:
    """Weights of one routed expert: gate, up and down."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def plain_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of this process; NumPy asks the system for large pages where it can, PyTorch does not."""
    return torch.from_numpy(np.empty(shape, STORED[dtype])).view(dtype)


def addresses(pieces: Tensor, config: NetworkConfig) -> ExpertWeights:
    """Where the matrices of each piece lie, for the compiled kernels. pieces [N, 3 * I * D], on the CPU."""
    matrix_bytes = config.hidden_size * config.moe_intermediate_size * pieces.element_size()
    gate = pieces.data_ptr() + np.arange(len(pieces), dtype=np.int64) * 3 * matrix_bytes
    return ExpertWeights(gate, gate + matrix_bytes, gate + 2 * matrix_bytes)


def check_host_memory(num_bytes: int, what: str) -> None:
    """Raise BudgetError if this machine has less than `num_bytes` left: a process that takes more is killed."""
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") + _cached_bytes()
    if num_bytes > left:
        raise BudgetError(
            f"{what} take {num_bytes / 2**30:.2f} GiB, and this machine has {left / 2**30:.2f} GiB of memory left; run "
            "fewer layers (--layers), or leave the experts in their files (--device disk)."
        )


def _cached_bytes() -> int:
    """Memory that only caches files, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return sizes.get("Cached", 0) - sizes.get("Shmem", 0)


class MappedWeights:
    """The experts as they lie in the mapped files of a model folder, read by the system as they are used.

    Nothing is held twice, and the files may be larger than memory. Raise ModelError for a tensor that is missing or
    misshapen, or for experts of several dtypes.
    """

    def __init__(self, checkpoint: Checkpoint, config: NetworkConfig) -> None:
        layers = range(config.first_k_dense_replace, config.num_hidden_layers)
        self._layers = [expert_weights(checkpoint, config, layer) for layer in layers]
        dtypes = {matrix.dtype for experts in self._layers for matrices in experts for matrix in matrices}
        if len(dtypes) > 1:
            raise ModelError(f"{checkpoint.folder}: experts are stored as {' and '.join(sorted(map(str, dtypes)))}.")
        self.dtype = dtypes.pop()
        self.expert_bytes = expert_numel(config) * self.dtype.itemsize
        self.at = [
            ExpertWeights(*(np.array([matrices[i].data_ptr() for matrices in experts]) for i in range(3)))
            for experts in self._layers
        ]

    def copy_to(self, layer: int, expert: int, target: Tensor) -> None:
        """Fill `target` with gate, up and down of one expert, one after another."""
        first = 0
        for matrix in self._layers[layer][expert]:
            target[first : first + matrix.numel()].copy_(matrix.view(-1))
            first += matrix.numel()


class HostWeights:
    """The experts of all MoE layers, staged: `layers[layer]` is [E, 3 * I * D], gate, up and down one after another.

    Attributes
    ----------
    dtype, expert_bytes : what experts are stored in, and bytes of one. at : where they lie, by layer.
    pieces : by layer and expert, the same memory as `layers`.
    """

    def __init__(self, layers: list[Tensor], config: NetworkConfig) -> None:
        self.layers = layers
        self.pieces = [experts.unbind() for experts in layers]
        self.dtype = layers[0].dtype
        self.expert_bytes = layers[0].shape[1] * layers[0].element_size()
        self.at = [addresses(pieces, config) for pieces in layers]

    def copy_to(self, layer: int, expert: int, target: Tensor) -> None:
        """Fill `target` with one expert."""
        target.copy_(self.layers[layer][expert])

    @classmethod
    def staged(cls, checkpoint: Checkpoint, config: NetworkConfig, allocate: Allocate = plain_memory) -> Self:
        """Read from the mapped files of a model folder, in the dtype they are stored in.

        Raise ModelError for a tensor that is missing or misshapen.
        """
        layers = []
        for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
            experts = expert_weights(checkpoint, config, layer)
            pieces = allocate((config.num_experts, expert_numel(config)), experts[0][0].dtype)
            for piece, matrices in zip(pieces, experts, strict=True):
                torch.cat([matrix.flatten() for matrix in matrices], out=piece)
            layers.append(pieces)
        return cls(layers, config)

    @classmethod
    def random(
        cls, config: NetworkConfig, dtype: torch.dtype, rng: torch.Generator, allocate: Allocate = plain_memory
    ) -> Self:
        """Random experts of the right size, for a model whose weights are not there.

        Every expert has its own memory; its numbers are a shifted copy of one random sequence, as drawn ones would
        take minutes.
        """
        numel = expert_numel(config)
        sequence = torch.randn(2 * numel, generator=rng).mul_(config.hidden_size**-0.5).to(dtype)
        layers = []
        for _ in range(config.first_k_dense_replace, config.num_hidden_layers):
            pieces = allocate((config.num_experts, numel), dtype)
            for piece, shift in zip(pieces, torch.randint(numel, (len(pieces),), generator=rng).tolist(), strict=True):
                piece.copy_(sequence[shift : shift + numel])
            layers.append(pieces)
        return cls(layers, config)
