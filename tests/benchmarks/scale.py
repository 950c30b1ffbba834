"""How time and memory grow with prompts, layers, budgets and cases: from writing a trace to sweeping over it.

    python tests/benchmarks/scale.py [--prompts 20 60] [--layers 8 31] [--budgets 8 64] [--cases 4 16]
        [--stages count inspect ...] [--out DIR] [--picture scale.png]

Each stage is a command of its own, so that its memory is its own. `synthesize` writes the trace, `count` reads and
counts it, `recount` does so once the counts are kept beside it, `full` also makes the forwards of an engine without a
KV cache. `open` is what all but the first take at least: reading, checking and hashing the trace. `inspect`, `simulate`
(the event simulator), `plan`, `compare` (gain, lru and tide) and `sweep` (tide and lru, on two processes) are the
commands; `replay POLICY` is `simulate --engine replay`, and `replay POLICY, full` the same without a KV cache.

Prompts are varied with the last of the layers, layers with the first of the prompts, and budgets (of replays) and cases
(of the sweep) with the first of the prompts and the last of the layers.

Prints one JSON line: for each size, of each stage, the seconds `s` from its start to its end, `cpu_s`, those that all
its processes computed (others that use the machine do not add to them), `gb`, the peak of the resident memory of all
its processes together, and `own_gb`, the same without what is mapped from files, which the system takes back when it
needs to. Both are sampled ten times a second. `ids_gb` are the expert ids of the trace uncompressed. Bar: 4 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import psutil
import yaml

from tidesim.moe import read_hf_config
from tidesim.replay import compile_now
from tidesim.shipped import find_shipped

SHAPE, HARDWARE = "llada2.0-flash", "rtx4090"
BUDGET, NUM_CASES = 64, 8
REPLAYED = ("static", "tide", "lru", "tide-as-coded")
REPLAYS = tuple(f"replay {name}{context}" for context in ("", ", full") for name in REPLAYED)
STAGES = (
    *("synthesize", "open", "count", "recount", "full", "inspect", "simulate"),
    *REPLAYS,
    *("plan", "compare", "sweep"),
)
BAR_GB = 4.0
_OPEN = "import sys; from tidesim.trace import Trace; trace = Trace.open(sys.argv[1])"
_COUNT = _OPEN + "; trace.workload('block', is_mapped=True)"
_FULL = _OPEN + "; trace.workload('full', is_mapped=True)"
_AXES = {"prompts": "prompts", "layers": "MoE layers", "budget": "budget, experts a layer", "cases": "cases of a sweep"}


class Size(NamedTuple):
    """What is measured at."""

    prompts: int
    layers: int
    budget: int = BUDGET
    cases: int = NUM_CASES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--layers", type=int, nargs="+", default=[31])
    parser.add_argument("--budgets", type=int, nargs="*", default=[])
    parser.add_argument("--cases", type=int, nargs="*", default=[])
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--no-kv-cache", action="store_true", help="traces with the whole prefix in every forward")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="others are left out")
    parser.add_argument("--out", type=Path, default=None, help="folder for the traces, which then stay there")
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument(
        "--read", type=Path, default=None, help="JSON lines of former calls: draw them, measure nothing"
    )
    arguments = parser.parse_args()
    document = measured(arguments) if arguments.read is None else read(arguments.read)
    print(json.dumps(document))
    if arguments.picture is not None:
        draw(document["rows"], arguments.picture)


def read(path: Path) -> dict[str, Any]:
    """The documents of several calls as one; of rows of one size, all stages."""
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows: dict[Size, dict[str, Any]] = {}
    for row in (row for document in documents for row in document["rows"]):
        merged = rows.setdefault(Size(*(row[name] for name in Size._fields)), row)
        for key in ("s", "cpu_s", "gb", "own_gb"):
            merged[key] |= row[key]
    peak_gb = max(document["peak_gb"] for document in documents)
    return documents[0] | {"rows": list(rows.values()), "peak_gb": peak_gb}


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every stage at every size."""
    compile_now(workers=None)  # no stage is to wait for that
    rows = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = arguments.out or Path(folder_name)
        folder.mkdir(parents=True, exist_ok=True)
        for size, stages in sizes(arguments).items():
            rows.append(measure(folder, size, stages, arguments))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    document = {"benchmark": "scale", "shape": SHAPE, "hardware": HARDWARE, "gen_length": arguments.gen_length}
    document |= {"prompt_tokens": arguments.prompt_tokens, "kv_cache": not arguments.no_kv_cache, "rows": rows}
    peak_gb = max((gb for row in rows for gb in row["gb"].values()), default=0.0)
    return document | {"cpus": psutil.cpu_count(), "bar_gb": BAR_GB, "peak_gb": peak_gb}


def sizes(arguments: argparse.Namespace) -> dict[Size, list[str]]:
    """What to measure at, and which stages; at budgets and cases other than the usual, those that have some."""
    first, last = arguments.prompts[0], arguments.layers[-1]
    found = [Size(first, num_layers) for num_layers in arguments.layers]
    found += [Size(num_prompts, last) for num_prompts in arguments.prompts]
    stages = {size: list(arguments.stages) for size in found}
    for budget in arguments.budgets:
        stages.setdefault(Size(first, last, budget=budget), [name for name in REPLAYS if name in arguments.stages])
    for num_cases in arguments.cases:
        stages.setdefault(Size(first, last, cases=num_cases), ["sweep"] if "sweep" in arguments.stages else [])
    return stages


def measure(folder: Path, size: Size, stages: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak GB of each stage, on a trace of this size."""
    trace = folder / f"flash-{size.layers}-{size.prompts}.h5"
    words = commands(folder, trace, size, arguments)
    row: dict[str, Any] = {**size._asdict(), "s": {}, "cpu_s": {}, "gb": {}, "own_gb": {}}
    for stage in stages:
        if stage == "count":
            trace.with_name(f"{trace.name}.counts").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as out:
            watched = watch([str(word).replace("OUT", out) for word in words[stage]])
        for key, value in watched.items():
            row[key][stage] = round(value, 3)
        print(json.dumps({"stage": stage, **watched}), file=sys.stderr, flush=True)
    with h5py.File(trace) as opened:  # to open it as a trace would read all of it
        num_forwards, num_ids = len(opened["forwards"]), opened["routing/expert_ids"].size
    return row | {"forwards": num_forwards, "ids_gb": num_ids / 1e9, "file_gb": trace.stat().st_size / 1e9}


def commands(folder: Path, trace: Path, size: Size, arguments: argparse.Namespace) -> Mapping[str, Sequence[object]]:
    """The command of each stage; OUT is a folder for its results."""
    model, study = folder / f"flash-{size.layers}", folder / f"study-{size.layers}-{size.prompts}-{size.cases}.yaml"
    model.mkdir(exist_ok=True)
    config = read_hf_config(find_shipped("models", SHAPE))
    config["num_hidden_layers"] = size.layers + config["first_k_dense_replace"]
    (model / "config.json").write_text(json.dumps(config))
    study.write_text(yaml.safe_dump(grid(trace, size.cases)))
    command, code = [sys.executable, "-m", "tidesim"], [sys.executable, "-c"]
    lengths = ("--gen-length", arguments.gen_length, "--prompt-tokens", arguments.prompt_tokens)
    lengths += ("--no-kv-cache",) if arguments.no_kv_cache else ()
    workers = ("--workers", arguments.workers)
    machine = ("--trace", trace, "--hardware", HARDWARE, "--json")
    how = (*machine, "--budget", size.budget, "--ignore-memory")
    names = [word for name in ("gain", "lru", "tide") for word in ("--policy", name)]
    return {
        "synthesize": (
            *(*command, "synthesize", "--shape", model, "--sequences", size.prompts, *lengths),
            *(*workers, "--out", trace, "--overwrite", "--json"),
        ),
        "open": (*code, _OPEN, trace),
        "count": (*code, _COUNT, trace),
        "recount": (*code, _COUNT, trace),
        "full": (*code, _FULL, trace),
        "inspect": (*command, "inspect", trace, "--json"),
        "simulate": (*command, "simulate", *how, "--policy", "tide"),
        **{stage: (*command, "simulate", *how, "--engine", "replay", *replayed(stage)) for stage in REPLAYS},
        "plan": (*command, "plan", *machine, *workers),
        "compare": (*command, "compare", *how, *names, *workers),
        "sweep": (*command, "sweep", study, "--out", "OUT", *workers, "--json"),
    }


def replayed(stage: str) -> Sequence[object]:
    """The options of one of `REPLAYS`."""
    name, *full = stage.removeprefix("replay ").split(", ")
    return ("--policy", name, *(("--context", "full") if full else ()))


def grid(trace: Path, num_cases: int) -> dict[str, object]:
    """A study with so many cases: half of them of each policy."""
    budgets = [round(256 * (number + 1) / (num_cases // 2 + 1)) for number in range(num_cases // 2)]
    return {
        "traces": [str(trace)],
        "machines": [HARDWARE],
        "policies": ["tide", "lru"],
        "budgets": budgets,
        "intervals": [4],
        "ignore_memory": True,
    }


def watch(words: Sequence[str]) -> dict[str, float]:
    """Seconds that a command takes, and the most memory that it and its children hold at once, in GB."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = peak_own = 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as running:
        process = psutil.Process(running.pid)
        while running.poll() is None:
            held = own = 0
            try:
                for one in (process, *process.children(recursive=True)):
                    memory = one.memory_info()
                    held, own = held + memory.rss, own + memory.rss - memory.shared
            except psutil.NoSuchProcess:  # it has just ended
                pass
            peak, peak_own = max(peak, held), max(peak_own, own)
            time.sleep(0.1)
    if running.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {running.returncode}.")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime
    return {"s": time.perf_counter() - began, "cpu_s": cpu_s, "gb": peak / 1e9, "own_gb": peak_own / 1e9}


# --- the picture ---


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """CPU seconds and peak GB of each stage over what is varied, all axes logarithmic."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    varied = {axis: along(rows, axis) for axis in _AXES}
    varied = {axis: found for axis, found in varied.items() if len(found) > 1}
    figure = Figure(figsize=(4.2 * len(varied) + 2.4, 8), layout="constrained")
    columns = figure.subplots(2, len(varied), squeeze=False, sharey="row")
    palette = colormaps["tab10"]
    styles = {stage: style(number, palette) for number, stage in enumerate(STAGES)}
    for place, (axis, found) in enumerate(varied.items()):
        for axes, key, name in zip(columns[:, place], ("cpu_s", "gb"), ("CPU seconds", "peak GB"), strict=True):
            for stage in STAGES:
                points = [(row[axis], row[key][stage]) for row in found if stage in row[key]]
                if len(points) > 1:
                    axes.loglog(*zip(*points, strict=True), label=stage, **styles[stage])
            if key == "gb":
                axes.axhline(BAR_GB, color="black", linestyle=":", linewidth=1.5)
                axes.text(found[-1][axis], BAR_GB, "bar ", ha="right", va="bottom")
            axes.xaxis.set_major_locator(FixedLocator([row[axis] for row in found]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(_AXES[axis])
            axes.set_ylabel(name if not place else "")
            axes.grid(visible=True, which="major", alpha=0.3)
        columns[0, place].set_title(fixed(found[0], axis), fontsize="medium")
    lines = {line.get_label(): line for axes in columns.ravel() for line in axes.get_lines()}
    shown = [stage for stage in STAGES if stage in lines]
    figure.legend([lines[stage] for stage in shown], shown, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def along(rows: Sequence[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The rows that differ in `axis` alone, ascending: the most there are."""
    groups: dict[tuple[int, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        others = tuple(row[name] for name in Size._fields if name != axis)
        groups.setdefault(others, {})[row[axis]] = row
    most = max(groups.values(), key=len)
    return [most[value] for value in sorted(most)]


def style(number: int, palette: Any) -> dict[str, Any]:
    """How a stage is drawn; replays of the full context are dashed."""
    solid = [stage for stage in STAGES if not stage.endswith(", full")]
    place = solid.index(STAGES[number].removesuffix(", full"))
    drawn = {"color": palette(place % palette.N), "marker": "o" if place < palette.N else "^", "linewidth": 1.4}
    return {**drawn, "linestyle": "-" if STAGES[number] in solid else "--", "markersize": 4}


def fixed(row: Mapping[str, Any], axis: str) -> str:
    """What the rows of a column of the picture have in common."""
    usual = Size(row["prompts"], row["layers"])
    shown = {"prompts": f"{row['prompts']} prompts", "layers": f"{row['layers']} layers"}
    shown |= {"budget": f"budget {usual.budget}"}
    return ", ".join(text for name, text in shown.items() if name != axis)


if __name__ == "__main__":
    main()
