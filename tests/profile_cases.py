"""Profiles to read: the shipped ones with a figure changed, and what is said of those that describe no machine."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tidesim.errors import ProfileError
from tidesim.hardware import FIGURE_KEYS, Hardware
from tidesim.shipped import shipped_folder, shipped_names

NAMES = [name.removesuffix(".yaml") for name in shipped_names("hardware_profiles")]
DISCRETE = [name for name in NAMES if name not in ("jetson-agx-orin", "dgx-spark")]


@cache
def parsed(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((shipped_folder("hardware_profiles") / f"{name}.yaml").read_text())
    return content


def shipped_content(name: str = "rtx4090") -> dict[str, Any]:
    return copy.deepcopy(parsed(name))


def put(content: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of `content` with the leaf at the dotted `path` set."""
    changed = copy.deepcopy(content)
    *sections, name = path.split(".")
    inner = changed
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return changed


def leaves(node: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, below in node.items():
        if isinstance(below, dict):
            yield from leaves(below, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def problems(content: object) -> list[str]:
    with pytest.raises(ProfileError) as caught:
        Hardware.from_content(content, "mine.yaml")
    return str(caught.value).splitlines()


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def curve(rows: object = (1, 2, 4), gflops: object = (0.12, 0.24, 0.32), **changes: object) -> dict[str, object]:
    lists = {"rows": [*rows] if isinstance(rows, tuple) else rows}
    lists["gflops"] = [*gflops] if isinstance(gflops, tuple) else gflops
    return {**lists, "kind": "calibrated", "source": "timed here", **changes}


def contention(**changes: object) -> dict[str, object]:
    """A section with shares 0.5, 0.55, .. 0.75 in the order of the keys."""
    names = [key.path.removeprefix("contention.") for key in FIGURE_KEYS if key.is_optional]
    figures = {
        name: {"value": 0.5 + 0.05 * index, "kind": "calibrated", "source": "timed here"}
        for index, name in enumerate(names)
    }
    return {**figures, **changes}


def calibrated_content() -> dict[str, Any]:
    content = put(shipped_content(), "contention", contention())
    return put(put(content, "device.expert_curve", curve()), "host.expert_curve", curve((1,), (7,), kind="guess"))
