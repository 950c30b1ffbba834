"""The command that tells other engines what a plan says."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tidesim import console
from tidesim.cli.app import JsonFlag, OverwriteFlag, SeedOption, app
from tidesim.cli.live import engine_extra
from tidesim.errors import InputError
from tidesim.exports import Export, model_of, routing_for, to_ktransformers, to_llama_cpp, to_pins, to_tide
from tidesim.planner import Plan
from tidesim.trace import Trace


class FormatChoice(StrEnum):
    """Whose words a plan is exported to."""

    TIDE = "tide"
    LLAMA_CPP = "llama.cpp"
    KTRANSFORMERS = "ktransformers"
    PINS = "pins"


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file of `tidesim plan --out`.")],
    to: Annotated[FormatChoice, typer.Option(help="Whose words.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; for ktransformers its counts, a .pt file that needs PyTorch.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model of the plan, a folder or shipped name; by the plan's own name if left out."),
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="Trace that says who is popular, for plans that move experts: path or name.")
    ] = None,
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Print a plan as another engine takes it, and say what it keeps and what it loses."""
    exported = _exported(Plan.load(file), to, model, trace, out)
    if out is not None:
        _write(exported, out, overwrite)
    if as_json:
        print(
            json.dumps(
                {**exported.to_dict(), "plan": str(file), "out": None if out is None else str(out), "seed": seed}
            )
        )
        return
    if out is None or to is FormatChoice.KTRANSFORMERS:
        print(exported.text)
    console.note(f"slots: {exported.slots} of {exported.planned_slots}")
    for word, sentences in (("kept", exported.kept), ("lost", exported.lost)):
        for sentence in sentences:
            console.note(f"{word}: {sentence}")
    if out is None and to is FormatChoice.KTRANSFORMERS:
        console.note("--out counts.pt writes the counts that these arguments name")


def _exported(plan: Plan, to: FormatChoice, model: str | None, trace: str | None, out: Path | None) -> Export:
    if to is FormatChoice.TIDE:
        if model is not None or trace is not None:
            raise InputError("the TIDE code takes two numbers of the plan; leave --model and --trace out.")
        return to_tide(plan)
    sizes, routing = model_of(plan, model), None
    if trace is not None:
        with Trace.open(trace) as opened:
            routing = routing_for(plan, opened)
    if to is FormatChoice.KTRANSFORMERS:
        return to_ktransformers(plan, sizes, routing, "counts.pt" if out is None else str(out))
    return to_llama_cpp(plan, sizes, routing) if to is FormatChoice.LLAMA_CPP else to_pins(plan, sizes, routing)


def _write(exported: Export, out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists; give --overwrite to replace it, or another name.")
    if exported.format == FormatChoice.KTRANSFORMERS:
        with engine_extra():
            from tidesim.engine.expert_counts import save_counts
        counts: Any = exported.values["logical_count"]
        save_counts(counts, out)
        return
    try:
        out.write_text(f"{exported.text}\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}).") from None
