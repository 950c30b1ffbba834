"""Counts of a trace, kept beside it so that they are counted once: a plain table on disk that is mapped, not read.

The file holds a header, a checksum for each sequence, and the counts [F, L, E] in as few bits as do. It belongs to one
trace and version: the header is the one that we would write now, byte for byte, or the file is ignored. Nothing in it
is parsed. It comes into being under another name and is then renamed, so that nobody ever sees a part of it, and
processes that count at the same time do the same work twice at worst.

Letters: F forwards, L MoE layers, E experts, S sequences.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT, VERSION = "tidesim-counts", 1
_HEADER_BYTES, _PAGE_BYTES = 512, 4096
_CHECKSUM = np.dtype("<u4")
_WINDOW_BYTES = 1 << 24  # read at once when checksums are compared

Counts = npt.NDArray[Any]  # unsigned integers [F, L, E]


class TooManyError(Exception):
    """A count does not fit the type that it should be kept in."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CountsFile:
    """Where the counts of one trace are kept, and what they must be like.

    Parameters
    ----------
    path : the file.
    fingerprint : that of the trace.
    bounds : int64 [S + 1], sequence s has the forwards bounds[s]:bounds[s + 1].
    num_layers, num_experts : L and E.
    dtype : little-endian unsigned integers, in which they are kept.
    """

    path: Path
    fingerprint: str
    bounds: npt.NDArray[np.int64]
    num_layers: int
    num_experts: int
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """F, L, E."""
        return int(self.bounds[-1]), self.num_layers, self.num_experts

    def read(self, sequences: Iterable[int]) -> Counts | None:
        """All counts [F, L, E], mapped and read-only; None if there are none, or those of `sequences` are damaged."""
        try:
            if not self.path.is_file() or self.path.stat().st_size != self._start + self._forward_bytes * self.shape[0]:
                return None
            with self.path.open("rb") as file:
                if file.read(_HEADER_BYTES) != self._header():
                    return None
                checksums = np.frombuffer(file.read(_CHECKSUM.itemsize * self._num_sequences), _CHECKSUM)
                if any(self._checksum(file, sequence) != checksums[sequence] for sequence in sequences):
                    return None
            if not self.shape[0]:
                return np.zeros(self.shape, self.dtype)
            return np.asarray(np.memmap(self.path, self.dtype, "r", self._start, self.shape))
        except OSError:
            return None

    def write(self, parts: Iterable[npt.NDArray[np.int32]], like: Path) -> bool:
        """Keep the counts of one sequence after another; whether that could be done.

        `like` is a file whose permissions the new one gets. Raise TooManyError, and write nothing, if a count is too
        large for `dtype`; and whatever `parts` raises.
        """
        try:
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._header())
                checksums = np.zeros(self._num_sequences, _CHECKSUM)
                file.seek(self._start)
                for sequence, part in enumerate(parts):
                    if part.size and part.max() > np.iinfo(self.dtype).max:
                        raise TooManyError
                    rows = np.ascontiguousarray(part, self.dtype)
                    checksums[sequence] = zlib.crc32(rows.data)
                    file.write(rows.data)
                file.truncate(self._start + self._forward_bytes * self.shape[0])
                file.seek(_HEADER_BYTES)
                file.write(checksums.tobytes())
            os.chmod(name, like.stat().st_mode & 0o666)
            os.replace(name, self.path)
        except OSError:
            return False
        finally:
            Path(name).unlink(missing_ok=True)
        return True

    @property
    def _num_sequences(self) -> int:
        return len(self.bounds) - 1

    @property
    def _forward_bytes(self) -> int:
        return self.num_layers * self.num_experts * self.dtype.itemsize

    @property
    def _start(self) -> int:
        """Where the counts begin."""
        return -(-(_HEADER_BYTES + _CHECKSUM.itemsize * self._num_sequences) // _PAGE_BYTES) * _PAGE_BYTES

    def _header(self) -> bytes:
        bounds = zlib.crc32(self.bounds.astype("<i8").tobytes())
        about = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "bounds": bounds}
        return json.dumps(about | {"shape": self.shape, "dtype": self.dtype.str}).encode().ljust(_HEADER_BYTES)

    def _checksum(self, file: Any, sequence: int) -> int:
        start, stop = (self._start + int(at) * self._forward_bytes for at in self.bounds[sequence : sequence + 2])
        file.seek(start)
        checksum = 0
        for at in range(start, stop, _WINDOW_BYTES):
            checksum = zlib.crc32(file.read(min(_WINDOW_BYTES, stop - at)), checksum)
        return checksum
