"""What a run waited for: a path worked out by hand, and what holds for the path of any run."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recurrence import timed_by_hand
from simulator_cases import MIXED, SWAPPED, cases, make_policy, run_case
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.critical_path import critical_path
from tidesim.hardware import Contention
from tidesim.policies import policy
from tidesim.simulator import END, simulate

# Two experts are missed and promoted in the background, each for 1510 ns; the next forward needs both.
TABLES = ([SWAPPED], [[0, 0, 2, 2, 2, 0, 0, 0]])
SLOW_LINK = toy_execution(host="parallel", copies="background", copies_per_expert=121)


def path_of(*tables, execution=SLOW_LINK, machine=None, name="tide", budget=2, **changes):
    return critical_path(
        toy_workload(*tables),
        TOY,
        machine or toy_hardware(),
        policy(name),
        budget=budget,
        execution=execution,
        is_memory_checked=False,
        **changes,
    )


def path_of_case(case, machine=None):
    workload, model, plain, (name, params), budgets, used = case
    return critical_path(
        workload,
        model,
        machine or plain,
        make_policy(name, params),
        budget=budgets,
        execution=used,
        is_memory_checked=False,
        most_tasks=None,
    )


# --- by hand ---


def test_a_task_names_what_it_waited_for():
    tasks = []
    simulate(toy_workload(*TABLES), TOY, toy_hardware(), policy("tide"), budget=2, execution=SLOW_LINK, tasks=tasks)
    named = [f"{task.name} {task.forward}" for task in tasks]
    waits = {name: {named[number] for number in task.after} for name, task in zip(named, tasks, strict=True)}
    assert waits == {
        "entry 0": set(),
        "dense 0": {"entry 0"},
        "experts 0": {"dense 0"},  # on the host: nobody is resident who has rows
        "head 0": {"experts 0", "dense 0"},
        "promote 2 0": {"experts 0", "dense 0"},
        "promote 3 0": {"experts 0", "dense 0", "promote 2 0"},
        "entry 1": {"head 0"},
        "dense 1": {"entry 1"},
        # The host's task has the same name as the device's, which is the later one and stays.
        "experts 1": {"dense 1", "promote 3 0"},
        "head 1": {"experts 1"},
        "end 1": {"head 1"},
    }
    assert [task.end_ns for task in tasks if task.resource == END] == [7760]


def test_the_path_goes_through_the_copies_that_a_layer_waits_for():
    # entry 200, dense 1000, host 2340, two copies of 1510, experts 200, head 1000.
    path = path_of(*TABLES)
    assert path.makespan_ns == 200 + 1000 + 2340 + 2 * 1510 + 200 + 1000 == 7760
    assert {share.resource: share.path_ns for share in path.resources} == {
        "h2d": 3020,
        "device": 2400,
        "host": 2340,
        "d2h": 0,
        "launch": 0,
    }
    assert [(share.work, share.path_ns, share.num_tasks) for share in path.works] == [
        ("copies to the device", 3020, 2),
        ("missed experts", 2340, 1),
        ("attention, router and shared experts", 1000, 1),
        ("lm_head and sampling", 1000, 1),
        ("embedding and layers without experts", 200, 1),
        ("resident experts", 200, 1),
    ]


def test_what_is_left_where_one_takes_no_time():
    # Without the host, copies go from 1200 to 4220 and the experts end at 4420, the head at 5420. Without the link, the
    # second host part goes from 5740 to 6710. Without the device, the copies end at 5360.
    bounds = {share.resource: share.bound_ns for share in path_of(*TABLES).resources}
    assert bounds == {"host": 5420, "h2d": 7710, "device": 5360, "d2h": 7760, "launch": 7760}
    slack = {share.resource: share.slack_ns for share in path_of(*TABLES).resources}
    assert slack == {"host": 2340, "h2d": 50, "device": 2400, "d2h": 0, "launch": 0}


def test_stretches_are_the_longest_pieces_of_one_resource():
    found = path_of(*TABLES).stretches
    assert [(one.resource, one.path_ns, one.num_tasks) for one in found] == [
        ("h2d", 3020, 2),
        ("host", 2340, 1),
        ("device", 1200, 2),
        ("device", 1200, 2),
    ]
    assert (found[0].first_forward, found[0].first_layer, found[0].first_work) == (0, 0, "copies to the device")
    assert (found[2].first_work, found[2].first_layer) == ("embedding and layers without experts", None)
    assert (found[3].last_work, found[3].last_forward, found[3].last_layer) == ("lm_head and sampling", 1, None)


def test_a_copy_that_has_arrived_is_waited_for_where_the_device_takes_no_time():
    # Copies of 310 hide under the head of 1000. Without the device they do not: host 2340, then both copies.
    path = path_of([SWAPPED], [SWAPPED], execution=toy_execution(copies="background"))
    shares = {share.resource: share for share in path.resources}
    assert (shares["h2d"].path_ns, shares["h2d"].bound_ns) == (0, path.makespan_ns)
    assert shares["device"].bound_ns == 2340 + 2 * 310


def test_launching_that_outlasts_kernels_is_on_the_path():
    slow = replace(toy_hardware(), device=replace(toy_hardware().device, eager_op_s=120e-9))
    path = path_of([SWAPPED], machine=slow, execution=toy_execution())
    # 10 ops of the dense part take 1200 against 1000; the head's as well; 5 of each of two experts 1200 against 200.
    launch = next(share for share in path.resources if share.resource == "launch")
    assert (launch.path_ns, launch.bound_ns) == (200 + 200 + 1000, path.makespan_ns - 1400)


def test_what_runs_beside_the_path_is_not_on_it():
    # Experts on the device take 200 beside 1540 on the host.
    path = path_of([MIXED], execution=toy_execution(host="parallel"))
    assert path.makespan_ns == 200 + 1000 + 1540 + 1000
    assert "resident experts" not in {share.work for share in path.works}


def test_a_path_is_told_in_seconds():
    document = json.loads(json.dumps(path_of(*TABLES).to_dict()))
    assert document["makespan_s"] == pytest.approx(7760e-9)
    assert document["resources"][0] == {
        "resource": "h2d",
        "path_s": pytest.approx(3020e-9),
        "share": pytest.approx(3020 / 7760),
        "bound_s": pytest.approx(7710e-9),
        "slack_s": pytest.approx(50e-9),
    }


# --- samples ---


def sequences(*lengths):
    workload = toy_workload(*[[SWAPPED]] * sum(lengths))
    return replace(workload, sequence=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))


@pytest.mark.parametrize(("most_tasks", "num_forwards"), [(None, 21), (1000, 21), (60, 12), (40, 9), (1, 1)])
def test_a_sample_is_of_whole_sequences_where_they_are_short_enough(most_tasks, num_forwards):
    # The first eight forwards have 33 tasks: entry, dense, host and head of each, and the end.
    path = critical_path(
        sequences(12, 9),
        TOY,
        toy_hardware(),
        policy("all-host"),
        budget=0,
        execution=toy_execution(),
        most_tasks=most_tasks,
    )
    assert (path.num_forwards, path.all_forwards) == (num_forwards, 21)


# --- properties ---


@st.composite
def contentions(draw: st.DrawFn) -> Contention | None:
    share = st.sampled_from([0.05, 0.3, 0.7, 1.0])
    return draw(st.none() | st.builds(Contention, **dict.fromkeys(Contention.__dataclass_fields__, share)))


@settings(max_examples=50, deadline=None)
@given(cases(), contentions())
def test_the_longest_path_is_as_long_as_the_run(case, contention):
    machine = replace(case[2], contention=contention)
    makespan_ns = run_case(case, machine=machine).makespan_ns
    path = path_of_case(case, machine)
    assert path.makespan_ns == makespan_ns
    assert sum(share.path_ns for share in path.resources) == makespan_ns
    assert sum(share.path_ns for share in path.works) == makespan_ns
    assert sum(share.share for share in path.resources) == pytest.approx(1)
    assert [share.path_ns for share in path.works] == sorted((share.path_ns for share in path.works), reverse=True)


@settings(max_examples=50, deadline=None)
@given(cases(), contentions())
def test_a_task_starts_when_the_last_that_it_waited_for_has_ended(case, contention):
    machine, tasks = replace(case[2], contention=contention), []
    result = run_case(case, machine=machine, tasks=tasks)
    assert result == run_case(case, machine=machine)
    for number, task in enumerate(tasks):
        assert all(before < number for before in task.after)
        assert task.start_ns == max((tasks[before].end_ns for before in task.after), default=0)
        assert task.end_ns - task.start_ns >= task.alone_ns
    assert all(one.start_ns <= two.start_ns for one, two in pairwise(tasks))
    assert (tasks[-1].resource, tasks[-1].end_ns) == (END, result.makespan_ns)


@settings(max_examples=50, deadline=None)
@given(cases(), contentions())
def test_the_bound_is_the_run_in_which_a_resource_takes_no_time(case, contention):
    """And in which nobody slows the others, worked out without the simulator."""
    workload, model, machine, (name, params), budgets, used = case
    # Who decides by predicted times decides otherwise where it is told that nobody slows the others.
    assume(contention is None or make_policy(name, params).is_routing_only)
    for share in path_of_case(case, replace(machine, contention=contention)).resources:
        assert 0 <= share.slack_ns <= share.path_ns or contention is not None
        if share.resource in ("device", "host", "h2d", "d2h"):
            stretch = {share.resource: 0}
            parts, _ = timed_by_hand(workload, model, machine, make_policy(name, params), budgets, used, stretch)
            assert share.bound_ns == sum(map(sum, parts))
