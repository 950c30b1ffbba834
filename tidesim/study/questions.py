"""What people ask of the rows of a study: who is best, what memory buys, what a figure of the machine matters."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidesim.errors import InputError, nearest_name
from tidesim.study.columns import FIGURE, SETTINGS
from tidesim.study.store import CSV, PARQUET

if TYPE_CHECKING:
    import pandas as pd

MEMORY, SPEED = "device_memory_bytes", "tok_per_s"
# Columns that say the same as a figure of the machine does, in other words.
_OF_FIGURES = ("machine", "changes", "machine_fingerprint")


def best(results: "pd.DataFrame", by: str | Sequence[str] = "machine") -> "pd.DataFrame":
    """The fastest row (most tok/s) for each value of the column `by`, or of several columns, in order of appearance.

    Of equally fast rows it is the first. Rows without figures do not count, so who has none has no row here. Raise
    InputError if there is no such column.
    """
    columns = [by] if isinstance(by, str) else list(by)
    _check_columns(results, columns)
    ran = _ran(results)
    # A stable sort keeps the first of equals.
    fastest = ran.sort_values(SPEED, ascending=False, kind="stable").drop_duplicates(columns)
    order = ran.drop_duplicates(columns)[columns].merge(fastest, on=columns, how="left")
    return order[results.columns]


def pareto(results: "pd.DataFrame", by: str | Sequence[str] = ()) -> "pd.DataFrame":
    """The rows for which no other is as fast with less device memory, or faster with no more; by memory, ascending.

    Speed is `tok_per_s`, memory `device_memory_bytes`, all of what a run needs on the device. Rows that are equal in
    both stay all. With `by`, a column or several, there is a front for each of their values. Rows without figures do
    not count. Raise InputError if there is no such column.
    """
    import pandas as pd

    columns = [by] if isinstance(by, str) else list(by)
    _check_columns(results, columns)
    ran = _ran(results)
    groups = [group for _, group in ran.groupby(columns, sort=False, dropna=False)] if columns else [ran]
    return pd.concat([_front(group) for group in groups or [ran]], ignore_index=True)


def sensitivity(results: "pd.DataFrame", field: str | None = None) -> "pd.DataFrame":
    """How throughput changes with one setting while all others stay: a row for each step from a value to the next.

    Parameters
    ----------
    field : the dotted path of a profile's figure ("links.h2d_pinned.bandwidth_gb_s"), or a setting that is a number
        ("budget", "refresh_interval", "batch_size", "weight_bits"). By default every figure that the study changes.

    The settings that stay have their own columns. Besides there are `field`; `from_value` and `to_value`, two
    neighbouring values in the unit of the field; `from_tok_per_s` and `to_tok_per_s`; `change`, the relative change of
    throughput (0.1: a tenth more); and `elasticity`, the change of its logarithm over that of the field's: 1 if
    throughput is in proportion to the field, 0 if the field does not matter, -1 in inverse proportion. It is empty
    where a value is 0. Raise InputError if the results have no such field.
    """
    import pandas as pd

    varied = [name for name in results.columns if name.startswith(FIGURE)]
    chosen = [_column(results, field)] if field is not None else varied
    steps = [step for column in chosen for step in _steps(results, column)]
    kept = [name for name in results.columns if name in {column.name for column in SETTINGS}] + varied
    named = ["field", "from_value", "to_value", "from_tok_per_s", "to_tok_per_s", "change", "elasticity"]
    return pd.DataFrame(steps, columns=[*kept, *named])


def summary(results: "pd.DataFrame", out: str | Path) -> dict[str, Any]:
    """What `tidesim sweep` reports of the rows in the folder `out`, as plain data.

    Where they are, how many went how, who is best on each machine and what memory buys there. Rows of one machine are
    rivals; rows of other traces, or of other sizes, answer other questions and are kept apart.
    """
    asks = [name for name in ("trace", "model", "weight_bits") if results[name].nunique() > 1]
    varied = ["execution", "policy", "params", "batch_size", *asks]
    failed = results[results["status"] == "failed"]
    traces = results.drop_duplicates("trace")
    return {
        "out": str(out),
        "csv": str(Path(out) / CSV),
        "parquet": str(Path(out) / PARQUET),
        "num_rows": len(results),
        "infeasible": int((results["status"] == "infeasible").sum()),
        "failed": len(failed),
        "failure": f"{failed['reason'].iloc[0]} (case {failed['case'].iloc[0]})" if len(failed) else None,
        "traces": dict(zip(traces["trace"], traces["trace_origin"], strict=True)),
        "models": [*results["model"].unique()],
        "seed": int(results["seed"].iloc[0]),
        "version": str(results["version"].iloc[0]),
        "varied": [name for name in varied if results[name].nunique() > 1],
        "best": _plain(best(results, ["machine", *asks])),
        "pareto": _plain(pareto(results, ["machine", *asks])),
    }


def _plain(results: "pd.DataFrame") -> list[dict[str, Any]]:
    """The rows as plain data, None where a cell is empty."""
    rows: list[dict[str, Any]] = results.astype(object).where(results.notna(), None).to_dict("records")
    return rows


def _ran(results: "pd.DataFrame") -> "pd.DataFrame":
    return results[results["status"] == "ok"]


def _check_columns(results: "pd.DataFrame", columns: Sequence[str]) -> None:
    for name in columns:
        if name not in results.columns:
            raise InputError(f"the results have no column {name!r}; {nearest_name(name, results.columns)}")


def _front(rows: "pd.DataFrame") -> "pd.DataFrame":
    """The rows that no other dominates, by memory; of equals in the order in which they stand."""
    ordered = rows.sort_values([MEMORY, SPEED], ascending=[True, False], kind="stable")
    is_record = ordered[SPEED].cummax().diff().fillna(1) > 0
    # Who equals the row that set the record stands right behind it.
    memory = ordered[MEMORY].where(is_record).ffill()
    return ordered[(ordered[SPEED] == ordered[SPEED].cummax()) & (ordered[MEMORY] == memory)]


def _column(results: "pd.DataFrame", field: str) -> str:
    numbers = [column.name for column in SETTINGS if column.dtype != "string"]
    figures = [name.removeprefix(FIGURE) for name in results.columns if name.startswith(FIGURE)]
    if field in figures:
        return FIGURE + field
    known = [*figures, "budget", *(name for name in numbers if name in results.columns)]
    if field not in known:
        raise InputError(f"the results do not vary {field!r}; {nearest_name(field, known)}")
    return field


def _steps(results: "pd.DataFrame", column: str) -> Iterator[dict[str, Any]]:
    """Steps from one value of `column` to the next, among rows that agree in all other settings."""
    is_figure = column.startswith(FIGURE)
    others = [name for name in results.columns if name.startswith(FIGURE) and name != column]
    own = {column, "budget_asked"} if column == "budget" else {column, *(_OF_FIGURES if is_figure else ())}
    kept = [item.name for item in SETTINGS if item.name in results.columns and item.name not in own] + others
    ran = _ran(results)
    ran = ran[ran[column].notna()]
    for _, group in ran.groupby(kept, sort=False, dropna=False):
        rows = group.sort_values(column, kind="stable").drop_duplicates(column).to_dict("records")
        for one, next_one in pairwise(rows):
            yield {name: next_one[name] for name in kept} | _step(one, next_one, column)


def _step(one: dict[str, Any], next_one: dict[str, Any], column: str) -> dict[str, Any]:
    values, speeds = (one[column], next_one[column]), (one[SPEED], next_one[SPEED])
    has_logs = min(*values, *speeds) > 0
    elasticity = (log(speeds[1]) - log(speeds[0])) / (log(values[1]) - log(values[0])) if has_logs else None
    return {
        "field": column.removeprefix(FIGURE),
        "from_value": values[0],
        "to_value": values[1],
        "from_tok_per_s": speeds[0],
        "to_tok_per_s": speeds[1],
        "change": speeds[1] / speeds[0] - 1,
        "elasticity": elasticity,
    }
