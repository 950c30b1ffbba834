"""From the text of a profile to checked figures, with every problem named at once."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tidesim.errors import InputError, ProfileError
from tidesim.hardware.keys import (
    COPY_NAMES,
    CURVE_KEYS,
    CURVE_PARTS,
    FIGURE_KEYS,
    FIGURE_PARTS,
    HEADER,
    KINDS,
    ROWS_KEY,
    SCHEMA,
    CurveFigure,
    CurveKey,
    Figure,
    FigureKey,
    nest,
    show,
)


def read_yaml(path: Path, error: type[InputError] = ProfileError) -> tuple[object, list[str]]:
    """What the file holds, and a problem for each key that stands twice (YAML itself would keep the last).

    Raise `error` if it cannot be read or is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        duplicates = list(_duplicates(root, "$", set()))
        return yaml.safe_load(text), duplicates
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror}).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        raise error(f"{path}: is not valid YAML ({_yaml_reason(reason)}).") from None


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


# --- checking ---


@dataclass(slots=True)
class _Reader:
    """Walks the content of one profile and gathers its figures, and every problem with its path."""

    problems: list[str]
    figures: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, CurveFigure] = field(default_factory=dict)

    def report(self, message: str, path: str) -> None:
        self.problems.append(f"{message} @ {path}")

    def header(self, content: Mapping[object, object]) -> None:
        """Check name, description and unified_memory, as far as they are there."""
        for name in ("name", "description"):
            if name in content:
                self.text(content[name], f"$.{name}")
        if not isinstance(content.get("unified_memory", False), bool):
            self.report(f"must be true or false, not {show(content['unified_memory'])}", "$.unified_memory")

    def without_copies(self, content: Mapping[object, object]) -> Mapping[object, object]:
        """`content` of a unified-memory machine without the links that it must leave out, each reported."""
        links = content.get("links")
        if not isinstance(links, Mapping):
            return content
        for name in COPY_NAMES:
            if name in links:
                self.report("must be left out: with unified_memory nothing is copied", f"$.links.{name}")
        return {**content, "links": {name: node for name, node in links.items() if name not in COPY_NAMES}}

    def text(self, value: object, path: str) -> None:
        if not isinstance(value, str) or not value.strip():
            self.report(f"must be text and not empty, not {show(value)}", path)

    def keys(
        self, node: Mapping[object, object], expected: Mapping[str, str], path: str, optional: Collection[str] = ()
    ) -> None:
        """Report the keys of `node` that are not `expected` (name -> meaning), and those that are missing.

        Those of them that are `optional` may be missing.
        """
        for name in node:
            if name not in expected:
                self.report(f"unknown key {str(name)!r}; {nearest(str(name), expected)}", f"{path}.{name}")
        for name, meaning in expected.items():
            if name not in node and name not in optional:
                self.report(f"required key missing: {meaning}", f"{path}.{name}")

    def section(self, node: Mapping[object, object], layout: Mapping[str, object], path: str) -> None:
        """Read the figures of one section and of those below it; what `node` lacks is left to `keys`."""
        for name, below in layout.items():
            here, inner = f"{path}.{name}", node.get(name)
            if name not in node:
                continue
            if isinstance(below, FigureKey):
                self.figure(inner, below, here)
            elif isinstance(below, CurveKey):
                self.curve(inner, below, here)
            elif isinstance(inner, Mapping) and isinstance(below, dict):
                self.keys(inner, {key: _meaning(item) for key, item in below.items()}, here, _optional(below))
                self.section(inner, below, here)
            else:
                self.report(f"must be {_meaning(below)}, not {show(inner)}", here)

    def figure(self, node: object, key: FigureKey, path: str) -> None:
        if not isinstance(node, Mapping):
            self.report(f"must be written {{value: ..., kind: ..., source: ...}}, not {show(node)}", path)
            return
        before = len(self.problems)
        self.keys(node, FIGURE_PARTS, path)
        value = _plain(node.get("value"))
        if "value" in node and (problem := key.problem(value)):
            self.report(problem, f"{path}.value")
        kind, source = self.origin(node, path)
        if len(self.problems) == before:
            assert isinstance(value, int | float)
            self.figures[key.path] = Figure(value, kind, source)

    def origin(self, node: Mapping[object, object], path: str) -> tuple[str, str]:
        """The kind and the source of a figure or curve."""
        kind, source = node.get("kind"), node.get("source")
        if "kind" in node and not (isinstance(kind, str) and kind in KINDS):
            self.report(f"must be one of {', '.join(KINDS)}, not {show(kind)}", f"{path}.kind")
        if "source" in node:
            self.text(source, f"{path}.source")
        return str(kind), str(source)

    def curve(self, node: object, key: CurveKey, path: str) -> None:
        if not isinstance(node, Mapping):
            rule = "must be written {rows: [...], gflops: [...], kind: ..., source: ...}"
            self.report(f"{rule}, not {show(node)}", path)
            return
        before = len(self.problems)
        self.keys(node, CURVE_PARTS, path)
        rows = [int(row) for row in self.numbers(node, "rows", ROWS_KEY, path)]
        gflops = self.numbers(node, "gflops", key.rate, path)
        kind, source = self.origin(node, path)
        if len(self.problems) == before:
            self.ascending(rows, f"{path}.rows")
            if len(gflops) != len(rows):
                self.report(f"must be one rate for each of the {len(rows)} rows, not {len(gflops)}", f"{path}.gflops")
        if len(self.problems) == before:
            self.curves[key.path] = CurveFigure(tuple(rows), tuple(gflops), kind, source)

    def numbers(self, node: Mapping[object, object], name: str, key: FigureKey, path: str) -> list[float]:
        """The list `name` of a curve, as far as each number is one that `key` allows."""
        listed = node.get(name)
        is_list = isinstance(listed, list | tuple)
        if name in node and not (is_list and listed):
            found = "an empty one" if is_list else show(listed)
            self.report(f"must be a list of {CURVE_PARTS[name]}, not {found}", f"{path}.{name}")
        if not isinstance(listed, list | tuple):
            return []
        problems = [key.problem(_plain(number)) for number in listed]
        for index, problem in enumerate(problems):
            if problem:
                self.report(problem, f"{path}.{name}[{index}]")
        return [_plain(number) for number, problem in zip(listed, problems, strict=True) if problem is None]

    def ascending(self, rows: Sequence[int], path: str) -> None:
        if rows[0] != 1:
            self.report(f"must be 1, as experts with one row are the most frequent, not {rows[0]}", f"{path}[0]")
        for index, (before, row) in enumerate(pairwise(rows), start=1):
            if row <= before:
                self.report(f"must be more than the {before} before it, not {row}", f"{path}[{index}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a profile holds, all of it allowed; figures and curves by dotted path, in the unit of their key."""

    name: str
    description: str
    is_unified: bool
    figures: Mapping[str, Figure]
    curves: Mapping[str, CurveFigure]


def check(content: object, where: str, problems: Iterable[str] = ()) -> Checked:
    """The figures that `content` holds. Raise ProfileError with `problems` and all others found."""
    if not isinstance(content, Mapping):
        raise ProfileError(f"{where}: must be a mapping with the keys of a profile, not {show(content)} @ $")
    if content.get("schema", SCHEMA) != SCHEMA:
        # The keys of another format or version are not ours to judge, so this is the only problem named.
        rule = f"must be {SCHEMA!r}, not {show(content['schema'])}; a newer profile needs a newer tidesim"
        raise ProfileError(f"{where}: {rule} @ $.schema")
    reader = _Reader(list(problems))
    is_unified = _is_unified(content)
    if is_unified:
        content = reader.without_copies(content)
    figure_keys = {key.path: key for key in FIGURE_KEYS if not (is_unified and key.is_copy)}
    layout = nest(figure_keys | {key.path: key for key in CURVE_KEYS})
    reader.keys(content, HEADER | {name: _meaning(below) for name, below in layout.items()}, "$", _optional(layout))
    reader.header(content)
    reader.section(content, layout, "$")
    if reader.problems:
        raise ProfileError("\n".join(f"{where}: {problem}" for problem in reader.problems))
    return Checked(
        name=str(content["name"]),
        description=str(content["description"]),
        is_unified=is_unified,
        figures=reader.figures,
        curves=reader.curves,
    )


def _is_unified(content: Mapping[object, object]) -> bool:
    """`unified_memory`, or what the links suggest where it is no truth value, so that one slip is one problem."""
    value, links = content.get("unified_memory"), content.get("links")
    if isinstance(value, bool):
        return value
    return isinstance(links, Mapping) and not any(name in links for name in COPY_NAMES)


def _optional(layout: Mapping[str, object]) -> list[str]:
    """What a section of this layout may lack: curves, and whole sections of optional figures."""

    def is_optional(below: object) -> bool:
        if isinstance(below, dict):
            return all(isinstance(item, FigureKey) and item.is_optional for item in below.values())
        return isinstance(below, CurveKey)

    return [name for name, below in layout.items() if is_optional(below)]


def _plain(value: Any) -> Any:
    """`value` without numpy's types: YAML writes plain numbers only."""
    return value.item() if isinstance(value, np.generic) else value


# --- words for messages ---


def _meaning(below: object) -> str:
    if isinstance(below, CurveKey):
        below = below.rate
    if isinstance(below, FigureKey):
        return f"{below.description} ({below.unit})"
    return f"a section with {', '.join(below) if isinstance(below, dict) else below}"


def nearest(name: str, names: Iterable[str]) -> str:
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known)}."
