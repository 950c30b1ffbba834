"""What stands in a row of results: every column described once, with its type and unit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Literal, NamedTuple

from tidesim.execution import DeviceMemory
from tidesim.result import PARTS, RESOURCES
from tidesim.study.case import Scalar

if TYPE_CHECKING:
    # Takes half a second to import, which no other command should wait for.
    import pandas as pd

Row = Mapping[str, Scalar]
Status = Literal["ok", "infeasible", "failed"]
# Status of a row -> what it says. Figures are empty unless it is ok.
STATUSES: dict[Status, str] = {
    "ok": "the case was run",
    "infeasible": "its settings do not go together, or do not fit the machine; `reason` says why",
    "failed": "something went wrong that should not; `reason` has the type of the error and its message",
}
FIGURE = "figures."  # before the dotted path of a profile's figure, where a study varies it
MEMORY_PARTS = tuple(field.name for field in fields(DeviceMemory))


class Column(NamedTuple):
    """One column: `dtype` as pandas calls it."""

    name: str
    dtype: str
    unit: str
    meaning: str


SETTINGS = (
    Column("trace", "string", "", "the trace, as the study names it"),
    Column("trace_fingerprint", "string", "", "SHA-256 of its routing"),
    Column("trace_origin", "string", "", "recorded, imported or synthetic"),
    Column("trace_model", "string", "", "the network that was traced"),
    Column("sequences", "string", "", "numbers of the sequences that are run"),
    Column("corpus", "string", "", "numbers of those that policies may know before"),
    Column("model", "string", "", "the network whose sizes are used"),
    Column("weight_bits", "Int64", "bits", "of each weight of its routed experts"),
    Column("model_fingerprint", "string", "", "SHA-256 of its sizes"),
    Column("machine", "string", "", "name of the profile, and the figures that were changed"),
    Column("profile", "string", "", "the profile, as the study names it"),
    Column("changes", "string", "", "JSON: changed figures by dotted path, in the units of the profile"),
    Column("machine_fingerprint", "string", "", "SHA-256 of all figures, after the change"),
    Column("execution", "string", "", "how the software runs"),
    Column("context", "string", "", "block: with a KV cache; full: without"),
    Column("policy", "string", "", "who is on the device"),
    Column("params", "string", "", "JSON: its parameters where they are not the default"),
    Column("refresh_interval", "Int64", "denoising steps", "between refreshes; empty for policies that never refresh"),
    Column("budget_asked", "string", "experts a layer", "as the study has it, a number or what fits"),
    Column("batch_size", "Int64", "sequences", "decoded side by side"),
    Column("held_out_share", "float64", "share", "of the sequences that is run"),
    Column("seed", "Int64", "", "of the draw of the sequences"),
    Column("reserve_bytes", "Int64", "bytes", "left free on the device; empty: the default"),
    Column("is_memory_checked", "boolean", "", "whether the device has to hold it"),
    Column("version", "string", "", "of tidesim"),
)
OUTCOME = (
    Column("python_version", "string", "", "of the process that ran the case"),
    Column("numpy_version", "string", "", "of the process that ran the case"),
    Column("status", "string", "", ", ".join(STATUSES)),
    Column("reason", "string", "", "why there are no figures"),
    Column("budget", "Int64", "experts a layer", "slots on the device"),
    Column("tok_per_s", "float64", "tok/s", "generated tokens over the seconds of the whole run"),
    Column("makespan_s", "float64", "s", "duration of the run"),
    Column("num_forwards", "Int64", "", "forwards of all kinds"),
    Column("generated_tokens", "Int64", "tokens", "of all answers"),
    Column("hit_rate", "float64", "share", "of routed (token, expert) pairs whose expert was resident"),
    Column("hits", "Int64", "pairs", "whose expert was resident"),
    Column("misses", "Int64", "pairs", "whose expert was not"),
    Column("promotions", "Int64", "experts", "moved to the device"),
    Column("evictions", "Int64", "experts", "whose slot was freed"),
    Column("drops", "Int64", "experts", "fetched for one forward and forgotten"),
    Column("num_copies", "Int64", "", "copies of expert weights"),
    Column("h2d_bytes", "Int64", "bytes", "of weights copied to the device"),
    Column("d2h_bytes", "Int64", "bytes", "of weights copied to the host"),
    *(Column(f"{part}_s", "float64", "s", meaning) for part, meaning in PARTS.items()),
    *(Column(f"{name}_busy_share", "float64", "share", f"of the run that {name} was busy") for name in RESOURCES),
    Column("device_memory_bytes", "Int64", "bytes", "needed on the device, the sum of the next five"),
    *(Column(f"memory_{part}_bytes", "Int64", "bytes", f"see DeviceMemory.{part}") for part in MEMORY_PARTS),
)
COLUMNS = (Column("case", "string", "", "SHA-256 of all settings and fingerprints"), *SETTINGS, *OUTCOME)


def frame(rows: Iterable[Row], figures: Sequence[str]) -> "pd.DataFrame":
    """The rows as a table with the columns `COLUMNS`, and one for each of `figures` behind the settings."""
    import pandas as pd

    listed = list(rows)
    units = [Column(f"{FIGURE}{path}", "float64", "", "a figure of the machine") for path in figures]
    columns = (*COLUMNS[: 1 + len(SETTINGS)], *units, *OUTCOME)
    return pd.DataFrame(
        {name: pd.Series([row.get(name) for row in listed], dtype=dtype) for name, dtype, *_ in columns}
    )
