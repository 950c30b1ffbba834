"""The command that runs many cases at once."""

from pathlib import Path
from typing import Annotated

import typer

from tidesim import console
from tidesim.cli.app import JsonFlag, WorkersOption, app, ready_replay
from tidesim.errors import InputError
from tidesim.study import Study, run_study, summary


@app.command()
def sweep(
    study: Annotated[Path, typer.Argument(help="Study: traces, machines, policies, ... (YAML).")],
    out: Annotated[Path, typer.Option(help="Folder for the results; a sweep that was stopped there goes on.")],
    scheduler: Annotated[
        str | None, typer.Option(help="Dask scheduler whose workers run the cases, such as tcp://10.0.0.1:8786.")
    ] = None,
    workers: WorkersOption = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of everything random, before that of the study.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run every case of a study, and say who is best on each machine and what memory buys."""
    if scheduler is not None and workers is not None:
        raise InputError(f"--workers {workers} are for this machine, and --scheduler has its own; leave one out.")
    asked = Study.read(study, seed)
    if scheduler is None:
        ready_replay(case.machine.hardware for case in asked.cases)
    with console.progress("sweeping") as advance:
        results = run_study(asked, out, workers=workers, scheduler=scheduler, progress=advance)
    document = summary(results, out)
    console.show(document, console.sweep_tables, as_json)
    if document["failed"]:
        console.note(
            f"tidesim: {document['failed']} of {document['num_rows']} cases failed, and should not have. The first: "
            f"{document['failure']}; the others are the rows with status failed."
        )
        raise typer.Exit(1)
