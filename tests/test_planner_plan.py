"""Plans from end to end, on a trace small enough to try everything."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hand_made import E, L
from plan_cases import BACKGROUND, BLOCKING, STEPS, machine, make, write_trace
from toy import toy_hardware

from tidesim.errors import BudgetError, InputError, PlanError
from tidesim.execution import check_memory
from tidesim.planner import InfeasibleError, Plan, plan
from tidesim.planner import runs as planner_runs
from tidesim.planner.candidates import default_budgets, distinct_intervals
from tidesim.planner.plan_report import split_sequences
from tidesim.planner.planning import tide_code
from tidesim.planner.room import measure_room
from tidesim.planner.runs import Case, Known, make_policy
from tidesim.policies import policy
from tidesim.policies.foresight import learn
from tidesim.simulator import simulate
from tidesim.trace import Trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    with Trace.open(write_trace(tmp_path_factory.mktemp("traces") / "small.h5")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(trace):
    return make(trace)


def counted(trace, sequences):
    """How often each expert was routed to in these sequences."""
    return trace.workload("block", sequences).counts.sum(axis=0)


def known(trace, sequences):
    return Known(counted(trace, sequences), learn(trace.workload("block", sequences)))


def run(trace, report, sequences, execution=BLOCKING):
    """The chosen plan, simulated from what its file says; while tuning, a static one knows the profiled ones alone."""
    chosen = report.chosen
    policy = chosen.make_policy()
    if chosen.policy in ("static", "gain") and sequences != report.split.held_out:
        policy = make_policy(chosen.policy, known(trace, report.split.profiled))
    return simulate(
        trace.workload("block", sequences),
        trace.config,
        machine(trace, 11, execution),
        policy,
        budget=report.chosen.budget,
        execution=execution,
        seed=0,
        reserve_bytes=0,
    )


# --- the plan is what it says it is ---


@pytest.mark.parametrize("execution", [BLOCKING, BACKGROUND], ids=["blocking", "background"])
def test_predictions_are_runs_of_the_plan(trace, execution):
    report = make(trace, execution=execution)
    assert run(trace, report, report.split.tuned, execution) == report.predicted
    assert run(trace, report, report.split.held_out, execution) == report.held_out
    assert report.chosen.predicted.tok_per_s == report.predicted.tok_per_s
    assert report.chosen.held_out.makespan_s == report.held_out.makespan_s


@pytest.mark.parametrize("execution", [BLOCKING, BACKGROUND], ids=["blocking", "background"])
@pytest.mark.parametrize("slots", [0, 1, 2, 11, 20, L * E])
def test_no_baseline_is_faster_with_the_same_memory(trace, slots, execution):
    report = make(trace, slots, execution)
    assert sum(report.chosen.budget) <= slots
    rivals = [baseline for baseline in report.baselines if not baseline.is_reference]
    assert all(baseline.predicted.makespan_s >= report.predicted.makespan_s for baseline in rivals)
    times = [baseline.predicted.makespan_s for baseline in report.baselines]
    assert times == sorted(times)


def test_a_plan_fits_the_device_and_one_expert_more_would_not(trace, report):
    hardware = machine(trace, 11)
    chosen = report.chosen
    scratch = chosen.make_policy().scratch_experts(trace.config.num_experts)
    most = (chosen.max_tokens, chosen.reserve_bytes, scratch)
    check_memory(trace.config, hardware, BLOCKING, chosen.budget, *most)
    assert sum(chosen.budget) + scratch == report.slots == 11
    more = (chosen.budget[0] + 1, *chosen.budget[1:])
    with pytest.raises(BudgetError, match=f"largest budget that fits is {(11 - scratch) // L} "):
        check_memory(trace.config, hardware, BLOCKING, more, *most)


@pytest.mark.parametrize("slots", [3, 11, 17])
@pytest.mark.parametrize(("name", "interval"), [("static", None), ("tide", 2), ("tide-as-coded", 1), ("lru", None)])
def test_no_other_choice_of_budgets_is_faster(trace, slots, name, interval):
    budgets = (1, 3, 4, 5, 6, 8, 12) if name == "lru" else (0, 1, 3, 4, 5, 6, 8, 12)
    report = make(trace, slots, policies=[name], budgets=budgets, intervals=[interval or 1])
    workload = trace.workload("block", report.split.tuned)
    knows = known(trace, report.split.profiled)
    times_ns = [
        simulate(
            workload,
            trace.config,
            toy_hardware(),
            make_policy(name, knows, interval and (interval,) * L),
            budget=budget,
            execution=BLOCKING,
            is_memory_checked=False,
        ).makespan_ns
        for budget in itertools.product(budgets, repeat=L)
        if sum(budget) + (name == "lru") <= slots  # one expert of scratch memory
    ]
    assert report.predicted.makespan_ns == min(times_ns)


def test_intervals_that_were_not_asked_for_are_not_chosen(trace):
    chosen = make(trace, policies=["tide", "tide-as-coded"], intervals=[3]).chosen
    assert chosen.refresh_interval == (3, 3)


def test_layers_that_share_no_link_add_up_exactly(report):
    assert [programme.table_error for programme in report.programmes] == [0.0] * 5
    assert [programme.policy for programme in report.programmes] == ["static", "tide", "tide-as-coded", "lru", "gain"]


def test_layers_that_share_a_link_are_simulated_again(trace):
    hardware = machine(trace, 13, BACKGROUND)
    slow = replace(hardware.links, h2d_pinned=replace(hardware.links.h2d_pinned, bytes_per_s=0.003e9))
    # Only uneven budgets use all 13 slots, so the chosen layers never ran beside each other in the table.
    options = {"policies": ["tide"], "budgets": [4, 9], "intervals": [1], "reserve_bytes": 0, "workers": 1}
    report = plan(trace, trace.config, replace(hardware, links=slow), execution=BACKGROUND, **options)
    assert sorted(report.programme.budget) == [4, 9]
    assert report.programme.table_error != 0
    assert report.predicted.makespan_s <= report.programme.resimulated_s


def test_the_bound_is_below_every_choice_of_the_table(report):
    for programme in report.programmes:
        assert programme.solver.status == "optimal"
        assert programme.solver.bound <= programme.solver.objective
        assert programme.solver.bound <= programme.resimulated_s  # exact with blocking copies
    assert report.chosen.proof.bound == report.programme.solver.bound
    assert report.gap == report.chosen.proof.gap < 1e-6


def test_same_input_same_plan(trace, report, tmp_path):
    again = make(trace)
    report.chosen.save(tmp_path / "one.json")
    again.chosen.save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert Plan.load(tmp_path / "one.json") == report.chosen
    assert again.baselines == report.baselines


def test_processes_change_nothing(trace, report):
    assert make(trace, workers=2).chosen == report.chosen


def test_nothing_is_simulated_twice(trace, monkeypatch):
    seen = []

    def counted(workload, model, hardware, policy, *, budget, **settings):
        seen.append((id(workload), policy.name, policy.refresh_interval, policy.refresh_steps, budget))
        return simulate(workload, model, hardware, policy, budget=budget, **settings)

    monkeypatch.setattr(planner_runs, "timed", counted)
    report = make(trace)
    assert len(seen) == len(set(seen)) == report.num_runs


def test_progress_ends_with_everything_done(trace):
    calls = []
    report = make(trace, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, report.num_runs + 1))
    assert all(done <= total for done, total in calls)
    assert calls[-1] == (report.num_runs, report.num_runs)


# --- what it is compared with ---


def test_baselines_use_the_largest_uniform_budget(report):
    named = {baseline.name: baseline for baseline in report.baselines}
    assert set(named) == {
        *("tide, every step", "tide-as-coded, every step", "tide, own programme", "tide-as-coded, own programme"),
        *("static", "lru", "all-host"),
    }
    assert named["tide, every step"].predicted.refresh_interval == (1, 1)
    assert named["tide, every step"].predicted.budget == named["lru"].predicted.budget == 5
    assert named["all-host"].is_reference
    assert named["all-host"].predicted.hits == 0


def test_the_programme_of_tide_is_simulated_as_it_chose(report):
    named = {baseline.name: baseline for baseline in report.baselines}
    for programme in report.tide:
        result = named[f"{programme.policy}, own programme"].predicted
        assert (result.policy, result.budget) == (programme.policy, programme.budget)
        assert result.refresh_interval == (programme.interval,) * L


def test_all_device_is_a_reference_where_it_fits(trace):
    named = {baseline.name: baseline for baseline in make(trace, L * E).baselines}
    assert named["all-device"].is_reference
    assert named["all-device"].predicted.misses == 0
    assert "all-device" not in {baseline.name for baseline in make(trace, L * E - 1).baselines}


def test_static_placement_is_the_popularity_of_the_training_sequences(trace):
    report = make(trace, policies=["static"])
    popularity = counted(trace, report.split.training)
    for layer, ids in enumerate(report.chosen.placement.experts):
        assert set(ids) == set(np.argsort(-popularity[layer], kind="stable")[: len(ids)].tolist())


def test_the_report_is_json_with_the_keys_that_the_command_promises(report):
    document = json.loads(report.to_json())
    assert {"chosen", "predicted", "baselines", "gap", "solver", "held_out", "solve_s"} <= set(document)
    assert document["chosen"]["policy"] == report.chosen.policy
    assert document["held_out"]["tok_per_s"] == report.held_out.tok_per_s
    assert document["held_out"]["sequences"] == list(report.split.held_out)
    assert {row["baseline"] for row in document["baselines"]} == {row.name for row in report.baselines}
    assert all(row["tok_per_s"] > 0 for row in document["baselines"] + document["held_out"]["baselines"])


# --- splitting ---


@pytest.mark.parametrize("num_sequences", [2, 3, 10, 17])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.99])
def test_held_out_sequences_are_never_trained_on(num_sequences, share):
    split = split_sequences(num_sequences, share, seed=3)
    assert sorted(split.training + split.held_out) == list(range(num_sequences))
    assert split.tuned
    assert split.held_out
    assert len(split.profiled) == len(split.training) // 2
    assert split == split_sequences(num_sequences, share, seed=3)


def test_another_seed_holds_out_other_sequences():
    assert len({split_sequences(12, 0.25, seed).held_out for seed in range(10)}) > 5


def test_choosing_never_sees_a_held_out_sequence(trace, report):
    # A trace whose held-out sequences were other ones altogether gives the same choice.
    assert report.chosen.trace.held_out == report.split.held_out
    assert set(report.split.training) & set(report.split.held_out) == set()
    assert set(report.split.tuned) & set(report.split.profiled) == set()
    assert set(report.split.tuned) | set(report.split.profiled) == set(report.split.training)
    generated = trace.sequences["generated_tokens"]
    assert report.predicted.generated_tokens == generated[list(report.split.tuned)].sum()
    assert report.held_out.generated_tokens == generated[list(report.split.held_out)].sum()


def test_a_share_of_zero_holds_out_nothing(trace):
    report = make(trace, held_out_share=0)
    assert report.split.training == tuple(range(len(STEPS)))
    assert report.held_out is report.chosen.held_out is report.to_dict()["held_out"] is None


@pytest.mark.parametrize(
    ("num_sequences", "share", "message"),
    [(1, 0.25, "cannot be split"), (0, 0.25, "no sequence"), (5, 1.0, "held_out_share"), (5, -0.1, "held_out_share")],
)
def test_a_split_that_cannot_be_made_is_refused(num_sequences, share, message):
    with pytest.raises(PlanError, match=message):
        split_sequences(num_sequences, share, 0)


def test_the_table_may_be_filled_on_fewer_sequences(trace, report):
    one = make(trace, table_visits=1)
    assert one.table_forwards == trace.workload("block", report.split.tuned[:1]).num_forwards
    assert report.table_forwards == trace.workload("block", report.split.tuned).num_forwards
    assert one.predicted.num_forwards == report.predicted.num_forwards
    assert run(trace, one, one.split.tuned) == one.predicted


# --- memory ---


def test_memory_is_set_aside_for_the_longest_sequence_whatever_it_was_used_for(trace):
    reports = [make(trace, policies=["static"], seed=seed) for seed in range(6)]
    longest = len(STEPS) - 1
    assert any(longest in report.split.profiled for report in reports)
    assert {report.chosen.max_tokens for report in reports} == {trace.workload().max_tokens}


def test_too_little_memory_says_which_reserve_would_do(trace):
    with pytest.raises(
        InfeasibleError, match=r"other weights .*, KV cache .*, transient peak .*, reserve 0\.00"
    ) as error:
        make(trace, slots=-1, reserve_bytes=1000)
    largest = trace.config.expert_bytes
    assert "a reserve of at most" not in str(error.value)
    with pytest.raises(InfeasibleError, match=rf"a reserve of at most {4 * largest} bytes"):
        make(trace, slots=4, reserve_bytes=4 * largest + 1)
    assert make(trace, slots=4, reserve_bytes=4 * largest).chosen.budget == (0, 0)


def test_too_little_memory_says_which_length_or_device_would_do(trace):
    model, hardware = trace.config, machine(trace, 200)
    assert measure_room(model, hardware, BLOCKING, 16, 0).slots >= 0
    with pytest.raises(InfeasibleError, match=r"sequences of at most (\d+) tokens would do") as error:
        measure_room(model, hardware, BLOCKING, 10_000, 0)
    longest = int(str(error.value).split("at most ")[1].split()[0])
    assert measure_room(model, hardware, BLOCKING, longest, 0).slots >= 0
    with pytest.raises(InfeasibleError):
        measure_room(model, hardware, BLOCKING, longest + 1, 0)
    tiny = replace(hardware, device=replace(hardware.device, memory_bytes=10))
    with pytest.raises(InfeasibleError, match="a device with at least"):
        measure_room(model, tiny, BLOCKING, 16, 0)


def test_budgets_that_do_not_fit_are_refused_with_one_that_does(trace):
    with pytest.raises(InfeasibleError, match=rf"takes {6 * L * 192} bytes, and {11 * 192} bytes \(11 experts\).*of 5"):
        make(trace, budgets=[6, 8])
    with pytest.raises(InfeasibleError, match="'lru' fetches into slots"):
        make(trace, policies=["lru"], budgets=[0])
    with pytest.raises(InfeasibleError, match="another policy than 'lru'"):
        make(trace, slots=1, policies=["lru"])
    with pytest.raises(BudgetError, match=r"budget\(=17\)"):
        make(trace, budgets=[17])


def test_with_unified_memory_every_expert_is_there(trace):
    hardware = replace(machine(trace, L * E), is_unified=True, links=None)
    report = plan(trace, trace.config, hardware, execution=BLOCKING, reserve_bytes=0, workers=1)
    assert report.slots == L * E
    assert report.predicted.h2d_bytes == 0


# --- candidates ---


@pytest.mark.parametrize(
    ("slots", "budgets"),
    [(0, (0,)), (7, (0, 1, 2)), (19 * 10 + 3, (0, 5, 8, 9, 10, 11, 13, 15)), (19 * 16, (0, 8, 12, 14, 16))],
)
def test_budgets_hold_none_the_largest_uniform_one_and_some_around(slots, budgets):
    assert default_budgets(slots, num_layers=19, num_experts=16) == budgets


def test_intervals_no_shorter_than_every_block_are_tried_once(trace):
    workload = trace.workload()
    assert max(max(steps) for steps in STEPS) == 5
    assert distinct_intervals((32, 1, 2, 8, 4, 2, 12), workload) == (1, 2, 4, 8)
    assert distinct_intervals((16, 32), workload) == (16,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "thrift"}, r"objective\(='thrift'\) must be one of throughput"),
        ({"policies": ["tide", "oracle"]}, r"policies\(=oracle\) must be some of static, tide, tide-as-coded, lru"),
        ({"policies": []}, "policies"),
        ({"intervals": [0, 1]}, "intervals"),
        ({"intervals": []}, "intervals"),
        ({"budgets": []}, "there must be a budget"),
        ({"solver": "gurobi"}, "no solver 'gurobi'"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"workers": 0}, "workers"),
    ],
)
def test_arguments_that_allow_no_plan_are_refused(trace, changes, message):
    with pytest.raises(ValueError, match=message):
        make(trace, **changes)


def test_routing_of_another_kind_of_network_is_refused(trace):
    with pytest.raises(InputError, match="same experts and top-k"):
        plan(trace, replace(trace.config, top_k=3), machine(trace, 11), execution=BLOCKING, reserve_bytes=0, workers=1)


def test_layers_are_repeated_for_a_deeper_model(trace):
    model = replace(trace.config, name="deeper", num_layers=5)
    hardware = toy_hardware()
    report = plan(trace, model, hardware, execution=BLOCKING, reserve_bytes=0, workers=1, policies=["static"])
    assert report.predicted.model == "routing of hand-made at the sizes of deeper"
    assert len(report.chosen.budget) == 5
    assert report.chosen.trace.model == "hand-made"


# --- out of time ---


def test_a_time_limit_still_gives_a_plan(trace, report):
    hurried = make(trace, time_limit_s=1e-9)
    assert sum(hurried.chosen.budget) <= 11
    assert hurried.chosen.proof.status in ("optimal", "feasible", "uniform")
    assert hurried.predicted.makespan_s >= report.predicted.makespan_s
    assert hurried.chosen.proof.bound <= report.chosen.proof.objective


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_solvers_agree_on_the_plan(trace, report, solver):
    assert make(trace, solver=solver).predicted.makespan_ns == report.predicted.makespan_ns


# --- in the terms of the released TIDE code ---


@pytest.mark.parametrize(
    ("case", "budget", "steps", "why"),
    [
        (Case("tide", (5, 6, 9), (1, 4, 8), "training"), 6, 4, "median interval"),
        (Case("tide", (0, 0, 9), (1, 4, 8), "training"), 3, 8, "median interval"),
        (Case("tide", (0, 0, 0), (2, 4, 8), "training"), 0, 2, "median interval"),
        (Case("static", (5, 6, 9), None, "training"), 6, 32, "never refreshes"),
        (Case("lru", (5, 6, 9), None, "training"), 6, 1, "every forward"),
    ],
)
def test_a_plan_in_the_terms_of_the_released_code(case, budget, steps, why):
    terms = tide_code(case, block_length=32)
    assert (terms.max_gpu_experts_per_layer, terms.jump_steps) == (budget, steps)
    assert why in terms.derivation


def test_the_miss_rule_is_that_of_the_policy(trace):
    for name in ("static", "tide", "lru"):
        chosen = make(trace, policies=[name]).chosen
        params = {"popularity": []} if name == "static" else {}
        assert chosen.miss_rule == policy(name, **params).miss_action
