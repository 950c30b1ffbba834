"""What stands in a profile: every key described once, with its unit and what is allowed."""

from collections.abc import Mapping
from dataclasses import dataclass

SCHEMA = "tidesim-hardware/1"

# Kind of a figure -> what it promises.
KINDS = {
    "datasheet": "the maker's specification",
    "measured": "measured by the named source",
    "derived": "arithmetic on measured or specified figures; the source states it",
    "rule": "a rule of thumb, or a constant that other tools ship",
    "guess": "no trustworthy figure was found; the source states the reasoning",
    "calibrated": "measured on this very machine by `tidesim calibrate`",
}

# Unit of a profile key -> how many bytes, seconds, bytes/s or FLOP/s one of it is. GB = 10^9 bytes, GiB = 2^30.
UNITS = {"GiB": 2.0**30, "GB/s": 1e9, "TFLOP/s": 1e12, "GFLOP/s": 1e9, "us": 1e-6, "cores": 1.0, "share": 1.0}

HEADER = {
    "schema": f"the format of the file, {SCHEMA!r}",
    "name": "text, the name that results carry",
    "description": "text, which device in which host",
    "unified_memory": "true if device and host share one memory, so that nothing is copied; else false",
}
FIGURE_PARTS = {
    "value": "the figure, in the unit of its key",
    "kind": f"one of {', '.join(KINDS)}",
    "source": "text, where the figure comes from",
}
CURVE_PARTS = {
    "rows": "whole numbers of rows, ascending from 1",
    "gflops": "rates at these rows (GFLOP/s)",
    "kind": FIGURE_PARTS["kind"],
    "source": FIGURE_PARTS["source"],
}
_WHOLE_UNITS = ("cores", "rows")


@dataclass(frozen=True, slots=True)
class FigureKey:
    """Description of one figure of a profile: where it stands, its unit, what is allowed and what it means.

    `low` and `high` (in `unit`, both allowed) only keep out what no machine can be, most often a slip of units.
    `is_copy` marks the figures of copies between host and device, which a unified-memory machine leaves out,
    `is_optional` those of a section that any machine may leave out, as a whole.
    """

    path: str
    unit: str
    low: float
    high: float
    description: str
    is_copy: bool = False
    is_optional: bool = False

    def problem(self, value: object) -> str | None:
        """What is wrong with `value` for this figure, or None if it is fine."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            hint = "; write it without quotes or exponent" if isinstance(value, str) else ""
            return f"must be a number ({self.unit}), not {show(value)}{hint}"
        # NaN compares false with everything, so it fails here as well.
        if not self.low <= value <= self.high:
            return f"must be from {self.low:.10g} to {self.high:.10g} ({self.unit}), not {show(value)}"
        if self.unit in _WHOLE_UNITS and value != int(value):
            return f"must be a whole number ({self.unit}), not {show(value)}"
        return None


def _link_keys(name: str, description: str, max_gb_s: float, is_copy: bool) -> tuple[FigureKey, FigureKey]:
    return (
        FigureKey(f"links.{name}.bandwidth_gb_s", "GB/s", 0.01, max_gb_s, f"{description}, at large sizes", is_copy),
        FigureKey(f"links.{name}.latency_us", "us", 0, 1e5, f"{description}, the fixed part of one copy", is_copy),
    )


@dataclass(frozen=True, slots=True)
class CurveKey:
    """Description of one curve, the rate [GFLOP/s] by the rows that are computed at once. Curves may be left out.

    `low` and `high` are as in `FigureKey`.
    """

    path: str
    low: float
    high: float
    description: str

    @property
    def rate(self) -> FigureKey:
        """What each rate must be."""
        return FigureKey(self.path, "GFLOP/s", self.low, self.high, self.description)


def _share_key(name: str) -> FigureKey:
    who, beside = name.split("_beside_")
    described = {"host": "missed experts on the host", "device": "kernels on the device", "copies": "copies of experts"}
    description = f"speed that {described[who]} keep beside {described[beside]}"
    return FigureKey(f"contention.{name}", "share", 0.05, 1, description, is_optional=True)


CONTENTION_NAMES = (
    "host_beside_device",
    "device_beside_host",
    "host_beside_copies",
    "device_beside_copies",
    "copies_beside_host",
    "copies_beside_device",
)

# Links stop at 2 TB/s, NVMe at 200 GB/s and memory at 20 TB/s: beyond every machine, below the same figure in MB/s.
FIGURE_KEYS = (
    FigureKey("device.memory_gib", "GiB", 0.25, 2048, "device memory that one process can use"),
    FigureKey("device.memory_gb_s", "GB/s", 1, 20_000, "achievable memory bandwidth, streaming large weights"),
    FigureKey("device.experts_gb_s", "GB/s", 1, 20_000, "achievable memory bandwidth of a grouped MoE kernel"),
    FigureKey("device.bf16_tflops", "TFLOP/s", 1e-3, 10_000, "achievable rate of a large dense GEMM"),
    FigureKey("device.grouped_tflops", "TFLOP/s", 1e-3, 10_000, "achievable rate of a grouped MoE kernel"),
    FigureKey("device.kernel_launch_us", "us", 0, 1000, "one kernel launch, back to back on a stream"),
    FigureKey("device.eager_op_us", "us", 0, 10_000, "host time of one eager framework op on device tensors"),
    FigureKey("device.grouped_overhead_us", "us", 0, 1e5, "fixed part of one grouped MoE layer"),
    FigureKey("device.gemm_overhead_us", "us", 0, 10_000, "added to each separate small GEMM"),
    FigureKey("host.cores", "cores", 1, 4096, "physical cores that compute experts"),
    FigureKey("host.memory_gib", "GiB", 0.25, 32_768, "host memory; the device's own on a unified-memory machine"),
    FigureKey("host.memory_gb_s", "GB/s", 0.1, 20_000, "achievable memory bandwidth, experts at a few tokens each"),
    FigureKey("host.bf16_gflops", "GFLOP/s", 0.1, 1e6, "achievable rate of a bf16 GEMM on the host"),
    FigureKey("host.fp32_gflops", "GFLOP/s", 0.1, 1e6, "achievable rate of an fp32 GEMM on the host"),
    FigureKey("host.call_overhead_us", "us", 0, 1e5, "framework ops of one expert call on the host"),
    *_link_keys("h2d_pinned", "host to device, pinned host memory", 2000, is_copy=True),
    *_link_keys("h2d_pageable", "host to device, pageable host memory", 2000, is_copy=True),
    *_link_keys("d2h_pinned", "device to host, pinned host memory", 2000, is_copy=True),
    *_link_keys("d2h_pageable", "device to host, pageable host memory already touched", 2000, is_copy=True),
    *_link_keys("d2h_fresh", "device to newly allocated pageable host memory", 2000, is_copy=True),
    FigureKey("links.duplex_factor", "share", 0.05, 1, "bandwidth each direction keeps when both run", is_copy=True),
    *_link_keys("nvme", "NVMe to host memory, expert-size reads", 200, is_copy=False),
    *map(_share_key, CONTENTION_NAMES),
)
# One routed expert, its three GEMMs on 16-bit weights that no cache holds.
CURVE_KEYS = (
    CurveKey("device.dense_curve", 0.01, 1e7, "rate that the linear maps of a layer reach on the device, by rows"),
    CurveKey("device.head_curve", 0.01, 1e7, "rate that lm_head reaches on the device, by rows"),
    CurveKey("device.expert_curve", 0.01, 1e7, "rate that one expert reaches on the device, by its rows"),
    CurveKey("host.expert_curve", 0.01, 1e6, "rate that one expert reaches on the host, by its rows"),
)
ROWS_KEY = FigureKey("rows", "rows", 1, 1e6, "rows computed at once")
KEY_BY_PATH = {key.path: key for key in FIGURE_KEYS}
COPY_NAMES = sorted({key.path.split(".")[1] for key in FIGURE_KEYS if key.is_copy})


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a profile: `value` in the unit of its key, its `kind` (see `KINDS`) and where it comes from."""

    value: float
    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class CurveFigure:
    """One curve of a profile: the rates in GFLOP/s at so many rows, their `kind` and where they come from."""

    rows: tuple[int, ...]
    gflops: tuple[float, ...]
    kind: str
    source: str


def nest(leaves: Mapping[str, object]) -> dict[str, object]:
    """Leaves by dotted path -> nested mappings, in the order of `FIGURE_KEYS`, curves behind a section's figures."""
    nested: dict[str, object] = {}
    paths = [*KEY_BY_PATH, *(key.path for key in CURVE_KEYS)]
    for path in (path for path in paths if path in leaves):
        *sections, name = path.split(".")
        inner = nested
        for section in sections:
            below = inner.setdefault(section, {})
            assert isinstance(below, dict)
            inner = below
        inner[name] = leaves[path]
    return nested


def show(value: object) -> str:
    """`value` for a message, short whatever it is."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, Mapping | list | set):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 40 else value[:40] + '...'!r}"
    if isinstance(value, int) and abs(value) > 10**15:
        return "a huge number"
    return str(value)
