"""The trace file, version 1: every attribute, dataset and column described once, and the rules they keep.

Knows nothing of HDF5: the package `trace` reads and writes the file.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from tidesim.errors import ModelError, TraceError
from tidesim.moe import MoEConfig
from tidesim.workload import ForwardKind

FORMAT = "tidesim-trace"
VERSION = 1

Origin = Literal["recorded", "imported", "synthetic"]


@dataclass(frozen=True, slots=True)
class Field:
    """One attribute, column or dataset of the file; integers of a column are at least `least`."""

    name: str
    dtype: str
    unit: str
    meaning: str
    least: int = 0


ATTRIBUTES = (
    Field("format", "str", "", f"always {FORMAT!r}"),
    Field("version", "int", "", f"version of this format; {VERSION} is the newest known"),
    Field("tool_version", "str", "", "tidesim version that wrote the file"),
    Field("created", "str", "ISO 8601, UTC", "when writing began"),
    Field("origin", "str", "", "'recorded' from a network, 'imported' from another tool, or 'synthetic'"),
    Field("complete", "bool", "", "false until the writer closed the file; finished sequences are whole either way"),
    Field("model", "str", "", "name of the network"),
    Field("config", "json", "", "the network's Hugging Face config.json"),
    Field("num_layers", "int", "layers", "L: MoE layers, dense layers left out"),
    Field("num_experts", "int", "experts", "E: routed experts per MoE layer"),
    Field("top_k", "int", "experts", "K: routed experts per token"),
    Field("block_length", "int", "tokens", "B: tokens denoised together"),
    Field("kv_cache", "bool", "", "true: a forward routes its own block; false: the whole prefix is routed again"),
    Field("sampler", "json", "", "settings of the decoding loop"),
    Field("seed", "int", "", "seed of the decoding loop or of the synthesis"),
)
SEQUENCES = (
    Field("id", "i4", "", "number of the sequence, from 0"),
    Field("prompt_tokens", "i4", "tokens", "P: length of the prompt"),
    Field("generated_tokens", "i4", "tokens", "length of the answer as returned"),
    Field("first_forward", "i8", "", "index of its first row in /forwards"),
    Field("num_forwards", "i4", "forwards", "number of its rows in /forwards", least=1),
    Field("first_token", "i8", "", "index of its first id in /tokens; -1 if tokens are left out", least=-1),
)
FORWARDS = (
    Field("sequence", "i4", "", "the sequence it belongs to"),
    Field("block", "i4", "", "block it works on, counted from the start of the prompt; prefill: first decoded block"),
    Field("step", "i4", "", "denoising step within the block, from 0; commit: the steps before it; prefill: 0"),
    Field("kind", "u1", "", "prefill 0, denoise 1, commit 2"),
    Field("context_tokens", "i4", "tokens", "cached tokens attended besides the routed ones; 0 without a cache"),
    Field("routed_tokens", "i4", "tokens", "rows routed in every MoE layer", least=1),
    Field("masked_tokens", "i4", "tokens", "mask tokens of the block before the forward"),
    Field("accepted_tokens", "i4", "tokens", "tokens accepted after the forward"),
    Field("wall_ns", "i8", "ns", "measured duration of the forward; 0 if not measured"),
)
DATASETS = (
    Field("sequences", "compound", "", "one row a sequence"),
    Field("forwards", "compound", "", "one row a forward, in order"),
    Field("tokens", "i4", "", "each sequence's prompt ids, then its generated ids; left out if private"),
    Field("routing/expert_ids", "u1 if E <= 256 else u2", "", "[N, L, K]: experts of each routed token, best first"),
    Field("routing/offsets", "i8", "rows", "[F + 1]: forward f routed the rows offsets[f]:offsets[f + 1]"),
    Field("routing/weights", "f2", "", "[N, L, K]: weights of those experts; optional"),
    Field(
        "routing/lookahead_ids",
        "as routing/expert_ids",
        "",
        "[N, L - 1, K]: experts that the router of layer l + 1 picks from what the router of layer l sees; optional",
    ),
)

MEND = "the file is damaged or was not written by tidesim: copy it again, or record it again."


def ids_dtype(num_experts: int) -> np.dtype[Any]:
    """The narrowest type that holds the ids of `num_experts` experts."""
    return np.dtype("u1" if num_experts <= 256 else "u2")


def starts(lengths: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Where each part starts when parts of these lengths lie one after another."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def parse_attributes(attributes: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The attributes of a trace file as Python values. Raise TraceError for another format, or a value out of place."""
    if not _is_ours(attributes.get("format")):
        raise TraceError(f"{path}: an HDF5 file, but no tidesim trace; convert traces of other tools first.")
    version = attributes.get("version")
    if isinstance(version, np.integer) and version > VERSION:
        raise TraceError(f"{path}: has version {version}, newer than {VERSION}; upgrade tidesim.")
    values = {}
    for field in ATTRIBUTES:
        try:
            values[field.name] = _VALUES[field.dtype](attributes[field.name])
        except (KeyError, TypeError, ValueError):
            state = "is missing" if field.name not in attributes else f"must be {field.dtype}"
            raise TraceError(f"{path}: attribute {field.name} {state} ({field.meaning}); {MEND}") from None
    check_values(values, path)
    return values


def check_values(values: Mapping[str, Any], path: Path) -> None:
    """Raise TraceError if an attribute of the right type has a value out of range."""
    if values["origin"] not in get_args(Origin):
        raise TraceError(f"{path}: origin(={values['origin']!r}) must be one of {', '.join(get_args(Origin))}.")
    for name in ("version", "block_length"):
        if values[name] < 1:
            raise TraceError(f"{path}: {name}(={values[name]}) must be >= 1.")


def _is_ours(value: object) -> bool:
    try:
        return _text(value) == FORMAT
    except (TypeError, ValueError):
        return False


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise TypeError
    return value


def _int(value: object) -> int:
    if not isinstance(value, np.integer):
        raise TypeError
    return int(value)


def _bool(value: object) -> bool:
    if not isinstance(value, np.bool_):
        raise TypeError
    return bool(value)


def _json_object(value: object) -> dict[str, Any]:
    found = json.loads(_text(value))
    if not isinstance(found, dict):
        raise TypeError
    return found


_VALUES: dict[str, Callable[[object], Any]] = {"str": _text, "int": _int, "bool": _bool, "json": _json_object}


def parse_config(values: Mapping[str, Any], path: Path) -> MoEConfig:
    """The sizes of the network in parsed attributes. Raise TraceError if they contradict the config."""
    try:
        config = MoEConfig.from_hf(values["config"], values["model"])
    except ModelError as error:
        raise TraceError(f"{path}: attribute config: {error}") from None
    for name in ("num_layers", "num_experts", "top_k"):
        if values[name] != getattr(config, name):
            raise TraceError(
                f"{path}: attribute {name}(={values[name]}) must be {getattr(config, name)}, as in config; {MEND}"
            )
    return config


def parse_table(found: npt.NDArray[Any], fields: Sequence[Field], where: str) -> npt.NDArray[np.void]:
    """The columns of a compound dataset in our types. Raise TraceError if one is missing or holds no integers."""
    missing = [field.name for field in fields if field.name not in (found.dtype.names or ())]
    if missing:
        raise TraceError(f"{where}: column {', '.join(missing)} is missing; {MEND}")
    rows = np.zeros(len(found), [(field.name, field.dtype) for field in fields])
    for field in fields:
        if found.dtype[field.name].kind not in "iu" or found[field.name].ndim != 1:
            raise TraceError(f"{where}: column {field.name} must hold integers; {MEND}")
        rows[field.name] = found[field.name]
    return rows


def check_rows(rows: npt.NDArray[np.void], fields: Sequence[Field], where: str) -> None:
    """Raise TraceError naming the first row of `rows` with a value below the least that its column allows."""
    for field in fields:
        bad = np.flatnonzero(rows[field.name] < field.least)
        if len(bad):
            value = rows[field.name][bad[0]]
            raise TraceError(f"{where} row {bad[0]}: {field.name}(={value}) must be >= {field.least}; {MEND}")


def check_kinds(rows: npt.NDArray[np.void], where: str) -> None:
    """Raise TraceError naming the first forward that is of no known kind."""
    bad = np.flatnonzero(rows["kind"] > max(ForwardKind))
    if len(bad):
        value = rows["kind"][bad[0]]
        raise TraceError(f"{where} row {bad[0]}: kind(={value}) must be 0, 1 or 2; {MEND}")


def check_column(rows: npt.NDArray[np.void], name: str, want: npt.NDArray[np.int64], where: str) -> None:
    """Raise TraceError naming the first row whose value is not the one that the rows before it imply."""
    bad = np.flatnonzero(rows[name] != want)
    if len(bad):
        i = int(bad[0])
        raise TraceError(f"{where} row {i}: {name}(={rows[name][i]}) must be {want[i]}, after the rows before; {MEND}")


def check_ids(ids: npt.NDArray[Any], num_experts: int, where: str, first_row: int) -> None:
    """Raise TraceError naming the first expert id out of range; `first_row` numbers the rows of `ids`."""
    if ids.size and (ids.max() >= num_experts or ids.min() < 0):
        row, layer, slot = np.argwhere((ids >= num_experts) | (ids < 0))[0]
        raise TraceError(
            f"{where} row {first_row + row}, layer {layer}, slot {slot}: expert {ids[row, layer, slot]} must be in "
            f"0..{num_experts - 1}; {MEND}"
        )
