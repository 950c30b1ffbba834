"""The machine as its system describes it, and copies within its memory."""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tidesim.engine.calibrate.measured import CopyFit, Measured, fit_copies, sample, seconds, seconds_per_call

UNKNOWN_CACHE_BYTES = 32 * 2**20  # of processors that do not tell: most have less
COLD = 4  # memory is cold once so many times the cache have been gone through since
SIZES = tuple(2**power for power in range(12, 27))  # 4 KiB to 64 MiB


def cache_bytes(root: Path = Path("/")) -> int:
    """Size of the last-level cache of the first core; `root` is where the system's files are."""
    sizes = {}
    for index in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            text = (index / "size").read_text(encoding="ascii").strip()
            sizes[int((index / "level").read_text(encoding="ascii"))] = (
                int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
            )
        except (OSError, ValueError, KeyError, IndexError):
            continue  # a cache that does not tell its size
    return sizes[max(sizes)] if sizes else UNKNOWN_CACHE_BYTES


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may use: the machine's, or what its control group allows if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_group_limits(root)])


def _group_limits(root: Path) -> Iterator[int]:
    """Limits of the control groups around this process, in both versions of their file system."""
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = [line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2]
    for name in ("", *own):
        for file in (groups / name / "memory.max", groups / "memory" / name / "memory.limit_in_bytes"):
            try:
                yield int(file.read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue  # not there, or "max"


def worker_call(repeats: int = 15, limit_s: float = 1.0) -> Measured:
    """Seconds to hand work to a waiting thread and to be told that it is done."""
    with ThreadPoolExecutor(1) as worker:
        samples = sample({"call": lambda: seconds_per_call(lambda: worker.submit(int).result(), 200)}, repeats, limit_s)
    return Measured.of(samples["call"], "work handed to a waiting thread and back, 200 times in a row")


class HostCopies:
    """Copies within host memory that find neither source nor target in a cache.

    Parameters
    ----------
    num_bytes : of the source and of the target each; copies go round in them.
    """

    def __init__(self, num_bytes: int, rng: np.random.Generator) -> None:
        self.source = torch.from_numpy(rng.integers(0, 256, num_bytes, np.uint8))
        self.target = torch.zeros(num_bytes, dtype=torch.uint8)
        self._rng = rng
        self._places: dict[int, Iterator[int]] = {}

    def pieces(self, size: int, num_pieces: int) -> list[tuple[Tensor, Tensor]]:
        """Sources and targets of the next copies of `size` bytes. Raise ValueError if these are more than there are."""
        if size > len(self.source):
            raise ValueError(f"size(={size}) must be at most the {len(self.source)} bytes that are copied from.")
        places = self._places.setdefault(size, self._round(size))
        starts = [next(places) for _ in range(num_pieces)]
        return [(self.source[start : start + size], self.target[start : start + size]) for start in starts]

    def _round(self, size: int) -> Iterator[int]:
        """Where copies start: all over the memory in random order, so that no prefetcher knows the next one."""
        while True:
            yield from (self._rng.permutation(len(self.source) // size) * size).tolist()

    def copy_s(self, size: int) -> float:
        """Seconds of one copy into memory that has been used before."""
        pieces = self.pieces(size, batch(size))
        return seconds(lambda: _copy(pieces)) / len(pieces)

    def fresh_copy_s(self, size: int) -> float:
        """Seconds of one copy into memory that is asked for on the spot."""
        sources = [source for source, _ in self.pieces(size, batch(size))]
        return seconds(lambda: copy_fresh(sources)) / len(sources)


def batch(size: int) -> int:
    """How many copies of `size` bytes are timed together."""
    return min(32, max(1, 2**20 // size))


def _copy(pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
    for source, target in pieces:
        target.copy_(source)


def copy_fresh(sources: Sequence[Tensor]) -> list[Tensor]:
    """Copies in new memory. It comes from the system itself: an allocator would hand out what was used before."""
    targets = [torch.frombuffer(mmap.mmap(-1, source.numel()), dtype=torch.uint8) for source in sources]
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
    return targets


def copy_sweep(
    copy_s: Callable[[int], float],
    expert_bytes: int,
    note: str,
    sizes: Sequence[int] = SIZES,
    repeats: int = 15,
    limit_s: float = 10.0,
) -> CopyFit:
    """The fit of `copy_s(bytes)` over `sizes` and the size of an expert."""
    measures = {size: partial(copy_s, size) for size in sorted({*sizes, expert_bytes})}
    return fit_copies(sample(measures, repeats, limit_s), note)


def duplex_share(copies: HostCopies, size: int, repeats: int = 9, limit_s: float = 3.0) -> Measured:
    """Share of its rate that a copy of `size` bytes keeps while another one runs."""
    num_copies = min(64, max(4, 2**28 // size))
    with ThreadPoolExecutor(2) as threads:

        def run(num_threads: int) -> float:
            pieces = [copies.pieces(size, num_copies) for _ in range(num_threads)]
            return seconds(lambda: list(threads.map(_copy, pieces)))

        samples = sample({"alone": lambda: run(1), "both": lambda: run(2)}, repeats, limit_s)
    shares = [min(1.0, alone / both) for alone, both in zip(samples["alone"], samples["both"], strict=True)]
    return Measured.of(shares, f"{num_copies} copies of {size} bytes on one thread, then on each of two at once")
