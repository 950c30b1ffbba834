"""How time and memory grow with the number of prompts and of layers: from writing a trace to replaying it.

    python tests/benchmarks/scale.py [--prompts 20 60] [--layers 31] [--out DIR] [--picture scale.png]

Each stage is a command of its own, so that its memory is its own. `synthesize` writes the trace, `count` reads and
counts it, `recount` does so once the counts are kept beside it, `full` also rebuilds the forwards of an engine without
a KV cache, `inspect` and `simulate` are the commands. `open` is what all but the first take at least: reading, checking
and hashing the trace. All seconds include the start of the program.

Prints one JSON line: for each size `s`, the seconds of each stage, `gb`, its peak (resident memory of all its processes
together, mapped files included, sampled every 20 ms), and `ids_gb`, the expert ids of the trace uncompressed.
Bar: 4 GB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tidesim.moe import read_hf_config
from tidesim.shipped import find_shipped
from tidesim.trace import Trace

SHAPE = "llada2.0-flash"
STAGES = ("synthesize", "open", "count", "recount", "full", "inspect", "simulate")
_OPEN = "import sys; from tidesim.trace import Trace; trace = Trace.open(sys.argv[1])"
_COUNT = _OPEN + "; trace.workload('block', is_mapped=True)"
_FULL = _OPEN + "; trace.workload('full')"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--layers", type=int, nargs="+", default=[31])
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--no-kv-cache", action="store_true", help="traces with the whole prefix in every forward")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="others are left out")
    parser.add_argument("--out", type=Path, default=None, help="folder for the traces, which then stay there")
    parser.add_argument("--picture", type=Path, default=None)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = arguments.out or Path(folder_name)
        folder.mkdir(parents=True, exist_ok=True)
        for num_layers in arguments.layers:
            for num_prompts in arguments.prompts:
                rows.append(measure(folder, num_prompts, num_layers, arguments))
                print(json.dumps(rows[-1]), file=sys.stderr)
    document = {"benchmark": "scale", "shape": SHAPE, "gen_length": arguments.gen_length, "rows": rows}
    document |= {"cpus": psutil.cpu_count(), "bar_gb": 4.0, "peak_gb": max(max(row["gb"].values()) for row in rows)}
    print(json.dumps(document))
    if arguments.picture is not None:
        draw(rows, arguments.picture)


def measure(folder: Path, num_prompts: int, num_layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak GB of each stage, on a trace of this size."""
    model, trace = folder / f"flash-{num_layers}", folder / f"flash-{num_layers}-{num_prompts}.h5"
    model.mkdir(exist_ok=True)
    config = read_hf_config(find_shipped("models", SHAPE))
    config["num_hidden_layers"] = num_layers + config["first_k_dense_replace"]
    (model / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "tidesim"]
    size = ("--shape", model, "--sequences", num_prompts, "--gen-length", arguments.gen_length)
    size += ("--no-kv-cache",) if arguments.no_kv_cache else ()
    workers = () if arguments.workers is None else ("--workers", arguments.workers)
    how = ("--hardware", "rtx4090", "--policy", "tide", "--budget", 64, "--ignore-memory")
    code = [sys.executable, "-c"]
    words: dict[str, Sequence[object]] = {
        "synthesize": (*command, "synthesize", *size, *workers, "--out", trace, "--overwrite", "--json"),
        "open": (*code, _OPEN, trace),
        "count": (*code, _COUNT, trace),
        "recount": (*code, _COUNT, trace),
        "full": (*code, _FULL, trace),
        "inspect": (*command, "inspect", trace, "--json"),
        "simulate": (*command, "simulate", "--trace", trace, *how, "--json"),
    }
    row: dict[str, Any] = {"prompts": num_prompts, "layers": num_layers, "s": {}, "gb": {}}
    for stage in arguments.stages:
        if stage == "count":
            trace.with_name(f"{trace.name}.counts").unlink(missing_ok=True)
        row["s"][stage], row["gb"][stage] = watch([str(word) for word in words[stage]])
    with Trace.open(trace) as opened:
        num_ids = opened.num_rows * opened.num_layers * opened.top_k
        row |= {"forwards": len(opened.forwards), "ids_gb": num_ids / 1e9, "file_gb": trace.stat().st_size / 1e9}
    return row


def watch(words: Sequence[str]) -> tuple[float, float]:
    """Seconds that a command takes, and the most memory that it and its children hold at once, in GB."""
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as running:
        process = psutil.Process(running.pid)
        while running.poll() is None:
            held = 0
            try:
                for one in (process, *process.children(recursive=True)):
                    held += one.memory_info().rss
            except psutil.NoSuchProcess:  # it has just ended
                pass
            peak = max(peak, held)
            time.sleep(0.02)
    if running.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {running.returncode}.")
    return time.perf_counter() - began, peak / 1e9


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and peak GB of each stage over the expert ids of the trace, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    ordered = sorted(rows, key=lambda row: row["ids_gb"])
    sizes = [row["ids_gb"] for row in ordered]
    for axes, key, name in zip(figure.subplots(1, 2), ("s", "gb"), ("seconds", "peak GB"), strict=True):
        for stage in ordered[0][key]:
            axes.loglog(sizes, [row[key][stage] for row in ordered], marker="o", label=stage)
        axes.set_xlabel("expert ids of the trace, GB uncompressed")
        axes.set_ylabel(name)
        axes.grid(visible=True, which="both", alpha=0.3)
    axes.axhline(4.0, color="black", linestyle="--", label="bar")
    axes.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    main()
