"""What an op takes on an accelerator where the engine begins it, between its bookkeeping and its waits."""

from dataclasses import replace

import torch

from tidesim.engine.accelerator import AcceleratorBackend, DeviceCalls
from tidesim.engine.calibrate.dense import CONTEXT_TOKENS
from tidesim.engine.calibrate.experts import network_config
from tidesim.engine.calibrate.measured import Measured, sample
from tidesim.engine.checkpoint import random_without_experts
from tidesim.engine.cores import Cores
from tidesim.engine.host_weights import HostWeights
from tidesim.engine.model import KVCache
from tidesim.engine.offload import Offload
from tidesim.execution import EXECUTIONS
from tidesim.moe import MoEConfig
from tidesim.policies import policy
from tidesim.workload import ForwardKind

_FORWARDS = 4  # of a sample, after one that is thrown away


class ResidentLayers:
    """Two MoE layers of the sizes of `model`, run by the engine with every expert on the device.

    A bare op repeated in a tight loop takes a fraction of what one takes in a network: there Python calls modules,
    products choose their kernels, and after each layer the host reads the choice of experts and sorts its rows.
    """

    def __init__(self, model: MoEConfig, calls: DeviceCalls, host_cores: Cores, rng: torch.Generator) -> None:
        # The vocabulary has no part in a layer, and drawing one of full size takes longer than all else.
        config = replace(network_config(model), num_hidden_layers=2, first_k_dense_replace=0, vocab_size=2)
        network = random_without_experts(config, torch.bfloat16, rng).to(calls.device)
        weights = HostWeights.random(config, torch.bfloat16, rng, calls.pinned)
        backend = AcceleratorBackend(config, weights, host_cores, calls)
        self.execution = EXECUTIONS["engine"]
        self._offload = Offload(network, backend, policy("all-device"), [model.num_experts] * 2, self.execution)
        self._offload.begin_sequence()
        self._network, self._num_rows = network, model.block_length
        size = CONTEXT_TOKENS + model.block_length
        self._tokens = torch.randint(config.vocab_size, (1, model.block_length), generator=rng).to(calls.device)
        self._positions = torch.arange(CONTEXT_TOKENS, size, device=calls.device)
        self._cache = KVCache(config, size, network.norm.weight)
        self._cache.length = CONTEXT_TOKENS

    def close(self) -> None:
        """Give back the device's memory."""
        self._offload.backend.close()

    def op_s(self) -> float:
        """Seconds of a forward that the second layer spends on all but its experts' kernels, over its ops.

        What it spends there is the later of its kernels and the ops that begin them; so this is too much for a device
        whose kernels outlast their ops, but the layer comes out right.
        """
        self._forward(0)
        before_ns = self._spent_ns()
        for step in range(_FORWARDS):
            self._forward(step)
        return (self._spent_ns() - before_ns) / _FORWARDS / self.execution.ops_per_layer / 1e9

    def _spent_ns(self) -> int:
        parts = self._offload.times.parts_ns[1]
        return parts["dense"] + parts["launch"]

    def _forward(self, step: int) -> None:
        offload = self._offload
        offload.begin(ForwardKind.DENOISE, 0, step, is_first_block=True, tokens=self._num_rows)
        self._network(self._tokens, self._positions, None, self._cache)
        offload.end()


def engine_op(layers: ResidentLayers, repeats: int = 9, limit_s: float = 5.0) -> Measured:
    """Seconds of one op of the engine."""
    with torch.inference_mode():
        samples = sample({"op": layers.op_s}, repeats, limit_s)
    note = (
        f"an MoE layer of the engine with all experts on the device, {CONTEXT_TOKENS} tokens before its block, less "
        f"its experts' kernels, over {layers.execution.ops_per_layer} ops; device clock"
    )
    return Measured.of(samples["op"], note)
