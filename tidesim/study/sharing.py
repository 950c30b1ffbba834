"""Workloads that several processes of one machine read from the same memory.

Counting a trace takes as long as many cases, and the counts of a long one take gigabytes. So the process that starts
the others counts once and writes plain arrays, one file each, into a folder; the others map these files. The pages of a
mapped file are the system's and exist once, however many processes read them. A file needs no owner, as a block of
`multiprocessing.shared_memory` does: that one stays in memory for ever where its owner is killed, and sweeps may be.
"""

import json
import shutil
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from tidesim.study.case import Routing
from tidesim.study.scoring import Known, make_known
from tidesim.workload import Workload

_VALUES = "values.json"


class SharedCounts:
    """Workloads in a folder, while they are needed; use it in a `with` statement, which removes the folder at its end.

    What a sweep that was killed has left there is removed at the beginning.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, routing: Routing) -> Path:
        """Count and write; gives where. Raise TraceError if the trace cannot be used."""
        folder = self._folder / routing.key
        for name, workload in make_known(routing)._asdict().items():
            _save(workload, folder / name)
        return folder

    def drop(self, routing: Routing) -> None:
        """Remove a workload that no case needs any more. Who has it mapped keeps it."""
        shutil.rmtree(self._folder / routing.key, ignore_errors=True)


@lru_cache(maxsize=1)
def load_shared(folder: Path) -> Known:
    """What `SharedCounts.put` wrote there, mapped; kept until another is asked for, as cases come by their workload."""
    return Known(*(_load(folder / name) for name in Known._fields))


def _save(workload: Workload, folder: Path) -> None:
    folder.mkdir(parents=True)
    values: dict[str, object] = {}
    for field in fields(workload):
        value = getattr(workload, field.name)
        if isinstance(value, np.ndarray):
            np.save(folder / f"{field.name}.npy", value)
        else:
            values[field.name] = value
    (folder / _VALUES).write_text(json.dumps(values), encoding="utf-8")


def _load(folder: Path) -> Workload:
    values: dict[str, Any] = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    # Copy on write: the pages are shared, and the arrays behave as those of a workload that was counted here.
    arrays = {path.stem: np.asarray(np.load(path, mmap_mode="c")) for path in folder.glob("*.npy")}
    return Workload(**(values | arrays))
