"""The compiled replay: how many routed pairs and layers it replays a second, and how much faster it is than the events.

    python tests/benchmarks/replay_speed.py [--repeats 7] [--workers 2] [--compile] [--only single|curve|grid]

On the shipped synthetic trace at the sizes of LLaDA2.0-mini, on one core: each case is run `--repeats` times after one
that is thrown away, and the median counts; `spread` is the distance of the quartiles over it. `layers_per_s` counts
layers of forwards, `pairs_per_s` routed pairs of a token and an expert, `run` all that `Replayer.run` does for a result
and `walk` the compiled part of it that times what was decided. `make` is what a policy takes to be made: `gain` learns
from the first 12 sequences, and runs on the other four. `simpy_ratio` is the event simulator's time over the replay's
for the same run, both in this process. `simulated_over_real` is the run's makespan over the time that replaying it
takes. `curve` counts hits and moves at all 257 budgets in one walk, at each of `intervals` where there are any:
`accesses_per_s` counts experts that a layer of a forward routes to, and `pairs_per_s` routed pairs, each once for an
interval; `read_ms` is for sorting the routing, which any replay needs too; `walks_ratio` is the time of as many walks
of the replay, one for each budget and interval, by the mean of some, over that of the curve. `grid` is 31 intervals x
16 budgets x 5 policies through `run_study`, process start and results on disk included. With `--compile` the time of a
first run with nothing on disk comes on top, on all cores. Bars: 1e9 pairs/s, 5e6 layers/s, a ratio of 1,000 to SimPy,
20,000 simulated seconds a second for mini on the 4090 profile, the grid in 10 s, the LRU curve at 22e6 accesses/s.
Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from tidesim.execution import execution
from tidesim.hardware import load_hardware
from tidesim.moe import load_moe_config
from tidesim.policies import Policy, policy
from tidesim.replay import Replayer, compile_now, stretches
from tidesim.replay.routing import routing_of
from tidesim.replay.stacks import first_depths, new_stacks, walk_recency, walk_refreshes
from tidesim.shipped import find_shipped
from tidesim.simulator import simulate
from tidesim.study import Study, run_study
from tidesim.trace import Trace
from tidesim.workload import Workload

TRACE = "llada2.0-mini-synthetic"
CASES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "static": ("static", {}, 64, "overlapped"),
    "tide": ("tide", {"refresh_interval": 4}, 64, "overlapped"),
    "tide each step": ("tide", {"refresh_interval": 1}, 64, "overlapped"),
    "tide-as-coded": ("tide-as-coded", {"refresh_interval": 4}, 64, "overlapped"),
    "lru": ("lru", {}, 128, "overlapped"),
    "gain": ("gain", {}, 64, "overlapped"),
    "static, full context": ("static", {}, 64, "tide-as-coded"),
    "tide-as-coded, full context": ("tide-as-coded", {"refresh_interval": 4}, 64, "tide-as-coded"),
}
CURVES: tuple[tuple[str, Sequence[int | None]], ...] = (
    ("lru", [None]),
    ("tide", [1]),
    ("tide", range(1, 32)),
    ("tide-as-coded", [1]),
    ("tide-as-coded", range(1, 32)),
)
NUM_LEARNT = 12  # sequences that `gain` learns from; it runs on the others
GRID = {
    "traces": [TRACE],
    "machines": ["rtx4090"],
    "policies": ["static", "lru", "mixtral-offloading", "tide", "tide-as-coded"],
    "budgets": [*range(16, 257, 16)],
    "intervals": [*range(1, 32)],
    "held_out_share": 0,
    "ignore_memory": True,
}


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds, and the distance of the quartiles over it; the first run is thrown away."""
    samples = []
    for _ in range(repeats + 1):
        start_s = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start_s)
    low, median, high = statistics.quantiles(samples[1:], n=4)
    return median, (high - low) / median


@contextmanager
def clocked_walks() -> Iterator[list[float]]:
    """Seconds of the compiled part of each run in the block."""
    walked: list[float] = []
    play = stretches.play

    def clocked(*args: Any) -> Any:
        start_s = time.perf_counter()
        makespan = play(*args)
        walked.append(time.perf_counter() - start_s)
        return makespan

    stretches.play = clocked
    try:
        yield walked
    finally:
        stretches.play = play


def walk_s(replayer: Replayer, made: Policy, budget: int, repeats: int) -> float:
    """Median seconds of the compiled part of a run; the first is thrown away."""
    model, machine, used = load_moe_config("llada2.0-mini"), load_hardware("rtx4090"), execution("overlapped")
    with clocked_walks() as walked:
        for _ in range(repeats + 1):
            replayer.run(model, machine, made, budget=budget, execution=used, is_memory_checked=False)
    return statistics.median(walked[1:])


def curve(repeats: int) -> dict[str, Any]:
    """All budgets at once, beside as many walks."""
    with Trace.open(find_shipped("traces", TRACE, ".h5")) as trace:
        workload = trace.workload("block")
    replayer, L, E = Replayer(workload), workload.num_layers, workload.num_experts
    whole = slice(0, workload.num_forwards)
    read_s, _ = timed(partial(routing_of, workload, whole), repeats)
    routing = routing_of(workload, whole)

    def recency() -> None:
        buffers, table = np.zeros((3, E), np.uint16), np.zeros((3, L, E), np.int64)
        walk_recency(routing, first_depths(L, E), *buffers, *table)

    def refreshes(by_total: bool, intervals: Sequence[int]) -> None:
        asked = np.array(intervals, np.int64)
        walk_refreshes(routing, asked, not by_total, by_total, True, new_stacks(len(asked), L, E))

    found = {}
    for name, intervals in CURVES:
        walk = recency if name == "lru" else partial(refreshes, name == "tide", intervals)
        all_s, spread = timed(walk, repeats)
        made = [
            policy(name, **({"refresh_interval": each} if each else {}))
            for each in intervals[:: len(intervals) // 3 or 1]
        ]
        each_s = statistics.mean(walk_s(replayer, one, budget, repeats) for one in made for budget in range(16, E, 48))
        found[f"{name}, {len(intervals)} intervals" if intervals[0] else name] = {
            "accesses_per_s": round(len(intervals) * len(routing.experts) / all_s),
            "pairs_per_s": round(len(intervals) * int(workload.counts.sum()) / all_s),
            "num_budgets": E + 1,
            "walk_ms": round(1e3 * all_s, 2),
            "read_ms": round(1e3 * read_s, 2),
            "spread": round(spread, 3),
            "walks_ratio": round((E + 1) * len(intervals) * each_s / all_s),
        }
    return found


def single(repeats: int) -> dict[str, Any]:
    """Every case of `CASES` alone."""
    model, machine = load_moe_config("llada2.0-mini"), load_hardware("rtx4090")
    workloads: dict[str, Workload] = {}
    with Trace.open(find_shipped("traces", TRACE, ".h5")) as trace:
        for context in ("block", "full"):
            workloads[context] = trace.workload(context)
        corpus = trace.workload("block", range(NUM_LEARNT))
        others = trace.workload("block", range(NUM_LEARNT, len(trace.sequences)))
    found: dict[str, Any] = {}
    for name, (policy_name, params, budget, how) in CASES.items():
        used = execution(how)
        workload = others if policy_name == "gain" else workloads[used.context]
        replayer = Replayer(workload)
        learnt = {"static": {"popularity": workload.counts.sum(axis=0)}, "gain": {"corpus": corpus}}
        start_s = time.perf_counter()
        made = policy(policy_name, **learnt.get(policy_name, params))
        make_s = time.perf_counter() - start_s
        settings: dict[str, Any] = {"budget": budget, "execution": used, "is_memory_checked": False}
        with clocked_walks() as walked:
            run_s, spread = timed(partial(replayer.run, model, machine, made, **settings), repeats)
        walk_s = statistics.median(walked[1:])
        start_s = time.perf_counter()
        expected = simulate(workload, model, machine, made, **settings)
        simpy_s = time.perf_counter() - start_s
        result = replayer.run(model, machine, made, **settings)
        assert result == expected
        num_layers = workload.num_forwards * workload.num_layers
        found[name] = {
            "layers_per_s": round(num_layers / walk_s),
            "pairs_per_s": round((result.hits + result.misses) / walk_s),
            "make_ms": round(1e3 * make_s, 2),
            "run_ms": round(1e3 * run_s, 2),
            "walk_ms": round(1e3 * walk_s, 2),
            "spread": round(spread, 3),
            "simpy_ratio": round(simpy_s / run_s),
            "simpy_ratio_of_walk": round(simpy_s / walk_s),
            "simulated_over_real": round(result.makespan_s / run_s),
        }
    return found


def grid(workers: int) -> dict[str, Any]:
    """The whole grid; its rows are written and read back."""
    study = Study.from_content(GRID)
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        results = run_study(study, folder, workers=workers)
        grid_s = time.perf_counter() - start_s
    assert {*results["status"]} == {"ok"}
    return {"num_cases": len(results), "workers": workers, "grid_s": round(grid_s, 2)}


def compile_s() -> float:
    """Seconds of a first run in a process with an empty cache, less those of a second such process with a full one."""
    command = (sys.executable, "-c", "from tidesim.replay import compile_now; compile_now(workers=None)")
    with tempfile.TemporaryDirectory() as cache:
        seconds = []
        for _ in range(2):
            start_s = time.perf_counter()
            subprocess.run(command, check=True, env={**os.environ, "NUMBA_CACHE_DIR": cache})
            seconds.append(time.perf_counter() - start_s)
    return round(seconds[0] - seconds[1], 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", choices=("single", "curve", "grid"))
    asked = parser.parse_args()
    compile_now()
    found: dict[str, Any] = {"benchmark": "replay_speed", "trace": TRACE, "origin": "synthetic", "hardware": "rtx4090"}
    if asked.only in (None, "single"):
        found["single"] = single(asked.repeats)
    if asked.only in (None, "curve"):
        found["curve"] = curve(asked.repeats)
    if asked.only in (None, "grid"):
        found["grid"] = grid(asked.workers)
    if asked.compile:
        found["compile_s"] = compile_s()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
