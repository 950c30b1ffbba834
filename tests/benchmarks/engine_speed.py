"""The engine with every expert resident against a plain forward written as the published code works.

    python tests/benchmarks/engine_speed.py [--shape llada2-tiny | llada2.0-mini] [--layers 1] [--repeats 5]

The plain side has no KV cache, so it computes the whole prefix in every forward, and runs the experts one by one with
PyTorch's own products. Both sides compute in float32 in one process, in turn, on all cores; the first pair is thrown
away. `llada2-tiny` generates up to 256 tokens, as the published evaluation does, from its real weights, and the text
must be the same on both sides. Any other shape runs the first sequence of the shipped synthetic trace with random
weights and forced routing. Prints one JSON line; `speedup` is the median of the paired ratios of tok/s, `peak_gb` the
largest resident size of a process that runs one side alone. Bars: 10 for llada2-tiny, 3 for true-shape layers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tidesim.engine.checkpoint import Checkpoint, expert_weights, load_without_experts, random_without_experts
from tidesim.engine.generate import Sampler, generate
from tidesim.engine.host_weights import HostWeights
from tidesim.engine.live import DeviceSettings, LiveModel, dummy_model, open_model
from tidesim.engine.model import LLaDA2, Routing
from tidesim.engine.run import replay_trace
from tidesim.engine.tokenizer import TextCodec, read_prompts
from tidesim.execution import EXECUTIONS, Execution
from tidesim.policies import policy
from tidesim.shipped import find_shipped
from tidesim.trace import Trace

UNCACHED = replace(EXECUTIONS["emulated"], kv_cache=False)
Matrices = list[tuple[Tensor, Tensor, Tensor]]


class Loop:
    """Stands where an `Offload` would: takes forced routing, keeps no books."""

    def __init__(self) -> None:
        self.forced: np.ndarray | None = None
        self.num_forwards = 0
        self.budgets = (0,)

    def begin_sequence(self) -> None:
        """Nothing to note."""

    def begin(self, *forward: Any) -> None:
        """A forward begins."""
        self.num_forwards += 1

    def end(self) -> None:
        """Nothing to note."""


class LoopExperts:
    """Rows sorted by expert, one expert after another, and the weighted sum: the published inference path."""

    def __init__(self, loop: Loop, layer: int, matrices: Matrices) -> None:
        self.loop, self.layer, self.matrices = loop, layer, matrices

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        forced = self.loop.forced
        ids = routing.expert_ids if forced is None else torch.from_numpy(forced[:, self.layer])
        order = ids.flatten().argsort()
        counts = torch.bincount(ids.flatten(), minlength=len(self.matrices)).tolist()
        rows = x[order // ids.shape[1]]
        outputs = []
        for (start, end), (gate, up, down) in zip(
            pairwise(np.append(0, np.cumsum(counts)).tolist()), self.matrices, strict=True
        ):
            if start < end:
                part = rows[start:end]
                hidden = functional.silu(functional.linear(part, gate)) * functional.linear(part, up)
                outputs.append(functional.linear(hidden, down))
        unsorted = torch.empty_like(rows)
        unsorted[order] = torch.cat(outputs)
        return (unsorted.view(*ids.shape, -1) * routing.expert_weights[:, :, None]).sum(1)


def loop_network(network: LLaDA2, experts: list[Matrices]) -> tuple[LLaDA2, Loop]:
    """`network` with looped experts, all of it in float32."""
    loop = Loop()
    network.float()
    for layer, (moe, matrices) in enumerate(zip(network.moe_layers, experts, strict=True)):
        moe.experts = LoopExperts(loop, layer, [tuple(matrix.float() for matrix in expert) for expert in matrices])
    return network, loop


def split(pieces: Tensor, width: int, hidden: int) -> Matrices:
    """The matrices of each packed expert."""
    parts = [piece.split(width * hidden) for piece in pieces]
    return [(gate.view(width, hidden), up.view(width, hidden), down.view(hidden, width)) for gate, up, down in parts]


def tiny_sides(name: str, which: str) -> dict[str, Callable[[], tuple[float, object]]]:
    """Both sides generate from the same prompts: tok/s and the text."""
    folder = find_shipped("models", name)
    codec = TextCodec(folder)
    prompts = [codec.encode(prompt) for prompt in read_prompts(None, 1, is_chat=False)]
    sampler = Sampler(gen_length=256)

    def run(network: LLaDA2, kv_cache: bool, watcher: Any) -> tuple[float, object]:
        settings = Sampler(gen_length=sampler.gen_length, kv_cache=kv_cache)
        began = time.perf_counter()
        texts = [
            generate(network, ids, settings, mask_id=codec.mask_id, end_id=codec.end_id, watcher=watcher).tokens
            for ids in prompts
        ]
        return sum(map(len, texts)) / (time.perf_counter() - began), texts

    sides: dict[str, Callable[[], tuple[float, object]]] = {}
    if which in ("both", "loop"):
        checkpoint = Checkpoint(folder)
        plain = load_without_experts(checkpoint)
        first, last = plain.config.first_k_dense_replace, plain.config.num_hidden_layers
        experts = [expert_weights(checkpoint, plain.config, layer) for layer in range(first, last)]
        network, loop = loop_network(plain, experts)
        sides["loop"] = lambda: run(network, False, loop)
    if which in ("both", "ours"):
        live = open_model(folder, all_cores())
        offload = live.start(policy("all-device"), all_slots(live), EXECUTIONS["emulated"])
        sides["ours"] = lambda: run(live.network, True, offload)
    return sides


def shape_sides(name: str, num_layers: int, which: str) -> dict[str, Callable[[], tuple[float, object]]]:
    """Both sides run the same recorded sequence: tok/s of the tokens that it generates."""
    shape = find_shipped("models", name)
    trace = Trace.open("llada2.0-mini-synthetic")
    tokens = int(trace.sequences["generated_tokens"][0])
    live = dummy_model(shape, all_cores(), num_layers, seed=0)
    sides: dict[str, Callable[[], tuple[float, object]]] = {}

    def run(model: LiveModel, watcher: Any, execution: Execution) -> tuple[float, object]:
        began = time.perf_counter()
        replay_trace(model, watcher, trace, execution, [0])
        return tokens / (time.perf_counter() - began), None

    if which in ("both", "loop"):
        config, rng = live.network.config, torch.Generator().manual_seed(0)
        weights = HostWeights.random(config, torch.bfloat16, rng)
        experts = [split(layer, config.moe_intermediate_size, config.hidden_size) for layer in weights.layers]
        network, loop = loop_network(random_without_experts(config, torch.bfloat16, rng), experts)
        plain = LiveModel(network, live.sizes, "cpu", 0, lambda detailed: None, ())  # type: ignore[arg-type,return-value]
        sides["loop"] = lambda: run(plain, loop, UNCACHED)
    if which in ("both", "ours"):
        offload = live.start(policy("all-device"), all_slots(live), EXECUTIONS["emulated"])
        sides["ours"] = lambda: run(live, offload, EXECUTIONS["emulated"])
    return sides


def all_cores() -> DeviceSettings:
    return DeviceSettings(device="cpu", device_threads=os.cpu_count() or 1, host_threads=1)


def all_slots(live: LiveModel) -> list[int]:
    return [live.sizes.num_experts] * live.sizes.num_layers


def timed(side: str, run: Callable[[], tuple[float, object]]) -> tuple[float, object]:
    """One run; the plain side gets all of PyTorch's threads, ours has threads of its own."""
    torch.set_num_threads((os.cpu_count() or 1) if side == "loop" else 1)
    return run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llada2-tiny")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=("both", "ours", "loop"), default="both", help="used by the benchmark itself")
    arguments = parser.parse_args()
    is_tiny = arguments.shape == "llada2-tiny"
    # Before this process holds both sides, which may be most of the machine's memory.
    peaks = {}
    for side in ("loop", "ours") if arguments.side == "both" else ():
        command = [sys.executable, str(Path(__file__)), "--side", side, "--shape", arguments.shape]
        done = subprocess.run([*command, "--layers", str(arguments.layers)], capture_output=True, text=True, check=True)
        peaks[side] = float(done.stdout.split()[-1])
    sides = (
        tiny_sides(arguments.shape, arguments.side)
        if is_tiny
        else shape_sides(arguments.shape, arguments.layers, arguments.side)
    )
    if arguments.side != "both":
        timed(arguments.side, sides[arguments.side])
        # Not ru_maxrss: a new process inherits that of the one that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9)
        return
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(arguments.repeats + 1):
        said = {}
        for side, run in sides.items():
            rate, said[side] = timed(side, run)
            if repeat:
                rates[side].append(rate)
        assert said["loop"] == said["ours"], "both sides must write the same text"
    ratios = [ours / loop for ours, loop in zip(rates["ours"], rates["loop"], strict=True)]
    document = {
        "benchmark": "engine_speed",
        "shape": arguments.shape if is_tiny else f"{arguments.shape}, {arguments.layers} layers, forced routing",
        "repeats": arguments.repeats,
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "tok_per_s": {side: statistics.median(values) for side, values in rates.items()},
        "peak_gb": peaks,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
