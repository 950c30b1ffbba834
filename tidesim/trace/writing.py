"""Writing a trace: whole sequences, one after another, into a file that can be read at any moment.

A recording may be killed at any moment. So the file is written in HDF5's single-writer/multiple-reader mode, which
orders metadata after the data it points to, and a sequence's row in /sequences is written last, after a flush.
Readers ignore whatever lies beyond the last row of /sequences. A file being written can be opened too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
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
from tidesim.trace_format import (
    ATTRIBUTES,
    FORMAT,
    FORWARDS,
    SEQUENCES,
    VERSION,
    Origin,
    check_ids,
    check_kinds,
    check_rows,
    check_values,
    ids_dtype,
)
from tidesim.workload import ForwardKind

_KIND_DTYPE = h5py.enum_dtype({kind.name.lower(): kind.value for kind in ForwardKind}, basetype="u1")
_SEQUENCE_DTYPE = np.dtype([(field.name, field.dtype) for field in SEQUENCES])
_FORWARD_DTYPE = np.dtype([(field.name, _KIND_DTYPE if field.name == "kind" else field.dtype) for field in FORWARDS])
_CHUNK_BYTES = 1 << 12


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
