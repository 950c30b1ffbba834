"""Tables of many cases: studies, and predictions beside measurements."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from tidesim.console.printing import Document
from tidesim.execution import GIB
from tidesim.tables import facts_of, table_of

# --- studies ---


def sweep_tables(document: Document) -> RenderableType:
    """A study: how many cases went how, who is fastest on each machine, and what more memory buys there."""
    facts = {
        "traces": ", ".join(f"{name} ({origin})" for name, origin in document["traces"].items()),
        "sizes of": ", ".join(document["models"]),
        "results": f"{document['csv']} and results.parquet beside it",
        "cases": f"{document['num_rows']}: {document['infeasible']} infeasible, {document['failed']} failed",
    }
    front = document["pareto"]
    tables = [
        _sweep_table("Fastest on each machine", document["best"], document["varied"]),
        _sweep_table("Fastest for their memory: none is as fast with less", front[:_MOST_ROWS], document["varied"]),
    ]
    more = [f"{len(front) - _MOST_ROWS} more rows: tidesim.study.pareto gives all."] if len(front) > _MOST_ROWS else []
    return Group(facts_of("Study", facts), *tables, *more)


_MOST_ROWS = 40


def _sweep_table(title: str, rows: Sequence[Document], varied: Sequence[str]) -> Table:
    """Rows of a study, with those settings that it varies."""
    right = ("refresh", "budget", "tok/s", "hits", "device GiB")
    table = table_of(title, left=("machine", *(name.replace("_", " ") for name in varied)), right=right)
    for row in rows:
        table.add_row(
            row["machine"],
            *(str(row[name]) for name in varied),
            "-" if row["refresh_interval"] is None else str(row["refresh_interval"]),
            str(row["budget"]),
            f"{row['tok_per_s']:.2f}",
            f"{100 * row['hit_rate']:.1f} %",
            f"{row['device_memory_bytes'] / GIB:.2f}",
        )
    return table


# --- measured against predicted ---


def profile_tables(document: Document) -> RenderableType:
    """A calibrated profile: every figure with the spread of its samples, as its source tells."""
    facts = {
        "profile": document["path"],
        "machine": document["description"],
        "check": f"a real denoising step is predicted {100 * document['step_error']:+.1f} % off",
    }
    table = table_of("Figures", left=("figure",), right=("value",))
    table.add_column("how", overflow="fold")
    for path, figure in _figures(document):
        table.add_row(path, figure["value"], figure["source"])
    return Group(facts_of("Calibrated", facts), table)


def _figures(node: Document, path: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """The figures and curves of a profile by their dotted path; a curve's value is its rates."""
    for name, below in node.items():
        here = f"{path}.{name}" if path else name
        if not isinstance(below, Mapping):
            continue
        if "source" not in below:
            yield from _figures(below, here)
            continue
        shown = (
            f"{below['value']:.4g}"
            if "value" in below
            else " ".join(f"{rows}:{rate:.3g}" for rows, rate in zip(below["rows"], below["gflops"], strict=True))
        )
        yield here, {"value": shown, "source": below["source"]}


def validation_tables(document: Document) -> RenderableType:
    """Predicted and measured side by side, and how well they agree over the whole grid."""
    right = ("predicted, tok/s", "measured, tok/s", "error", "spread", "at one speed", "error", "spread", "differences")
    table = table_of("Predicted and measured", left=("case",), right=right)
    for row in document["rows"]:
        table.add_row(
            row["case"],
            f"{row['predicted_tok_per_s']:.3f}",
            f"{row['measured_tok_per_s']:.3f}",
            f"{100 * row['error']:+.1f} %",
            f"{100 * row['spread']:.1f} %",
            f"{row['steady_tok_per_s']:.3f}",
            f"{100 * row['steady_error']:+.1f} %",
            f"{100 * row['steady_spread']:.1f} %",
            str(row["num_differences"]),
        )
    facts = {
        "model": document["model"],
        "routing": document["trace_origin"],
        "machine": f"{document['machine']}; profile {document['profile']}",
        "cases": f"{document['num_cases']}, {document['num_forwards']} forwards each",
        "as measured": _agreement(document),
        "at one speed": f"{_agreement(document['steady'])}; each run brought to the speed of the calibration by a "
        "yardstick timed beside it",
        "decisions": f"{document['num_differences']} differ between engine and simulator",
    }
    return Group(table, facts_of("Agreement", facts))


def _agreement(figures: Document) -> str:
    return (
        f"error median {100 * figures['median_error']:.1f} %, worst {100 * figures['worst_error']:.1f} %; "
        f"Kendall's tau {figures['kendall_tau']:.3f}; median spread of repeats {100 * figures['median_spread']:.1f} %; "
        f"of {figures['num_told_apart']} pairs of cases that repeats tell apart, "
        f"{100 * figures['ranked_alike']:.1f} % are ranked alike"
    )
