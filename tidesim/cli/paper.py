"""Commands that need no network: traces, simulation, plans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tidesim import console, replay
from tidesim.cli.app import (
    DEFAULT_TRACE,
    BatchOption,
    BudgetOption,
    ContextOption,
    CriticalPathFlag,
    DecisionsOption,
    EngineChoice,
    EngineOption,
    ExecutionOption,
    HardwareOption,
    IgnoreMemoryFlag,
    IntervalOption,
    JsonFlag,
    ModelOption,
    OverwriteFlag,
    PredictorOption,
    ReserveOption,
    SeedOption,
    StepsOfBlockOption,
    TimelineOption,
    TraceOption,
    WeightBitsOption,
    WorkersOption,
    app,
    chosen_execution,
    chosen_policy,
    decisions_file,
    numbers,
    ready_replay,
    reserve_bytes,
)
from tidesim.comparison import OWN_EXECUTIONS
from tidesim.comparison import compare as run_comparison
from tidesim.critical_path import critical_path as find_critical_path
from tidesim.errors import InputError
from tidesim.execution import Execution, execution, largest_budget
from tidesim.hardware import Hardware, load_hardware
from tidesim.moe import MoEConfig, find_model, load_moe_config, read_hf_config
from tidesim.paper_run import RunSettings
from tidesim.planner import plan as make_plan
from tidesim.planner import split_sequences
from tidesim.policies import POLICIES, Policy
from tidesim.policies.knowledge import Knowledge
from tidesim.report import check_picture, save_comparison, save_timeline
from tidesim.result import Interval
from tidesim.simulator import simulate as run_simulation
from tidesim.statistics import trace_statistics
from tidesim.synthesize import synthesize as write_synthetic
from tidesim.trace import Trace, Workload
from tidesim.workload import Context


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="Trace file, or the name of a shipped one.")],
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Print the shape of a trace, statistics of its routing beside published figures, and what a cache would hit."""
    with Trace.open(file) as opened:
        document = {"trace": _trace_header(opened), "statistics": trace_statistics(opened).to_dict(), "seed": seed}
        with_forwards = np.flatnonzero(opened.sequences["num_forwards"]).tolist()
        parts = (opened.workload("block", [sequence], is_mapped=True) for sequence in with_forwards)
        document["lru_hits_and_copies"] = replay.lru_curve(parts).to_dict()
    console.show(document, console.statistics_tables, as_json)


@app.command()
def synthesize(
    out: Annotated[Path, typer.Option(help="Trace file to write (HDF5).")],
    shape: Annotated[str, typer.Option(help="Model whose shape to use: a folder or shipped name.")] = "llada2.0-mini",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences to make.")] = 16,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens generated in each, on average.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, on average.")] = 96,
    no_kv_cache: Annotated[
        bool, typer.Option("--no-kv-cache", help="Route the whole prefix in every forward.")
    ] = False,
    workers: WorkersOption = None,
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Write a synthetic trace whose routing meets the published statistics of LLaDA2.0."""
    folder = find_model(shape)
    with console.progress("synthesizing") as advance:
        write_synthetic(
            read_hf_config(folder),
            out,
            model_name=load_moe_config(shape).name,
            num_sequences=sequences,
            gen_length=gen_length,
            prompt_tokens=prompt_tokens,
            kv_cache=not no_kv_cache,
            seed=seed,
            overwrite=overwrite,
            workers=workers,
            progress=advance,
        )
    with Trace.open(out) as written:
        console.show(_trace_header(written), console.trace_table, as_json)


@app.command()
def simulate(
    hardware: HardwareOption,
    policy_name: Annotated[str, typer.Option("--policy", help=f"Placement policy: {', '.join(POLICIES)}.")],
    trace_name: TraceOption = DEFAULT_TRACE,
    model: ModelOption = None,
    budget: BudgetOption = None,
    refresh_interval: IntervalOption = None,
    refresh_steps: StepsOfBlockOption = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Trace that policies learn from (who is popular, what comes next). If left out they learn from the "
            "very trace that is replayed, which they then know beforehand."
        ),
    ] = None,
    predictor: PredictorOption = None,
    execution_name: ExecutionOption = "overlapped",
    context: ContextOption = None,
    batch: BatchOption = 1,
    engine: EngineOption = EngineChoice.SIMPY,
    weight_bits: WeightBitsOption = 16,
    reserve_gib: ReserveOption = None,
    ignore_memory: IgnoreMemoryFlag = False,
    timeline: TimelineOption = None,
    decisions: DecisionsOption = None,
    critical_path: CriticalPathFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Replay a trace under one placement policy on one machine and say how long it takes, and why."""
    if engine is EngineChoice.REPLAY and (timeline is not None or decisions is not None):
        raise InputError("--timeline and --decisions come from the event simulator; leave out --engine replay.")
    machine, how = load_hardware(hardware), chosen_execution(execution_name, context)
    with Trace.open(trace_name) as opened:
        sizes = _sizes(opened, model, weight_bits)
        workload = _workload(opened, sizes, how.context).batched(batch)
    learnt = workload
    if corpus is not None:
        with Trace.open(corpus) as opened:
            learnt = _workload(opened, sizes, how.context).batched(batch)
    knowledge = Knowledge(workload=workload, corpus=learnt)
    made = chosen_policy(policy_name, refresh_interval, refresh_steps, predictor, knowledge)
    reserve = reserve_bytes(reserve_gib)
    if budget is None:
        slots: int | list[int] = _default_budget(made, sizes, machine, how, workload, reserve)
    else:
        slots = numbers(budget, "budget")
    settings = RunSettings(
        budget=slots, execution=how, seed=seed, reserve_bytes=reserve, is_memory_checked=not ignore_memory
    )
    intervals: list[Interval] | None = None if timeline is None else []
    if engine is EngineChoice.REPLAY:
        ready_replay([machine])
        result = replay.Replayer(workload).run(sizes, machine, made, **settings)
    else:
        with decisions_file(decisions) as write_decision:
            result = run_simulation(
                workload, sizes, machine, made, **settings, decisions=write_decision, timeline=intervals
            )
    if timeline is not None and intervals is not None:
        save_timeline(intervals, result, timeline)
    document = result.to_dict()
    if critical_path:
        document["critical_path"] = find_critical_path(workload, sizes, machine, made, **settings).to_dict()
    console.show(document, console.result_tables, as_json)


@app.command()
def plan(
    hardware: HardwareOption,
    out: Annotated[Path | None, typer.Option(help="Plan file to write (JSON).")] = None,
    trace_name: TraceOption = DEFAULT_TRACE,
    model: ModelOption = None,
    execution_name: ExecutionOption = "overlapped",
    context: ContextOption = None,
    weight_bits: WeightBitsOption = 16,
    reserve_gib: ReserveOption = None,
    held_out_share: Annotated[
        float, typer.Option(help="Share of the sequences to score the plan on; 0 for none.")
    ] = 0.25,
    workers: WorkersOption = None,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Find the refresh interval and the expert budget that generate fastest on a machine."""
    machine, how = load_hardware(hardware), chosen_execution(execution_name, context)
    ready_replay([machine])
    with Trace.open(trace_name) as opened, console.progress("planning") as advance:
        report = make_plan(
            opened,
            _sizes(opened, model, weight_bits),
            machine,
            execution=how,
            held_out_share=held_out_share,
            reserve_bytes=reserve_bytes(reserve_gib),
            workers=workers,
            seed=seed,
            progress=advance,
        )
    if out is not None:
        report.chosen.save(out)
    console.show(report.to_dict(), console.plan_tables, as_json)


@app.command()
def compare(
    hardware: HardwareOption,
    budget: Annotated[int | None, typer.Option(help="Experts a layer on the device; default: what fits.")] = None,
    trace_name: TraceOption = DEFAULT_TRACE,
    model: ModelOption = None,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="Compare this one and no others; may be given again.")
    ] = None,
    execution_name: ExecutionOption = "overlapped",
    context: ContextOption = None,
    batch: BatchOption = 1,
    weight_bits: WeightBitsOption = 16,
    reserve_gib: ReserveOption = None,
    ignore_memory: IgnoreMemoryFlag = False,
    held_out_share: Annotated[
        float, typer.Option(help="Share of the sequences to compare on; policies may know the others before.")
    ] = 0.25,
    own_executions: Annotated[
        bool, typer.Option("--own-executions", help="Run each other system's policy the way that system runs.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Picture to write (PNG).")] = None,
    workers: WorkersOption = None,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Run every policy on the same sequences with the same memory, beside the ceiling that none can pass."""
    if picture is not None:
        check_picture(picture)
    machine, how = load_hardware(hardware), chosen_execution(execution_name, context)
    reserve = reserve_bytes(reserve_gib)
    with Trace.open(trace_name) as opened:
        sizes = _sizes(opened, model, weight_bits)
        split = split_sequences(len(opened.sequences), held_out_share, seed)
        parts = (split.held_out or split.training, split.training)
        contexts: tuple[Context, ...] = ("block", "full") if own_executions else (how.context,)
        known = {
            context: (_workload(opened, sizes, context, parts[0]), _workload(opened, sizes, context, parts[1]))
            for context in contexts
        }
    workload, corpus = known[how.context]
    if budget is None:
        hows = [how, *(execution(name) for name in OWN_EXECUTIONS.values() if own_executions)]
        together = workload.batched(batch)
        most = (together.max_tokens, reserve)
        budget = min(largest_budget(sizes, machine, one, *most, batch_size=together.batch_size) for one in hows)
    ready_replay([machine])
    with console.progress("comparing") as advance:
        comparison = run_comparison(
            workload,
            corpus,
            sizes,
            machine,
            execution=how,
            budget=budget,
            names=policies,
            batch_size=batch,
            by_context=known if own_executions else None,
            reserve_bytes=reserve,
            is_memory_checked=not ignore_memory,
            workers=workers,
            seed=seed,
            progress=advance,
        )
    if picture is not None:
        save_comparison(comparison.to_dict(), picture)
    console.show(comparison.to_dict(), console.comparison_tables, as_json)


# --- from options to values ---


def _workload(opened: Trace, sizes: MoEConfig, context: Context, sequences: Sequence[int] | None = None) -> Workload:
    """The workload of some sequences, all by default, tiled to the layers of the model whose sizes are used, with its
    look-ahead if it was recorded; counts are mapped, as there may be many."""
    workload = opened.workload(context, sequences, has_lookahead=opened.has_lookahead, is_mapped=True)
    return workload.tiled(sizes.num_layers)


def _sizes(opened: Trace, model: str | None, weight_bits: int) -> MoEConfig:
    """The model whose sizes are used: the one named, else the trace's own."""
    return (opened.config if model is None else load_moe_config(model)).with_weight_bits(weight_bits)


def _default_budget(
    made: Policy, sizes: MoEConfig, machine: Hardware, how: Execution, workload: Workload, reserve: int | None
) -> int:
    """The largest budget that fits beside the policy's scratch memory; whether all experts fit is asked later."""
    if made.name == "all-device":
        return sizes.num_experts
    scratch = made.scratch_experts(sizes.num_experts)
    return largest_budget(sizes, machine, how, workload.max_tokens, reserve, scratch, workload.batch_size)


def _trace_header(opened: Trace) -> dict[str, Any]:
    """What a trace is, by name, as printed first wherever one is shown."""
    return {
        "path": str(opened.path),
        "origin": opened.origin,
        "model": opened.model_name,
        "is_complete": opened.is_complete,
        "num_sequences": len(opened.sequences),
        "num_forwards": len(opened.forwards),
        "generated_tokens": int(opened.sequences["generated_tokens"].sum()),
        "routed_tokens": opened.num_rows,
        "num_layers": opened.num_layers,
        "num_experts": opened.num_experts,
        "top_k": opened.top_k,
        "block_length": opened.block_length,
        "kv_cache": opened.kv_cache,
        "sampler": opened.sampler,
        "seed": opened.seed,
        "created": opened.created,
        "fingerprint": opened.fingerprint,
    }
