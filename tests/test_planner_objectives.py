"""Plans for other aims than throughput, for batches and lengths, for several machines; and what explains them."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hand_made import E, L
from plan_cases import BACKGROUND, BLOCKING, machine, make, write_trace
from toy import toy_workload

from tidesim.errors import PlanError
from tidesim.hardware import load_hardware
from tidesim.planner import Demand, InfeasibleError, Objective, plan, rank_machines
from tidesim.planner.candidates import find_candidates
from tidesim.planner.plan_fields import POLICY_NAMES
from tidesim.planner.runs import Case, Outcome, by_block
from tidesim.planner.search import neighbours
from tidesim.planner.table import Table
from tidesim.policies import policy
from tidesim.simulator import simulate
from tidesim.trace import Trace
from tidesim.workload import ForwardKind


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    with Trace.open(write_trace(tmp_path_factory.mktemp("traces") / "small.h5")) as opened:
        yield opened


@pytest.fixture(scope="module")
def fastest(trace):
    return make(trace)


# --- aims ---


def test_the_slowest_block_is_no_slower_than_that_of_the_fastest_plan(trace, fastest):
    report = make(trace, objective="latency")
    assert report.slowest_block_s <= fastest.slowest_block_s
    assert report.predicted.makespan_s >= fastest.predicted.makespan_s
    assert report.chosen.objective == "latency"


@pytest.mark.parametrize("share", [0.5, 0.8, 0.999])
def test_the_least_memory_still_gives_what_is_wanted(trace, fastest, share):
    wanted = share * fastest.predicted.tok_per_s
    report = make(trace, objective=Objective(name="memory", tok_per_s=wanted))
    assert report.predicted.tok_per_s >= wanted
    assert sum(report.chosen.budget) <= sum(fastest.chosen.budget)
    assert report.programme.solver.minimised == "slots"


def test_more_memory_is_planned_for_more_throughput(trace, fastest):
    rates = [share * fastest.predicted.tok_per_s for share in (0.4, 0.7, 0.95)]
    reports = [make(trace, objective=Objective(name="memory", tok_per_s=rate)) for rate in rates]
    slots = [sum(report.chosen.budget) for report in reports]
    assert slots == sorted(slots)


def test_more_than_there_is_to_be_had_is_refused_with_what_there_is(trace, fastest):
    rate = fastest.predicted.tok_per_s
    with pytest.raises(InfeasibleError, match=re.escape(f"{2 * rate:g} tok/s are wanted, {rate:.4g} are reached")):
        make(trace, objective=Objective(name="memory", tok_per_s=2 * rate))
    least = make(trace, objective="latency").slowest_block_s
    with pytest.raises(InfeasibleError, match=re.escape(f"the slowest takes {least:.4g} s")):
        make(trace, objective=Objective(block_s=least / 2))


def test_a_bound_on_blocks_is_kept_by_the_run(trace):
    least = make(trace, objective="latency").slowest_block_s
    report = make(trace, objective=Objective(block_s=1.001 * least))
    assert report.slowest_block_s <= 1.001 * least


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "thrift"}, "must be one of throughput, latency, memory"),
        ({"name": "memory"}, "needs tok_per_s"),
        ({"tok_per_s": 3.0}, "no other objective takes one"),
        ({"name": "memory", "tok_per_s": -1.0}, r"tok_per_s\(=-1.0\) must be > 0"),
        ({"block_s": float("nan")}, r"block_s\(=nan\) must be > 0"),
        ({"block_s": float("inf")}, "finite"),
    ],
)
def test_nonsense_is_refused_with_the_rule(values, message):
    with pytest.raises(PlanError, match=message):
        Objective(**values)


def test_blocks_add_up_to_all_but_the_prefill(trace):
    workload = trace.workload()
    spent = np.random.default_rng(0).integers(0, 100, (workload.num_forwards, L + 1))
    blocks, is_block = by_block(workload, spent), workload.kind != ForwardKind.PREFILL
    pairs = zip(workload.sequence[is_block].tolist(), workload.block[is_block].tolist(), strict=True)
    assert len(blocks) == len(set(pairs))
    assert blocks.sum() == spent[is_block].sum()


# --- how the model is used ---


def test_a_plan_for_batches_is_made_on_batches_and_has_memory_for_them(trace, fastest):
    report = make(trace, slots=60, demand=Demand(batch_size=2))
    assert report.predicted.batch_size == 2
    assert report.chosen.max_tokens > fastest.chosen.max_tokens


def test_answers_are_cut_to_their_length_and_memory_is_set_aside_for_it(trace):
    whole = trace.workload()
    short = whole.answering(1)
    denoise = whole.kind == ForwardKind.DENOISE
    first = dict(zip(whole.sequence[denoise][::-1].tolist(), whole.block[denoise][::-1].tolist(), strict=True))
    assert all(
        block <= first[sequence] for sequence, block in zip(short.sequence.tolist(), short.block.tolist(), strict=True)
    )
    assert 0 < short.num_forwards < whole.num_forwards
    assert 0 < short.generated_tokens < whole.generated_tokens
    assert whole.answering(None) is whole
    long = whole.answering(1000)
    assert long.num_forwards == whole.num_forwards
    assert long.max_tokens >= 1000
    assert (
        make(trace, slots=60, demand=Demand(gen_length=1)).predicted.num_forwards < make(trace).predicted.num_forwards
    )
    with pytest.raises(ValueError, match="gen_length"):
        whole.answering(0)
    with pytest.raises(ValueError, match="batched already"):
        whole.batched(2).answering(8)


# --- which machine ---


def test_machines_are_ranked_by_what_is_scored_and_one_that_is_too_small_comes_last(trace):
    large, small = (replace(machine(trace, slots), name=f"with {slots}") for slots in (24, 4))
    tiny = replace(small, name="tiny", device=replace(small.device, memory_bytes=10))
    settings = {"execution": BLOCKING, "reserve_bytes": 0, "workers": 1}
    ranking = rank_machines(trace, trace.config, [tiny, small, large], objective=Objective(), **settings)
    assert [ranked.machine for ranked in ranking.machines] == ["with 24", "with 4", "tiny"]
    assert ranking.machines[-1].report is None
    assert "a device with at least" in ranking.machines[-1].reason
    rates = [ranked.report.held_out.tok_per_s for ranked in ranking.machines[:2]]
    assert rates == sorted(rates, reverse=True)
    json.dumps(ranking.to_dict())
    with pytest.raises(PlanError, match="different names"):
        rank_machines(trace, trace.config, [large, large], objective=Objective(), **settings)


# --- around the best, and why ---


def hand_made_table(times) -> Table:
    """A table of a policy that never refreshes: time of each layer by budget."""
    workload = toy_workload([[4, 0, 0, 0, 0, 0, 0, 0]])

    class Result:
        def __init__(self, layers):
            self.layer_parts_ns = (*((time_ns,) for time_ns in layers), (0,))

    assert workload.num_layers == 1
    return Table("static", {(b, None): Outcome(Result(layers), np.zeros((0, 3)), ()) for b, layers in times.items()})


def test_neighbours_differ_in_one_thing_fit_and_come_most_promising_first():
    table = hand_made_table({0: (100, 100), 4: (60, 90), 8: (50, 20)})
    near = neighbours(Case("static", (4, 4), None, "tuned"), table, 8)
    assert [case.budget for case in near] == [(0, 8), (8, 0), (4, 0), (0, 4)]
    roomy = neighbours(Case("static", (4, 4), None, "tuned"), table, 12)
    assert roomy[0].budget == (4, 8)
    assert all(sum(case.budget) <= 12 for case in roomy)


@pytest.mark.parametrize("execution", [BLOCKING, BACKGROUND], ids=["blocking", "background"])
def test_a_look_around_never_makes_a_plan_slower_and_says_what_it_tried(trace, execution):
    report = make(trace, execution=execution)
    assert report.rescored.after_s <= report.rescored.before_s
    assert report.rescored.after_s == report.predicted.makespan_s
    assert report.rescored.num_neighbours > 0


def test_an_explained_plan_says_what_it_waits_for_and_what_more_would_give(trace):
    settings = {"execution": BACKGROUND, "workers": 1, "is_explained": True}
    report = plan(trace, trace.config, load_hardware("rtx4090"), **settings)
    found = report.explanation
    assert sum(row.share for row in found.path.resources) == pytest.approx(1)
    assert found.prices[0].before_tok_per_s == pytest.approx(report.predicted.tok_per_s)
    gains = [price.gain for price in found.prices]
    assert gains == sorted(gains, reverse=True)
    assert min(row.tok_per_s for row in found.alternatives) >= 0.98 * report.predicted.tok_per_s
    json.dumps(report.to_dict())


def test_the_choice_of_tides_own_programme_is_replayed_among_the_intervals(trace, fastest):
    report = make(trace, is_explained=True)
    workload = trace.workload("block", report.split.held_out)
    assert report.tide
    for programme, replayed in zip(report.tide, report.tide_replayed, strict=True):
        rates = {
            interval: simulate(
                workload,
                trace.config,
                machine(trace, 11),
                policy(programme.policy, refresh_interval=interval),
                budget=programme.budget,
                execution=BLOCKING,
                is_memory_checked=False,
            ).tok_per_s
            for interval in range(1, 6)
        }
        assert replayed.best_tok_per_s == max(rates.values())
        assert replayed.regret == pytest.approx(1 - rates[programme.interval] / max(rates.values()))
    assert fastest.tide_replayed == []
    assert fastest.to_dict()["tide"][0]["replayed"] is None


def test_a_plan_of_gain_decides_from_its_file_as_it_did(trace, tmp_path):
    report = make(trace, policies=["gain"])
    report.chosen.save(tmp_path / "plan.json")
    loaded = type(report.chosen).load(tmp_path / "plan.json")
    assert loaded == report.chosen
    held_out = trace.workload("block", report.split.held_out)
    result = simulate(
        *(held_out, trace.config, machine(trace, 11), loaded.make_policy()),
        budget=loaded.budget,
        execution=BLOCKING,
        seed=0,
        reserve_bytes=0,
    )
    assert result == report.held_out


def test_scratch_memory_is_taken_off_what_layers_may_have(trace):
    for name in POLICY_NAMES:
        report = make(trace, policies=[name], slots=9)
        scratch = report.chosen.make_policy().scratch_experts(E)
        assert sum(report.chosen.budget) + scratch <= 9
    assert find_candidates(trace.config, 4, trace.workload(), ["gain"], None, None).policies == ("gain",)
