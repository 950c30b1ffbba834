"""Refresh steps: paths against all schedules there are, costs against the replay, and the verdict by hand."""

import importlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.errors import InputError
from tidesim.planner.refresh_steps import (
    climb,
    common_steps,
    in_turn,
    intervals_by_layer,
    neighbours,
    refresh_steps,
    shortest_path,
    steps_by_layer,
)
from tidesim.policies import policy
from tidesim.policies.rules import Schedule
from tidesim.replay import Replayer
from tidesim.replay.step_costs import StepCosts

TWO_LAYERS = replace(TOY, num_layers=2)


def all_schedules(num_steps):
    return [steps for size in range(num_steps + 1) for steps in itertools.combinations(range(num_steps), size)]


def walked_ns(keep_ns, refresh_ns, steps):
    """The total of a schedule, step by step."""
    last, total_ns = 0, 0
    for step in range(len(keep_ns)):
        total_ns += int((refresh_ns if step in steps else keep_ns)[last][step])
        last = step + 1 if step in steps else last
    return total_ns


@st.composite
def tables(draw: st.DrawFn):
    """Costs of one to three layers with up to six steps; some of them are equal."""
    num_layers, num_steps = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    highest = draw(st.sampled_from([2, 50, 10**9]))
    return StepCosts(*rng.integers(0, highest, (2, num_layers, num_steps, num_steps)))


# --- the path ---


@settings(deadline=None)
@given(tables())
def test_no_schedule_is_shorter_than_the_path(costs):
    schedules = all_schedules(costs.num_steps)
    for keep_ns, refresh_ns, steps in zip(costs.keep_ns, costs.refresh_ns, steps_by_layer(costs), strict=True):
        least_ns = min(walked_ns(keep_ns, refresh_ns, every) for every in schedules)
        assert walked_ns(keep_ns, refresh_ns, steps) == least_ns
    summed = costs.keep_ns.sum(axis=0), costs.refresh_ns.sum(axis=0)
    assert walked_ns(*summed, common_steps(costs)) == min(walked_ns(*summed, every) for every in schedules)


@settings(deadline=None)
@given(tables())
def test_costs_add_up_along_a_schedule(costs):
    for steps in all_schedules(costs.num_steps):
        by_hand = [walked_ns(*pair, steps) for pair in zip(costs.keep_ns, costs.refresh_ns, strict=True)]
        assert costs.time_ns(Schedule.of(None, steps)).tolist() == by_hand


@settings(deadline=None)
@given(tables())
def test_no_constant_interval_is_better_by_the_costs_than_the_path(costs):
    by_layer = costs.time_ns(Schedule.of(None, steps_by_layer(costs)))
    common_ns = costs.time_ns(Schedule.of(None, common_steps(costs))).sum()
    constant_ns = [costs.time_ns(Schedule(interval)) for interval in range(1, costs.num_steps + 1)]
    assert all((by_layer <= times_ns).all() and common_ns <= times_ns.sum() for times_ns in constant_ns)
    best_ns = costs.time_ns(Schedule(intervals_by_layer(costs)))
    assert best_ns.tolist() == np.min(constant_ns, axis=0).tolist()


def test_where_nothing_is_gained_nothing_is_refreshed():
    keep_ns = np.ones((4, 4), np.int64)
    assert shortest_path(keep_ns, keep_ns) == ()


def test_layers_take_turns():
    assert in_turn(2, 3, 5) == ((0, 2, 4), (1, 3), (0, 2, 4))
    assert in_turn(4, 2, 1) == ((0,), ())


# --- the costs ---


def drawn_workload(seed, lengths, kinds="d", num_rows=400):
    """Blocks of so many steps, each followed by the rest of `kinds`, in two layers with hardly any equal counts."""
    rng = np.random.default_rng(seed)
    letters, steps = [], []
    for length in lengths:
        letters += ["d"] * length + list(kinds[1:])
        steps += [*range(length), *[length] * len(kinds[1:])]
    taste = rng.random((len(steps), 2, 1, 8)) + np.linspace(0, 3, len(steps))[:, None, None, None] * rng.random(8)
    picks = np.argsort(-taste - rng.gumbel(0, 0.5, (len(steps), 2, num_rows, 8)), axis=-1)[..., :2]
    counts = (picks[..., None] == np.arange(8)).sum(axis=(2, 3))
    return toy_workload(*counts, kinds="".join(letters), steps=steps)


def costs_and_run(workload, execution, name="tide", budget=(3, 5), machine=None):
    """The costs, and a function that replays a schedule: nanoseconds of the layers' routed experts and copies."""
    kwargs = {"budget": budget, "execution": execution, "is_memory_checked": False}
    replayer, machine = Replayer(workload), machine or toy_hardware()

    def run_ns(steps):
        made = policy(name, refresh_steps=steps)
        rows = replayer.run(TWO_LAYERS, machine, made, **kwargs).layer_parts_ns[:-1]
        return [sum(row[1:]) for row in rows]

    return replayer.step_costs(TWO_LAYERS, machine, policy(name), **kwargs), run_ns


@pytest.mark.parametrize("host", ["serial", "parallel"])
@pytest.mark.parametrize("write_back", [False, True])
def test_costs_are_what_a_replay_with_blocking_copies_takes(host, write_back):
    """Of every schedule, in one block: `tide` holds the same experts after a refresh whatever was before."""
    execution = toy_execution(host=host, write_back=write_back, launch="stream", ops_per_expert=0)
    costs, run_ns = costs_and_run(drawn_workload(1, [4]), execution)
    assert costs.num_steps == 4
    for steps in all_schedules(4):
        assert costs.time_ns(Schedule.of(None, steps)).tolist() == run_ns(steps), steps


def test_blocks_of_any_length_and_what_is_between_them_count():
    """With a refresh on each block's first step at least, who was there in the block before does not matter."""
    workload = drawn_workload(2, [4, 1, 3], kinds="dcp")
    costs, run_ns = costs_and_run(workload, toy_execution())
    for steps in all_schedules(4):
        if 0 in steps:
            copies_ns = np.array(run_ns(steps)) - costs.time_ns(Schedule.of(None, steps))
            # Only how many are new at a block's first step depends on when the block before was refreshed last.
            assert (copies_ns % 310 == 0).all(), steps
    assert run_ns(tuple(range(4))) == costs.time_ns(Schedule(1)).tolist()


def test_background_copies_are_waited_for_beyond_two_visits_or_one_after_a_refresh():
    """A promotion in 3000 pieces takes 30300 ns in place of 310, a visit 1000 ns of dense part and the experts."""
    workload = drawn_workload(3, [3], num_rows=20)
    blocking, slower = (costs_and_run(workload, toy_execution(copies_per_expert=pieces))[0] for pieces in (1, 3000))
    costs, _ = costs_and_run(workload, toy_execution(copies="background", copies_per_expert=3000))
    assert np.array_equal(costs.keep_ns, blocking.keep_ns)
    copy_ns = 30300 * ((slower.refresh_ns - blocking.refresh_ns) // 29990)
    waits = 0
    for layer, (last, step) in itertools.product(range(2), [(0, 0), (0, 1), (1, 1)]):
        this_ns, next_ns = costs.keep_ns[layer, last, step], costs.keep_ns[layer, step + 1, step + 1]
        link_ns = 1000 + this_ns + (0 if (last, step) == (1, 1) else 1000 + next_ns)
        wait_ns = max(0, copy_ns[layer, last, step] - link_ns)
        assert costs.refresh_ns[layer, last, step] == this_ns + wait_ns
        waits += wait_ns > 0
    assert waits
    assert np.array_equal(costs.refresh_ns[..., 2], costs.keep_ns[..., 2])  # nobody comes after the last step


def test_a_block_that_is_refreshed_at_every_step_anyway_is_left_out():
    workload = drawn_workload(4, [3, 2])
    first = np.arange(5) < 3
    costs, run_ns = costs_and_run(replace(workload, is_first_block=first), toy_execution(), name="tide-as-coded")
    assert not costs.keep_ns[:, :, 2].any()
    by_hand = np.array(run_ns((0, 1, 2))) - costs.time_ns(Schedule(1))
    alone = workload.first(3)
    _, run_alone_ns = costs_and_run(replace(alone, is_first_block=first[:3]), toy_execution(), name="tide-as-coded")
    assert by_hand.tolist() == run_alone_ns((0, 1, 2))


def test_policies_without_refreshes_have_no_steps():
    replayer = Replayer(drawn_workload(5, [2]))
    kwargs = {"budget": 2, "execution": toy_execution(), "is_memory_checked": False}
    for name in ("lru", "all-host", "rlx"):
        with pytest.raises(InputError, match=f"{name!r} has no refresh steps to choose"):
            replayer.step_costs(TWO_LAYERS, toy_hardware(), policy(name), **kwargs)


# --- the neighbourhood ---


def test_neighbours_drop_shift_and_add_one_step():
    assert set(neighbours((0, 2), 4)) == {(2,), (1, 2), (0, 1, 2), (0,), (0, 1), (0, 3), (0, 2, 3)}


def test_a_climb_ends_where_no_neighbour_is_faster_or_runs_are_used_up():
    asked = []

    def time_ns(steps):
        asked.append(steps)
        return 10 * len({1, 4} ^ set(steps))

    assert climb((0, 5), 6, time_ns, time_ns, 99) == (1, 4)
    assert len(asked) > len(set(asked))  # by the expectation too
    asked.clear()
    assert climb((0, 5), 6, time_ns, len, 0) == (0, 5)
    assert asked == [(0, 5)]


# --- the verdict ---


def found(**changes):
    given = {"policy_name": "tide", "budget": 3, "execution": toy_execution()} | changes
    training, held_out = drawn_workload(6, [5, 3, 5]), drawn_workload(7, [5, 4])
    return refresh_steps(training, held_out, TWO_LAYERS, toy_hardware(), **given)


def test_listed_steps_are_held_against_every_interval_on_both_parts():
    report = found()
    assert [one.schedule for one in report.intervals] == [Schedule(interval) for interval in range(1, 6)]
    constant = [*report.intervals, report.intervals_by_layer]
    fastest_ns = min(one.training.makespan_ns for one in constant)
    assert report.training_gain == fastest_ns / report.chosen.training.makespan_ns - 1
    assert report.held_out_gain == (
        min(one.held_out.makespan_ns for one in constant) / report.chosen.held_out.makespan_ns - 1
    )
    assert report.is_better == (report.training_gain > 0 and report.held_out_gain > 0)
    assert report.climbed.training.makespan_ns <= min(
        report.path.training.makespan_ns, *(one.training.makespan_ns for one in report.intervals)
    )
    assert report.line in json.loads(json.dumps(report.to_dict()))["line"]
    assert ("not faster" in report.line) != report.is_better
    assert f"{100 * report.training_gain:+.2f} % to" in report.line


def test_choosing_never_looks_at_the_sequences_held_out(monkeypatch):
    report, runs = found(), []
    kwargs = {"policy_name": "tide", "budget": 3, "execution": toy_execution()}
    alone = refresh_steps(drawn_workload(6, [5, 3, 5]), None, TWO_LAYERS, toy_hardware(), **kwargs)
    assert alone.chosen.schedule == report.chosen.schedule
    assert (alone.held_out_gain, alone.num_runs) == (None, report.num_runs)
    assert "held out" not in alone.line
    monkeypatch.setattr(
        importlib.import_module("tidesim.planner.refresh_steps"),
        "timed",
        lambda *args, **_: runs.append(args) or report.path.training,
    )
    refresh_steps(drawn_workload(6, [5, 3, 5]), None, TWO_LAYERS, toy_hardware(), max_runs=3, **kwargs)
    assert len(runs) <= 5 + 4 + 4 + 5  # intervals, starts and ways, neighbours, turns
