"""Routing traces: where the router sent every token of every forward, in one HDF5 file.

A trace holds routing and nothing about time. `TraceWriter` appends whole sequences, `Trace` opens and checks a
file, and `Trace.workload` reduces it to what a simulator eats: how many tokens each expert got in each forward.

Letters: F forwards, L MoE layers, T tokens, E experts, K top-k, B block length, N routed tokens of all forwards.

A recording may be killed at any moment. So the file is written in HDF5's single-writer/multiple-reader mode, which
orders metadata after the data it points to, and a sequence's row in /sequences is written last, after a flush.
Readers ignore whatever lies beyond the last row of /sequences. A file being written can be opened too.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from tidesim.errors import TraceError
from tidesim.moe import MoEConfig
from tidesim.result import tool_version
from tidesim.shipped import find_shipped
from tidesim.trace_format import (
    ATTRIBUTES,
    FORMAT,
    FORWARDS,
    MEND,
    SEQUENCES,
    VERSION,
    Origin,
    check_column,
    check_ids,
    check_kinds,
    check_rows,
    check_values,
    ids_dtype,
    parse_attributes,
    parse_config,
    parse_table,
    starts,
)
from tidesim.workload import WINDOW_ROWS, Context, ForwardKind, Workload, build_workload

__all__ = ["Context", "ForwardKind", "ForwardRouting", "SequenceRouting", "Trace", "TraceWriter", "Workload"]

_KIND_DTYPE = h5py.enum_dtype({kind.name.lower(): kind.value for kind in ForwardKind}, basetype="u1")
_SEQUENCE_DTYPE = np.dtype([(field.name, field.dtype) for field in SEQUENCES])
_FORWARD_DTYPE = np.dtype([(field.name, _KIND_DTYPE if field.name == "kind" else field.dtype) for field in FORWARDS])
_CHUNK_BYTES = 1 << 12


# --- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardRouting:
    """One forward of a sequence; the columns of /forwards say what each field means."""

    block: int
    step: int
    kind: ForwardKind
    context_tokens: int
    routed_tokens: int
    masked_tokens: int
    accepted_tokens: int
    wall_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceRouting:
    """One whole sequence: its tokens, its forwards in order, and the routing of all their rows, one after another.

    `prompt_ids` is int32 [P], `generated_ids` int32 [G], `expert_ids` integers [n, L, K], `weights` float [n, L, K],
    `lookahead_ids` integers [n, L - 1, K]: for layer l + 1, foretold by its own router from the input of layer l's.
    Of a private trace the file keeps the lengths of the two token arrays only.
    """

    prompt_ids: npt.NDArray[np.int32]
    generated_ids: npt.NDArray[np.int32]
    forwards: Sequence[ForwardRouting]
    expert_ids: npt.NDArray[np.integer[Any]]
    weights: npt.NDArray[np.floating[Any]] | None = None
    lookahead_ids: npt.NDArray[np.integer[Any]] | None = None


class TraceWriter:
    """Writes a trace, one whole sequence at a time; use it in a `with` statement.

    Parameters
    ----------
    path : file to create; an existing file is refused unless `overwrite`.
    config : the network's Hugging Face config.json; the numbers of MoE layers, experts and top-k come from it.
    model_name, block_length, sampler, seed, origin, kv_cache : see `trace_format.ATTRIBUTES`.
    is_private : leave the token ids out.
    has_weights : store the router's weights of every sequence too.
    has_lookahead : store too which experts of the next layer each layer's input foretells.

    Raise TraceError if the file exists, cannot be created, or an argument is out of range; ModelError if `config`
    does not describe a mixture-of-experts network.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: Mapping[str, Any],
        model_name: str,
        block_length: int,
        sampler: Mapping[str, Any],
        seed: int,
        origin: Origin,
        kv_cache: bool,
        is_private: bool = False,
        has_weights: bool = False,
        has_lookahead: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.config = MoEConfig.from_hf(config, model_name)
        if has_lookahead and self.config.num_layers < 2:
            raise TraceError(f"{path}: {model_name} has one MoE layer and no next one to look ahead to; leave it out.")
        self._is_private = is_private
        self._has_weights, self._has_lookahead = has_weights, has_lookahead
        self._num_sequences = self._num_forwards = self._num_rows = self._num_tokens = 0
        values = {
            "format": FORMAT,
            "version": VERSION,
            "tool_version": tool_version(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "origin": origin,
            "complete": False,
            "model": model_name,
            "config": dict(config),
            "num_layers": self.config.num_layers,
            "num_experts": self.config.num_experts,
            "top_k": self.config.top_k,
            "block_length": block_length,
            "kv_cache": kv_cache,
            "sampler": dict(sampler),
            "seed": seed,
        }
        self._file = _create(self.path, values, overwrite)
        self._create_datasets()
        self._file.flush()
        # From here on every flush leaves a file that can be opened, whatever becomes of this process.
        self._file.swmr_mode = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def append(self, sequence: SequenceRouting) -> None:
        """Write one sequence and flush it. Raise TraceError, and write nothing, if its parts do not fit together."""
        forwards = self._forward_rows(sequence)
        self._check_routing(sequence, int(forwards["routed_tokens"].sum()))
        offsets = self._num_rows + np.cumsum(forwards["routed_tokens"], dtype=np.int64)
        self._extend("routing/expert_ids", self._num_rows, sequence.expert_ids)
        if sequence.weights is not None:
            self._extend("routing/weights", self._num_rows, sequence.weights)
        if sequence.lookahead_ids is not None:
            self._extend("routing/lookahead_ids", self._num_rows, sequence.lookahead_ids)
        self._extend("routing/offsets", self._num_forwards + 1, offsets)
        self._extend("forwards", self._num_forwards, forwards)
        num_prompt, num_generated = len(sequence.prompt_ids), len(sequence.generated_ids)
        first_token = -1 if self._is_private else self._num_tokens
        if not self._is_private:
            self._extend("tokens", self._num_tokens, np.concatenate([sequence.prompt_ids, sequence.generated_ids]))
        # A sequence exists once its row does, so the row goes to disk after everything it points to.
        self._file.flush()
        row = (self._num_sequences, num_prompt, num_generated, self._num_forwards, len(forwards), first_token)
        self._extend("sequences", self._num_sequences, np.array([row], _SEQUENCE_DTYPE))
        self._file.flush()
        self._num_sequences += 1
        self._num_forwards += len(forwards)
        self._num_rows = int(offsets[-1])
        self._num_tokens += num_prompt + num_generated

    def close(self) -> None:
        """Mark the trace complete and close it. Closing twice does nothing."""
        if self._file:
            self._file.flush()
            self._file.attrs.modify("complete", np.bool_(True))
            self._file.close()

    def _create_datasets(self) -> None:
        shape = (self.config.num_layers, self.config.top_k)
        ids = ids_dtype(self.config.num_experts)
        self._create("sequences", _SEQUENCE_DTYPE)
        self._create("forwards", _FORWARD_DTYPE)
        self._create("routing/expert_ids", ids, shape)
        self._create("routing/offsets", np.dtype("i8"))
        self._extend("routing/offsets", 0, np.zeros(1, np.int64))
        if not self._is_private:
            self._create("tokens", np.dtype("i4"))
        if self._has_weights:
            self._create("routing/weights", np.dtype("f2"), shape)
        if self._has_lookahead:
            self._create("routing/lookahead_ids", ids, (shape[0] - 1, shape[1]))

    def _create(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...] = ()) -> None:
        # One layer a chunk: its rows resemble each other, and gzip then saves a third where it saved a sixth.
        # Small chunks: the last one is written anew by every append, and the space of the old one is lost.
        # What is not compressed is added in place.
        chunk = (1, *shape[1:]) if shape else ()
        rows = max(1, _CHUNK_BYTES // (dtype.itemsize * int(np.prod(chunk))))
        squeeze = {"compression": "gzip", "compression_opts": 1, "shuffle": dtype.itemsize > 1} if shape else {}
        self._file.create_dataset(
            name, (0, *shape), maxshape=(None, *shape), dtype=dtype, chunks=(rows, *chunk), **squeeze
        )

    def _extend(self, name: str, start: int, rows: npt.NDArray[Any]) -> None:
        dataset = self._file[name]
        dataset.resize(start + len(rows), axis=0)
        dataset[start:] = rows

    def _forward_rows(self, sequence: SequenceRouting) -> npt.NDArray[np.void]:
        rows = np.zeros(len(sequence.forwards), _FORWARD_DTYPE)
        for field in FORWARDS[1:]:
            rows[field.name] = [getattr(forward, field.name) for forward in sequence.forwards]
        rows["sequence"] = self._num_sequences
        where = f"sequence {self._num_sequences}"
        if not len(rows):
            raise TraceError(f"{where}: a sequence must have at least one forward.")
        check_rows(rows, FORWARDS, f"{where}, forwards")
        check_kinds(rows, f"{where}, forwards")
        return rows

    def _check_routing(self, sequence: SequenceRouting, num_rows: int) -> None:
        where = f"sequence {self._num_sequences}"
        shape = (num_rows, self.config.num_layers, self.config.top_k)
        self._check_ids(sequence.expert_ids, shape, f"{where}, expert_ids")
        for name, given, is_kept in (
            ("weights", sequence.weights, self._has_weights),
            ("lookahead", sequence.lookahead_ids, self._has_lookahead),
        ):
            if (given is not None) != is_kept:
                raise TraceError(f"{where}: {name} must be given exactly when has_{name}(={is_kept}).")
        if sequence.weights is not None and sequence.weights.shape != shape:
            raise TraceError(f"{where}: weights must be {list(shape)}, not {list(sequence.weights.shape)}.")
        if sequence.lookahead_ids is not None:
            ahead = (num_rows, self.config.num_layers - 1, self.config.top_k)
            self._check_ids(sequence.lookahead_ids, ahead, f"{where}, lookahead_ids")

    def _check_ids(self, ids: npt.NDArray[np.integer[Any]], shape: tuple[int, ...], where: str) -> None:
        if ids.shape != shape or ids.dtype.kind not in "iu":
            raise TraceError(f"{where} must be integers {list(shape)}, not {ids.dtype} {list(ids.shape)}.")
        check_ids(ids, self.config.num_experts, where, 0)


# --- reading ----------------------------------------------------------------------------------------------------


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
        self, context: Context = "block", sequences: Sequence[int] | None = None, *, has_lookahead: bool = False
    ) -> Workload:
        """The counts of every forward of an engine with a KV cache ("block") or without one ("full").

        Both can be had from both kinds of recording, exactly. `sequences` picks some by number, in the trace's order;
        all by default. `has_lookahead` asks for the counts of what was foretold as well. Raise ValueError if there is
        no such context or sequence, or one is named twice; TraceError if the recording lacks the rows that the
        context needs, or the look-ahead.
        """
        if has_lookahead:
            self._check_has_lookahead()
        return build_workload(self, context, sequences, has_lookahead)

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


def _create(path: Path, values: Mapping[str, Any], overwrite: bool) -> h5py.File:
    """A new file with these attributes. Raise TraceError if a value is out of place or the file cannot be created."""
    check_values(values, path)
    ready = {field.name: _ENCODE[field.dtype](values[field.name]) for field in ATTRIBUTES}
    try:
        # Bounds on both sides: older HDF5 releases can read it, and single-writer/multiple-reader mode can write it.
        file = h5py.File(path, "w" if overwrite else "x", libver=("v110", "v110"))
    except FileExistsError:
        raise TraceError(f"{path}: exists already; give another name, or allow overwriting.") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be created ({error}).") from None
    file.attrs.update(ready)
    return file


def _fixed(text: str) -> npt.NDArray[Any]:
    # Text of fixed length lies among the checksummed metadata; HDF5 hangs on some damage to text of variable length.
    raw = text.encode()
    return np.array(raw, h5py.string_dtype("utf-8", max(1, len(raw))))


_ENCODE: dict[str, Callable[[Any], Any]] = {
    "str": _fixed,
    "int": int,
    "bool": np.bool_,
    "json": lambda value: _fixed(json.dumps(value, sort_keys=True)),
}


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
