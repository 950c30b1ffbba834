"""What beginning work costs on an accelerator: a layer's dense part eager and as a graph, copies, and whole steps.

    python tests/benchmarks/accelerator_speed.py [--shape llada2.0-mini] [--layers 4] [--forwards 24] [--stand-in]

Everything is of the shape given, with random weights and forced routing, and is the engine's own code. The dense part
is that of an MoE layer with the adds of the one before it, a block of rows, 128 tokens before it. `device_ms` is by the
device's clock, several begun back to back; `launch_ms` is the host's time to begin one while the device is idle;
`kernels` is what the profiler sees. Copies are begun 32 at a time; compare `h2d_gb_s` with `link_gb_s`, one large copy.
Steps are those of runs with all experts on the device, with half of them and a refresh every fourth step, and with
none; the first run of each is thrown away. Prints one JSON line. `--stand-in` takes the CPU for a device, to try the
script.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tidesim.engine import live as live_module
from tidesim.engine.accelerator import AcceleratorBackend
from tidesim.engine.calibrate.accelerator import device_name, device_s, host_s
from tidesim.engine.calibrate.dense import CONTEXT_TOKENS
from tidesim.engine.calibrate.experts import network_config
from tidesim.engine.checkpoint import random_without_experts
from tidesim.engine.choice import by_hand
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_network import no_experts
from tidesim.engine.device_calls import DeviceCalls, Work
from tidesim.engine.device_network import DeviceNetwork
from tidesim.engine.host_weights import HostWeights
from tidesim.engine.live import DeviceSettings, dummy_model
from tidesim.engine.session import Session
from tidesim.engine.slots import Place
from tidesim.execution import EXECUTIONS
from tidesim.moe import MoEConfig, load_moe_config, read_hf_config
from tidesim.policies import Policy, policy
from tidesim.shipped import find_shipped
from tidesim.synthesize import synthesize
from tidesim.trace import Trace

AGAIN = 8  # dense parts begun back to back
BATCH = 32  # copies begun together
REPEATS = 15


class EagerGraphs:
    """Work that is begun again op by op."""

    def run(self, work: Work) -> Work:
        """Do it; it is its own graph."""
        work()
        return work


def eager(network: DeviceNetwork) -> DeviceNetwork:
    """The same network without graphs."""
    network._graphs = EagerGraphs()
    return network


def dense_part(model: MoEConfig, calls: DeviceCalls, is_eager: bool) -> dict[str, float | None]:
    """Time and kernels of the dense part of the second of two MoE layers."""
    rng = torch.Generator().manual_seed(0)
    config = replace(network_config(model), num_hidden_layers=2, first_k_dense_replace=0, vocab_size=64)
    network = DeviceNetwork(random_without_experts(config, torch.bfloat16, rng).to(calls.device), calls)
    network = eager(network) if is_eager else network
    for moe in network.moe_layers:
        moe.experts = no_experts
    T = model.block_length
    tokens = torch.randint(64, (1, T), generator=rng).to(calls.device)
    positions = torch.arange(CONTEXT_TOKENS, CONTEXT_TOKENS + T, device=calls.device)
    cache = network.new_cache(CONTEXT_TOKENS + T)
    cache.length = CONTEXT_TOKENS

    def forward() -> None:
        network(tokens, positions, None, cache)

    def part() -> None:
        network.run_again(T, 1)

    def parts() -> None:
        for _ in range(AGAIN):
            part()

    def launch_s() -> float:
        calls.finish(calls.current_stream())
        started_s = time.perf_counter()
        part()
        return time.perf_counter() - started_s

    with torch.inference_mode():
        forward()
        capture_s = host_s(calls, forward)
        launch_s()
        device = statistics.median(device_s(calls, parts) / AGAIN for _ in range(REPEATS))
        launch = statistics.median(launch_s() for _ in range(REPEATS))
        kernels = num_kernels(calls, part)
    return {
        "device_ms": 1e3 * device,
        "launch_ms": 1e3 * launch,
        "kernels": kernels,
        "forward_of_2_layers_ms": 1e3 * capture_s,
    }


def num_kernels(calls: DeviceCalls, run: Callable[[], object]) -> int | None:
    """Kernels and copies that `run` has the device do; None where no profiler sees them."""
    if calls.device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        calls.finish(calls.current_stream())
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def copies(model: MoEConfig, calls: DeviceCalls) -> dict[str, float]:
    """What beginning a copy of an expert takes the host, and what the link carries."""
    rng = torch.Generator().manual_seed(0)
    config = replace(network_config(model), num_hidden_layers=1, first_k_dense_replace=0)
    weights = HostWeights.random(config, torch.bfloat16, rng, calls.pinned)
    num = min(BATCH, model.num_experts)
    places = [Place(0, number, 0, number) for number in range(num)]
    with Cores(1) as cores:
        backend = AcceleratorBackend(config, weights, cores, calls)
        backend.open_slots([num, 1])
        begun_s, one_s, whole_s = [], [], []
        for _ in range(REPEATS + 1):
            started_s = time.perf_counter()
            arrivals = backend.copy(places)
            begun_s.append((time.perf_counter() - started_s) / num)
            backend.wait_for(arrivals[-1])
            calls.finish(calls.current_stream())
            whole_s.append(time.perf_counter() - started_s)
            started_s = time.perf_counter()
            alone = backend.copy(places[:1])
            one_s.append(time.perf_counter() - started_s)
            backend.wait_for(alone[0])
            calls.finish(calls.current_stream())
        backend.close()
    pieces = torch.empty(num, *weights.layers[0].shape[1:], dtype=torch.bfloat16, device=calls.device)
    large_s = [device_s(calls, lambda: pieces.copy_(weights.layers[0][:num], non_blocking=True)) for _ in range(5)]
    num_bytes = num * weights.expert_bytes
    return {
        "begin_us": 1e6 * statistics.median(begun_s[1:]),
        "begin_alone_us": 1e6 * statistics.median(one_s[1:]),
        "h2d_gb_s": num_bytes / statistics.median(whole_s[1:]) / 1e9,
        "link_gb_s": num_bytes / statistics.median(large_s) / 1e9,
    }


def steps(shape: Path, num_layers: int, num_forwards: int) -> dict[str, Any]:
    """Milliseconds of a step, as a whole and by part, and of the host's calls to the device beside it."""
    model = load_moe_config(str(shape))
    settings, found = DeviceSettings(device="accelerator"), {}
    made: dict[str, tuple[Policy, int]] = {
        "all-device": (policy("all-device"), model.num_experts),
        "tide, half": (policy("tide", refresh_interval=4), model.num_experts // 2),
        "all-host": (policy("all-host"), 0),
    }
    with tempfile.TemporaryDirectory() as folder, dummy_model(shape, settings, num_layers, seed=0) as live:
        file = Path(folder) / "routing.h5"
        synthesize(read_hf_config(shape), file, model_name=model.name, num_sequences=1, seed=0)
        with Trace.open(file) as trace:
            for name, (decides, budget) in made.items():
                choice = by_hand(decides, budget, EXECUTIONS["overlapped"], live)
                session = Session(live, choice, machine=settings.description, seed=0)
                session.replay(trace, [0], num_forwards)
                result = session.replay(trace, [0], num_forwards).result
                parts = {part: 1e3 * s / result.num_forwards for part, s in result.breakdown_s.items()}
                found[name] = {"ms": 1e3 * result.makespan_s / result.num_forwards, "parts_ms": parts}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llada2.0-mini")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--forwards", type=int, default=24)
    parser.add_argument("--stand-in", action="store_true")
    arguments = parser.parse_args()
    shape = find_shipped("models", arguments.shape)
    model = load_moe_config(str(shape))
    with ExitStack() as stack:
        make: Callable[[], DeviceCalls] = DeviceCalls
        if arguments.stand_in:
            sys.path.append(str(Path(__file__).parent.parent))
            import pytest
            from accelerator_stand_in import StandIn

            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(live_module, "DeviceCalls", StandIn)
            patch.setattr(torch.accelerator, "is_available", lambda: True)
            make = StandIn
        calls = make()
        report = {
            "device": device_name(calls) if not arguments.stand_in else "stand-in",
            "torch": torch.__version__,
            "shape": arguments.shape,
            "dense_part": {name: dense_part(model, make(), name == "eager") for name in ("eager", "graph")},
            "copies": copies(model, calls),
            "steps": steps(shape, arguments.layers, arguments.forwards),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
