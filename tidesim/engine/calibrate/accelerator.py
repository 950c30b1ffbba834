"""An accelerator: copies to and from it, its kernels, its memory. Nothing is timed without waiting for the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tidesim.engine.accelerator import run_grouped
from tidesim.engine.calibrate.experts import ROWS, Load
from tidesim.engine.calibrate.host import COLD, SIZES, batch, copy_fresh, copy_sweep
from tidesim.engine.calibrate.measured import CopyFit, Measured, sample, seconds, seconds_per_call
from tidesim.engine.cpu_backend import Worker, sleep_until
from tidesim.engine.device_calls import DeviceCalls
from tidesim.moe import MoEConfig

LARGE_ROWS = 256  # rows of an expert, and of a dense product by 16, at which rates no longer rise by much
DEVICE_CACHE_BYTES = 128 * 2**20  # the largest last-level cache of a present accelerator
_NUM_CALLS = 200


def device_name(calls: DeviceCalls) -> str:
    """What the maker calls the device, or PyTorch's word for it where that is not told."""
    properties: Any = getattr(torch.get_device_module(calls.device), "get_device_properties", None)
    name = getattr(properties(calls.device), "name", None) if properties is not None else None
    return str(name or calls.device)


def device_s(calls: DeviceCalls, run: Callable[[], object]) -> float:
    """Seconds that the device takes for what `run` begins on the current stream, by the device's clock."""
    stream = calls.current_stream()
    begin = calls.record(stream)
    run()
    end = calls.record(stream)
    end.synchronize()
    return calls.elapsed_ms(begin, end) / 1e3


def host_s(calls: DeviceCalls, run: Callable[[], object], streams: Sequence[Any] = ()) -> float:
    """Seconds until what `run` begins on `streams` (none: the current one) is done, by the host's clock."""
    streams = streams or (calls.current_stream(),)

    def wait() -> None:
        for event in [calls.record(stream) for stream in streams]:
            event.synchronize()

    def run_and_wait() -> None:
        run()
        wait()

    wait()
    return seconds(run_and_wait)


@dataclass(frozen=True, slots=True)
class LinkFits:
    """The copies between host and device; `duplex` is the share of its rate that a direction keeps when both run."""

    h2d_pinned: CopyFit
    h2d_pageable: CopyFit
    d2h_pinned: CopyFit
    d2h_pageable: CopyFit
    d2h_fresh: CopyFit
    duplex: Measured


class DeviceCopies:
    """Copies of pieces of memory between host and device, which go round in as much memory as no cache holds."""

    def __init__(self, calls: DeviceCalls, num_bytes: int, rng: np.random.Generator) -> None:
        self.calls = calls
        self.pageable = torch.from_numpy(rng.integers(0, 256, num_bytes, np.uint8))
        self.pinned = calls.pinned((num_bytes,), torch.uint8)
        self.pinned.copy_(self.pageable)
        self.on_device = torch.empty(num_bytes, dtype=torch.uint8, device=calls.device).copy_(self.pageable)
        self._positions: dict[int, int] = {}

    def pieces(self, size: int, *memories: Tensor) -> list[list[Tensor]]:
        """The next pieces of `size` bytes of each of the memories: those of one batch."""
        first, num_bytes = self._positions.get(size, 0), len(self.pageable)
        starts = [(first + number * size) % (num_bytes - size + 1) for number in range(batch(size))]
        self._positions[size] = starts[-1] + size
        return [[memory[start : start + size] for start in starts] for memory in memories]

    def pinned_s(self, target: Tensor, source: Tensor, size: int) -> float:
        """Seconds of one copy from or to pinned memory, on the device's clock, as such copies are queued."""
        targets, sources = self.pieces(size, target, source)
        return device_s(self.calls, lambda: copy_all(targets, sources)) / len(sources)

    def pageable_s(self, target: Tensor, source: Tensor, size: int) -> float:
        """Seconds of one copy from or to pageable memory, which the host waits for."""
        targets, sources = self.pieces(size, target, source)
        return host_s(self.calls, lambda: copy_all(targets, sources)) / len(sources)

    def fresh_s(self, size: int) -> float:
        """Seconds of one copy to host memory that is asked for on the spot."""
        (sources,) = self.pieces(size, self.on_device)
        return host_s(self.calls, lambda: copy_fresh(sources)) / len(sources)

    def duplex(self, size: int, repeats: int = 9, limit_s: float = 5.0) -> Measured:
        """Share of its rate that each direction keeps while the other one runs, with pinned memory."""
        num_copies = 8
        half = len(self.pinned) // 2
        calls, to_device, to_host = self.calls, self.calls.new_stream(), self.calls.new_stream()

        def copies(*directions: tuple[Any, Tensor, Tensor]) -> float:
            def run() -> None:
                for _ in range(num_copies):
                    for stream, target, source in directions:
                        with calls.on(stream):
                            target[:size].copy_(source[:size], non_blocking=True)

            return host_s(calls, run, [stream for stream, _, _ in directions])

        h2d = (to_device, self.on_device, self.pinned)
        d2h = (to_host, self.pinned[half:], self.on_device[half:])
        measures = {"h2d": lambda: copies(h2d), "d2h": lambda: copies(d2h), "both": lambda: copies(h2d, d2h)}
        samples = sample(measures, repeats, limit_s)
        # Both directions move twice the bytes; they are done when the slower one is.
        shares = [min(1.0, max(alone) / both) for *alone, both in zip(*samples.values(), strict=True)]
        return Measured.of(shares, f"{num_copies} copies of {size} bytes in one direction, then in both at once")

    def load(self, size: int, copy_gb_s: float | None = None) -> Load:
        """Copies of `size` bytes from pinned memory to the device; with `copy_gb_s` each lasts as long as at that
        rate.
        """
        calls, stream = self.calls, self.calls.new_stream()
        least_ns = 0 if copy_gb_s is None else round(size / copy_gb_s)

        def copy() -> None:
            start_ns = perf_counter_ns()
            with calls.on(stream):
                self.on_device[:size].copy_(self.pinned[:size], non_blocking=True)
            calls.record(stream).synchronize()
            sleep_until(start_ns + least_ns)

        return Load("pinned copies of experts to the device", copy)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Begin copies, one after another on the current stream."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def link_fits(
    copies: DeviceCopies, expert_bytes: int, sizes: Sequence[int] = SIZES, repeats: int = 15, limit_s: float = 40.0
) -> LinkFits:
    """Measure the copies between host and device, both directions and all kinds of host memory."""
    on_device, pinned, pageable = copies.on_device, copies.pinned, copies.pageable
    ways: dict[str, tuple[str, Callable[[int], float]]] = {
        "h2d_pinned": ("pinned to device, device clock", lambda size: copies.pinned_s(on_device, pinned, size)),
        "h2d_pageable": ("pageable to device, host clock", lambda size: copies.pageable_s(on_device, pageable, size)),
        "d2h_pinned": ("device to pinned, device clock", lambda size: copies.pinned_s(pinned, on_device, size)),
        "d2h_pageable": ("device to pageable, host clock", lambda size: copies.pageable_s(pageable, on_device, size)),
        "d2h_fresh": ("device to new memory, host clock", copies.fresh_s),
    }
    each_s = limit_s / (len(ways) + 1)
    fits = {
        name: copy_sweep(copy_s, expert_bytes, f"copies {note}", sizes, repeats, each_s)
        for name, (note, copy_s) in ways.items()
    }
    return LinkFits(**fits, duplex=copies.duplex(min(expert_bytes, len(pinned) // 2), limit_s=each_s))


# --- kernels ------------------------------------------------------------------------------------------------------


class DeviceExperts:
    """Experts in device memory, more than its cache holds, run all together or one by one."""

    def __init__(self, model: MoEConfig, calls: DeviceCalls, cache_bytes: int, rng: torch.Generator) -> None:
        D, width = model.hidden_size, model.moe_intermediate_size
        self.calls, self.flops_per_row, self.expert_bytes = calls, 2 * model.expert_params, 2 * model.expert_params
        wanted = max(24, math.ceil(COLD * cache_bytes / self.expert_bytes))
        self.num_experts = min(wanted, model.num_layers * model.num_experts)
        # As in the engine's slots: [E, 2 I, D] and [E, D, I], of which products take the transposed.
        self._gate_up = self._random((self.num_experts, 2 * width, D), rng).transpose(1, 2)
        self._down = self._random((self.num_experts, D, width), rng).transpose(1, 2)
        self._x = self._random((LARGE_ROWS * self.num_experts, D), rng)
        self._out = torch.empty(self._x.shape, device=calls.device)

    def _random(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        drawn = torch.randn(min(math.prod(shape), 2**22), generator=rng).mul_(shape[-1] ** -0.5).to(torch.bfloat16)
        times = -(-math.prod(shape) // len(drawn))
        return drawn.to(self.calls.device).repeat(times)[: math.prod(shape)].view(shape)

    def grouped(self, rows: int, num_experts: int | None = None) -> Callable[[], object]:
        """What runs experts (None: all of them) at once, each on so many rows, as the engine does; returns their
        outputs.
        """
        E = num_experts or self.num_experts
        gate_up, down = self._gate_up[:E], self._down[:E]
        tokens = torch.arange(rows * E, dtype=torch.int32, device=self.calls.device)
        ends = torch.arange(1, E + 1, dtype=torch.int32, device=self.calls.device) * rows

        def run() -> Tensor:
            run_grouped(self._x, tokens, gate_up, down, ends, self._out)
            return self._out[: rows * E]

        return run

    def looped(self, rows: int) -> Callable[[], object]:
        """What runs the experts one after another with three products each."""
        x = self._x[:rows]

        def run() -> None:
            for gate_up, down in zip(self._gate_up, self._down, strict=True):
                gate, up = gate_up.chunk(2, dim=-1)
                (functional.silu(x @ gate) * (x @ up)) @ down

        return run

    def load(self, rows: int) -> Load:
        """The experts over and over, each run waited for."""
        run = self.grouped(rows)

        def work() -> None:
            run()
            self.calls.record(self.calls.current_stream()).synchronize()

        return Load(f"experts of {rows} rows on the device", work)


@dataclass(frozen=True, slots=True)
class KernelRates:
    """What the device's kernels reach.

    Parameters
    ----------
    curve : FLOP/s of grouped experts by rows per expert.
    experts_bytes_per_s, grouped_flops_per_s : weights of grouped experts at one row, operations at many.
    bytes_per_s, flops_per_s : a dense product at one row (bytes of weights), and at many rows.
    grouped_s : a grouped run of one expert on one row, less reading its weights.
    gemm_s : added to each product that runs alone.
    """

    curve: dict[int, Measured]
    experts_bytes_per_s: Measured
    grouped_flops_per_s: Measured
    bytes_per_s: Measured
    flops_per_s: Measured
    grouped_s: Measured
    gemm_s: Measured


def kernel_rates(
    model: MoEConfig, experts: DeviceExperts, cache_bytes: int, repeats: int = 15, limit_s: float = 40.0
) -> KernelRates:
    """Measure the device's kernels at the sizes of `model`, with weights that lie in no cache."""
    calls, each_s = experts.calls, limit_s / 3
    curve = _grouped_curve(experts, repeats, each_s)
    expert_flops, E = experts.flops_per_row, experts.num_experts
    one_row = curve[1].with_value(curve[1].value / expert_flops * experts.expert_bytes)
    dense = _dense_products(model, calls, cache_bytes, repeats, each_s)
    alone = {"one": experts.grouped(1, num_experts=1), "loop": experts.looped(1)}
    measures = {name: partial(device_s, calls, run) for name, run in alone.items()}
    times = {name: Measured.of(values, "") for name, values in sample(measures, repeats, each_s).items()}
    read_s = experts.expert_bytes / one_row.value
    grouped_s = max(0.0, times["one"].value - read_s)
    gemm_s = max(0.0, times["loop"].value / E - experts.expert_bytes / dense["bytes"].value) / 3
    return KernelRates(
        curve={rows: measured for rows, measured in curve.items() if rows in ROWS},
        experts_bytes_per_s=one_row,
        grouped_flops_per_s=curve[LARGE_ROWS],
        bytes_per_s=dense["bytes"],
        flops_per_s=dense["flops"],
        grouped_s=times["one"].with_value(grouped_s, "a grouped run of one expert on one row, less its weights' time"),
        gemm_s=times["loop"].with_value(
            gemm_s, f"a loop over {E} experts of one row, less their weights' time, over 3"
        ),
    )


def _grouped_curve(experts: DeviceExperts, repeats: int, limit_s: float) -> dict[int, Measured]:
    works = {rows: experts.grouped(rows) for rows in (*ROWS, LARGE_ROWS)}
    measures = {rows: partial(device_s, experts.calls, run) for rows, run in works.items()}
    note = f"{experts.num_experts} cold bf16 experts at once with the engine's grouped product, device clock"
    flops = experts.num_experts * experts.flops_per_row
    samples = sample(measures, repeats, limit_s)
    return {rows: Measured.of(times, note).per(flops * rows) for rows, times in samples.items()}


def _dense_products(
    model: MoEConfig, calls: DeviceCalls, cache_bytes: int, repeats: int, limit_s: float
) -> dict[str, Measured]:
    """Bytes/s of a product whose weights are read for one row, FLOP/s of one with many rows."""
    D = model.hidden_size
    num_outputs = min(model.vocab_size, math.ceil(COLD * cache_bytes / (2 * D)))
    weights = torch.empty(num_outputs, D, dtype=torch.bfloat16, device=calls.device).normal_(0, D**-0.5)
    x = torch.empty(16 * LARGE_ROWS, D, dtype=torch.bfloat16, device=calls.device).normal_()
    measures = {
        "bytes": lambda: device_s(calls, lambda: functional.linear(x[:1], weights)),
        "flops": lambda: device_s(calls, lambda: functional.linear(x, weights)),
    }
    samples = sample(measures, repeats, limit_s)
    note = f"a bf16 product with [{num_outputs}, {D}] weights, device clock"
    read = Measured.of(samples["bytes"], f"{note}, 1 row").per(2 * num_outputs * D)
    return {
        "bytes": read,
        "flops": Measured.of(samples["flops"], f"{note}, {len(x)} rows").per(2 * len(x) * num_outputs * D),
    }


# --- calls of the host --------------------------------------------------------------------------------------------


def host_call(calls: DeviceCalls, copies_s: float, repeats: int = 15, limit_s: float = 1.0) -> Measured:
    """Seconds of a call of the host from the device, less the `copies_s` of a row out and back, by the host's clock."""
    sent, back = (calls.pinned((1,), torch.float32) for _ in range(2))
    there, stream = torch.zeros(1, device=calls.device), calls.current_stream()
    worker = Worker("host")

    def call() -> None:
        sent.copy_(there, non_blocking=True)
        is_sent = calls.record(stream)
        worker.submit("call", 0, is_sent.synchronize).result()
        there.copy_(back, non_blocking=True)
        calls.finish(stream)

    try:
        samples = sample({"call": lambda: seconds_per_call(call, _NUM_CALLS)}, repeats, limit_s)
    finally:
        worker.close()
    called = Measured.of(
        samples["call"], f"a row out, a waiting thread woken by it, and a row back, {_NUM_CALLS} times"
    )
    return called.with_value(max(0.0, called.value - copies_s), "less the time of the copies")
