"""The network's parts on CPU cores: modules that call compiled code where PyTorch would launch many small operations.

The weights stay in the dtype they are stored in, activations are float32, and there is one sequence at a time. What is
computed is what `tidesim.engine.model` says; sums are in another order.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn
from torch.nn import functional

from tidesim.engine import kernel
from tidesim.engine.cores import Cores
from tidesim.engine.model import MLP, Attention, KVCache, Likeliest, LLaDA2, RMSNorm, Router, Routing

Floats = npt.NDArray[np.float32]


@njit(nogil=True, cache=True, fastmath=kernel.FASTMATH)
def norm_rows(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """out[t] = x[t] / root mean square of x[t] * weight. x and out [T, D]."""
    T, D = x.shape
    for t in range(T):
        total = np.float32(0)
        for i in range(D):
            total += x[t, i] * x[t, i]
        scale = np.float32(1) / math.sqrt(total / np.float32(D) + np.float32(eps))
        for i in range(D):
            out[t, i] = x[t, i] * scale * weight[i]


@njit(nogil=True, cache=True, fastmath=kernel.FASTMATH)
def split_heads(
    heads: Floats,
    query_weight: Floats,
    key_weight: Floats,
    cos: Floats,
    sin: Floats,
    eps: float,
    query: Floats,
    key: Floats,
    value: Floats,
) -> None:
    """Norm and rotate query and key heads, and lay all heads out for attention.

    Parameters
    ----------
    heads : [T, H + 2 G, C], query heads, then key heads, then value heads.
    cos, sin : [T, R], R leading dimensions of a head rotate, halves paired.
    query : [H, T, C], key, value : [G, T, C]; filled.
    """
    T, _, C = heads.shape
    H, G, R = len(query), len(key), cos.shape[1]
    half = R // 2
    for t in range(T):
        for head in range(H + G):
            source = heads[t, head]
            weight = query_weight if head < H else key_weight
            target = query[head, t] if head < H else key[head - H, t]
            total = np.float32(0)
            for i in range(C):
                total += source[i] * source[i]
            scale = np.float32(1) / math.sqrt(total / np.float32(C) + np.float32(eps))
            for i in range(C):
                target[i] = source[i] * scale * weight[i]
            for i in range(half):
                first, second = target[i], target[i + half]
                target[i] = first * cos[t, i] - second * sin[t, i]
                target[i + half] = second * cos[t, i + half] + first * sin[t, i + half]
        for head in range(G):
            value[head, t] = heads[t, H + G + head]


@njit(nogil=True, cache=True)
def choose_experts(
    logits: Floats,
    bias: Floats,
    num_groups: int,
    top_groups: int,
    scale: float,
    ids: npt.NDArray[np.int64],
    weights: Floats,
) -> None:
    """The router's choice from its logits [T, E]: ids [T, K] in descending score, and their weights. Ties: lower id.

    See `tidesim.engine.model.Router`. The bias takes part in the choice, never in the weights.
    """
    T, E = logits.shape
    K, size = ids.shape[1], E // num_groups
    scores, choice = np.empty(E, np.float32), np.empty(E, np.float32)
    groups, kept = np.empty(num_groups, np.float32), np.empty(top_groups, np.int64)
    for t in range(T):
        for e in range(E):
            scores[e] = np.float32(1) / (np.float32(1) + kernel.exp(-logits[t, e]))
            choice[e] = scores[e] + bias[e]
        for group in range(num_groups):
            best = second = np.float32(-np.inf)
            for e in range(group * size, (group + 1) * size):
                if choice[e] > best:
                    best, second = choice[e], best
                elif choice[e] > second:
                    second = choice[e]
            groups[group] = best + second
        for number in range(top_groups):
            kept[number] = np.argmax(groups)
            groups[kept[number]] = -np.inf
        kept.sort()
        total = np.float32(0)
        for k in range(K):
            top = kept[0] * size
            for start in kept * size:
                candidate = start + np.argmax(choice[start : start + size])
                if choice[candidate] > choice[top]:
                    top = candidate
            ids[t, k], weights[t, k] = top, scores[top]
            total += scores[top]
            choice[top] = -np.inf
        for k in range(K):
            share = weights[t, k] / (total + np.float32(1e-20)) if K > 1 else weights[t, k]
            weights[t, k] = share * np.float32(scale)


@njit(nogil=True, cache=True, fastmath=kernel.FASTMATH)
def gate(gates: Floats, ups: Floats) -> None:
    """gates = silu(gates) * ups, in place. [T, width]."""
    T, width = gates.shape
    for t in range(T):
        for i in range(width):
            gates[t, i] = gates[t, i] / (np.float32(1) + kernel.exp(-gates[t, i])) * ups[t, i]


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def take_likeliest(logits: Floats, tokens: npt.NDArray[np.int64], confidences: Floats) -> None:
    """The likeliest token of each row of logits [T, V], the first of equals, and its probability."""
    T, V = logits.shape
    for t in range(T):
        best = logits[t, 0]
        for i in range(V):
            best = max(best, logits[t, i])
        total = np.float32(0)
        for i in range(V):
            total += kernel.exp(logits[t, i] - best)
        for i in range(V):
            if logits[t, i] == best:
                tokens[t] = i
                break
        confidences[t] = np.float32(1) / total


def _float(tensor: Tensor) -> Floats:
    """A small weight, widened once."""
    weight: Floats = tensor.detach().float().contiguous().numpy()
    return weight


class CpuLinear(nn.Module):
    """A linear map without bias; x [..., in] float32 -> [..., out] float32."""

    def __init__(self, weight: Tensor, cores: Cores) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self._cores, self._like = cores, kernel.stored_like(weight.dtype)
        self._at, self._num_outputs = self.weight.data_ptr(), len(self.weight)

    def rows(self, rows: Floats) -> Floats:
        """The same on rows [T, in] -> [T, out]."""
        out = np.empty((len(rows), self._num_outputs), np.float32)
        self._cores.multiply(self._at, self._like, rows, out)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out = self.rows(x.reshape(-1, x.shape[-1]).numpy())
        return torch.from_numpy(out).view(*x.shape[:-1], -1)


class CpuEmbedding(nn.Module):
    """Rows of a table; ids [...] -> [..., D] float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()


class CpuNorm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)
        self._weight, self._eps = self.weight.numpy(), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        width = x.shape[-1]
        norm_rows(x.reshape(-1, width).numpy(), self._weight, self._eps, out.view(-1, width).numpy())
        return out


class CpuAttention(nn.Module):
    """Grouped-query attention of one sequence; keys and values go straight into the cache where there is one."""

    def __init__(self, attention: Attention, cores: Cores) -> None:
        super().__init__()
        self.query_key_value = CpuLinear(attention.query_key_value.weight.data, cores)
        self.dense = CpuLinear(attention.dense.weight.data, cores)
        self._num_heads, self._num_kv_heads = attention.num_heads, attention.num_kv_heads
        self._query_weight, self._key_weight = (
            _float(norm.weight) for norm in (attention.query_layernorm, attention.key_layernorm)
        )
        self._eps = attention.query_layernorm.eps

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        T, width = x.shape[1:]
        heads = self.query_key_value.rows(x.view(T, width).numpy()).reshape(
            T, self._num_heads + 2 * self._num_kv_heads, -1
        )
        query = torch.empty(1, self._num_heads, T, heads.shape[2])
        if cache is None:
            key, value = (torch.empty(1, self._num_kv_heads, T, heads.shape[2]) for _ in range(2))
            new_key, new_value = key, value
        else:
            start, end = cache.length, cache.length + T
            key, value = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]
            new_key, new_value = key[:, :, start:], value[:, :, start:]
        cos, sin = rotary
        split_heads(
            heads,
            self._query_weight,
            self._key_weight,
            cos.numpy(),
            sin.numpy(),
            self._eps,
            query[0].numpy(),
            new_key[0].numpy(),
            new_value[0].numpy(),
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        out = self.dense.rows(mixed[0].transpose(0, 1).reshape(T, -1).numpy())  # [T, D]
        return torch.from_numpy(out)[None]


class CpuMLP(nn.Module):
    """Gated MLP: down(silu(gate x) * up x)."""

    def __init__(self, mlp: MLP, cores: Cores) -> None:
        super().__init__()
        maps = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.gate_proj, self.up_proj, self.down_proj = (CpuLinear(each.weight.data, cores) for each in maps)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).numpy()
        hidden = self.gate_proj.rows(rows)
        gate(hidden, self.up_proj.rows(rows))
        return torch.from_numpy(self.down_proj.rows(hidden)).view(x.shape)


class CpuRouter(nn.Module):
    """See `tidesim.engine.model.Router`; the choice is made in one pass over the logits."""

    def __init__(self, router: Router, cores: Cores) -> None:
        super().__init__()
        self.map = CpuLinear(router.weight.data, cores)
        self._bias = _float(router.expert_bias)
        self._num_groups, self._top_groups = router.num_groups, router.top_groups
        self._top_k, self._scale = router.top_k, router.scale

    def forward(self, x: Tensor) -> Routing:
        logits = self.map.rows(x.numpy())
        ids, weights = np.empty((len(x), self._top_k), np.int64), np.empty((len(x), self._top_k), np.float32)
        choose_experts(logits, self._bias, self._num_groups, self._top_groups, self._scale, ids, weights)
        return Routing(torch.from_numpy(ids), torch.from_numpy(weights))


class CpuLikeliest(nn.Module):
    """The likeliest token of each row and its probability. [B, V] -> [B], [B]."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens, confidences = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
        take_likeliest(logits.numpy(), tokens, confidences)
        return torch.from_numpy(tokens), torch.from_numpy(confidences)


def on_cores(network: LLaDA2, cores: Cores) -> None:
    """Have `network` computed by `cores`."""
    make: dict[type[nn.Module], Any] = {
        nn.Linear: lambda linear: CpuLinear(linear.weight.data, cores),
        nn.Embedding: lambda embedding: CpuEmbedding(embedding.weight.data),
        RMSNorm: CpuNorm,
        Attention: lambda attention: CpuAttention(attention, cores),
        MLP: lambda mlp: CpuMLP(mlp, cores),
        Router: lambda router: CpuRouter(router, cores),
        Likeliest: lambda _: CpuLikeliest(),
    }
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) in make:
                setattr(module, name, make[type(child)](child))
