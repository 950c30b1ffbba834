"""All measurements of a machine, put together as a hardware profile."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidesim.engine.calibrate import accelerator as on_accelerator
from tidesim.engine.calibrate import dense, experts, host, storage
from tidesim.engine.calibrate.engine_op import Launches, ResidentLayers, launches
from tidesim.engine.calibrate.experts import ROWS, TYPICAL_ROWS, ColdExperts, Load
from tidesim.engine.calibrate.measured import CopyFit, Measured, OtherProcesses
from tidesim.engine.cores import Cores
from tidesim.engine.device_calls import DeviceCalls
from tidesim.errors import ProfileError
from tidesim.execution import EXECUTIONS, GIB
from tidesim.hardware import Hardware
from tidesim.hardware.keys import KEY_BY_PATH, SCHEMA, UNITS, nest
from tidesim.moe import MoEConfig
from tidesim.result import tool_version

Progress = Callable[[str, float], None]

PASSES = 3
MOST_OFF = 0.25  # a profile that is further off than this does not describe the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a machine is calibrated.

    Parameters
    ----------
    device_threads, host_threads : cores that compute on the device, where it is emulated, and on the host; by default
        half of the machine's each.
    device_memory_bytes : memory of an emulated device; by default half of the machine's.
    copy_gb_s : mean rate that experts are copied at while others compute, as over a slower link; None: flat out.
    drive_file : a large file on the drive that experts would be read from; None: one is written for the purpose.
    drive_folder : where that is written.
    drive_bytes : how long it is.
    copy_sizes, read_sizes : bytes of the copies and the reads that latency and bandwidth are fitted to.
    budget_s : seconds that all of it may take, about; what is short of time takes fewer samples. Twice as many where
        other processes keep the machine busy.
    """

    device_threads: int = field(default_factory=lambda: max(1, (os.cpu_count() or 1) // 2))
    host_threads: int = field(default_factory=lambda: max(1, (os.cpu_count() or 1) // 2))
    device_memory_bytes: int | None = None
    copy_gb_s: float | None = None
    drive_file: Path | None = None
    drive_folder: Path = Path()
    drive_bytes: int = storage.SCRATCH_BYTES
    copy_sizes: tuple[int, ...] = host.SIZES
    read_sizes: tuple[int, ...] = storage.SIZES
    budget_s: float = 90.0


def calibrate(
    model: MoEConfig,
    name: str,
    settings: Settings,
    *,
    accelerator: DeviceCalls | None = None,
    progress: Progress | None = None,
    rng: np.random.Generator | None = None,
) -> Hardware:
    """Measure this machine at the sizes of `model`, and return its profile.

    Parameters
    ----------
    accelerator : the device; None: cores of this machine are the device, and memory is the link.
    progress : called before each step with what comes next, and the share of the time that is behind.

    Raise ProfileError if the machine is too busy to be measured, if the drive cannot be read, or if a figure came out
    as what no machine can have.
    """
    rng = rng or np.random.default_rng(0)
    others = OtherProcesses()
    with _torch_threads(settings.device_threads):
        calibration = _Calibration(model, settings, accelerator, rng)
        try:
            calibration.run(progress or (lambda step, share: None))
        finally:
            calibration.close()
    content = {
        "schema": SCHEMA,
        "name": name,
        "description": _description(model, settings, accelerator, others.cores()),
        "unified_memory": False,
        **nest(calibration.figures),
    }
    return Hardware.from_content(content, f"calibration of {name}")


def check_step(predicted_s: Mapping[str, float], measured_s: Mapping[str, float]) -> None:
    """Raise ProfileError, with the times by part, if a step was predicted to take a quarter more or less than it does.

    Parameters
    ----------
    predicted_s, measured_s : seconds of each part of the same denoising step under the same placement, simulated with
        the profile and run.
    """
    whole_s, took_s = sum(predicted_s.values()), sum(measured_s.values())
    off = whole_s / took_s - 1
    if abs(off) > MOST_OFF:
        parts = ", ".join(
            f"{name} {predicted_s[name] * 1e3:.1f} and {measured_s[name] * 1e3:.1f}" for name in measured_s
        )
        raise ProfileError(
            f"with this profile a denoising step takes {whole_s * 1e3:.1f} ms, measured are {took_s * 1e3:.1f} "
            f"ms: {100 * off:+.0f} %, allowed are {100 * MOST_OFF:.0f} % (predicted and measured ms: {parts}). End "
            "what else runs on this machine and calibrate again; if that does not help, give device and host fewer "
            "threads, so that each has cores of its own."
        )


@contextmanager
def _torch_threads(num_threads: int) -> Any:
    """PyTorch's own ops, those of the dense parts and copies, on so many threads; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _description(
    model: MoEConfig, settings: Settings, accelerator: DeviceCalls | None, others_cores: float | None
) -> str:
    cores = f"{_processor()}, {os.cpu_count()} cores, {host.memory_bytes() / GIB:.1f} GiB"
    device = f"{settings.device_threads} cores as an emulated device"
    if accelerator is not None:
        device = on_accelerator.device_name(accelerator)
    # Whoever doubts a figure should know whether the machine was busy.
    others = "" if others_cores is None else f", while other processes used {others_cores:.2f} cores"
    return (
        f"{device} beside {settings.host_threads} cores as the host, on {cores}; calibrated at the sizes of "
        f"{model.name} by tidesim {tool_version()} with PyTorch {torch.__version__}{others}"
    )


def _processor() -> str:
    """The processor's name as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class _Calibration:
    """The measurements in order, and the figures that have come of them so far.

    Attributes
    ----------
    figures : figures and curves as a profile has them, by dotted path: those of the present pass, then the medians.
    """

    def __init__(
        self, model: MoEConfig, settings: Settings, accelerator: DeviceCalls | None, rng: np.random.Generator
    ) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self._model, self._settings, self._calls, self._rng = model, settings, accelerator, rng
        self._torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self._cache_bytes = host.cache_bytes()
        self._device_cores, self._host_cores = Cores(settings.device_threads), Cores(settings.host_threads)
        self._loads: dict[str, Load] = {}
        largest = max(*settings.copy_sizes, model.expert_bytes)
        self._copied_bytes = max(2 * largest, host.COLD * self._cache_bytes // 2)

    def close(self) -> None:
        """End the threads."""
        self._device_cores.close()
        self._host_cores.close()

    def run(self, progress: Progress) -> None:
        """Measure everything, `PASSES` times over; each step has its part of the time.

        What a machine reaches changes from minute to minute, beside neighbours that nobody here can see. So samples of
        one figure are taken at several times, and all figures at the same times.
        """
        steps: Mapping[str, tuple[float, Callable[[float], None]]] = {
            "link": (0.2, self._link if self._calls is None else self._device_link),
            "experts on the host": (0.15, self._host_experts),
            "experts on the device": (0.2, self._emulated_device if self._calls is None else self._device),
            "side by side": (0.15, self._contention),
            "drive": (0.2, self._drive),
        }
        whole = sum(share for share, _ in steps.values())
        passes: list[dict[str, dict[str, Any]]] = []
        behind = 0.0
        for number in range(PASSES):
            self.figures = {}
            for name, (share, step) in steps.items():
                if name == "drive" and number:
                    continue  # it writes a large file, and no other figure depends on it
                progress(name, behind)
                part = share / whole if name == "drive" else share / whole / PASSES
                step(part * self._settings.budget_s)
                behind += part
            passes.append(self.figures)
        self.figures = _medians(passes)
        progress("done", 1.0)

    # --- figures ---

    def _put(self, path: str, measured: Measured) -> None:
        """Enter a figure, in the unit of its key. Four digits are more than any of them has."""
        value = measured.value / UNITS[KEY_BY_PATH[path].unit]
        self.figures[path] = {"value": _rounded(value), **_origin(measured.source)}

    def _put_choice(self, path: str, value: float, reason: str) -> None:
        """Enter a figure in its own unit that was not measured, but chosen or told by the system."""
        self.figures[path] = {"value": value, **_origin(reason)}

    def _put_link(self, name: str, fit: CopyFit) -> None:
        self._put(f"links.{name}.bandwidth_gb_s", fit.bytes_per_s)
        self._put(f"links.{name}.latency_us", fit.latency_s)

    def _put_curve(self, path: str, curve: Mapping[int, Measured]) -> None:
        spreads = ", ".join(f"{100 * measured.spread:.0f}" for measured in curve.values())
        one = curve[min(curve)]
        self.figures[path] = {
            "rows": list(curve),
            "gflops": [_rounded(measured.value / UNITS["GFLOP/s"]) for measured in curve.values()],
            **_origin(f"{one.note}; medians of {one.repeats}, quartiles {spreads} % apart"),
        }

    # --- links ---

    def _link(self, limit_s: float) -> None:
        """Host memory is the link, so copies are alike whichever way they go and however memory was asked for."""
        copies = host.HostCopies(self._copied_bytes, self._rng)
        expert_bytes, sizes = self._model.expert_bytes, self._settings.copy_sizes
        note = f"copies within host memory, cold, {torch.get_num_threads()} threads"
        fit = host.copy_sweep(copies.copy_s, expert_bytes, note, sizes=sizes, limit_s=limit_s / 3)
        fresh_note = f"{note}, into new memory"
        fresh = host.copy_sweep(copies.fresh_copy_s, expert_bytes, fresh_note, sizes=sizes, limit_s=limit_s / 3)
        for name in ("h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable"):
            self._put_link(name, fit)
        self._put_link("d2h_fresh", fresh)
        self._put("links.duplex_factor", host.duplex_share(copies, expert_bytes, limit_s=limit_s / 3))
        self._loads["copies"] = experts.copying(copies, expert_bytes, self._settings.copy_gb_s)

    def _device_link(self, limit_s: float) -> None:
        assert self._calls is not None
        copies = on_accelerator.DeviceCopies(self._calls, self._copied_bytes, self._rng)
        fits = on_accelerator.link_fits(copies, self._model.expert_bytes, self._settings.copy_sizes, limit_s=limit_s)
        for name in ("h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable", "d2h_fresh"):
            self._put_link(name, getattr(fits, name))
        self._put("links.duplex_factor", fits.duplex)
        self._loads["copies"] = copies.load(self._model.expert_bytes, self._settings.copy_gb_s)

    def _drive(self, limit_s: float) -> None:
        settings, rng = self._settings, self._rng

        def put(file: Path) -> None:
            fit = storage.drive_fit(file, self._model.expert_bytes, rng, settings.read_sizes, limit_s=limit_s)
            self._put_link("nvme", fit)

        if settings.drive_file is not None:
            put(settings.drive_file)
            return
        with storage.scratch_file(settings.drive_folder, settings.drive_bytes, rng) as file:
            put(file)

    # --- host ---

    def _host_experts(self, limit_s: float) -> None:
        stored = {dtype: self._cold_experts(dtype) for dtype in (torch.bfloat16, torch.float32)}
        cores = self._host_cores
        curve = experts.expert_curve(stored[torch.bfloat16], cores, limit_s=limit_s / 2)
        most = max(ROWS)
        single = experts.expert_curve(stored[torch.float32], cores, (most,), limit_s=limit_s / 4)[most]
        total = host.memory_bytes()
        kept = 0 if self._calls is not None else self._device_memory(total)
        reason = "what this process may use" + (", less the memory of the emulated device" if kept else "")
        self._put_choice("host.memory_gib", _rounded((total - kept) / GIB), reason)
        self._put_choice("host.cores", self._settings.host_threads, "a choice: threads that compute on the host")
        self._put("host.memory_gb_s", _weights(curve[1]))
        self._put("host.bf16_gflops", curve[most].with_value(curve[most].value, f"{most} rows an expert"))
        self._put("host.fp32_gflops", single.with_value(single.value, f"{most} rows an expert"))
        self._put("host.call_overhead_us", self._host_call())
        self._put_curve("host.expert_curve", curve)
        self._loads["host"] = Load("experts on the host", stored[torch.bfloat16].work(cores, TYPICAL_ROWS))

    def _host_call(self) -> Measured:
        if self._calls is None:
            return host.worker_call()
        copies_us = sum(self.figures[f"links.{name}.latency_us"]["value"] for name in ("d2h_pinned", "h2d_pinned"))
        return on_accelerator.host_call(self._calls, copies_us / 1e6)

    def _cold_experts(self, dtype: torch.dtype) -> ColdExperts:
        return ColdExperts(self._model, dtype, self._cache_bytes, self._torch_rng)

    # --- device ---

    def _device_memory(self, total: int) -> int:
        return self._settings.device_memory_bytes or total // 2

    def _emulated_device(self, limit_s: float) -> None:
        model, cores = self._model, self._device_cores
        cold, most = self._cold_experts(torch.bfloat16), max(ROWS)
        curve = experts.expert_curve(cold, cores, limit_s=limit_s / 2)
        parts = dense.ColdNetwork(model, cores, self._cache_bytes, self._torch_rng)
        rates = dense.dense_rates(model, parts, EXECUTIONS["emulated"].ops_per_layer, limit_s=limit_s / 2)
        memory_bytes, reason = self._device_memory(host.memory_bytes()), "a choice: memory that an emulated device has"
        self._put_choice("device.memory_gib", _rounded(memory_bytes / GIB), reason)
        head = f"lm_head {rates.head_bytes_per_s.value / 1e9:.3g} GB/s"
        self._put("device.memory_gb_s", rates.bytes_per_s.with_value(rates.bytes_per_s.value, f"1 row; {head}"))
        self._put("device.experts_gb_s", _weights(curve[1]))
        head = f"{model.block_length} rows; lm_head {rates.head_flops_per_s.value / 1e9:.3g} GFLOP/s"
        self._put("device.bf16_tflops", rates.flops_per_s.with_value(rates.flops_per_s.value, head))
        self._put("device.grouped_tflops", curve[most].with_value(curve[most].value, f"{most} rows an expert"))
        self._put("device.kernel_launch_us", dense.tiny_op())
        self._put("device.eager_op_us", rates.op_s)
        self._put("device.grouped_overhead_us", experts.experts_call(model, cores))
        self._put_choice("device.gemm_overhead_us", 0.0, "nothing is launched on an emulated device")
        self._put_curve("device.expert_curve", curve)
        # At one row, a bf16 weight is two bytes and two operations, so both rates are one number.
        block = model.block_length
        self._put_curve("device.dense_curve", {1: rates.bytes_per_s, block: rates.flops_per_s})
        self._put_curve("device.head_curve", {1: rates.head_bytes_per_s, block: rates.head_flops_per_s})
        self._loads["device"] = Load("experts on the device", cold.work(cores, TYPICAL_ROWS))

    def _device(self, limit_s: float) -> None:
        calls = self._calls
        assert calls is not None
        cache_bytes = on_accelerator.DEVICE_CACHE_BYTES
        cold = on_accelerator.DeviceExperts(self._model, calls, cache_bytes, self._torch_rng)
        rates = on_accelerator.kernel_rates(self._model, cold, cache_bytes, limit_s=4 * limit_s / 5)
        self._put_choice("device.memory_gib", _rounded(calls.memory_bytes() / GIB), "all of the device's memory")
        self._put("device.memory_gb_s", rates.bytes_per_s)
        self._put("device.experts_gb_s", rates.experts_bytes_per_s)
        self._put("device.bf16_tflops", rates.flops_per_s)
        self._put("device.grouped_tflops", rates.grouped_flops_per_s)
        begun = self._launches(calls, limit_s / 5)
        self._put("device.kernel_launch_us", begun.kernel_s)
        self._put("device.eager_op_us", begun.op_s)
        self._put("device.grouped_overhead_us", rates.grouped_s)
        self._put("device.gemm_overhead_us", rates.gemm_s)
        self._put_curve("device.expert_curve", rates.curve)
        self._loads["device"] = cold.load(TYPICAL_ROWS)

    def _launches(self, calls: DeviceCalls, limit_s: float) -> Launches:
        layers = ResidentLayers(self._model, calls, self._host_cores, self._torch_rng)
        try:
            return launches(layers, limit_s=limit_s)
        finally:
            layers.close()

    def _contention(self, limit_s: float) -> None:
        shares = experts.contention(**self._loads, limit_s=limit_s)
        for name, share in shares.items():
            # Work of microseconds that loses its core for once comes out slower than any memory makes it.
            path = f"contention.{name}"
            self._put(path, share.with_value(max(share.value, KEY_BY_PATH[path].low)))


def _medians(passes: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each figure and curve as the median of the passes that measured it; its source tells what the passes gave."""
    merged = {}
    for path, first in passes[0].items():
        found = [figures[path] for figures in passes if path in figures]
        if "rows" in first:
            rates = [float(np.median(column)) for column in zip(*(each["gflops"] for each in found), strict=True)]
            merged[path] = {**first, "gflops": rates, "source": f"{first['source']}; median of {len(found)} passes"}
            continue
        values = [each["value"] for each in found]
        source = first["source"]
        if len(set(values)) > 1:
            source += f"; median of {len(values)} passes that gave {', '.join(f'{value:.4g}' for value in values)}"
        merged[path] = {**first, "value": float(np.median(values)), "source": source}
    return merged


def _weights(rate: Measured) -> Measured:
    """Bytes/s of bf16 weights that were read for one row each: two bytes and two operations, so both rates are one."""
    return rate.with_value(rate.value, "weights at 1 row an expert")


def _origin(source: str) -> dict[str, str]:
    return {"kind": "calibrated", "source": f"{date.today().isoformat()}: {source}"}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
