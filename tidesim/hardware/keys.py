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


@dataclass(frozen=True, slots=True)
class FigureKey:
    """Description of one figure of a profile: where it stands, its unit, what is allowed and what it means.

    `low` and `high` (in `unit`, both allowed) only keep out what no machine can be, most often a slip of units.
    `is_copy` marks the figures of copies between host and device, which a unified-memory machine leaves out.
    """

    path: str
    unit: str
    low: float
    high: float
    description: str
    is_copy: bool = False

    def problem(self, value: object) -> str | None:
        """What is wrong with `value` for this figure, or None if it is fine."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            hint = "; write it without quotes or exponent" if isinstance(value, str) else ""
            return f"must be a number ({self.unit}), not {show(value)}{hint}"
        # NaN compares false with everything, so it fails here as well.
        if not self.low <= value <= self.high:
            return f"must be from {self.low:.10g} to {self.high:.10g} ({self.unit}), not {show(value)}"
        if self.unit == "cores" and value != int(value):
            return f"must be a whole number ({self.unit}), not {show(value)}"
        return None


def _link_keys(name: str, description: str, max_gb_s: float, is_copy: bool) -> tuple[FigureKey, FigureKey]:
    return (
        FigureKey(f"links.{name}.bandwidth_gb_s", "GB/s", 0.01, max_gb_s, f"{description}, at large sizes", is_copy),
        FigureKey(f"links.{name}.latency_us", "us", 0, 1e5, f"{description}, the fixed part of one copy", is_copy),
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
)
KEY_BY_PATH = {key.path: key for key in FIGURE_KEYS}
COPY_NAMES = sorted({key.path.split(".")[1] for key in FIGURE_KEYS if key.is_copy})


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a profile: `value` in the unit of its key, its `kind` (see `KINDS`) and where it comes from."""

    value: float
    kind: str
    source: str


def nest(leaves: Mapping[str, object]) -> dict[str, object]:
    """Leaves by dotted path -> nested mappings, in the order of `FIGURE_KEYS`."""
    nested: dict[str, object] = {}
    for path in (key.path for key in FIGURE_KEYS if key.path in leaves):
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
