"""Counts of many forwards, a window at a time: a long trace's do not fit into memory, mapped ones or any other.

Letters: F forwards.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW_CELLS = 1 << 24  # counts of a window: as floats of 64 bits they take 134 MB

_MOST_BYTES = 1 << 28  # of counts in memory; more of them go to a file

Counts = npt.NDArray[Any]  # [F, ...]


def spans(shape: tuple[int, ...], window_cells: int | None = None) -> list[slice]:
    """The forwards of each window of counts of this shape; at least one forward is in a window."""
    num_cells = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    size = max(1, (window_cells or WINDOW_CELLS) // num_cells)
    return [slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size)]


def windows(counts: Counts) -> Iterator[tuple[slice, Counts]]:
    """The forwards of each window, and their counts, which are to be read before the next ones are asked for."""
    for span in spans(counts.shape):
        yield span, counts[span]
        forget(counts)


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Counts:
    """Zeros in memory; many of them, if the disk has room, in a file without a name that lasts as long as they do."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if num_bytes > _MOST_BYTES and hasattr(os, "posix_fallocate"):
        with suppress(OSError), tempfile.TemporaryFile(prefix="tidesim-") as file:
            # Room that is not there would be found missing when it is written, which ends a process without a word.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return np.asarray(np.memmap(file, dtype, "w+", shape=shape))
    return np.zeros(shape, dtype)


def taken(counts: Counts, index: npt.NDArray[np.integer[Any]]) -> Counts:
    """`counts[index]`, in a file if they are many."""
    chosen = zeros((len(index), *counts.shape[1:]), counts.dtype)
    for span in spans(chosen.shape):
        chosen[span] = counts[index[span]]
        forget(counts)
        forget(chosen, is_shared=True)
    return chosen


def forget(counts: Counts, *, is_shared: bool = False) -> None:
    """Take what was read of a mapped file out of this process's memory; it is read again when it is needed.

    So it is with what was written into a file that `is_shared`, as those of `zeros` are.
    """
    owner: Any = counts
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    # What was written into a private copy of a file would be lost.
    if isinstance(owner, mmap.mmap) and (is_shared or not counts.flags.writeable) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
