"""The network on CPU cores: modules that call compiled code where PyTorch would launch many small operations.

The weights stay in the dtype they are stored in, activations are float32, and there is one sequence at a time. What is
computed is what `tidesim.engine.model` says; sums are in another order, which is the same in every forward.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tidesim.engine import kernel, layer_kernel
from tidesim.engine.cores import Cores
from tidesim.engine.layer_kernel import AttentionWeights, Context, Floats, GatedWeights, Rotation, RouterWeights, Space
from tidesim.engine.model import (
    KVCache,
    Layer,
    Likeliest,
    LLaDA2,
    MoE,
    NetworkConfig,
    RMSNorm,
    Router,
    Routing,
    look_ahead,
)


class Workspace:
    """Room for what the layers of a network compute, one after another; it grows with the longest forward."""

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._num_rows = 0
        self._keys_and_values: tuple[Floats, Floats] | None = None
        self.space = self._of(0)

    def make_room(self, num_rows: int) -> Space:
        """Room for so many tokens."""
        if num_rows > self._num_rows:
            self._num_rows = kernel.padded(num_rows)
            self.space = self._of(self._num_rows)
            self._keys_and_values = None
        return self.space

    def keys_and_values(self) -> tuple[Floats, Floats]:
        """Room for keys and values of a forward that keeps none, each [G, tokens, C]."""
        if self._keys_and_values is None:
            shape = (self._config.num_key_value_heads, self._num_rows, self._config.head_dim)
            self._keys_and_values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        return self._keys_and_values

    def _of(self, num_rows: int) -> Space:
        config = self._config
        heads = config.num_attention_heads * config.head_dim
        shared = config.moe_intermediate_size * config.num_shared_experts
        gated = max(config.intermediate_size if config.first_k_dense_replace else 0, shared)

        def room(width: int) -> Floats:
            return np.zeros((num_rows, width), np.float32)

        return Space(
            normed=room(config.hidden_size),
            added=room(config.hidden_size),
            heads=room(heads + 2 * config.num_key_value_heads * config.head_dim),
            mixed=room(heads),
            logits=room(config.num_experts),
            gates=room(gated),
            ups=room(gated),
        )


def _wide(tensor: Tensor) -> Floats:
    """A small weight, widened once."""
    weight: Floats = tensor.detach().float().contiguous().numpy()
    return weight


class CpuLayer(Layer):
    """A layer, computed in a call before its routed experts and one behind them. What it adds, it adds to x in place.

    A mask is taken to let every token see some number of the leading ones, as a block-causal one does.
    """

    def __init__(self, layer: Layer, config: NetworkConfig, cores: Cores, workspace: Workspace) -> None:
        nn.Module.__init__(self)
        for name, part in layer.named_children():
            setattr(self, name, part)
        self._config, self._cores, self._workspace = config, cores, workspace
        attention, mlp = layer.attention, layer.mlp
        self._attention = AttentionWeights(
            _wide(layer.input_layernorm.weight),
            kernel.stored(attention.query_key_value.weight),
            _wide(attention.query_layernorm.weight),
            _wide(attention.key_layernorm.weight),
            kernel.stored(attention.dense.weight),
            _wide(layer.post_attention_layernorm.weight),
        )
        gated = mlp.shared_experts if isinstance(mlp, MoE) else mlp
        maps = (gated.gate_proj, gated.up_proj, gated.down_proj)
        self._gated = GatedWeights(*(kernel.stored(each.weight) for each in maps))
        # Multiply-adds for one token in the call before the routed experts and in the one behind them.
        self._num_before = self._attention.query_key_value.size + self._attention.out.size
        self._num_behind = sum(weight.size for weight in self._gated)
        if isinstance(mlp, MoE):
            self._router = RouterWeights(kernel.stored(mlp.gate.weight), _wide(mlp.gate.expert_bias))
            self._num_before += self._router.map.size

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        next_router: Router | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """See `Layer`; x [1, T, D] is changed."""
        config, cores = self._config, self._cores
        rows: Floats = x[0].numpy()
        T, eps = len(rows), config.rms_norm_eps
        space = self._workspace.make_room(T)
        rotation, context = Rotation(*(table.numpy() for table in rotary)), self._context(T, mask, cache, layer)
        before = (rows, self._attention, eps, rotation, context, space)
        if not isinstance(self.mlp, MoE):
            num_products = T * (self._num_before + self._num_behind)
            cores.run(layer_kernel.run_dense_layer, num_products, *before, self._gated)
            return x, None
        ids = np.empty((T, config.num_experts_per_tok), np.int64)
        weights = np.empty((T, config.num_experts_per_tok), np.float32)
        choice = (self._router, config.n_group, config.topk_group, config.routed_scaling_factor, ids, weights)
        cores.run(layer_kernel.attend_and_route, T * self._num_before, *before, *choice)
        normed = torch.from_numpy(space.normed[:T])
        routing = look_ahead(Routing(torch.from_numpy(ids), torch.from_numpy(weights)), normed, next_router)
        routed: Floats = self.mlp.experts(normed, routing).numpy()
        cores.run(layer_kernel.add_experts, T * self._num_behind, rows, routed, self._gated, space)
        return x, routing

    def _context(self, num_rows: int, mask: Tensor | None, cache: KVCache | None, layer: int) -> Context:
        if cache is None:
            start, (keys, values) = 0, self._workspace.keys_and_values()
        else:
            start, keys, values = cache.length, cache.keys[layer][0].numpy(), cache.values[layer][0].numpy()
        visible = np.full(num_rows, start + num_rows) if mask is None else mask.sum(1).numpy()
        return Context(keys, values, start, visible)


class CpuLinear(nn.Module):
    """A linear map without bias; x [..., in] float32 -> [..., out] float32."""

    def __init__(self, weight: Tensor, cores: Cores) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._cores, self._stored = cores, kernel.stored(weight)

    def forward(self, x: Tensor) -> Tensor:
        rows: Floats = x.reshape(-1, x.shape[-1]).contiguous().numpy()
        T, missing = len(rows), kernel.padded(len(rows)) - len(rows)
        if missing:
            rows = np.pad(rows, ((0, missing), (0, 0)))
        out = np.empty((T, len(self._stored)), np.float32)
        self._cores.run(layer_kernel.multiply_rows, T * self._stored.size, self._stored, rows, out)
        return torch.from_numpy(out).view(*x.shape[:-1], -1)


class CpuEmbedding(nn.Module):
    """Rows of a table; ids [...] -> [..., D] float32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()


class CpuNorm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, norm: RMSNorm, cores: Cores) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)
        self._weight, self._eps, self._cores = self.weight.numpy(), norm.eps, cores

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        rows, normed = (each.view(-1, x.shape[-1]).numpy() for each in (x, out))
        self._cores.run(layer_kernel.normalize, rows.size, rows, self._weight, self._eps, normed)
        return out


class CpuLikeliest(nn.Module):
    """The likeliest token of each row and its probability. [B, V] -> [B], [B]."""

    def __init__(self, cores: Cores) -> None:
        super().__init__()
        self._cores = cores

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens, confidences = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
        # An exponential is worth some ten multiply-adds.
        self._cores.run(layer_kernel.take_likeliest, 10 * logits.numel(), logits.numpy(), tokens, confidences)
        return torch.from_numpy(tokens), torch.from_numpy(confidences)


def on_cores(network: LLaDA2, cores: Cores) -> None:
    """Have `network` computed by `cores`; what that takes is compiled here, so that no run waits for it."""
    workspace = Workspace(network.config)
    make: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
        Layer: lambda layer: CpuLayer(layer, network.config, cores, workspace),
        nn.Linear: lambda linear: CpuLinear(linear.weight, cores),
        nn.Embedding: CpuEmbedding,
        RMSNorm: lambda norm: CpuNorm(norm, cores),
        Likeliest: lambda _: CpuLikeliest(cores),
    }
    for module in (network, network.layers):
        for name, child in list(module.named_children()):
            if type(child) in make:
                setattr(module, name, make[type(child)](child))
    _compile(network)


def _compile(network: LLaDA2) -> None:
    """Call everything once: the first layer of each kind with one token, and what comes behind the layers."""
    first_of_kind = {type(layer.mlp): index for index, layer in reversed(list(enumerate(network.layers)))}
    with torch.inference_mode():
        x = network.word_embeddings(torch.zeros(1, 1, dtype=torch.long))
        rotary = network.rotary.tables(torch.zeros(1), x.dtype)
        for index in first_of_kind.values():
            layer = network.layers[index]
            # A network from a checkpoint gets its experts when a run starts.
            bare = layer.mlp if isinstance(layer.mlp, MoE) and not hasattr(layer.mlp, "experts") else None
            if bare is not None:
                bare.experts = no_experts
            layer(x, rotary, None, None, index)
            if bare is not None:
                del bare.experts
        network.likeliest(network.logits(network.norm(x)[0]))


def no_experts(x: Tensor, routing: Routing) -> Tensor:
    """In place of a layer's routed experts: zeros [T, D]."""
    return torch.zeros_like(x)
