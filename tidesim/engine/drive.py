"""Experts read from a drive, past the page cache: safetensors files, byte ranges, several reads at a time.

A model larger than host memory has its experts on a drive. Reading them through the page cache would fill memory with
copies that nobody uses again, and would measure that memory in place of the drive, so files are read with O_DIRECT
where the file system allows it. Such reads begin and end at multiples of a block: they go into aligned scratch memory,
and the bytes asked for are copied out of it. Neighbouring tensors, as the matrices of one expert mostly are, are read
at once.
"""

import json
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from tidesim.engine.model import NetworkConfig
from tidesim.errors import ModelError

Bytes = npt.NDArray[np.uint8]

BLOCK = 4096  # a multiple of the logical block of every common drive, and the size of a page
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MATRICES = ("gate_proj", "up_proj", "down_proj")
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


class DirectFile:
    """A file that is read in whole blocks, past the page cache where the file system allows it.

    Where it does not (`is_direct` is False), pages are dropped from the cache once they have been read. Any number of
    threads may read at once. Raise ModelError if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scratch = threading.local()
        try:
            self._descriptor, self.is_direct = _opened(path)
            self.num_bytes = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise ModelError(f"{path}: cannot be opened ({error.strerror}).") from None

    def read(self, begin: int, length: int) -> Bytes:
        """The bytes `begin` to `begin + length`, in memory of the calling thread that its next read overwrites.

        Raise ModelError, with the offset, if the drive reports an error or the file ends before.
        """
        start = begin - begin % BLOCK
        size = _round_up(begin + length) - start
        if getattr(self._scratch, "memory", None) is None or len(self._scratch.memory) < size:
            self._scratch.memory = mmap.mmap(-1, size)
        memory: mmap.mmap = self._scratch.memory
        done = 0
        with memoryview(memory) as view:
            while start + done < begin + length:
                try:
                    got = os.preadv(self._descriptor, [view[done:size]], start + done)
                except OSError as error:
                    raise ModelError(
                        f"{self.path}: reading {size - done} bytes at offset {start + done} failed ({error.strerror})."
                    ) from None
                if start + done + got >= begin + length:
                    break
                # A direct read that was cut short goes on at a whole block, which it then reads once more.
                if got < BLOCK:
                    size = os.fstat(self._descriptor).st_size
                    raise ModelError(f"{self.path}: ends at byte {size}, expected at least {begin + length}.")
                done += got - got % BLOCK
        if not self.is_direct:
            _forget(self._descriptor, start, size)
        return np.frombuffer(memory, np.uint8, length, begin - start)

    def close(self) -> None:
        """Give the file back; nobody may be reading it."""
        os.close(self._descriptor)


def _opened(path: Path) -> tuple[int, bool]:
    """A descriptor of the file, and whether its reads go past the page cache."""
    if hasattr(os, "O_DIRECT"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return os.open(path, os.O_RDONLY), False
        try:
            # Some file systems take the flag and refuse the reads.
            os.preadv(descriptor, [mmap.mmap(-1, BLOCK)], 0)
            return descriptor, True
        except OSError:
            os.close(descriptor)
    return os.open(path, os.O_RDONLY), False


def _forget(descriptor: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _round_up(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK


# --- where tensors lie --------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """A matrix of an expert: the bytes `begin` to `begin + length` of `file`, and the tensor they belong to."""

    file: DirectFile
    begin: int
    length: int
    tensor: str


class _Stored(NamedTuple):
    """A tensor as the header of its file describes it; `begin` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class _Directory:
    """The tensors of the safetensors files of one folder, by name, as their headers describe them.

    Headers may come from anywhere, so nothing in them is believed: what is used of them lies inside its file and is as
    long as its shape asks for.
    """

    def __init__(self, folder: Path, files: Sequence[DirectFile]) -> None:
        self._folder = folder
        self._entries: dict[str, tuple[DirectFile, int, Any]] = {}
        for file in files:
            header, data_begin = _header(file)
            self._entries.update((name, (file, data_begin, entry)) for name, entry in header.items())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def spans(self, name: str, shape: tuple[int, ...], num_parts: int = 1) -> tuple[torch.dtype, list[Span]]:
        """The dtype of tensor `name`, and its equal parts along the first dimension.

        Raise ModelError if it is missing, is not of `shape`, or does not lie in its file as the header says.
        """
        if name not in self._entries:
            raise ModelError(f"{self._folder}: tensor {name} is missing from the weights.")
        file, data_begin, entry = self._entries[name]
        stored = _stored(file, name, entry, data_begin)
        if stored.shape != shape:
            raise ModelError(f"{file.path}: tensor {name} has shape {list(stored.shape)}, expected {list(shape)}.")
        end = stored.begin + stored.num_bytes
        if end > file.num_bytes:
            raise ModelError(
                f"{file.path}: tensor {name} ends at byte {end}, yet the file has {file.num_bytes}; copy it again."
            )
        length = stored.num_bytes // num_parts
        return stored.dtype, [Span(file, stored.begin + part * length, length, name) for part in range(num_parts)]


def _header(file: DirectFile) -> tuple[Mapping[str, Any], int]:
    """The header of a safetensors file, and where the data begins. Raise ModelError if it is none."""
    not_readable = f"{file.path}: not a readable safetensors file"
    if file.num_bytes < 8:
        raise ModelError(f"{not_readable} (it has {file.num_bytes} bytes).")
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file.num_bytes - 8):
        raise ModelError(f"{not_readable} (a header of {length} bytes in a file of {file.num_bytes}).")
    try:
        header = json.loads(file.read(8, length).tobytes())
    except (ValueError, RecursionError):
        raise ModelError(f"{not_readable} (its header is not JSON).") from None
    if not isinstance(header, dict):
        raise ModelError(f"{not_readable} (its header is a {type(header).__name__}, not an object).")
    header.pop("__metadata__", None)
    return header, 8 + length


def _stored(file: DirectFile, name: str, entry: Any, data_begin: int) -> _Stored:
    """Tensor `name` as its header entry describes it. Raise ModelError if that makes no sense."""
    where = f"{file.path}: tensor {name}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ModelError(f"{where}: its header entry must give a dtype, a shape and two data_offsets.")
    if dtype not in _DTYPES:
        raise ModelError(f"{where} is stored as {dtype[:20]}; experts are read as {' or '.join(_DTYPES)}.")
    num_bytes = prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise ModelError(
            f"{where}: its data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, its shape takes {num_bytes}."
        )
    return _Stored(_DTYPES[dtype], tuple(shape), data_begin + offsets[0], num_bytes)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers >= 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raise ModelError if it names none, or files outside of it."""
    index = folder / _INDEX
    if not index.is_file():
        return [folder / _SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{index}: an object with a weight_map is expected.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is not the name of a file in this folder.")
    return [folder / name for name in names]


# --- experts ------------------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    """One read of a file: from the first of some neighbouring spans to the end of the last.

    `targets` says for each of the spans where in the expert's memory it goes.
    """

    spans: list[Span]
    targets: list[int]


class Drive:
    """The routed experts in the safetensors files of a model folder, read one at a time into memory of the caller.

    Any number of threads may read at once; together they have at most `depth` reads under way. Use it in a `with`
    statement, or call `close`.

    Parameters
    ----------
    folder : single file or shards with an index; experts split or merged, see `tidesim.engine.checkpoint`.
    depth : reads under way at the same time, >= 1.

    Attributes
    ----------
    is_direct : whether all reads go past the page cache. Where the file system refuses that (tmpfs, some network file
        systems), they are buffered, and the pages dropped afterwards.
    dtype : what the experts are stored in.
    expert_bytes : bytes of one expert: gate, up, down.

    Raise ModelError, which names file and tensor, for an unusable folder, and ValueError for a bad `depth`.
    """

    def __init__(self, folder: Path, config: NetworkConfig, depth: int = 4) -> None:
        if depth < 1:
            raise ValueError(f"depth(={depth}) must be >= 1.")
        self._files: list[DirectFile] = []
        try:
            for path in _files(folder):
                self._files.append(DirectFile(path))
            directory = _Directory(folder, self._files)
            first = config.first_k_dense_replace
            layers = [_experts(directory, config, layer) for layer in range(first, config.num_hidden_layers)]
        except ModelError:
            self._close_files()
            raise
        dtypes = {dtype for experts in layers for dtype, _ in experts}
        if len(dtypes) > 1:
            self._close_files()
            raise ModelError(
                f"{folder}: experts are stored as {' and '.join(sorted(map(str, dtypes)))}; one is expected."
            )
        self.dtype = dtypes.pop()
        self.expert_bytes = 3 * config.hidden_size * config.moe_intermediate_size * self.dtype.itemsize
        self.is_direct = all(file.is_direct for file in self._files)
        self._spans = [[spans for _, spans in experts] for experts in layers]
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="drive")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def read_expert(self, layer: int, expert: int, out: Bytes) -> None:
        """Fill `out` with one expert: gate, up and down, each contiguous [rows, cols], one after another.

        Parameters
        ----------
        layer : MoE layer, counted from 0.
        out : contiguous, `expert_bytes` long.

        Raise ModelError, with file and offset, if the drive fails or a file has become shorter.
        """
        for reading in self.start_read(layer, expert, out):
            reading.result()

    def start_read(self, layer: int, expert: int, out: Bytes) -> list[Future[None]]:
        """Begin what `read_expert` does. `out` is filled once all of the returned are done; they raise its errors."""
        if out.dtype != np.uint8 or out.shape != (self.expert_bytes,) or not out.flags.c_contiguous:
            raise ValueError(f"out(={out.dtype} {list(out.shape)}) must be contiguous uint8 [{self.expert_bytes}].")
        if not (0 <= layer < len(self._spans) and 0 <= expert < len(self._spans[0])):
            raise ValueError(f"there is no expert {expert} in a layer {layer}.")
        return [self._pool.submit(_fill, read, out) for read in _merged(self._spans[layer][expert])]

    def close(self) -> None:
        """Finish what was begun, and give threads and files back."""
        self._pool.shutdown()
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            file.close()


def _experts(directory: _Directory, config: NetworkConfig, layer: int) -> list[tuple[torch.dtype, list[Span]]]:
    """Dtype and spans of every expert of one layer, counted from the first of all layers."""
    E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes = dict(zip(_MATRICES, ((width, D), (width, D), (D, width)), strict=True))
    prefix = f"model.layers.{layer}.mlp.experts"
    is_merged = f"{prefix}.gate_proj" in directory
    columns = []  # for each matrix: dtype and span of every expert
    for matrix, shape in shapes.items():
        if is_merged:
            dtype, spans = directory.spans(f"{prefix}.{matrix}", (E, *shape), num_parts=E)
            columns.append([(dtype, span) for span in spans])
        else:
            found = (directory.spans(f"{prefix}.{expert}.{matrix}.weight", shape) for expert in range(E))
            columns.append([(dtype, span) for dtype, (span,) in found])
    return [_one_dtype(matrices) for matrices in zip(*columns, strict=True)]


def _one_dtype(matrices: Sequence[tuple[torch.dtype, Span]]) -> tuple[torch.dtype, list[Span]]:
    """The matrices of one expert under the dtype that they share. Raise ModelError if they share none."""
    dtype = matrices[0][0]
    for other, span in matrices:
        if other != dtype:
            raise ModelError(f"{span.file.path}: tensor {span.tensor} is {other}, the expert's others are {dtype}.")
    return dtype, [span for _, span in matrices]


def _merged(spans: Sequence[Span]) -> Iterator[_Read]:
    """Reads that cover the spans: neighbours less than a block apart are read at once, as one read would end and the
    next begin in the same block or in adjoining ones."""
    ends = np.cumsum([span.length for span in spans])
    targets = [int(end) - span.length for end, span in zip(ends, spans, strict=True)]
    placed = sorted(zip(spans, targets, strict=True), key=lambda pair: (str(pair[0].file.path), pair[0].begin))
    read = _Read([], [])
    for span, target in placed:
        if read.spans:
            last = read.spans[-1]
            if last.file is not span.file or span.begin - (last.begin + last.length) > BLOCK:
                yield read
                read = _Read([], [])
        read.spans.append(span)
        read.targets.append(target)
    yield read


def _fill(read: _Read, out: Bytes) -> None:
    """Do a read, and put each of its spans where it belongs in `out`."""
    first, last = read.spans[0], read.spans[-1]
    data = first.file.read(first.begin, last.begin + last.length - first.begin)
    for span, target in zip(read.spans, read.targets, strict=True):
        out[target : target + span.length] = data[span.begin - first.begin :][: span.length]
