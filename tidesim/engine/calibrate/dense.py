"""What the device computes besides routed experts, on this machine's cores: linear maps, and all the small ops."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import cast

import torch

from tidesim.engine.calibrate.experts import network_config
from tidesim.engine.calibrate.host import COLD
from tidesim.engine.calibrate.measured import Measured, sample, seconds, seconds_per_call
from tidesim.engine.checkpoint import random_without_experts
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_network import CpuLinear, no_experts, on_cores
from tidesim.engine.model import KVCache, Layer, MoE
from tidesim.moe import MoEConfig

CONTEXT_TOKENS = 128  # finished tokens that a block attends to: some blocks into an answer


class ColdNetwork:
    """As many layers, and as much of lm_head, as it takes that no cache holds their weights, computed by `cores`.

    A network that is smaller than that is as warm in its cache here as when it decodes.

    Attributes
    ----------
    x : [T, D], a block of hidden states.
    head_share : part of the vocabulary that the head here has.
    """

    def __init__(self, model: MoEConfig, cores: Cores, cache_bytes: int, rng: torch.Generator) -> None:
        whole = network_config(model)
        layer_bytes = 2 * (model.attention_params + model.shared_params + model.router_params)
        vocab = min(model.vocab_size, math.ceil(COLD * cache_bytes / (2 * model.hidden_size) / 2) * 2)
        config = replace(
            whole,
            # One more than needed, so that at least two take turns.
            num_hidden_layers=min(whole.num_hidden_layers, math.ceil(COLD * cache_bytes / layer_bytes) + 1),
            first_k_dense_replace=0,
            vocab_size=vocab,
        )
        self.network = random_without_experts(config, torch.bfloat16, rng)
        self._maps = [_linear_maps(cast(Layer, layer), cores) for layer in self.network.layers]
        on_cores(self.network, cores)
        self._layers = cast(list[Layer], list(self.network.layers))
        for moe in self.network.moe_layers:
            moe.experts = no_experts
        T = model.block_length
        self.x = torch.randn(T, model.hidden_size, generator=rng)
        self.head_share = vocab / model.vocab_size
        self._cache = KVCache(config, CONTEXT_TOKENS + T, self.x)
        self._cache.length = CONTEXT_TOKENS
        self._rotary = self.network.rotary.tables(torch.arange(CONTEXT_TOKENS, CONTEXT_TOKENS + T), self.x.dtype)
        self._turns = cycle(range(config.num_hidden_layers))
        self._tiny = CpuLinear(torch.zeros(2, 2, dtype=torch.bfloat16), cores)

    def maps_s(self, num_rows: int) -> float:
        """Seconds of the linear maps of one MoE layer (attention, router, shared expert) on so many rows."""
        maps = self._maps[next(self._turns)]
        inputs = [self.x.new_ones(num_rows, part.weight.shape[1]) for part in maps]

        def run() -> None:
            for part, rows in zip(maps, inputs, strict=True):
                part(rows)

        return seconds(run)

    def calls_s(self) -> float:
        """Seconds of as many linear maps that have nothing to compute: what is not reading or multiplying."""
        return len(self._maps[0]) * seconds_per_call(lambda: self._tiny(self.x[:1, :2]), 20)

    def layer_s(self) -> float:
        """Seconds of a whole MoE layer without routed experts; the block attends to `CONTEXT_TOKENS` tokens."""
        index = next(self._turns)
        layer, x = self._layers[index], self.x[None].clone()
        return seconds(lambda: layer(x, self._rotary, None, self._cache, index))

    def head_s(self, num_rows: int) -> float:
        """Seconds of lm_head on so many rows."""
        return seconds(lambda: self.network.lm_head(self.x[:num_rows]))


def _linear_maps(layer: Layer, cores: Cores) -> list[CpuLinear]:
    """The linear maps of an MoE layer, each to be called alone; they share the layer's weights."""
    moe = cast(MoE, layer.mlp)
    shared = moe.shared_experts
    maps = (layer.attention.query_key_value, layer.attention.dense, moe.gate)
    return [CpuLinear(each.weight, cores) for each in (*maps, shared.gate_proj, shared.up_proj, shared.down_proj)]


@dataclass(frozen=True, slots=True)
class DenseRates:
    """What the cores reach in the dense parts of a network.

    Parameters
    ----------
    bytes_per_s : weights of a layer's linear maps, at one row.
    flops_per_s : operations of these, at a block of rows.
    head_bytes_per_s, head_flops_per_s : the same of lm_head.
    op_s : one of the ops that a layer has besides them: norms, rotary tables, attention, the router's choice.
    """

    bytes_per_s: Measured
    flops_per_s: Measured
    head_bytes_per_s: Measured
    head_flops_per_s: Measured
    op_s: Measured


def dense_rates(
    model: MoEConfig, parts: ColdNetwork, ops_per_layer: int, repeats: int = 9, limit_s: float = 15.0
) -> DenseRates:
    """Measure the dense parts of a network of the sizes of `model`, which has `ops_per_layer` ops in an MoE layer."""
    T = model.block_length
    measures: dict[str, Callable[[], float]] = {
        "maps": lambda: parts.maps_s(1),
        "maps of a block": lambda: parts.maps_s(T),
        "layer": parts.layer_s,
        "calls": parts.calls_s,
        "head": lambda: parts.head_s(1),
        "head of a block": lambda: parts.head_s(T),
    }
    with torch.inference_mode():
        samples = sample(measures, repeats, limit_s)
    params = model.attention_params + model.shared_params + model.router_params
    head_params = model.vocab_params * parts.head_share
    maps, maps_of_block, layer, calls, head, head_of_block = (
        Measured.of(times, f"{name} on cold bf16 weights") for name, times in samples.items()
    )
    maps, maps_of_block = (_without_calls(each, calls) for each in (maps, maps_of_block))
    return DenseRates(
        maps.per(2 * params),
        maps_of_block.per(2 * T * params),
        head.per(2 * head_params),
        head_of_block.per(2 * T * head_params),
        _op(model, layer, maps_of_block, maps_of_block.per(2 * T * params), ops_per_layer),
    )


def _without_calls(maps: Measured, calls: Measured) -> Measured:
    """Linear maps without what calling them takes, which in a small network would pass for slow memory.

    Calls are counted among a layer's ops. A tenth of the time is left in any case.
    """
    return maps.with_value(max(maps.value - calls.value, maps.value / 10), "without the calls themselves")


def _op(model: MoEConfig, layer: Measured, maps: Measured, flops_per_s: Measured, ops_per_layer: int) -> Measured:
    """Seconds of one op of a layer that has `ops_per_layer`, given times of the whole and of its linear maps."""
    # Attention has no weights, but operations, which a simulation counts at the rate of the maps.
    attention_flops = 4 * model.block_length * (CONTEXT_TOKENS + model.block_length) * model.num_heads * model.head_dim
    rest_s = layer.value - maps.value - attention_flops / flops_per_s.value
    note = (
        f"a layer without routed experts ({layer.value * 1e3:.2f} ms, {model.block_length} rows that attend to "
        f"{CONTEXT_TOKENS} more) less its linear maps ({maps.value * 1e3:.2f} ms) and the operations of attention, "
        f"over {ops_per_layer} ops; {torch.get_num_threads()} threads of PyTorch"
    )
    return replace(layer, value=max(0.0, rest_s) / ops_per_layer, note=note)


def tiny_op(repeats: int = 15, limit_s: float = 1.0) -> Measured:
    """Seconds of one op on a tensor of one number."""
    number = torch.zeros(1)
    with torch.inference_mode():
        samples = sample({"op": lambda: seconds_per_call(lambda: number.add_(1), 500)}, repeats, limit_s)
    return Measured.of(samples["op"], "an op on a tensor of one number, 500 times in a row")
