"""Reading a trace: everything in the file is checked when it is opened, so what is read later can be relied on."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from tidesim.counting import WINDOW_ROWS, Segments, build_workload, count_segments
from tidesim.errors import TraceError
from tidesim.shipped import find_shipped, shipped_folder
from tidesim.trace.counts_file import CountsFile, TooManyError
from tidesim.trace_format import (
    FORWARDS,
    MEND,
    SEQUENCES,
    check_column,
    check_ids,
    check_kinds,
    check_rows,
    ids_dtype,
    parse_attributes,
    parse_config,
    parse_table,
    starts,
)
from tidesim.workload import Context, Counts, Workload


class Trace:
    """An open trace file. `Trace.open` checks all of it first, so what is read later can be relied on.

    `sequences` and `forwards` are read-only structured arrays with the columns `SEQUENCES` and `FORWARDS` of
    `trace_format`; `offsets` is int64 [F + 1]. The other public attributes are those of the file (`ATTRIBUTES` there).
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        values = parse_attributes(file.attrs, path)
        self.version: int = values["version"]
        self.tool_version: str = values["tool_version"]
        self.created: str = values["created"]
        self.origin: str = values["origin"]
        self.is_complete: bool = values["complete"]
        self.model_name: str = values["model"]
        self.hf_config: dict[str, Any] = values["config"]
        self.block_length: int = values["block_length"]
        self.kv_cache: bool = values["kv_cache"]
        self.sampler: dict[str, Any] = values["sampler"]
        self.seed: int = values["seed"]
        self.config = parse_config(values, path)
        self.num_layers, self.num_experts, self.top_k = (
            self.config.num_layers,
            self.config.num_experts,
            self.config.top_k,
        )
        self.is_private = "tokens" not in file
        self.has_weights = "routing/weights" in file
        self.has_lookahead = "routing/lookahead_ids" in file
        self.sequences = self._read_sequences()
        self.forwards = self._read_forwards()
        self.offsets = self._read_offsets()
        self.num_rows = int(self.offsets[-1])
        self._check_routing()
        self.fingerprint = self._scan()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the trace at `path`, or the shipped trace of that name, and check everything in it.

        A recording that was stopped, or is still running, opens with its finished sequences and `is_complete` False.
        Raise TraceError, naming file, dataset, row and way out, if the file is no trace, newer than this version of
        tidesim knows, damaged, or contradicts itself.
        """
        found = find_shipped("traces", str(path), ".h5", TraceError)
        with _reading(found):
            file = h5py.File(found, "r", swmr=_is_being_written(found))
            try:
                return cls(found, file)
            except BaseException:
                file.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; sequences, forwards and offsets stay usable."""
        self._file.close()

    def expert_ids(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Experts of the routed rows start:stop, [stop - start, L, K]. Raise ValueError if there are no such rows."""
        return self._rows("routing/expert_ids", start, stop)

    def weights(self, start: int, stop: int) -> npt.NDArray[np.float16]:
        """Router weights of the rows start:stop, [stop - start, L, K]. Raise TraceError if the trace keeps none."""
        if not self.has_weights:
            raise TraceError(f"{self.path}: keeps no router weights; record it with --weights.")
        return self._rows("routing/weights", start, stop)

    def lookahead_ids(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Experts of layer l + 1 that the input of layer l foretold for the rows start:stop, [stop - start, L - 1, K].

        Raise TraceError if the trace keeps none.
        """
        self._check_has_lookahead()
        return self._rows("routing/lookahead_ids", start, stop)

    def tokens(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids of one sequence, int32 [P + G]: its prompt, then its answer. Raise TraceError if left out."""
        if self.is_private:
            raise TraceError(f"{self.path}: keeps no tokens; record it without --private.")
        row = self.sequences[sequence]
        start, num_tokens = int(row["first_token"]), int(row["prompt_tokens"]) + int(row["generated_tokens"])
        with _reading(self.path):
            return np.asarray(self._file["tokens"][start : start + num_tokens], np.int32)

    def workload(
        self,
        context: Context = "block",
        sequences: Sequence[int] | None = None,
        *,
        has_lookahead: bool = False,
        is_mapped: bool = False,
    ) -> Workload:
        """The counts of every forward of an engine with a KV cache ("block") or without one ("full").

        Both can be had from both kinds of recording, exactly. Forwards with a KV cache are counted once and kept beside
        the trace, in `FILE.counts`, if that folder may be written; what else there is comes from these, but for the
        look-ahead, and for forwards that were recorded without a KV cache: they are counted each time.

        Parameters
        ----------
        sequences : some by number, in the trace's order; all by default.
        has_lookahead : count what was foretold as well.
        is_mapped : leave the counts where they are kept, if they are, so that a long trace takes no memory; those that
            are not kept as they are asked for go to a file without a name, if they are many. They are then read-only,
            and unsigned integers of as few bits as do: sums of them need a wider type, and so does a minus sign.

        Raise ValueError if there is no such context or sequence, or one is named twice; TraceError if the recording
        lacks the rows that the context needs, or the look-ahead.
        """
        if has_lookahead:
            self._check_has_lookahead()
        return build_workload(self, context, sequences, has_lookahead, is_mapped)

    def kept_counts(self, every: Segments, chosen: npt.NDArray[np.int64]) -> Counts | None:
        """Counts [F, L, E] of `every` forward of an engine with a KV cache, mapped from beside the trace.

        Those of the `chosen` sequences are in order. If there are none yet they are counted now. None if they cannot be
        kept: what comes with tidesim has its folder left alone, and other folders may be read-only.
        """
        if self.path.resolve().parent == shipped_folder("traces").resolve():
            return None
        rows, wanted = int((every.stop - every.start).max(initial=0)), chosen.tolist()
        # As many tokens as rows at most, unless a row names an expert twice, which no router does.
        files = [self._counts_file(every, most) for most in (rows, self.top_k * rows)]
        kept = next((counts for counts in (file.read(wanted) for file in files) if counts is not None), None)
        for file in files:
            if kept is None:
                with suppress(TooManyError):
                    kept = file.read(wanted) if file.write(self._count_each(every, file.bounds), self.path) else None
                    break
        return kept

    def _counts_file(self, every: Segments, most: int) -> CountsFile:
        """The file beside the trace, if no count exceeds `most`."""
        return CountsFile(
            path=self.path.with_name(f"{self.path.name}.counts"),
            fingerprint=self.fingerprint,
            bounds=np.searchsorted(every.sequence, np.arange(len(self.sequences) + 1)),
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            dtype=np.dtype(np.min_scalar_type(most)).newbyteorder("<"),
        )

    def _count_each(self, every: Segments, bounds: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int32]]:
        """The counts of one sequence after another."""
        for start, stop in pairwise(bounds.tolist()):
            yield count_segments(self.expert_ids, every.slice(start, stop), self.num_layers, self.num_experts)

    def _check_has_lookahead(self) -> None:
        if not self.has_lookahead:
            raise TraceError(f"{self.path}: keeps no look-ahead; record it with --lookahead.")

    def _rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"rows(={start}:{stop}) must lie within 0:{self.num_rows}.")
        with _reading(self.path):
            return np.asarray(self._file[name][start:stop])

    # --- checks ---------------------------------------------------------------------------------------------------

    def _read_sequences(self) -> npt.NDArray[np.void]:
        where = f"{self.path}: /sequences"
        rows = parse_table(_dataset(self._file, "sequences", self.path)[:], SEQUENCES, where)
        if not self.is_complete:
            # Rows that a killed writer had made room for, but had not written, hold zeros.
            rows = rows[: int(np.argmin(np.append(rows["num_forwards"], 0) > 0))]
        check_rows(rows, SEQUENCES, where)
        check_column(rows, "first_forward", starts(rows["num_forwards"]), where)
        lengths = rows["prompt_tokens"].astype(np.int64) + rows["generated_tokens"]
        check_column(rows, "first_token", np.full(len(rows), -1) if self.is_private else starts(lengths), where)
        if not self.is_private:
            tokens = _dataset(self._file, "tokens", self.path)
            self._check_shape(tokens, (int(lengths.sum()),), np.dtype("i4"))
        rows.flags.writeable = False
        return rows

    def _read_forwards(self) -> npt.NDArray[np.void]:
        where = f"{self.path}: /forwards"
        dataset = _dataset(self._file, "forwards", self.path)
        num_forwards = int(self.sequences["num_forwards"].sum())
        self._check_length(dataset, num_forwards)
        rows = parse_table(dataset[:num_forwards], FORWARDS, where)
        check_rows(rows, FORWARDS, where)
        check_kinds(rows, where)
        owner = np.repeat(np.arange(len(self.sequences)), self.sequences["num_forwards"])
        check_column(rows, "sequence", owner, where)
        rows.flags.writeable = False
        return rows

    def _read_offsets(self) -> npt.NDArray[np.int64]:
        dataset = _dataset(self._file, "routing/offsets", self.path)
        self._check_shape(dataset, (len(self.forwards) + 1,), np.dtype("i8"))
        offsets = np.asarray(dataset[: len(self.forwards) + 1], np.int64)
        want = np.concatenate([[0], np.cumsum(self.forwards["routed_tokens"], dtype=np.int64)])
        bad = np.flatnonzero(offsets != want)
        if len(bad):
            i = int(bad[0])
            raise TraceError(
                f"{self.path}: /routing/offsets row {i}: {offsets[i]} must be {want[i]}, the routed_tokens of all "
                f"forwards before; {MEND}"
            )
        offsets.flags.writeable = False
        return offsets

    def _check_routing(self) -> None:
        shape = (self.num_rows, self.num_layers, self.top_k)
        self._check_shape(_dataset(self._file, "routing/expert_ids", self.path), shape, ids_dtype(self.num_experts))
        if self.has_weights:
            self._check_shape(_dataset(self._file, "routing/weights", self.path), shape, np.dtype("f2"))
        if self.has_lookahead:
            if self.num_layers < 2:
                raise TraceError(f"{self.path}: /routing/lookahead_ids needs two MoE layers, not one; {MEND}")
            ahead = (self.num_rows, self.num_layers - 1, self.top_k)
            dataset = _dataset(self._file, "routing/lookahead_ids", self.path)
            self._check_shape(dataset, ahead, ids_dtype(self.num_experts))

    def _check_shape(self, dataset: h5py.Dataset, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if dataset.dtype != dtype or dataset.shape[1:] != shape[1:]:
            raise TraceError(
                f"{self.path}: {dataset.name} must hold {dtype} {['N', *shape[1:]]}, not {dataset.dtype} "
                f"{['N', *dataset.shape[1:]]}; {MEND}"
            )
        self._check_length(dataset, shape[0])

    def _check_length(self, dataset: h5py.Dataset, num_rows: int) -> None:
        # What a stopped recording had begun to append is there, but belongs to no sequence.
        if len(dataset) < num_rows or (self.is_complete and len(dataset) > num_rows):
            raise TraceError(f"{self.path}: {dataset.name} has {len(dataset)} rows, not {num_rows}; {MEND}")

    def _scan(self) -> str:
        """Check all expert ids, window by window, and hash what was routed: no times, tokens, weights or look-ahead."""
        digest = hashlib.sha256()
        shape = {name: getattr(self, name) for name in ("num_layers", "num_experts", "top_k", "block_length")}
        digest.update(json.dumps({**shape, "kv_cache": self.kv_cache}, sort_keys=True).encode())
        for name in ("prompt_tokens", "generated_tokens"):
            digest.update(self.sequences[name].astype("<i8").tobytes())
        for field in FORWARDS:
            if field.name != "wall_ns":
                digest.update(self.forwards[field.name].astype("<i8").tobytes())
        for start in range(0, self.num_rows, WINDOW_ROWS):
            stop = min(start + WINDOW_ROWS, self.num_rows)
            ids = self.expert_ids(start, stop)
            check_ids(ids, self.num_experts, f"{self.path}: /routing/expert_ids", start)
            if self.has_lookahead:
                ahead = self.lookahead_ids(start, stop)
                check_ids(ahead, self.num_experts, f"{self.path}: /routing/lookahead_ids", start)
            digest.update(ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        # h5py picks the class of the exception by what HDF5 was doing when it met the damage.
        raise TraceError(f"{path}: cannot be read ({error}); {MEND}") from error


def _is_being_written(path: Path) -> bool:
    """Whether a writer has the file open, or was killed while it had: it must then be opened as a second reader.

    Byte 8 of the file is the version of the superblock and byte 11 its consistency flags: bit 0 is set while it is
    open for writing, bit 2 while it may be read at the same time (HDF5 File Format Specification 3.0, section II.A).
    """
    with path.open("rb") as file:
        head = file.read(12)
    if not head.startswith(b"\x89HDF\r\n\x1a\n"):
        raise TraceError(f"{path}: not an HDF5 file; a tidesim trace is expected.")
    flags = head[11] if len(head) == 12 and head[8] == 3 else 0
    if flags & 1 and not flags & 4:
        raise TraceError(f"{path}: its writer stopped before the first sequence, or has just begun; record it again.")
    return bool(flags & 4)


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
        raise TraceError(f"{path}: dataset /{name} is missing or has no rows to it; {MEND}")
    return dataset
