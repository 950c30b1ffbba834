"""The published experiment of TIDE, predicted: LLaDA2.0-mini on an A100 40 GB, 128 experts a layer, as its code runs.

    python tests/benchmarks/published_tide.py [--sequences 4] [--workers 2]

Published (arXiv 2605.20179v1, known at second hand) are 1.91 tok/s at τ = 1, 2.14 with τ drawn at random and 2.44 at
the τ that its search finds. Here policy and execution are `tide-as-coded`, hence without a KV cache, on the profile
a100-40gb as it is shipped: no figure is chosen to fit. Every τ from 1 to 31 is run, but those no shorter than every
block of the trace, which mean the same, just once. "random" is the mean of their tok/s, each of the 31 counted alike;
the harmonic mean stands beside it, as what a run makes that draws τ anew for each token. "best" is the best τ in
hindsight. The routing is the shipped synthetic one: its prompts have 96 tokens and its answers 128 on average, where
the paper has sanitized MBPP with answers of 256 and 1024. The authors' early logs (another machine) have hit rates of
0.928 to 0.948 at τ = 2. Prints one JSON line; `error` is predicted over published, minus 1.
"""

import argparse
import json
import statistics

from tidesim.execution import EXECUTIONS
from tidesim.hardware import load_hardware
from tidesim.planner.candidates import distinct_intervals
from tidesim.policies import policy
from tidesim.result import RunResult
from tidesim.simulator import simulate
from tidesim.trace import Trace
from tidesim.workers import Workers
from tidesim.workload import Workload

PUBLISHED = {"tau_1": 1.91, "random": 2.14, "best": 2.44}  # tok/s
EXECUTION = EXECUTIONS["tide-as-coded"]
BUDGET = 128
TAUS = range(1, 32)


def run(setting: tuple[Workload, object, object], tau: int) -> RunResult:
    """The run at one τ."""
    workload, model, machine = setting
    chosen = policy("tide-as-coded", refresh_interval=tau)
    return simulate(workload, model, machine, chosen, budget=BUDGET, execution=EXECUTION)


def told(result: RunResult) -> dict[str, object]:
    """What is printed of a run: where the time of a forward goes, and what moved."""
    forwards = result.num_forwards
    return {
        "refresh_interval": result.refresh_interval,
        "ms_per_forward": 1e3 * result.makespan_s / forwards,
        "breakdown_ms_per_forward": {part: 1e3 * part_s / forwards for part, part_s in result.breakdown_s.items()},
        "breakdown_share": {part: part_s / result.makespan_s for part, part_s in result.breakdown_s.items()},
        "hit_rate": result.hit_rate,
        "promotions_per_forward": result.promotions / forwards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="llada2.0-mini-synthetic")
    parser.add_argument("--sequences", type=int, default=4, help="the first so many of the trace")
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    with Trace.open(arguments.trace) as opened:
        workload, model = opened.workload(EXECUTION.context, range(arguments.sequences)), opened.config
    distinct = distinct_intervals(TAUS, workload)
    with Workers((workload, model, load_hardware("a100-40gb")), arguments.workers) as pool:
        results = dict(zip(distinct, pool.map(run, distinct), strict=True))
    rates = {tau: results[min(tau, distinct[-1])].tok_per_s for tau in TAUS}
    best = max(rates, key=rates.__getitem__)
    predicted = {"tau_1": rates[1], "random": statistics.mean(rates.values()), "best": rates[best]}
    document = {
        "benchmark": "published_tide",
        "trace": arguments.trace,
        "origin": workload.origin,
        "sequences": workload.num_sequences,
        "num_forwards": workload.num_forwards,
        "tokens_per_forward": workload.generated_tokens / workload.num_forwards,
        "rows_per_forward": float(workload.tokens.mean()),
        "published_tok_per_s": PUBLISHED,
        "predicted_tok_per_s": predicted,
        "random_harmonic_tok_per_s": statistics.harmonic_mean(rates.values()),
        "error": {name: predicted[name] / rate - 1 for name, rate in PUBLISHED.items()},
        "published_ratio_to_tau_1": {name: rate / PUBLISHED["tau_1"] for name, rate in PUBLISHED.items()},
        "predicted_ratio_to_tau_1": {name: rate / predicted["tau_1"] for name, rate in predicted.items()},
        "tok_per_s_by_tau": rates,
        "hit_rate_by_tau": {tau: result.hit_rate for tau, result in results.items()},
        "tau_1": told(results[1]),
        "best": told(results[best]),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
