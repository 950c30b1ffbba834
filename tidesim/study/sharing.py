"""The workloads of a study, counted once by the process that starts the others, and mapped by these."""

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Self

from tidesim.lending import load_workload, save_workload
from tidesim.study.case import Routing
from tidesim.study.scoring import Known, known_parts


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
        for name, workload in known_parts(routing):
            save_workload(workload, folder / name)
        return folder

    def drop(self, routing: Routing) -> None:
        """Remove a workload that no case needs any more. Who has it mapped keeps it."""
        shutil.rmtree(self._folder / routing.key, ignore_errors=True)


@lru_cache(maxsize=1)
def load_shared(folder: Path) -> Known:
    """What `SharedCounts.put` wrote there, mapped; kept until another is asked for, as cases come by their workload."""
    return Known(*(load_workload(folder / name) for name in Known._fields))
