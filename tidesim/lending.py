"""Workloads that several processes of one machine read from the same memory.

Counting a trace takes as long as many cases, and the counts of a long one take gigabytes. So the process that starts
the others writes plain arrays, one file each, into a folder, and the others map these files. The pages of a mapped file
are the system's and exist once, however many processes read them. A file needs no owner, as a block of
`multiprocessing.shared_memory` does: that one stays in memory for ever where its owner is killed.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import numpy as np

from tidesim.windows import forget
from tidesim.workload import Workload

_VALUES = "values.json"


class Lent(Mapping[str, Workload]):
    """Workloads by name; use it in a `with` statement.

    Here they are what was handed in. A process that this object is sent to maps them from files, which are written
    when it is sent for the first time, and removed at the end of the `with` statement.
    """

    def __init__(self, workloads: Mapping[str, Workload]) -> None:
        self._workloads = dict(workloads)
        self._names = tuple(workloads)
        self._path = Path()

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory(prefix="tidesim-", ignore_cleanup_errors=True)
        self._path = Path(self._folder.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._folder.cleanup()

    def __getitem__(self, name: str) -> Workload:
        if name in self._names and name not in self._workloads:
            self._workloads[name] = load_workload(self._path / name)
        return self._workloads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> tuple[Path, tuple[str, ...]]:
        for name, workload in self._workloads.items():
            if not (self._path / name).exists():
                save_workload(workload, self._path / name)
        return self._path, self._names

    def __setstate__(self, state: tuple[Path, tuple[str, ...]]) -> None:
        (self._path, self._names), self._workloads = state, {}


def save_workload(workload: Workload, folder: Path) -> None:
    """Write a workload into a new folder."""
    folder.mkdir(parents=True)
    values: dict[str, object] = {}
    for field in fields(workload):
        value = getattr(workload, field.name)
        if isinstance(value, np.ndarray):
            np.save(folder / f"{field.name}.npy", value)
            forget(value)
        else:
            values[field.name] = value
    (folder / _VALUES).write_text(json.dumps(values), encoding="utf-8")


def load_workload(folder: Path) -> Workload:
    """What was written there, mapped."""
    values: dict[str, Any] = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    # Counts cannot be written, so that what was read of them can be forgotten. The other arrays are copied on write,
    # and behave as those of a workload that was counted here.
    arrays = {}
    for path in folder.glob("*.npy"):
        mapped = np.load(path, mmap_mode="r") if path.stem == "counts" else np.load(path, mmap_mode="c")
        arrays[path.stem] = np.asarray(mapped)
    return Workload(**(values | arrays))
