"""What all commands share: the application, the options that several of them have, and values made of options."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tidesim import console, replay
from tidesim.errors import InputError
from tidesim.execution import EXECUTIONS, GIB, Execution, execution
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig, load_moe_config
from tidesim.policies import Policy, parameters_of
from tidesim.policies.knowledge import PREDICTORS, Knowledge
from tidesim.result import Decision, tool_version
from tidesim.trace import Trace

DEFAULT_TRACE = "llada2.0-mini-synthetic.h5"
DEFAULT_INTERVAL = 4

app = typer.Typer(
    name="tidesim",
    help="Plan expert offloading for mixture-of-experts diffusion LLMs on paper, and prove it on the machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ContextChoice(StrEnum):
    """Which rows a forward routes."""

    BLOCK = "block"
    FULL = "full"


class EngineChoice(StrEnum):
    """Who times a run on paper."""

    SIMPY = "simpy"
    REPLAY = "replay"


class Dtype(StrEnum):
    """What the network computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random; kept with the result.")]
TraceOption = Annotated[str, typer.Option("--trace", help="Routing trace: a path, or the name of a shipped one.")]
HardwareOption = Annotated[str, typer.Option("--hardware", help="Machine profile: a path, or a shipped name.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Model whose sizes to use: a folder or shipped name; the trace's if left out."),
]
ExecutionOption = Annotated[str, typer.Option("--execution", help=f"How the software runs: {', '.join(EXECUTIONS)}.")]
ContextOption = Annotated[
    ContextChoice | None,
    typer.Option(
        "--context", help="block: with a KV cache; full: the whole prefix is routed again. Default: as executed."
    ),
]
WeightBitsOption = Annotated[
    int, typer.Option("--weight-bits", help="Bits a weight of the routed experts: 16, 8 or 4.")
]
ReserveOption = Annotated[
    float | None,
    typer.Option("--reserve-gib", help="Device memory to leave free; default: 1.5 GiB or a tenth, whichever is more."),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", help="Experts a layer on the device: a number, or one per layer (8,16,...). Default: what fits."
    ),
]
EngineOption = Annotated[
    EngineChoice,
    typer.Option(
        "--engine", help="simpy: every event, with timeline and decisions; replay: compiled, the same result sooner."
    ),
]
BatchOption = Annotated[
    int, typer.Option("--batch", min=1, help="Sequences that run together, forward by forward, in their order.")
]
IntervalOption = Annotated[
    int | None,
    typer.Option(
        "--refresh-interval",
        help=f"Denoising steps between refreshes; {DEFAULT_INTERVAL} for policies that refresh.",
    ),
]
StepsOfBlockOption = Annotated[
    str | None,
    typer.Option(
        "--refresh-steps",
        help="In place of an interval: the denoising steps of a block to refresh at (0,1,4,9), for all layers, or one "
        "list per layer with / between. After the last one nothing is refreshed until the next block.",
    ),
]
PredictorOption = Annotated[
    str | None,
    typer.Option(
        "--predictor",
        help=f"Who foretells the experts of later layers, for policies that go by that: {', '.join(PREDICTORS)}; "
        f"{PREDICTORS[0]} (the forward before) if left out. The oracle knows the trace beforehand.",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes, or threads where those do; default: one a core.")
]
TimelineOption = Annotated[Path | None, typer.Option("--timeline", help="Write who ran when, for Perfetto.")]
DecisionsOption = Annotated[
    Path | None, typer.Option("--decisions", help="Write every promotion and eviction, one line a layer.")
]
CriticalPathFlag = Annotated[
    bool, typer.Option("--critical-path", help="Say what the run waits for, and what would be gained without it.")
]
IgnoreMemoryFlag = Annotated[bool, typer.Option("--ignore-memory", help="Do not ask whether the device can hold it.")]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")]


def main() -> None:
    """Run the command line; errors that the user can mend become one line and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"tidesim: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Plan expert offloading for mixture-of-experts diffusion LLMs on paper, and prove it on the machine."""
    if version:
        print(tool_version())


# --- from options to values ---


def chosen_execution(name: str, context: ContextChoice | None) -> Execution:
    """The preset `name`; `--context` overrides whether it keeps a KV cache, and the name then says so."""
    how = execution(name)
    if context is None or context == how.context:
        return how
    is_cached = not how.kv_cache
    return replace(how, name=f"{how.name} {'with' if is_cached else 'without'} KV cache", kv_cache=is_cached)


def chosen_policy(
    name: str, refresh_interval: int | None, refresh_steps: str | None, predictor: str | None, knowledge: Knowledge
) -> Policy:
    """The policy called `name`, with what it asks for of what is known."""
    params: dict[str, Any] = {}
    if refresh_steps is not None:
        params["refresh_steps"] = steps_of_block(refresh_steps)
    if refresh_interval is not None:
        params["refresh_interval"] = refresh_interval
    elif refresh_steps is None and "refresh_interval" in parameters_of(name):
        params["refresh_interval"] = DEFAULT_INTERVAL
    if predictor is not None:
        params["predictor"] = predictor
    return knowledge.make(name, params)


def numbers(text: str, name: str) -> int | list[int]:
    """One whole number, or several with commas between."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name}(={text!r}) must be a whole number, or one per layer with commas between.") from None
    return numbers[0] if len(numbers) == 1 else numbers


def steps_of_block(text: str) -> list[int] | list[list[int]]:
    """Whole numbers with commas between, or several such lists with slashes between."""
    try:
        rows = [[int(step) for step in row.split(",") if row] for row in text.split("/")]
    except ValueError:
        raise InputError(
            f"refresh-steps(={text!r}) must be whole numbers with commas between, or such a list per layer with / "
            "between."
        ) from None
    return rows[0] if len(rows) == 1 else rows


def reserve_bytes(reserve_gib: float | None) -> int | None:
    if reserve_gib is not None and not 0 <= reserve_gib < 1e6:
        raise InputError(f"reserve-gib(={reserve_gib}) must be >= 0.")
    return None if reserve_gib is None else round(reserve_gib * GIB)


@contextmanager
def decisions_file(path: Path | None) -> Iterator[Any]:
    """A function that writes one decision a line to `path`, or None without a path."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}).") from None
    with file:

        def write(decision: Decision) -> None:
            file.write(decision.to_json() + "\n")

        yield write


def ready_replay(machines: Iterable[Hardware]) -> None:
    """Compile the replay before it is needed, and say so, unless a run before has done it here or it is for none of
    the `machines`."""
    if all(map(replay.is_contended, machines)) or replay.is_compiled():
        return
    console.note("compiling the replay, once on this machine: this takes about 20 seconds")
    replay.compile_now(workers=None)


def sizes_of(opened: Trace, model: str | None, weight_bits: int) -> MoEConfig:
    """The model whose sizes are used: the one named, else the trace's own."""
    return (opened.config if model is None else load_moe_config(model)).with_weight_bits(weight_bits)
