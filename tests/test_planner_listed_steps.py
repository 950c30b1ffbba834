"""Plans with listed refresh steps: found, run as a whole, held against intervals, saved and shown."""

import json

import pytest
from hand_made import L
from plan_cases import BACKGROUND, BLOCKING, machine, make, write_trace
from rich.console import Console

from tidesim.console.plans import plan_tables
from tidesim.console.runs import shown_steps
from tidesim.execution import Execution
from tidesim.planner import Plan
from tidesim.planner.planning import tide_code
from tidesim.planner.refresh_steps import common_steps, in_turn, steps_by_layer
from tidesim.planner.runs import Case
from tidesim.policies import policy
from tidesim.replay import Replayer
from tidesim.simulator import simulate
from tidesim.trace import Trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    with Trace.open(write_trace(tmp_path_factory.mktemp("traces") / "small.h5")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(trace):
    """A plan that has listed steps: with this much memory they are faster than any interval."""
    return make(trace, 14, BACKGROUND, policies=["tide-as-coded"])


def run(trace, sequences, name, budget, execution: Execution = BACKGROUND, **params):
    how = {"budget": budget, "execution": execution, "is_memory_checked": False}
    workload = trace.workload("block", sequences)
    return simulate(workload, trace.config, machine(trace, 14, execution), policy(name, **params), **how)


def test_a_plan_has_listed_steps_where_they_are_faster(trace, report, tmp_path) -> None:
    chosen = report.chosen
    assert chosen.refresh_interval is None
    assert chosen.refresh_steps is not None
    chosen.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == chosen
    found = run(trace, report.split.tuned, "tide-as-coded", chosen.budget, refresh_steps=loaded.refresh_steps)
    assert found.tok_per_s == report.predicted.tok_per_s


def test_both_kinds_are_scored_on_what_was_planned_on_and_on_what_was_held_out(trace, report) -> None:
    (compared,) = report.listed_steps
    assert compared.refresh_steps == report.chosen.refresh_steps
    name, split = "tide-as-coded", report.split
    rates = [
        run(trace, sequences, name, budget, **params).tok_per_s
        for sequences in (split.tuned, split.held_out)
        for budget, params in (
            (compared.budget, {"refresh_steps": compared.refresh_steps}),
            (compared.constant_budget, {"refresh_interval": compared.refresh_interval}),
        )
    ]
    assert compared.gain == rates[0] / rates[1] - 1 > 0
    assert compared.held_out_gain == rates[2] / rates[3] - 1
    stated = json.loads(report.to_json())["listed_steps"]
    assert stated[0]["gain"] == compared.gain


def test_shortest_paths_and_turns_are_among_what_is_run(trace, monkeypatch) -> None:
    seen = []
    timed = "tidesim.planner.runs.timed"

    def noted(workload, model, hardware, policy, **how):
        seen.append((policy.refresh_steps, how["budget"]))
        return simulate(workload, model, hardware, policy, **how)

    monkeypatch.setattr(timed, noted)
    report = make(trace, 14, BLOCKING, policies=["tide"])
    workload = trace.workload("block", report.split.tuned)
    even = (7, 7)
    how = {"budget": even, "execution": BLOCKING, "is_memory_checked": False}
    costs = Replayer(workload).step_costs(trace.config, machine(trace, 14), policy("tide"), **how)
    ran = {steps for steps, budget in seen if budget == even}
    # A policy states steps that all layers have once.
    assert {steps_by_layer(costs), common_steps(costs), in_turn(2, L, costs.num_steps)} <= ran


def test_without_sequences_held_out_only_what_was_planned_on_is_compared(trace) -> None:
    (compared,) = make(trace, 14, BACKGROUND, policies=["tide"], held_out_share=0).listed_steps
    assert compared.held_out_gain is None
    assert compared.to_dict()["held_out_tok_per_s"] is None


def test_intervals_that_were_asked_for_leave_no_listed_steps(trace) -> None:
    report = make(trace, 14, BACKGROUND, policies=["tide-as-coded"], intervals=[1, 2, 3])
    assert report.listed_steps == ()
    assert report.chosen.refresh_steps is None


def test_a_machine_without_room_has_none(trace) -> None:
    assert make(trace, 1, BACKGROUND, policies=["tide"]).listed_steps == ()


def test_tides_code_gets_the_usual_distance_of_listed_steps() -> None:
    # Distances 2, the whole block, and 2: the median by budget is 2.
    case = Case("tide", (5, 6, 9), None, "tuned", ((0, 2, 4), (0,), (1, 3)))
    assert (tide_code(case, 32).jump_steps, tide_code(case, 32).max_gpu_experts_per_layer) == (2, 6)
    assert tide_code(case._replace(steps=((0,), (0, 1), (5,))), 32).jump_steps == 32


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([0, 1, 2, 3], "steps 0 to 3 of each block"),
        ([[0, 2], [0, 2]], "steps 0,2 of each block"),
        (((0, 2), (0, 2)), "steps 0,2 of each block"),
        ([[0, 2], [1, 3]], "each layer's own steps of a block, 2 of them"),
        ([[0, 2], [1]], "each layer's own steps of a block, 1 to 2 of them"),
        ([], "no step"),
    ],
)
def test_steps_are_shown_in_few_words(steps, expected: str) -> None:
    assert shown_steps(steps) == expected


def test_the_tables_show_both_kinds(report) -> None:
    console = Console(width=200, record=True)
    with console.capture() as captured:
        console.print(plan_tables(json.loads(report.to_json())))
    assert "Listed refresh steps beside constant intervals" in captured.get()
    assert f"{100 * report.listed_steps[0].gain:+.1f} %" in captured.get()
    assert "of each block" in captured.get()
