"""The command that runs many cases at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidesim import console
from tidesim.cli.app import JsonFlag, app
from tidesim.errors import InputError
from tidesim.result import tool_version
from tidesim.study import Study, best, pareto, run_study

if TYPE_CHECKING:
    import pandas as pd


@app.command()
def sweep(
    study: Annotated[Path, typer.Argument(help="Study: traces, machines, policies, ... (YAML).")],
    out: Annotated[Path, typer.Option(help="Folder for the results; a sweep that was stopped there goes on.")],
    scheduler: Annotated[
        str | None, typer.Option(help="Dask scheduler whose workers run the cases, such as tcp://10.0.0.1:8786.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes to run on; default: one a core.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of everything random, before that of the study.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run every case of a study, and say who is best on each machine and what memory buys."""
    if scheduler is not None and workers is not None:
        raise InputError(f"--workers {workers} are for this machine, and --scheduler has its own; leave one out.")
    asked = Study.read(study, seed)
    with console.progress("sweeping") as advance:
        results = run_study(asked, out, workers=workers, scheduler=scheduler, progress=advance)
    document = _document(asked, out, results)
    console.show(document, console.sweep_tables, as_json)
    if document["failed"]:
        first = results[results["status"] == "failed"].iloc[0]
        console.note(
            f"tidesim: {document['failed']} of {len(results)} cases failed, and should not have; the first: "
            f"{first['reason']} (case {first['case']}). Rows with status failed say which."
        )
        raise typer.Exit(1)


def _document(asked: Study, out: Path, results: "pd.DataFrame") -> dict[str, Any]:
    """What is printed: where the rows are, how many went how, and the answers to the usual questions."""
    # Rows of one machine are rivals; rows of other routing or another network answer other questions.
    asks = [name for name in ("trace", "model", "weight_bits") if results[name].nunique() > 1]
    counts = results["status"].value_counts()
    varied = ["execution", "policy", "params", "batch_size", *asks]
    return {
        "out": str(out),
        "csv": str(out / "results.csv"),
        "parquet": str(out / "results.parquet"),
        "num_rows": len(results),
        "failed": int(counts.get("failed", 0)),
        "infeasible": int(counts.get("infeasible", 0)),
        "seed": asked.cases[0].rules.seed,
        "version": tool_version(),
        "traces": {case.trace.name: case.trace.origin for case in asked.cases},
        "models": [*results["model"].unique()],
        "varied": [name for name in varied if results[name].nunique() > 1],
        "best": _rows(best(results, ["machine", *asks])),
        "pareto": _rows(pareto(results, ["machine", *asks])),
    }


def _rows(results: "pd.DataFrame") -> list[Mapping[str, Any]]:
    """The rows as plain data, None where a cell is empty."""
    rows: list[Mapping[str, Any]] = results.astype(object).where(results.notna(), None).to_dict("records")
    return rows
