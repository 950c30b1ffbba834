"""The command that plans: for one machine, or to rank several."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tidesim import console
from tidesim.cli.app import (
    DEFAULT_TRACE,
    BatchOption,
    ContextOption,
    ExecutionOption,
    JsonFlag,
    ModelOption,
    ReserveOption,
    SeedOption,
    TraceOption,
    WeightBitsOption,
    WorkersOption,
    app,
    chosen_execution,
    ready_replay,
    reserve_bytes,
    sizes_of,
)
from tidesim.errors import InputError
from tidesim.hardware import load_hardware
from tidesim.planner import OBJECTIVES, POLICY_NAMES, Demand, Objective, rank_machines
from tidesim.planner import plan as make_plan
from tidesim.trace import Trace


class SolverChoice(StrEnum):
    """Who solves the integer programme."""

    HIGHS = "highs"
    CBC = "cbc"


@app.command()
def plan(
    hardware: Annotated[
        list[str],
        typer.Option("--hardware", help="Machine profile: a path, or a shipped name. Several are ranked."),
    ],
    out: Annotated[Path | None, typer.Option(help="Plan file to write (JSON); for one machine.")] = None,
    trace_name: TraceOption = DEFAULT_TRACE,
    model: ModelOption = None,
    objective: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {meaning}" for name, meaning in OBJECTIVES.items()) + ".")
    ] = "throughput",
    tok_per_s: Annotated[
        float | None, typer.Option("--tok-per-s", help="Throughput to keep; what objective 'memory' is about.")
    ] = None,
    block_s: Annotated[
        float | None, typer.Option("--block-s", help="Seconds that no block of an answer may take longer than.")
    ] = None,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="Choose this one and no others; may be given again.")
    ] = None,
    execution_name: ExecutionOption = "overlapped",
    context: ContextOption = None,
    batch: BatchOption = 1,
    gen_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens that an answer may have; default: as in the trace.")
    ] = None,
    weight_bits: WeightBitsOption = 16,
    reserve_gib: ReserveOption = None,
    held_out_share: Annotated[
        float, typer.Option(help="Share of the sequences to score the plan on; 0 for none.")
    ] = 0.25,
    solver: Annotated[SolverChoice, typer.Option(help="Solver of the integer programme.")] = SolverChoice.HIGHS,
    time_limit: Annotated[float, typer.Option(help="Seconds for each programme; then the best so far is taken.")] = 60,
    brief: Annotated[bool, typer.Option("--brief", help="Leave out why the plan is as fast as it is.")] = False,
    workers: WorkersOption = None,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Find the policy, the expert budgets and the refresh intervals that do best on a machine; or rank machines."""
    machines = [load_hardware(name) for name in hardware]
    wanted = Objective(name=objective, tok_per_s=tok_per_s, block_s=block_s)
    if out is not None and len(machines) > 1:
        raise InputError("--out takes the plan of one machine; give one --hardware, or leave --out away to rank them.")
    ready_replay(machines)
    settings: dict[str, Any] = {
        "execution": chosen_execution(execution_name, context),
        "objective": wanted,
        "demand": Demand(batch_size=batch, gen_length=gen_length),
        "policies": tuple(policies or POLICY_NAMES),
        "held_out_share": held_out_share,
        "reserve_bytes": reserve_bytes(reserve_gib),
        "solver": solver.value,
        "time_limit_s": time_limit,
        "workers": workers,
        "seed": seed,
    }
    with Trace.open(trace_name) as opened, console.progress("planning") as advance:
        sizes = sizes_of(opened, model, weight_bits)
        if len(machines) > 1:
            ranking = rank_machines(opened, sizes, machines, progress=advance, **settings)
            console.show(ranking.to_dict(), console.ranking_tables, as_json)
            return
        report = make_plan(opened, sizes, machines[0], is_explained=not brief, progress=advance, **settings)
    if out is not None:
        report.chosen.save(out)
    console.show(report.to_dict(), console.plan_tables, as_json)
