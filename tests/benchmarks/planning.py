"""How long a plan takes, how good it is on sequences held out, and whether two exact methods agree on its tables.

    python tests/benchmarks/planning.py [--models llada2.0-mini llada2.0-flash] [--machines rtx4090 a100-40gb h100-sxm]
        [--repeats 3] [--cold]

On the shipped synthetic trace, its layers repeated for larger models; a cell is a model on a machine. `plan_s` is the
median time of `tidesim plan` as a process, from its start to its end, with everything explained; `spread` is the
distance of its longest from its shortest over it, and `cold_s` the same once with nothing compiled (with `--cold`).
`gap` is that of the programme whose policy was chosen, and `largest_gap` the largest of all policies. `disagreement` is
how far the programmes' sums are off those of a dynamic programme over slots, the largest of all policies, relative.

Then come held-out throughputs: of the plan; of the best `in_hindsight` of every choice that planning ran (each policy's
uniform budgets and intervals, its programme's choice, listed refresh steps, and what differs from the best in one
thing); of TIDE's own programme, the better of both versions; and of the best constant interval at the largest uniform
budget, in hindsight too. `regret` is what `in_hindsight` is faster by. Bars: plan_s under 10 s, cold_s under 30 s,
gap 0, regret under 0.02. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tidesim.execution import execution
from tidesim.hardware import load_hardware
from tidesim.moe import load_moe_config
from tidesim.planner import plan, planning, search
from tidesim.planner.plan_report import PlanReport
from tidesim.shipped import find_shipped
from tidesim.trace import Trace

sys.path.append(str(Path(__file__).parent.parent))
from knapsack import least_ns

TRACE = "llada2.0-mini-synthetic"
USED = execution("overlapped")
_HELD_OUT = "held-out"


def process_s(model: str, machine: str, cache: str | None = None) -> float:
    """Seconds of the command."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "plan.json")
        command = [sys.executable, "-m", "tidesim", "plan", "--hardware", machine, "--model", model, "--out", out]
        start_s = time.perf_counter()
        environment = os.environ | ({} if cache is None else {"NUMBA_CACHE_DIR": cache})
        subprocess.run([*command, "--json"], check=True, capture_output=True, env=environment)
        return time.perf_counter() - start_s


def cold_s(model: str, machine: str) -> float:
    """The same with an empty cache of compiled code."""
    with tempfile.TemporaryDirectory() as cache:
        return process_s(model, machine, cache)


def spied(model: str, machine: str) -> tuple[PlanReport, float, dict[str, float]]:
    """A plan, how far its programmes are off a dynamic programme at most, and all choices' held-out throughputs."""
    found_search, choose = planning.search, search.choose
    off, rates = [0.0], {}

    def choose_twice(options: Any, slots: int, **how: Any) -> Any:
        choice = choose(options, slots, **how)
        least = least_ns(options, slots)
        assert least is not None
        off.append(abs(sum(option.time_ns for option in choice.options) / max(1, least) - 1))
        return choice

    def search_and_score(runs: Any, candidates: Any, *rest: Any, **how: Any) -> Any:
        found = found_search(runs, candidates, *rest, **how)
        for case in found.ranked:
            result = runs.result(case._replace(sequences=_HELD_OUT))
            rates[str(case)] = result.tok_per_s
            is_even = case.budget == (candidates.uniform,) * len(case.budget) and case.interval is not None
            if is_even and len(set(case.interval)) == 1:
                rates["constant"] = max(rates.get("constant", 0.0), result.tok_per_s)
        return found

    planning.search, search.choose = search_and_score, choose_twice
    try:
        with Trace.open(find_shipped("traces", TRACE, ".h5")) as trace:
            report = plan(trace, load_moe_config(model), load_hardware(machine), execution=USED, is_explained=False)
    finally:
        planning.search, search.choose = found_search, choose
    return report, max(off), rates


def cell(model: str, machine: str, repeats: int, has_cold: bool) -> dict[str, object]:
    """The figures of a model on a machine."""
    seconds = [process_s(model, machine) for _ in range(repeats + 1)][1:]
    report, disagreement, rates = spied(model, machine)
    tide = [one.held_out.tok_per_s for one in report.baselines if one.name.endswith("own programme")]
    plan_rate, best = report.held_out.tok_per_s, max(rates.values())
    median_s = statistics.median(seconds)
    return {
        "model": model,
        "machine": machine,
        "plan_s": round(median_s, 2),
        "spread": round((max(seconds) - min(seconds)) / median_s, 3),
        **({"cold_s": round(cold_s(model, machine), 1)} if has_cold else {}),
        "gap": report.gap,
        "largest_gap": max(programme.solver.gap for programme in report.programmes),
        "disagreement": disagreement,
        "policy": report.chosen.policy,
        "planned_on": round(report.predicted.tok_per_s, 2),
        "held_out": round(plan_rate, 2),
        "in_hindsight": round(best, 2),
        "num_choices": len(rates),
        "regret": round(best / plan_rate - 1, 4),
        "tide_programme": round(max(tide), 2) if tide else None,
        "constant_interval": round(rates["constant"], 2) if "constant" in rates else None,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llada2.0-mini", "llada2.0-flash"])
    parser.add_argument("--machines", nargs="+", default=["rtx4090", "a100-40gb", "h100-sxm"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    asked = parser.parse_args()
    cells = [cell(model, machine, asked.repeats, asked.cold) for model in asked.models for machine in asked.machines]
    print(json.dumps({"benchmark": "planning", "trace": TRACE, "origin": "synthetic", "cells": cells}))


if __name__ == "__main__":
    main()
