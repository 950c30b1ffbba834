"""The values of a profile, in bytes, seconds and per second, and what follows from them."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import yaml

from tidesim.errors import ProfileError
from tidesim.hardware.keys import (
    CONTENTION_NAMES,
    COPY_NAMES,
    HEADER,
    KEY_BY_PATH,
    SCHEMA,
    UNITS,
    CurveFigure,
    Figure,
    nest,
)
from tidesim.hardware.reading import Checked, check, nearest, read_yaml
from tidesim.shipped import find_shipped

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Who may be busy beside whom where memory is shared.
Busy = Literal["device", "host", "copies"]
BUSY: tuple[Busy, ...] = get_args(Busy)
DEVICE_CURVES = ("dense_curve", "head_curve", "expert_curve")


@dataclass(frozen=True, slots=True)
class Curve:
    """How fast products with weights are computed, by rows: `flops_per_s[i]` with `rows[i]`, ascending from 1."""

    rows: tuple[int, ...]
    flops_per_s: tuple[float, ...]

    def product_s(self, rows: Ints, params: int) -> Floats:
        """Seconds that so many rows, an array of any shape, take through weights of `params`; no rows, no time.

        The time is interpolated linearly between two points of the curve; above the last, its rate holds.
        """
        flops = 2 * params * np.asarray(rows, np.int64)
        at_points = 2 * params * np.array(self.rows) / np.array(self.flops_per_s)
        between = np.interp(rows, (0, *self.rows), (0, *at_points))
        seconds: Floats = np.where(np.asarray(rows) > self.rows[-1], flops / self.flops_per_s[-1], between)
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """Who slows whom where device, host and copies share one memory: the share of its own speed that each keeps.

    "device" is everything that runs as kernels there, "host" the missed experts, "copies" those of expert weights.
    """

    host_beside_device: float
    device_beside_host: float
    host_beside_copies: float
    device_beside_copies: float
    copies_beside_host: float
    copies_beside_device: float

    def share(self, who: Busy, beside: Busy) -> float:
        """The share that `who` keeps while `beside` is busy; with two others, their shares multiply."""
        share: float = getattr(self, f"{who}_beside_{beside}")
        return share


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the accelerator achieves; the fields are those of `FIGURE_KEYS` in bytes, seconds and per second.

    The curves hold in place of the rates, `expert_curve` for experts of 16 bits a weight; None: not measured.
    """

    memory_bytes: int
    bytes_per_s: float
    experts_bytes_per_s: float
    flops_per_s: float
    grouped_flops_per_s: float
    kernel_launch_s: float
    eager_op_s: float
    grouped_overhead_s: float
    gemm_overhead_s: float
    dense_curve: Curve | None = None
    head_curve: Curve | None = None
    expert_curve: Curve | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the host achieves when it computes experts; units and `expert_curve` as in `Device`."""

    cores: int
    memory_bytes: int
    bytes_per_s: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    call_overhead_s: float
    expert_curve: Curve | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A path that bytes are copied over."""

    bytes_per_s: float
    latency_s: float

    def copy_s(self, num_bytes: int) -> float:
        """Seconds of one copy of `num_bytes`: latency + bytes / bandwidth.

        The usual two-parameter model of point-to-point copies, as fitted by NVlabs/cuda-oxide PR 976 on PCIe 4.
        Raise ValueError if `num_bytes` < 0.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes(={num_bytes}) must be >= 0.")
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The copies between host and device. `duplex_factor` is the share each direction keeps when both run."""

    h2d_pinned: Link
    h2d_pageable: Link
    d2h_pinned: Link
    d2h_pageable: Link
    d2h_fresh: Link
    duplex_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine. Made by `load_hardware` or `Hardware.from_content`, which check every figure.

    `links` is None on a unified-memory machine, where copies take no time, and `contention` where none was measured:
    nobody slows anybody then. `sources` holds every figure as the profile gives it, by its dotted path
    ("device.memory_gb_s"), `curves` every curve ("host.expert_curve").
    """

    name: str
    description: str
    is_unified: bool
    device: Device
    host: Host
    links: Links | None
    nvme: Link
    sources: Mapping[str, Figure] = field(hash=False)
    curves: Mapping[str, CurveFigure] = field(hash=False, default_factory=dict)
    contention: Contention | None = None

    @staticmethod
    def from_content(content: object, where: str) -> "Hardware":
        """The machine that the nested mapping of a profile describes; `where` names it in messages.

        Raise ProfileError with every problem, a line each: `where: message @ $.path`.
        """
        return _assemble(check(content, where))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what results depend on: the values and `unified_memory`, not names or sources."""
        values: list[object] = [SCHEMA, self.is_unified]
        values.append({path: float(figure.value) for path, figure in self.sources.items()})
        if self.curves:
            values.append({path: [curve.rows, [*map(float, curve.gflops)]] for path, curve in self.curves.items()})
        canonical = json.dumps(values, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def content(self) -> dict[str, object]:
        """The profile as a nested mapping, keys in the order of `FIGURE_KEYS`, then curves: what `to_yaml` writes."""
        header = (SCHEMA, self.name, self.description, self.is_unified)
        curves = {
            path: asdict(curve) | {"rows": [*curve.rows], "gflops": [*curve.gflops]}
            for path, curve in self.curves.items()
        }
        figures = nest({path: asdict(figure) for path, figure in self.sources.items()} | curves)
        return dict(zip(HEADER, header, strict=True)) | figures

    def to_yaml(self, path: str | Path) -> None:
        """Write the profile to `path`; loading it gives an equal `Hardware`. Raise ProfileError if it cannot be."""
        text = yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True, width=120)
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ProfileError(f"{path}: cannot be written ({error.strerror}).") from None

    def replace_figure(self, dotted_path: str, value: float) -> "Hardware":
        """The same machine with one figure changed, for what-if questions.

        Parameters
        ----------
        dotted_path : str
            A key of `sources`, such as "links.h2d_pinned.bandwidth_gb_s".
        value : float
            The new value, in the unit of that key.

        Raise ProfileError if this machine has no such figure (the nearest are named) or `value` is out of range.
        """
        if dotted_path not in self.sources:
            hint = nearest(dotted_path, self.sources)
            raise ProfileError(f"{self.name}: there is no figure {dotted_path!r}; {hint}")
        changed = _what_if(self.sources[dotted_path], value)
        content = replace(self, sources={**self.sources, dotted_path: changed}).content()
        return Hardware.from_content(content, self.name)

    def scaled(self, dotted_paths: Collection[str], factor: float) -> "Hardware":
        """The same machine with some figures, and the rates of some curves, times `factor`, for what-if questions.

        Raise ProfileError if this machine has no such figure or curve, or a value is out of range.
        """
        known = {**self.sources, **self.curves}
        for path in dotted_paths:
            if path not in known:
                raise ProfileError(f"{self.name}: there is no figure or curve {path!r}; {nearest(path, known)}")
        sources = {
            path: _what_if(self.sources[path], factor * self.sources[path].value)
            for path in dotted_paths
            if path in self.sources
        }
        curves = {path: _rates_what_if(self.curves[path], factor) for path in dotted_paths if path in self.curves}
        changed = replace(self, sources={**self.sources, **sources}, curves={**self.curves, **curves})
        return Hardware.from_content(changed.content(), self.name)


def load_hardware(name: str) -> Hardware:
    """The machine of a profile: a path, or the name of a shipped profile with or without ".yaml".

    Raise ProfileError if there is none of that name, if it is no YAML, or with everything that is wrong in it.

    Examples
    --------
    >>> load_hardware("rtx4090").device.memory_bytes
    25769803776
    """
    path = find_shipped("hardware_profiles", name, suffix=".yaml", error=ProfileError)
    content, duplicates = read_yaml(path)
    return _assemble(check(content, str(path), duplicates))


# --- what if ---


def _what_if(figure: Figure, value: float) -> Figure:
    return Figure(value, "guess", f"what-if, in place of {figure.value} ({figure.kind}: {figure.source})")


def _rates_what_if(curve: CurveFigure, factor: float) -> CurveFigure:
    rates = tuple(factor * rate for rate in curve.gflops)
    return CurveFigure(curve.rows, rates, "guess", f"what-if, {factor:g} times ({curve.kind}: {curve.source})")


# --- from figures to values ---


def _assemble(checked: Checked) -> Hardware:
    """Convert checked figures to bytes, seconds, bytes/s and FLOP/s."""
    si = {path: figure.value * UNITS[KEY_BY_PATH[path].unit] for path, figure in checked.figures.items()}

    gflop = UNITS["GFLOP/s"]
    curves = {
        path: Curve(figure.rows, tuple(rate * gflop for rate in figure.gflops))
        for path, figure in checked.curves.items()
    }

    def link(name: str) -> Link:
        return Link(bytes_per_s=si[f"links.{name}.bandwidth_gb_s"], latency_s=si[f"links.{name}.latency_us"])

    links = None
    if not checked.is_unified:
        copies = {copy: link(copy) for copy in COPY_NAMES if copy != "duplex_factor"}
        links = Links(**copies, duplex_factor=si["links.duplex_factor"])
    return Hardware(
        name=checked.name,
        description=checked.description,
        is_unified=checked.is_unified,
        device=_device(si, {name: curves.get(f"device.{name}") for name in DEVICE_CURVES}),
        host=_host(si, curves.get("host.expert_curve")),
        links=links,
        nvme=link("nvme"),
        sources=dict(checked.figures),
        curves=dict(checked.curves),
        contention=_contention(si),
    )


def _device(si: Mapping[str, float], curves: Mapping[str, Curve | None]) -> Device:
    return Device(
        memory_bytes=round(si["device.memory_gib"]),
        bytes_per_s=si["device.memory_gb_s"],
        experts_bytes_per_s=si["device.experts_gb_s"],
        flops_per_s=si["device.bf16_tflops"],
        grouped_flops_per_s=si["device.grouped_tflops"],
        kernel_launch_s=si["device.kernel_launch_us"],
        eager_op_s=si["device.eager_op_us"],
        grouped_overhead_s=si["device.grouped_overhead_us"],
        gemm_overhead_s=si["device.gemm_overhead_us"],
        **curves,
    )


def _host(si: Mapping[str, float], curve: Curve | None) -> Host:
    return Host(
        cores=round(si["host.cores"]),
        memory_bytes=round(si["host.memory_gib"]),
        bytes_per_s=si["host.memory_gb_s"],
        bf16_flops_per_s=si["host.bf16_gflops"],
        fp32_flops_per_s=si["host.fp32_gflops"],
        call_overhead_s=si["host.call_overhead_us"],
        expert_curve=curve,
    )


def _contention(si: Mapping[str, float]) -> Contention | None:
    shares = {name: si[f"contention.{name}"] for name in CONTENTION_NAMES if f"contention.{name}" in si}
    return Contention(**shares) if shares else None
