"""A drive that experts are read from: direct reads of expert size, at random places of a large file."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from tidesim.engine.calibrate.measured import CopyFit, Measured, fit_copies, sample, seconds
from tidesim.engine.drive import BLOCK, DirectFile
from tidesim.errors import ProfileError

SIZES = tuple(2**power for power in range(16, 24))  # 64 KiB to 8 MiB
DEPTHS = (1, 4, 8)
SCRATCH_BYTES = 2**30
_PIECE_BYTES = 2**24


@contextmanager
def scratch_file(folder: Path, num_bytes: int, rng: np.random.Generator) -> Iterator[Path]:
    """A file of random bytes on the drive that `folder` is on; it is gone afterwards.

    Raise ProfileError if it cannot be written.
    """
    path = folder / f"tidesim-calibrate-{os.getpid()}.bin"
    piece = rng.integers(0, 2**64, _PIECE_BYTES // 8, np.uint64)
    try:
        try:
            with path.open("xb") as file:
                for number in range(-(-num_bytes // _PIECE_BYTES)):
                    # A different number in each piece: a drive that spots repetitions would store just one of them.
                    file.write((piece ^ np.uint64(0x9E3779B97F4A7C15 * number % 2**64)).tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ProfileError(
                f"{path}: {num_bytes} bytes to read cannot be written ({error.strerror}); name another folder, or a "
                "large file that is there already."
            ) from None
        yield path
    finally:
        path.unlink(missing_ok=True)


def drive_fit(
    path: Path,
    expert_bytes: int,
    rng: np.random.Generator,
    sizes: tuple[int, ...] = SIZES,
    depths: tuple[int, ...] = DEPTHS,
    repeats: int = 5,
    limit_s: float = 25.0,
) -> CopyFit:
    """Latency of reads that run alone, and the best bandwidth at any size and depth.

    Parameters
    ----------
    path : a file that nobody has read lately; reads start anywhere in it.
    depths : how many reads are under way at once.

    Raise ProfileError if the file is too small to read from at random.
    """
    sizes = tuple(sorted({*sizes, -(-expert_bytes // BLOCK) * BLOCK}))
    file = DirectFile(path)
    try:
        if file.num_bytes < 8 * sizes[-1]:
            raise ProfileError(f"{path}: has {file.num_bytes} bytes, at least {8 * sizes[-1]} are needed to read from.")
        pieces = [(depth, size) for depth in depths for size in sizes]
        each_s = limit_s / (len(pieces) * (repeats + 1))
        measures = {(depth, size): partial(_read_s, file, size, depth, each_s, rng) for depth, size in pieces}
        samples = sample(measures, repeats, limit_s)
        way = "direct" if file.is_direct else "buffered (direct ones are refused here, so memory may have been read)"
    finally:
        file.close()
    note = f"{way} reads at random places of {file.num_bytes / 1e9:.1f} GB"
    alone = fit_copies({size: samples[min(depths), size] for size in sizes}, f"{note}, {min(depths)} at a time")
    rates = {key: Measured.of(times, note).per(key[1]) for key, times in samples.items()}
    depth, size = max(rates, key=lambda key: rates[key].value)
    best = rates[depth, size]
    return replace(alone, bytes_per_s=best.with_value(best.value, f"the best: {depth} at a time of {size} bytes"))


def _read_s(file: DirectFile, size: int, depth: int, limit_s: float, rng: np.random.Generator) -> float:
    """Seconds per read of `size` bytes with `depth` of them under way, for as long as `limit_s`."""
    blocks = (file.num_bytes - size) // BLOCK + 1
    end_s = perf_counter() + limit_s
    starts = [(rng.integers(0, blocks, 4096) * BLOCK).tolist() for _ in range(depth)]

    def read(places: list[int]) -> int:
        for count, start in enumerate(places, start=1):
            file.read(start, size)
            if perf_counter() >= end_s:
                return count
        return len(places)

    with ThreadPoolExecutor(depth) as threads:
        counts: list[int] = []
        taken_s = seconds(lambda: counts.extend(threads.map(read, starts)))
    return taken_s / sum(counts)
