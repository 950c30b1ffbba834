"""Counts of many forwards, read a window at a time: a long trace's do not fit into memory, mapped ones or any other.

Letters: F forwards.
"""

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW_CELLS = 1 << 24  # counts of a window: as floats of 64 bits they take 134 MB

Counts = npt.NDArray[Any]  # [F, ...]


def spans(shape: tuple[int, ...]) -> list[slice]:
    """The forwards of each window of counts of this shape; at least one forward is in a window."""
    num_cells = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    size = max(1, WINDOW_CELLS // num_cells)
    return [slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size)]


def windows(counts: Counts) -> Iterator[tuple[slice, Counts]]:
    """The forwards of each window, and their counts, which are to be read before the next ones are asked for."""
    for span in spans(counts.shape):
        yield span, counts[span]
        forget(counts)


def forget(counts: Counts) -> None:
    """Take what was read of a mapped file out of this process's memory; it is read again when it is needed."""
    owner: Any = counts
    while isinstance(owner, np.ndarray):
        owner = owner.base
    # What was written into a private copy would be lost, so nothing that may be written is touched.
    if isinstance(owner, mmap.mmap) and not counts.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
