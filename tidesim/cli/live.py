"""Commands that run a network, on whatever device there is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tidesim import console
from tidesim.cli.app import (
    BudgetOption,
    DecisionsOption,
    Dtype,
    ExecutionOption,
    IntervalOption,
    JsonFlag,
    OverwriteFlag,
    PredictorOption,
    SeedOption,
    StepsOfBlockOption,
    TimelineOption,
    app,
    chosen_policy,
    decisions_file,
    numbers,
)
from tidesim.errors import InputError
from tidesim.execution import GIB, Execution, execution
from tidesim.hardware import Hardware, load_hardware
from tidesim.moe import find_model
from tidesim.planner import Plan
from tidesim.policies import POLICIES, policy
from tidesim.policies.knowledge import PREDICTORS, Knowledge
from tidesim.report import check_picture, save_timeline, save_validation
from tidesim.trace import Trace, Workload

if TYPE_CHECKING:
    from tidesim.engine.calibrate import Settings
    from tidesim.engine.choice import Choice
    from tidesim.engine.live import DeviceSettings, LiveModel

FolderOption = Annotated[str, typer.Option("--model", help="Model folder in Hugging Face layout, or a shipped name.")]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", help="JSONL file of prompts; built-in ones if left out.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Use the first so many prompts.")]
GenLengthOption = Annotated[int, typer.Option("--gen-length", help="Tokens to generate for each prompt, at most.")]
ThresholdOption = Annotated[float, typer.Option("--threshold", help="Confidence above which a token is accepted.")]
StepsOption = Annotated[int, typer.Option("--steps", help="Denoising steps a block may take.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0: the likeliest token; above 0: draw.")]
ChatFlag = Annotated[bool, typer.Option("--chat", help="Put each plain prompt through the model's chat template.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, accelerator, cpu, emulated, or disk (experts stay in their files).")
]
DeviceThreads = Annotated[
    int | None, typer.Option("--device-threads", help="Threads of a device made of cores; default: half of them.")
]
HostThreads = Annotated[
    int | None, typer.Option("--host-threads", help="Threads that compute missed experts; default: half of the cores.")
]
PaceOption = Annotated[
    str | None, typer.Option("--pace", help="Machine profile whose link an emulated device keeps to.")
]
DummyOption = Annotated[
    str | None, typer.Option("--dummy-weights", help="In place of --model: random weights of this model's shape.")
]
LayersOption = Annotated[int | None, typer.Option("--layers", help="MoE layers of --dummy-weights; default: all.")]
RoutingOption = Annotated[
    str | None, typer.Option("--routing", help="Run the recorded forwards of this trace, with its choice of experts.")
]
CorpusOption = Annotated[
    str | None, typer.Option("--corpus", help="Trace that policies learn from: who is popular, what comes next.")
]
DecidingOption = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        help="Machine profile by whose predicted times policies decide that do, such as gain: path or name.",
    ),
]
SequencesOption = Annotated[int | None, typer.Option("--sequences", help="The first so many sequences of --routing.")]


@app.command()
def trace(
    out: Annotated[Path, typer.Option(help="Trace file to write (HDF5).")],
    model: FolderOption = "llada2-tiny",
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    gen_length: GenLengthOption = 128,
    threshold: ThresholdOption = 0.95,
    steps: StepsOption = 32,
    temperature: TemperatureOption = 0.0,
    no_kv_cache: Annotated[bool, typer.Option("--no-kv-cache", help="Compute the prefix in every forward.")] = False,
    chat: ChatFlag = False,
    weights: Annotated[bool, typer.Option("--weights", help="Record the router's weights too.")] = False,
    lookahead: Annotated[
        bool, typer.Option("--lookahead", help="Record too what each next layer's router makes of a layer's input.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Leave the tokens out of the file.")] = False,
    show_text: Annotated[bool, typer.Option("--show-text", help="Print what the model writes.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="What to compute in; default: float32.")] = None,
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Generate from prompts with a real model and record the routing of every forward."""
    with engine_extra():
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
            find_model(model),
            requests,
            sampler,
            out,
            seed=seed,
            dtype=getattr(torch, dtype or Dtype.FLOAT32),
            has_weights=weights,
            has_lookahead=lookahead,
            is_private=private,
            overwrite=overwrite,
            on_sequence=finished,
        )
    console.show(recording.to_dict(), console.recording_table, as_json)


@app.command()
def run(
    model: FolderOption = "llada2-tiny",
    plan: Annotated[Path | None, typer.Option(help="Plan file of `tidesim plan --out`.")] = None,
    policy_name: Annotated[
        str | None, typer.Option("--policy", help=f"In place of --plan: {', '.join(POLICIES)}.")
    ] = None,
    budget: BudgetOption = None,
    refresh_interval: IntervalOption = None,
    refresh_steps: StepsOfBlockOption = None,
    hardware: DecidingOption = None,
    corpus: CorpusOption = None,
    predictor: PredictorOption = None,
    execution_name: ExecutionOption = "overlapped",
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    gen_length: GenLengthOption = 128,
    threshold: ThresholdOption = 0.95,
    steps: StepsOption = 32,
    temperature: TemperatureOption = 0.0,
    chat: ChatFlag = False,
    device: DeviceOption = "auto",
    device_threads: DeviceThreads = None,
    host_threads: HostThreads = None,
    pace: PaceOption = None,
    dummy_weights: DummyOption = None,
    layers: LayersOption = None,
    routing: RoutingOption = None,
    sequences: SequencesOption = None,
    record: Annotated[Path | None, typer.Option(help="Write the routing of this run as a trace.")] = None,
    timeline: TimelineOption = None,
    decisions: DecisionsOption = None,
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Generate with a plan on this machine, print the text as blocks finish, and say what was measured."""
    with engine_extra():
        from tidesim.engine.generate import Sampler
        from tidesim.engine.session import Session
        from tidesim.engine.tokenizer import Prompt, read_prompts
    settings, machine = _device(device, device_threads, host_threads, pace)
    _check_routing(dummy_weights, routing)
    sampler = Sampler(gen_length=gen_length, steps=steps, threshold=threshold, temperature=temperature)
    requests = [Prompt(text=prompt)] if prompt is not None else read_prompts(prompts, limit, chat)
    with _model(model, dummy_weights, layers, settings, seed) as live, decisions_file(decisions) as write_decision:
        asked = _Asked(policy_name, budget, refresh_interval, refresh_steps, hardware, corpus, predictor)
        if plan is not None:
            choice = _planned(live, plan, asked)
        else:
            choice = _by_hand(live, asked, execution(execution_name), routing, sequences)
        session = Session(
            live, choice, machine=machine, seed=seed, decisions=write_decision, is_detailed=timeline is not None
        )
        if routing is not None:
            with Trace.open(routing) as opened:
                outcome = session.replay(opened, range(len(opened.sequences))[:sequences])
        else:
            outcome = session.answer(
                find_model(model),
                requests,
                sampler,
                record=record,
                overwrite=overwrite,
                on_text=None if as_json else console.TextStream(),
            )
            if not as_json:
                print("\n")
    if timeline is not None:
        save_timeline(outcome.intervals, outcome.result, timeline)
    console.show(outcome.to_dict(), console.result_tables, as_json)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Profile file to write (YAML).")],
    model: Annotated[
        str, typer.Option(help="Model whose sizes to measure at: a folder or shipped name.")
    ] = "llada2.0-mini",
    name: Annotated[str | None, typer.Option(help="Name of the profile; default: that of the file.")] = None,
    device: DeviceOption = "auto",
    device_threads: DeviceThreads = None,
    host_threads: HostThreads = None,
    pace: PaceOption = None,
    device_memory_gib: Annotated[
        float | None, typer.Option(help="Memory of an emulated device; default: half of the machine's.")
    ] = None,
    drive_folder: Annotated[Path, typer.Option(help="Where a scratch file may lie that is read directly.")] = Path(),
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Measure this machine into a profile, and reject it if it does not predict a real denoising step."""
    with engine_extra():
        from tidesim.validate import calibrated_profile
    settings, _ = _device(device, device_threads, host_threads, pace)
    with console.steps("calibrating") as step:
        profile, error = calibrated_profile(
            find_model(model),
            settings,
            _calibration(settings, device_memory_gib, drive_folder),
            name=name or out.stem,
            seed=seed,
            progress=step,
        )
    profile.to_yaml(out)
    console.show({"path": str(out), "step_error": error, **profile.content()}, console.profile_tables, as_json)


@app.command()
def validate(
    out: Annotated[Path, typer.Option(help="Folder for measurements, table (CSV) and picture.")],
    model: FolderOption = "llada2-tiny",
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="Calibrated profile of this machine; measured first if left out.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file whose choice is measured beside the grid.")] = None,
    grid: Annotated[
        Path | None, typer.Option("--grid", help='JSON: {"policies": [...], "budgets": [...], "intervals": [...]}.')
    ] = None,
    predictor: Annotated[
        str, typer.Option(help=f"Who foretells experts to policies of the grid that ask: {', '.join(PREDICTORS)}.")
    ] = PREDICTORS[0],
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    gen_length: GenLengthOption = 128,
    execution_name: ExecutionOption = "overlapped",
    device: DeviceOption = "auto",
    device_threads: DeviceThreads = None,
    host_threads: HostThreads = None,
    pace: PaceOption = None,
    dummy_weights: DummyOption = None,
    layers: LayersOption = None,
    routing: RoutingOption = None,
    sequences: SequencesOption = None,
    forwards: Annotated[int | None, typer.Option(help="The first so many forwards of --routing.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 3,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Measure a grid of choices on this machine, simulate each on the same routing, and set both side by side."""
    with engine_extra():
        from tidesim.engine.choice import by_hand
        from tidesim.engine.generate import Sampler
        from tidesim.engine.session import Session
        from tidesim.engine.tokenizer import read_prompts
        from tidesim.validate import Case, ForcedSource, PromptSource, default_grid, read_grid
        from tidesim.validate import validate as run_validation
    settings, machine = _device(device, device_threads, host_threads, pace)
    _check_routing(dummy_weights, routing)
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "validation.png"
    check_picture(picture)
    profile = _profile(hardware, settings, dummy_weights or model, out, seed)
    with _model(model, dummy_weights, layers, settings, seed) as live, ExitStack() as stack:
        num_experts, how = live.sizes.num_experts, execution(execution_name)
        first = Session(live, by_hand(policy("all-host"), 0, how, live), machine=machine, seed=seed)
        source: ForcedSource | PromptSource
        if routing is not None:
            opened = stack.enter_context(Trace.open(routing))
            source = ForcedSource(first, opened, range(len(opened.sequences))[:sequences], forwards)
        else:
            requests = read_prompts(prompts, limit, is_chat=False)
            folder, sampler = find_model(model), Sampler(gen_length=gen_length)
            source = PromptSource(first, folder, requests, sampler, out / "routing.h5")
        cases = default_grid(num_experts) if grid is None else read_grid(grid, num_experts, predictor)
        validation = run_validation(
            live,
            source,
            [*cases, *([] if plan is None else [Case.of(Plan.load(plan))])],
            how,
            profile,
            out / "measurements.jsonl",
            machine=machine,
            repeats=repeats,
            seed=seed,
            progress=stack.enter_context(console.progress("validating")),
        )
    validation.save_csv(out / "validation.csv")
    save_validation(validation.to_dict(), picture)
    console.show(validation.to_dict(), console.validation_tables, as_json)


# --- from options to values ---


@contextmanager
def engine_extra() -> Iterator[None]:
    """Turn a missing engine extra into an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"running the network needs {error.name}: install the extra, pip install 'tidesim[engine]'."
        ) from None


def _device(
    device: str, device_threads: int | None, host_threads: int | None, pace: str | None
) -> tuple["DeviceSettings", str]:
    """On what to run, and what results call that."""
    from tidesim.engine.emulated import Pace
    from tidesim.engine.live import DeviceSettings

    threads = {"device_threads": device_threads, "host_threads": host_threads}
    given = {name: number for name, number in threads.items() if number is not None}
    link = None if pace is None else load_hardware(pace)
    settings = DeviceSettings(device=device, pace=Pace() if link is None else Pace.of(link), **given)
    return settings, settings.description + ("" if link is None else f", link of {link.name}")


def _check_routing(dummy_weights: str | None, routing: str | None) -> None:
    if dummy_weights is not None and routing is None:
        raise InputError("dummy weights write no text; name a trace whose forwards to run, --routing TRACE.")


def _calibration(settings: "DeviceSettings", device_memory_gib: float | None, drive_folder: Path) -> "Settings":
    from tidesim.engine.calibrate import Settings

    if device_memory_gib is not None and not 0 < device_memory_gib < 1e6:
        raise InputError(f"device-memory-gib(={device_memory_gib}) must be > 0.")
    return Settings(
        device_threads=settings.device_threads,
        host_threads=settings.host_threads,
        device_memory_bytes=None if device_memory_gib is None else round(device_memory_gib * GIB),
        drive_folder=drive_folder,
    )


def _profile(hardware: str | None, settings: "DeviceSettings", model: str, out: Path, seed: int) -> Hardware:
    """The profile named, or one of this machine that is measured now and kept in `out`."""
    from tidesim.validate import calibrated_profile

    kept = out / "profile.yaml"
    if hardware is not None or kept.is_file():
        return load_hardware(hardware or str(kept))
    with console.steps("calibrating") as step:
        shape = find_model(model)
        how = _calibration(settings, None, out)
        profile, _ = calibrated_profile(shape, settings, how, name="this machine", seed=seed, progress=step)
    profile.to_yaml(kept)
    return profile


def _model(
    model: str, dummy_weights: str | None, layers: int | None, settings: "DeviceSettings", seed: int
) -> "LiveModel":
    from tidesim.engine.live import dummy_model, open_model

    if dummy_weights is None and layers is not None:
        raise InputError(f"layers(={layers}) is for --dummy-weights; a model's own weights are run whole.")
    with console.steps("opening") as step:
        step("the model; its kernels are compiled the first time, which takes a while", 0)
        if dummy_weights is None:
            return open_model(find_model(model), settings)
        return dummy_model(find_model(dummy_weights), settings, layers, seed)


class _Asked(NamedTuple):
    """What the options say of who is on the device; None where they say nothing."""

    policy: str | None
    budget: str | None
    refresh_interval: int | None
    refresh_steps: str | None
    hardware: str | None
    corpus: str | None
    predictor: str | None


def _planned(live: "LiveModel", plan: Path, asked: _Asked) -> "Choice":
    from tidesim.engine.choice import planned

    if any(option is not None for option in asked._replace(hardware=None)):
        raise InputError("a plan says policy, budget and all else itself; give --plan or --policy, not both.")
    return planned(Plan.load(plan), live, None if asked.hardware is None else load_hardware(asked.hardware))


def _by_hand(live: "LiveModel", asked: _Asked, how: Execution, routing: str | None, sequences: int | None) -> "Choice":
    from tidesim.engine.choice import by_hand

    if asked.policy is None:
        raise InputError("nothing says who is on the device; give --plan FILE, or --policy NAME and --budget N.")

    def counted(trace: str | None, number: int | None = None) -> Workload | None:
        """The first `number` sequences of a trace as this model would run them."""
        if trace is None:
            return None
        with Trace.open(trace) as opened:
            chosen = range(len(opened.sequences))[:number]
            workload = opened.workload(how.context, chosen, has_lookahead=opened.has_lookahead)
        return workload.tiled(live.sizes.num_layers)

    is_foretold = asked.predictor not in (None, PREDICTORS[0])
    knowledge = Knowledge(workload=counted(routing, sequences) if is_foretold else None, corpus=counted(asked.corpus))
    made = chosen_policy(asked.policy, asked.refresh_interval, asked.refresh_steps, asked.predictor, knowledge)
    slots = live.sizes.num_experts if asked.budget is None else numbers(asked.budget, "budget")
    hardware = None if asked.hardware is None else load_hardware(asked.hardware)
    return by_hand(made, slots, how, live, hardware)
