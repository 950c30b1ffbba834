"""A machine as figures: how fast its memories, chips and links are, and where each figure comes from.

A profile is a YAML file that describes one device (an accelerator) and its host. Each figure stands in it as
`{value: 25.2, kind: rule, source: "..."}`, in the unit that its key names. `FIGURE_KEYS` describes every figure once:
validation and conversion are driven from it. From here on, everything is in bytes, seconds, bytes/s and FLOP/s.
A profile says what the machine can do; how the software uses it is the business of `tidesim.execution`.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from tidesim.errors import ProfileError
from tidesim.shipped import find_shipped

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
_UNITS = {"GiB": 2.0**30, "GB/s": 1e9, "TFLOP/s": 1e12, "GFLOP/s": 1e9, "us": 1e-6, "cores": 1.0, "share": 1.0}

_HEADER = {
    "schema": f"the format of the file, {SCHEMA!r}",
    "name": "text, the name that results carry",
    "description": "text, which device in which host",
    "unified_memory": "true if device and host share one memory, so that nothing is copied; else false",
}
_FIGURE_PARTS = {
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
            return f"must be a number ({self.unit}), not {_show(value)}{hint}"
        # NaN compares false with everything, so it fails here as well.
        if not self.low <= value <= self.high:
            return f"must be from {self.low:.10g} to {self.high:.10g} ({self.unit}), not {_show(value)}"
        if self.unit == "cores" and value != int(value):
            return f"must be a whole number ({self.unit}), not {_show(value)}"
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
_KEY_BY_PATH = {key.path: key for key in FIGURE_KEYS}
_COPY_NAMES = sorted({key.path.split(".")[1] for key in FIGURE_KEYS if key.is_copy})


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a profile: `value` in the unit of its key, its `kind` (see `KINDS`) and where it comes from."""

    value: float
    kind: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the accelerator achieves; the fields are those of `FIGURE_KEYS` in bytes, seconds and per second."""

    memory_bytes: int
    bytes_per_s: float
    experts_bytes_per_s: float
    flops_per_s: float
    grouped_flops_per_s: float
    kernel_launch_s: float
    eager_op_s: float
    grouped_overhead_s: float
    gemm_overhead_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the host achieves when it computes experts; same units as `Device`."""

    cores: int
    memory_bytes: int
    bytes_per_s: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    call_overhead_s: float


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

    `links` is None on a unified-memory machine, where copies take no time. `sources` holds every figure as the
    profile gives it, by its dotted path ("device.memory_gb_s").
    """

    name: str
    description: str
    is_unified: bool
    device: Device
    host: Host
    links: Links | None
    nvme: Link
    sources: Mapping[str, Figure] = field(hash=False)

    @staticmethod
    def from_content(content: object, where: str) -> "Hardware":
        """The machine that the nested mapping of a profile describes; `where` names it in messages.

        Raise ProfileError with every problem, a line each: `where: message @ $.path`.
        """
        return _build(content, where, [])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what results depend on: the values and `unified_memory`, not names or sources."""
        figures = {path: float(figure.value) for path, figure in self.sources.items()}
        canonical = json.dumps([SCHEMA, self.is_unified, figures], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def content(self) -> dict[str, object]:
        """The profile as a nested mapping, keys in the order of `FIGURE_KEYS`: what `to_yaml` writes."""
        header = (SCHEMA, self.name, self.description, self.is_unified)
        figures = _nest({path: asdict(figure) for path, figure in self.sources.items()})
        return dict(zip(_HEADER, header, strict=True)) | figures

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
            hint = _nearest(dotted_path, self.sources)
            raise ProfileError(f"{self.name}: there is no figure {dotted_path!r}; {hint}")
        old = self.sources[dotted_path]
        changed = Figure(value, "guess", f"what-if, in place of {old.value} ({old.kind}: {old.source})")
        content = replace(self, sources={**self.sources, dotted_path: changed}).content()
        return Hardware.from_content(content, self.name)


def load_hardware(name: str) -> Hardware:
    """The machine of a profile: a path, or the name of a shipped profile with or without ".yaml".

    Raise ProfileError if there is none of that name, if it is no YAML, or with everything that is wrong in it.

    Examples
    --------
    >>> load_hardware("rtx4090").device.memory_bytes
    25769803776
    """
    path = find_shipped("hardware_profiles", name, suffix=".yaml", error=ProfileError)
    content, duplicates = _read_yaml(path)
    return _build(content, str(path), duplicates)


# --- reading the file -------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> tuple[object, list[str]]:
    """What the file holds, and a problem for each key that stands twice (YAML itself would keep the last)."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        duplicates = list(_duplicates(root, "$", set()))
        return yaml.safe_load(text), duplicates
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: is not valid YAML ({_yaml_reason(error)}).") from None


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _duplicates(node: yaml.Node | None, path: str, seen: set[int]) -> Iterator[str]:
    """A problem for each key that stands twice in one mapping, in the whole tree under `node`."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))  # an alias may point back at its own parent
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item, path, seen)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, below in node.value:
            name = str(key.value)
            if name in names:
                line = key.start_mark.line + 1
                yield f"key {name!r} stands twice, again on line {line}; keep one @ {path}.{name}"
            names.add(name)
            yield from _duplicates(below, f"{path}.{name}", seen)


# --- checking -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    """Walks the content of one profile and gathers its figures, and every problem with its path."""

    problems: list[str]
    figures: dict[str, Figure] = field(default_factory=dict)

    def report(self, message: str, path: str) -> None:
        self.problems.append(f"{message} @ {path}")

    def header(self, content: Mapping[object, object]) -> None:
        """Check name, description and unified_memory, as far as they are there."""
        for name in ("name", "description"):
            if name in content:
                self.text(content[name], f"$.{name}")
        if not isinstance(content.get("unified_memory", False), bool):
            self.report(f"must be true or false, not {_show(content['unified_memory'])}", "$.unified_memory")

    def without_copies(self, content: Mapping[object, object]) -> Mapping[object, object]:
        """`content` of a unified-memory machine without the links that it must leave out, each reported."""
        links = content.get("links")
        if not isinstance(links, Mapping):
            return content
        for name in _COPY_NAMES:
            if name in links:
                self.report("must be left out: with unified_memory nothing is copied", f"$.links.{name}")
        return {**content, "links": {name: node for name, node in links.items() if name not in _COPY_NAMES}}

    def text(self, value: object, path: str) -> None:
        if not isinstance(value, str) or not value.strip():
            self.report(f"must be text and not empty, not {_show(value)}", path)

    def keys(self, node: Mapping[object, object], expected: Mapping[str, str], path: str) -> None:
        """Report the keys of `node` that are not `expected` (name -> meaning), and those that are missing."""
        for name in node:
            if name not in expected:
                self.report(f"unknown key {str(name)!r}; {_nearest(str(name), expected)}", f"{path}.{name}")
        for name, meaning in expected.items():
            if name not in node:
                self.report(f"required key missing: {meaning}", f"{path}.{name}")

    def section(self, node: Mapping[object, object], layout: Mapping[str, object], path: str) -> None:
        """Read the figures of one section and of those below it; what `node` lacks is left to `keys`."""
        for name, below in layout.items():
            here, inner = f"{path}.{name}", node.get(name)
            if name not in node:
                continue
            if isinstance(below, FigureKey):
                self.figure(inner, below, here)
            elif isinstance(inner, Mapping) and isinstance(below, dict):
                self.keys(inner, {key: _meaning(item) for key, item in below.items()}, here)
                self.section(inner, below, here)
            else:
                self.report(f"must be {_meaning(below)}, not {_show(inner)}", here)

    def figure(self, node: object, key: FigureKey, path: str) -> None:
        if not isinstance(node, Mapping):
            self.report(f"must be written {{value: ..., kind: ..., source: ...}}, not {_show(node)}", path)
            return
        before = len(self.problems)
        self.keys(node, _FIGURE_PARTS, path)
        value, kind, source = (node.get(part) for part in _FIGURE_PARTS)
        if isinstance(value, np.generic):
            value = value.item()  # YAML writes plain numbers only
        if "value" in node and (problem := key.problem(value)):
            self.report(problem, f"{path}.value")
        if "kind" in node and not (isinstance(kind, str) and kind in KINDS):
            self.report(f"must be one of {', '.join(KINDS)}, not {_show(kind)}", f"{path}.kind")
        if "source" in node:
            self.text(source, f"{path}.source")
        if len(self.problems) == before:
            assert isinstance(value, int | float)
            self.figures[key.path] = Figure(value, str(kind), str(source))


def _build(content: object, where: str, problems: Iterable[str]) -> Hardware:
    """The machine that `content` describes. Raise ProfileError with `problems` and all others found."""
    if not isinstance(content, Mapping):
        raise ProfileError(f"{where}: must be a mapping with the keys of a profile, not {_show(content)} @ $")
    if content.get("schema", SCHEMA) != SCHEMA:
        # The keys of another format or version are not ours to judge, so this is the only problem named.
        rule = f"must be {SCHEMA!r}, not {_show(content['schema'])}; a newer profile needs a newer tidesim"
        raise ProfileError(f"{where}: {rule} @ $.schema")
    reader = _Reader(list(problems))
    is_unified = _is_unified(content)
    if is_unified:
        content = reader.without_copies(content)
    layout = _nest({key.path: key for key in FIGURE_KEYS if not (is_unified and key.is_copy)})
    reader.keys(content, _HEADER | {name: _meaning(below) for name, below in layout.items()}, "$")
    reader.header(content)
    reader.section(content, layout, "$")
    if reader.problems:
        raise ProfileError("\n".join(f"{where}: {problem}" for problem in reader.problems))
    return _assemble(str(content["name"]), str(content["description"]), is_unified, reader.figures)


def _is_unified(content: Mapping[object, object]) -> bool:
    """`unified_memory`, or what the links suggest where it is no truth value, so that one slip is one problem."""
    value, links = content.get("unified_memory"), content.get("links")
    if isinstance(value, bool):
        return value
    return isinstance(links, Mapping) and not any(name in links for name in _COPY_NAMES)


def _nest(leaves: Mapping[str, object]) -> dict[str, object]:
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


def _assemble(name: str, description: str, is_unified: bool, figures: Mapping[str, Figure]) -> Hardware:
    """Convert checked figures to bytes, seconds, bytes/s and FLOP/s."""
    si = {path: figure.value * _UNITS[_KEY_BY_PATH[path].unit] for path, figure in figures.items()}

    def link(name: str) -> Link:
        return Link(bytes_per_s=si[f"links.{name}.bandwidth_gb_s"], latency_s=si[f"links.{name}.latency_us"])

    links = None
    if not is_unified:
        copies = {copy: link(copy) for copy in _COPY_NAMES if copy != "duplex_factor"}
        links = Links(**copies, duplex_factor=si["links.duplex_factor"])
    return Hardware(
        name=name,
        description=description,
        is_unified=is_unified,
        device=_device(si),
        host=_host(si),
        links=links,
        nvme=link("nvme"),
        sources=dict(figures),
    )


def _device(si: Mapping[str, float]) -> Device:
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
    )


def _host(si: Mapping[str, float]) -> Host:
    return Host(
        cores=round(si["host.cores"]),
        memory_bytes=round(si["host.memory_gib"]),
        bytes_per_s=si["host.memory_gb_s"],
        bf16_flops_per_s=si["host.bf16_gflops"],
        fp32_flops_per_s=si["host.fp32_gflops"],
        call_overhead_s=si["host.call_overhead_us"],
    )


# --- words for messages ---------------------------------------------------------------------------------------------


def _meaning(below: object) -> str:
    if isinstance(below, FigureKey):
        return f"{below.description} ({below.unit})"
    return f"a section with {', '.join(below) if isinstance(below, dict) else below}"


def _nearest(name: str, names: Iterable[str]) -> str:
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known)}."


def _show(value: object) -> str:
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
