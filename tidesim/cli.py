"""The command line: each command parses, loads, calls one public function and prints.

Results go to stdout, everything else to stderr. Exit codes: 0, 2 for what the user can mend, 1 for our own faults.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tidesim import console
from tidesim.errors import InputError
from tidesim.execution import EXECUTIONS, GIB, Execution, execution, largest_budget
from tidesim.hardware import Hardware, load_hardware
from tidesim.moe import MoEConfig, load_moe_config, read_hf_config
from tidesim.planner import plan as make_plan
from tidesim.planner.runs import REFRESHING
from tidesim.policies import POLICIES, Policy, policy
from tidesim.report import save_timeline
from tidesim.result import Decision, Interval, tool_version
from tidesim.shipped import find_shipped
from tidesim.simulator import simulate as run_simulation
from tidesim.statistics import trace_statistics
from tidesim.synthesize import synthesize as write_synthetic
from tidesim.trace import Trace, Workload

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


@app.command()
def trace(
    out: Annotated[Path, typer.Option(help="Trace file to write (HDF5).")],
    model: Annotated[str, typer.Option(help="Model folder in Hugging Face layout, or a shipped name.")] = "llada2-tiny",
    prompts: Annotated[Path | None, typer.Option(help="JSONL file of prompts; built-in ones if left out.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many prompts.")] = None,
    gen_length: Annotated[int, typer.Option(help="Tokens to generate for each prompt, at most.")] = 128,
    threshold: Annotated[float, typer.Option(help="Confidence above which a token is accepted.")] = 0.95,
    steps: Annotated[int, typer.Option(help="Denoising steps a block may take.")] = 32,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; above 0: draw.")] = 0.0,
    no_kv_cache: Annotated[bool, typer.Option("--no-kv-cache", help="Compute the prefix in every forward.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each plain prompt through the model's chat template.")
    ] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Record the router's weights too.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Leave the tokens out of the file.")] = False,
    show_text: Annotated[bool, typer.Option("--show-text", help="Print what the model writes.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="What to compute in; default: float32.")] = None,
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Generate from prompts with a real model and record the routing of every forward."""
    with _engine():
        import torch

        from tidesim.engine.generate import Sampler
        from tidesim.engine.tokenizer import read_prompts
        from tidesim.engine.tracer import record
    sampler = Sampler(
        gen_length=gen_length, steps=steps, threshold=threshold, temperature=temperature, kv_cache=not no_kv_cache
    )
    requests = read_prompts(prompts, limit, chat)
    with console.progress("tracing") as advance:

        def finished(done: int, text: str) -> None:
            advance(done, len(requests))
            if show_text:
                console.note(f"{text}\n{'-' * 40}")

        recording = record(
            find_shipped("models", model),
            requests,
            sampler,
            out,
            seed=seed,
            dtype=getattr(torch, dtype or Dtype.FLOAT32),
            has_weights=weights,
            is_private=private,
            overwrite=overwrite,
            on_sequence=finished,
        )
    console.show(recording.to_dict(), console.recording_table, as_json)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="Trace file, or the name of a shipped one.")],
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Print the shape of a trace and the statistics of its routing, beside published figures."""
    with Trace.open(file) as opened:
        document = {"trace": _trace_header(opened), "statistics": trace_statistics(opened).to_dict(), "seed": seed}
    console.show(document, console.statistics_tables, as_json)


@app.command()
def synthesize(
    out: Annotated[Path, typer.Option(help="Trace file to write (HDF5).")],
    shape: Annotated[str, typer.Option(help="Model whose shape to use: a folder or shipped name.")] = "llada2.0-mini",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences to make.")] = 16,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens generated in each, on average.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, on average.")] = 96,
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Write a synthetic trace whose routing meets the published statistics of LLaDA2.0."""
    folder = find_shipped("models", shape)
    with console.progress("synthesizing") as advance:
        write_synthetic(
            read_hf_config(folder),
            out,
            model_name=load_moe_config(shape).name,
            num_sequences=sequences,
            gen_length=gen_length,
            prompt_tokens=prompt_tokens,
            seed=seed,
            overwrite=overwrite,
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
    budget: Annotated[
        str | None,
        typer.Option(help="Experts a layer on the device: a number, or one per layer (8,16,...). Default: what fits."),
    ] = None,
    refresh_interval: Annotated[
        int | None,
        typer.Option(help=f"Denoising steps between refreshes; {DEFAULT_INTERVAL} for policies that refresh."),
    ] = None,
    execution_name: ExecutionOption = "overlapped",
    context: ContextOption = None,
    weight_bits: WeightBitsOption = 16,
    reserve_gib: ReserveOption = None,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Do not ask whether the device can hold it.")
    ] = False,
    timeline: Annotated[Path | None, typer.Option(help="Write who ran when, for Perfetto.")] = None,
    decisions: Annotated[
        Path | None, typer.Option(help="Write every promotion and eviction, one line a layer.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Replay a trace under one placement policy on one machine and say how long it takes, and why."""
    machine, how = load_hardware(hardware), _execution(execution_name, context)
    workload, sizes = _workload(trace_name, model, how, weight_bits)
    reserve_bytes = _reserve_bytes(reserve_gib)
    if budget is None:
        slots: int | list[int] = _default_budget(policy_name, sizes, machine, how, workload, reserve_bytes)
    else:
        slots = _numbers(budget, "budget")
    intervals: list[Interval] | None = None if timeline is None else []
    with _decisions_file(decisions) as write_decision:
        result = run_simulation(
            workload,
            sizes,
            machine,
            _policy(policy_name, refresh_interval, workload),
            budget=slots,
            execution=how,
            seed=seed,
            decisions=write_decision,
            timeline=intervals,
            reserve_bytes=reserve_bytes,
            is_memory_checked=not ignore_memory,
        )
    if timeline is not None and intervals is not None:
        save_timeline(intervals, result, timeline)
    console.show(result.to_dict(), console.result_tables, as_json)


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
    workers: Annotated[int | None, typer.Option(help="Processes to simulate on; default: one a core.")] = None,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Find the refresh interval and the expert budget that generate fastest on a machine."""
    machine, how = load_hardware(hardware), _execution(execution_name, context)
    with Trace.open(trace_name) as opened, console.progress("planning") as advance:
        report = make_plan(
            opened,
            _sizes(opened, model, weight_bits),
            machine,
            execution=how,
            held_out_share=held_out_share,
            reserve_bytes=_reserve_bytes(reserve_gib),
            workers=workers,
            seed=seed,
            progress=advance,
        )
    if out is not None:
        report.chosen.save(out)
    console.show(report.to_dict(), console.plan_tables, as_json)


# --- from options to values ---


@contextmanager
def _engine() -> Iterator[None]:
    """Turn a missing engine extra into an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"running the network needs {error.name}: install the extra, pip install 'tidesim[engine]'."
        ) from None


def _execution(name: str, context: ContextChoice | None) -> Execution:
    """The preset `name`; `--context` overrides whether it keeps a KV cache, and the name then says so."""
    how = execution(name)
    if context is None or context == how.context:
        return how
    is_cached = not how.kv_cache
    return replace(how, name=f"{how.name} {'with' if is_cached else 'without'} KV cache", kv_cache=is_cached)


def _workload(trace_name: str, model: str | None, how: Execution, weight_bits: int) -> tuple[Workload, MoEConfig]:
    """The trace's workload, tiled to the layers of the model whose sizes are used, and those sizes."""
    with Trace.open(trace_name) as opened:
        sizes = _sizes(opened, model, weight_bits)
        return opened.workload(how.context).tiled(sizes.num_layers), sizes


def _sizes(opened: Trace, model: str | None, weight_bits: int) -> MoEConfig:
    """The model whose sizes are used: the one named, else the trace's own."""
    return (opened.config if model is None else load_moe_config(model)).with_weight_bits(weight_bits)


def _policy(name: str, refresh_interval: int | None, workload: Workload) -> Policy:
    params: dict[str, Any] = {}
    if name == "static":
        params["popularity"] = workload.counts.sum(axis=0)
    if refresh_interval is not None:
        params["refresh_interval"] = refresh_interval
    elif name in REFRESHING:
        params["refresh_interval"] = DEFAULT_INTERVAL
    return policy(name, **params)


def _default_budget(
    policy_name: str, sizes: MoEConfig, machine: Hardware, how: Execution, workload: Workload, reserve_bytes: int | None
) -> int:
    if policy_name == "all-device":
        return sizes.num_experts
    return largest_budget(sizes, machine, how, workload.max_tokens, reserve_bytes)


def _numbers(text: str, name: str) -> int | list[int]:
    """One whole number, or several with commas between."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name}(={text!r}) must be a whole number, or one per layer with commas between.") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _reserve_bytes(reserve_gib: float | None) -> int | None:
    if reserve_gib is not None and not 0 <= reserve_gib < 1e6:
        raise InputError(f"reserve-gib(={reserve_gib}) must be >= 0.")
    return None if reserve_gib is None else round(reserve_gib * GIB)


@contextmanager
def _decisions_file(path: Path | None) -> Iterator[Any]:
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
