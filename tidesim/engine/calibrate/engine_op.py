"""What an accelerator takes for the small kernels of a layer, and for the ops that the engine begins one by one."""

from dataclasses import dataclass, replace

import torch

from tidesim.engine.accelerator import AcceleratorBackend
from tidesim.engine.calibrate.accelerator import device_s
from tidesim.engine.calibrate.dense import CONTEXT_TOKENS
from tidesim.engine.calibrate.experts import network_config
from tidesim.engine.calibrate.measured import Measured, sample
from tidesim.engine.checkpoint import random_without_experts
from tidesim.engine.cores import Cores
from tidesim.engine.device_calls import DeviceCalls
from tidesim.engine.device_network import DeviceNetwork
from tidesim.engine.host_weights import HostWeights
from tidesim.engine.offload import Offload
from tidesim.execution import EXECUTIONS
from tidesim.moe import MoEConfig
from tidesim.policies import policy
from tidesim.workload import ForwardKind

_FORWARDS = 4  # of a sample, after one that is thrown away
_AGAIN = 8  # dense parts begun back to back, so that beginning one hides behind the one before


class ResidentLayers:
    """Two MoE layers of the sizes of `model`, run by the engine with every expert on the device.

    A bare op repeated in a tight loop takes a fraction of what one takes in a network: there kernels read what others
    wrote, and after each layer's dense part the host reads the choice of experts and sorts its rows.
    """

    def __init__(self, model: MoEConfig, calls: DeviceCalls, host_cores: Cores, rng: torch.Generator) -> None:
        # The vocabulary has no part in a layer, and drawing one of full size takes longer than all else.
        config = replace(network_config(model), num_hidden_layers=2, first_k_dense_replace=0, vocab_size=2)
        self._network = DeviceNetwork(random_without_experts(config, torch.bfloat16, rng).to(calls.device), calls)
        weights = HostWeights.random(config, torch.bfloat16, rng, calls.pinned)
        backend = AcceleratorBackend(config, weights, host_cores, calls)
        self.execution = EXECUTIONS["engine"]
        self._offload = Offload(self._network, backend, policy("all-device"), [model.num_experts] * 2, self.execution)
        self._offload.begin_sequence()
        self._calls, self._num_rows = calls, model.block_length
        size = CONTEXT_TOKENS + model.block_length
        self._tokens = torch.randint(config.vocab_size, (1, model.block_length), generator=rng).to(calls.device)
        self._positions = torch.arange(CONTEXT_TOKENS, size, device=calls.device)
        self._cache = self._network.new_cache(size)
        self._cache.length = CONTEXT_TOKENS

    def close(self) -> None:
        """Give back the device's memory."""
        self._offload.backend.close()

    def dense_part_s(self) -> float:
        """Seconds of the dense part of the second layer, by the device's clock."""
        self._forward(0)

        def run() -> None:
            for _ in range(_AGAIN):
                self._network.run_again(self._num_rows, 1)

        return device_s(self._calls, run) / _AGAIN

    def layer_s(self) -> float:
        """Seconds of a forward that the second layer spends on all but its experts' kernels."""
        self._forward(0)
        before_ns = self._spent_ns()
        for step in range(_FORWARDS):
            self._forward(step)
        return (self._spent_ns() - before_ns) / _FORWARDS / 1e9

    def _spent_ns(self) -> int:
        parts = self._offload.times.parts_ns[1]
        return parts["dense"] + parts["launch"]

    def _forward(self, step: int) -> None:
        offload = self._offload
        offload.begin(ForwardKind.DENOISE, 0, step, is_first_block=True, tokens=self._num_rows)
        self._network(self._tokens, self._positions, None, self._cache)
        offload.end()


@dataclass(frozen=True, slots=True)
class Launches:
    """What remains of a layer besides reading weights and multiplying.

    Parameters
    ----------
    kernel_s : one kernel of the dense part, as the engine begins them: together, where the device can.
    op_s : one of the ops that the host begins, or does itself, one by one.
    """

    kernel_s: Measured
    op_s: Measured


def launches(layers: ResidentLayers, repeats: int = 9, limit_s: float = 5.0) -> Launches:
    """Measure a layer of the engine."""
    with torch.inference_mode():
        samples = sample({"dense": layers.dense_part_s, "layer": layers.layer_s}, repeats, limit_s)
    what = f"an MoE layer of the engine, {CONTEXT_TOKENS} tokens before its block"
    dense = Measured.of(samples["dense"], f"the dense part of {what}, device clock")
    layer = Measured.of(samples["layer"], f"{what}, with all experts on the device, less their kernels")
    num_kernels, num_ops = layers.execution.graph_kernels_per_layer, layers.execution.ops_per_layer
    rest_s = max(0.0, layer.value - dense.value)
    return Launches(
        dense.with_value(dense.value / num_kernels, f"{dense.value * 1e6:.0f} us over {num_kernels} kernels"),
        layer.with_value(rest_s / num_ops, f"less its dense part, {rest_s * 1e6:.0f} us over {num_ops} ops"),
    )
