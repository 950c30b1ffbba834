"""tidesim's own policy against both versions of TIDE at their best interval, in twelve cells.

    python tests/benchmarks/policy_cells.py [--sequences N] [--trace llada2-tiny] [--all] [--workers 2]

A cell is a machine, a budget and a context: "block" is the overlapped execution with its KV cache, "full" the same
without one. Compared is on the sequences that `tidesim compare` holds out, with the sizes of llada2.0-mini; `gain` may
know the others before. Prints a line for each cell on stderr as it is done, and one JSON line at the end. In a cell,
`gap_closed` is (t_tide - t_gain) / (t_tide - t_ceiling) in makespan, t_tide being the faster of the two versions of
TIDE at the best of the intervals 1, 2, 4, 8, 16 and 32 in hindsight, t_ceiling a time that no policy can undercut:
0 where gain is as fast as TIDE, 1 where it is as fast as the ceiling, negative where it is behind.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace

from tidesim.comparison import STATIC_IN_HINDSIGHT, Comparison, Row, compare
from tidesim.execution import EXECUTIONS
from tidesim.hardware import load_hardware
from tidesim.moe import MoEConfig, load_moe_config
from tidesim.planner import split_sequences
from tidesim.trace import Trace
from tidesim.workload import Workload

MACHINES = ("a100-40gb", "rtx4090")
BUDGETS = (32, 64, 128)
CACHED = EXECUTIONS["overlapped"]
HOWS = (CACHED, replace(CACHED, name="overlapped without KV cache", kv_cache=False))
TIDES = ("tide", "tide-as-coded")
HELD_OUT_SHARE = 0.25  # as `tidesim compare` does by default


def fastest(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: row.result.makespan_ns)


def told(row: Row) -> dict[str, object]:
    """What a cell says of a row."""
    return {"name": row.name, "makespan_s": row.result.makespan_s, "tok_per_s": row.result.tok_per_s}


def cell(comparison: Comparison) -> dict[str, object]:
    """The figures of one cell."""
    rows = list(comparison.rows)
    tides = {name: fastest([row for row in rows if row.family == name]) for name in TIDES}
    tide, gain = fastest(list(tides.values())), fastest([row for row in rows if row.name == "gain"])
    static = fastest([row for row in rows if row.name == STATIC_IN_HINDSIGHT])
    others = [row for row in rows if row.family not in TIDES and row not in (gain, static)]
    ceiling_s = gain.ceiling.makespan_ns / 1e9
    gap_s = tide.result.makespan_s - ceiling_s
    return {
        **{name: told(row) for name, row in tides.items()},
        "gain": told(gain),
        "static_in_hindsight": told(static),
        "fastest_other": told(fastest(others)) if others else None,
        "ceiling": {"makespan_s": ceiling_s, "tok_per_s": gain.ceiling.tok_per_s},
        "speedup": tide.result.makespan_s / gain.result.makespan_s,
        "gap_closed": (tide.result.makespan_s - gain.result.makespan_s) / gap_s,
        "is_fastest": rows[0] is gain,
    }


def workloads(trace: str, model: MoEConfig, num_sequences: int | None) -> dict[str, tuple[Workload, Workload]]:
    """By context: what is compared on, and what may be known before."""
    with Trace.open(trace) as opened:
        split = split_sequences(len(opened.sequences), HELD_OUT_SHARE, seed=0)
        parts = split.held_out[:num_sequences], split.training
        return {
            how.context: tuple(opened.workload(how.context, part).tiled(model.num_layers) for part in parts)
            for how in HOWS
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="llada2.0-mini-synthetic")
    parser.add_argument("--sequences", type=int, help="how many of the held-out sequences; default: all")
    parser.add_argument("--all", action="store_true", help="run every other policy too")
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    model = load_moe_config("llada2.0-mini")
    known = workloads(arguments.trace, model, arguments.sequences)
    cells = []
    for machine, how, budget in [(machine, how, budget) for machine in MACHINES for how in HOWS for budget in BUDGETS]:
        began = time.perf_counter()
        comparison = compare(
            *known[how.context],
            model,
            load_hardware(machine),
            execution=how,
            budget=budget,
            names=None if arguments.all else [*TIDES, "gain"],
            workers=arguments.workers,
        )
        where = {"machine": machine, "context": how.context, "budget": budget}
        cells.append(where | cell(comparison) | {"took_s": time.perf_counter() - began})
        print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
    closed = [one["gap_closed"] for one in cells]
    behind = ("machine", "context", "budget")
    document = {
        "benchmark": "policy_cells",
        "trace": arguments.trace,
        "origin": known["block"][0].origin,
        "sequences": known["block"][0].num_sequences,
        "median_gap_closed": statistics.median(closed),
        "least_gap_closed": min(closed),
        "least_speedup": min(one["speedup"] for one in cells),
        "behind": [{name: one[name] for name in behind} for one in cells if one["gap_closed"] < 0],
        "cells": cells,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
