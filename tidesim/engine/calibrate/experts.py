"""Routed experts on this machine's cores, alone and beside what else an engine does at the same time."""

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt
import torch

from tidesim.engine.calibrate.host import COLD, HostCopies
from tidesim.engine.calibrate.measured import Measured, sample, seconds, seconds_per_call
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_backend import sleep_precisely, sleep_until
from tidesim.engine.host_weights import HostWeights, addresses
from tidesim.engine.kernel import sorted_pairs, stored_like
from tidesim.engine.model import NetworkConfig
from tidesim.moe import MoEConfig

# Rows per expert that curves are measured at. The kernel computes four at a time: its time steps up behind each four.
ROWS = (1, 4, 5, 8, 9, 16, 17, 32, 64)
TYPICAL_ROWS = 4
PHASE_S = 0.2  # long enough for some calls and some copies of experts
_PER_CALL = 24  # experts of one layer that a forward of 32 tokens has run in one memory, in order of magnitude

Floats = npt.NDArray[np.float32]


def network_config(model: MoEConfig) -> NetworkConfig:
    """A network of the sizes of `model`; what no size depends on is as in the published LLaDA2 models."""
    groups, top_groups = (8, 4) if model.num_experts % 16 == 0 and model.top_k <= model.num_experts // 2 else (1, 1)
    return NetworkConfig(
        num_hidden_layers=model.num_dense_layers + model.num_layers,
        first_k_dense_replace=model.num_dense_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        moe_intermediate_size=model.moe_intermediate_size,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        num_shared_experts=model.num_shared_experts,
        n_group=groups,
        topk_group=top_groups,
        routed_scaling_factor=2.5,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        partial_rotary_factor=0.5,
        rope_theta=600_000.0,
        rms_norm_eps=1e-6,
        vocab_size=model.vocab_size,
    )


class ColdExperts:
    """Experts in host memory, more of them than any cache holds, run so many at a time, one set after another.

    A model so small that all its experts fit the cache runs them from there, and is measured so.

    Parameters
    ----------
    dtype : what they are stored in, bfloat16 or float32.
    cache_bytes : of the last-level cache.
    """

    def __init__(self, model: MoEConfig, dtype: torch.dtype, cache_bytes: int, rng: torch.Generator) -> None:
        expert_bytes = model.expert_params * dtype.itemsize
        num_sets = math.ceil(COLD * cache_bytes / (_PER_CALL * expert_bytes))
        self.num_experts = min(_PER_CALL * num_sets, model.num_layers * model.num_experts)
        self.per_call = min(_PER_CALL, self.num_experts)
        self.width = model.moe_intermediate_size
        self.flops_per_row = 2 * model.expert_params
        config = replace(
            network_config(model), num_hidden_layers=1, first_k_dense_replace=0, num_experts=self.num_experts
        )
        self.pieces = HostWeights.random(config, dtype, rng).layers[0]  # [experts, 3 * I * D]
        self._at = addresses(self.pieces, config)
        self._like = stored_like(dtype)
        self._x: Floats = torch.randn(max(ROWS), model.hidden_size, generator=rng).numpy()
        self._ids = np.arange(self.per_call, dtype=np.int64)

    def work(self, cores: Cores, rows: int) -> Callable[[], None]:
        """What runs the next set of experts, each on so many rows, in one call of `cores`."""
        x = self._x[:rows]
        pairs = sorted_pairs(np.tile(self._ids, (rows, 1)), self._ids, self.per_call)
        out = np.empty((rows * self.per_call, x.shape[1]), np.float32)
        firsts = cycle(range(0, self.num_experts, self.per_call))

        def run() -> None:
            used = (next(firsts) + self._ids) % self.num_experts
            cores.run_experts(x, pairs, self._ids, self._at.of(used), self._like, self.width, out)

        return run

    def flops(self, rows: int) -> float:
        """Operations of one call."""
        return self.per_call * rows * self.flops_per_row


def expert_curve(
    experts: ColdExperts, cores: Cores, rows: tuple[int, ...] = ROWS, repeats: int = 9, limit_s: float = 20.0
) -> dict[int, Measured]:
    """FLOP/s of `cores` by rows per expert."""
    works = {number: experts.work(cores, number) for number in rows}
    samples = sample({number: partial(seconds, work) for number, work in works.items()}, repeats, limit_s)
    note = (
        f"{experts.per_call} {_dtype(experts)} experts in one call of the engine's kernel on {cores.num_threads} "
        f"threads, going round {experts.num_experts} of them"
    )
    return {number: Measured.of(times, note).per(experts.flops(number)) for number, times in samples.items()}


def _dtype(experts: ColdExperts) -> str:
    return str(experts.pieces.dtype).removeprefix("torch.")


def experts_call(model: MoEConfig, cores: Cores, repeats: int = 15, limit_s: float = 1.0) -> Measured:
    """Seconds that one call to run experts takes besides the experts: tiny ones of one row, one for each thread."""
    N, D, width = cores.num_threads, 8, 2
    config = replace(network_config(model), hidden_size=D, moe_intermediate_size=width)
    pieces = torch.zeros(N, 3 * D * width, dtype=torch.bfloat16)
    at, like, ids = addresses(pieces, config), stored_like(torch.bfloat16), np.arange(N, dtype=np.int64)
    pairs = sorted_pairs(ids[None], ids, N)
    x, out = np.zeros((1, D), np.float32), np.empty((N, D), np.float32)

    def call() -> None:
        cores.run_experts(x, pairs, ids, at, like, width, out)

    samples = sample({"call": lambda: seconds_per_call(call, 200)}, repeats, limit_s)
    return Measured.of(samples["call"], f"a call of the engine's kernel for {N} tiny experts, 200 times in a row")


# --- side by side -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """Something that is done over and over on a thread of its own."""

    name: str
    work: Callable[[], None]

    def repeat(self, start: threading.Barrier, duration_s: float) -> float:
        """Do it for so long once all are ready; mean seconds that it took once.

        What was not done by the end ran beside nothing, and does not count.
        """
        start.wait()
        busy_ns, count = 0, 0
        end_ns = perf_counter_ns() + round(duration_s * 1e9)
        while True:
            began_ns = perf_counter_ns()
            self.work()
            done_ns = perf_counter_ns()
            if count == 0 or done_ns <= end_ns:
                busy_ns += done_ns - began_ns
                count += 1
            if done_ns >= end_ns:
                return busy_ns / count / 1e9


def shares_beside(
    first: Load, second: Load, duration_s: float | None = None, repeats: int = 7, limit_s: float = 6.0
) -> tuple[Measured, Measured]:
    """Share of its own rate that each of two loads keeps beside the other, at most 1.

    Each alone and both together run in turn, for `duration_s` each (None: `PHASE_S`); a share compares neighbours in
    time.
    """
    with ThreadPoolExecutor(2, initializer=sleep_precisely) as threads:

        def run(*loads: Load) -> list[float]:
            start = threading.Barrier(len(loads))
            return list(threads.map(lambda load: load.repeat(start, duration_s or PHASE_S), loads))

        measures = {"first": lambda: run(first), "second": lambda: run(second), "both": lambda: run(first, second)}
        samples = sample(measures, repeats, limit_s)
    beside = zip(*samples["both"], strict=True)
    kept = [
        [min(1.0, alone_s / beside_s) for (alone_s,), beside_s in zip(samples[name], times, strict=True)]
        for name, times in zip(("first", "second"), beside, strict=True)
    ]
    note = f"{first.name} and {second.name}, each alone and both at once in turn"
    return Measured.of(kept[0], note), Measured.of(kept[1], note)


def copying(copies: HostCopies, expert_bytes: int, copy_gb_s: float | None = None) -> Load:
    """Copies of experts within host memory, one after another.

    With `copy_gb_s` each lasts as long as on a link of that rate: most of the time memory is left alone.
    """
    least_ns = 0 if copy_gb_s is None else round(expert_bytes / copy_gb_s)

    def copy() -> None:
        start_ns = perf_counter_ns()
        ((source, target),) = copies.pieces(expert_bytes, 1)
        target.copy_(source)
        sleep_until(start_ns + least_ns)

    return Load("copies of experts" if copy_gb_s is None else f"copies of experts at {copy_gb_s:g} GB/s", copy)


def contention(device: Load, host: Load, copies: Load, limit_s: float = 18.0) -> dict[str, Measured]:
    """The six shares of a profile's `contention`: what each of device, host and copies keeps beside another one."""
    pairs: Mapping[tuple[str, str], tuple[Load, Load]] = {
        ("device", "host"): (device, host),
        ("device", "copies"): (device, copies),
        ("host", "copies"): (host, copies),
    }
    shares: dict[str, Measured] = {}
    for (first, second), loads in pairs.items():
        of_first, of_second = shares_beside(*loads, limit_s=limit_s / len(pairs))
        shares |= {f"{first}_beside_{second}": of_first, f"{second}_beside_{first}": of_second}
    return shares
