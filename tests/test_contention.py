"""Device, host and copies beside each other in one memory: timetables to the nanosecond, and what always holds."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import simpy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recurrence import timed_by_hand
from simulator_cases import MIXED, SWAPPED, cases, hardware, make_policy, parts, play, run_case
from toy import toy_hardware

from tidesim.hardware import Contention
from tidesim.simulator.contention import SharedMemory

WHO = {"device": "device", "host": "host", "h2d": "copies", "d2h": "copies"}


def shares(**changes: float) -> Contention:
    """Nobody slows anybody but as `changes` say."""
    return Contention(**dict.fromkeys(Contention.__dataclass_fields__, 1.0) | changes)


def contended(machine=None, **changes: float):
    return replace(machine or toy_hardware(), contention=shares(**changes))


# --- the shared memory alone ---


@pytest.fixture
def env():
    return simpy.Environment()


@pytest.fixture
def log():
    return []


def working(env, log, memory, *jobs):
    """Run (resource, start, duration alone) side by side; what comes back is (resource, start, end), by end."""

    def work(resource, start_ns, duration_ns):
        yield env.timeout(start_ns)
        yield from memory.work(resource, duration_ns)
        log.append((resource, start_ns, env.now))

    for job in jobs:
        env.process(work(*job))
    env.run()
    return sorted(log, key=lambda entry: (entry[2], entry[0]))


def test_who_is_alone_is_not_slowed(env, log):
    memory = SharedMemory(env, shares(device_beside_host=0.5, host_beside_device=0.5))
    assert working(env, log, memory, ("device", 0, 10), ("host", 10, 10)) == [("device", 0, 10), ("host", 10, 20)]


def test_who_ends_first_leaves_the_other_at_full_speed(env, log):
    # Device: 0 to 200 at a half does 100. Host: 0.8 x 200 = 160 by then, the other 40 alone.
    memory = SharedMemory(env, shares(device_beside_host=0.5, host_beside_device=0.8))
    assert working(env, log, memory, ("device", 0, 100), ("host", 0, 200)) == [("device", 0, 200), ("host", 0, 240)]


def test_who_comes_later_slows_what_is_left(env, log):
    # Device: 40 alone, then 60 at a half until 160. Host: from 40 on 0.8 x 120 = 96 by then, 4 alone.
    memory = SharedMemory(env, shares(device_beside_host=0.5, host_beside_device=0.8))
    assert working(env, log, memory, ("device", 0, 100), ("host", 40, 100)) == [("device", 0, 160), ("host", 40, 164)]


def test_shares_multiply_when_three_are_busy_at_once(env, log):
    # Device at 0.5 x 0.8 = 0.4: 40 by 100. Host at 0.25 x 0.8 = 0.2: 20 by 100. Copies at 0.5 x 1: 50, done at 100.
    # Then device at 0.5, 60 more by 220, host at 0.25, 30 more by 220; and the host's last 50 alone.
    memory = SharedMemory(
        env,
        shares(
            device_beside_host=0.5,
            device_beside_copies=0.8,
            host_beside_device=0.25,
            host_beside_copies=0.8,
            copies_beside_device=0.5,
        ),
    )
    assert working(env, log, memory, ("device", 0, 100), ("host", 0, 100), ("h2d", 0, 50)) == [
        ("h2d", 0, 100),
        ("device", 0, 220),
        ("host", 0, 270),
    ]


def test_copies_in_both_directions_slow_as_much_as_one_and_not_each_other(env, log):
    memory = SharedMemory(env, shares(device_beside_copies=0.5))
    assert working(env, log, memory, ("h2d", 0, 30), ("d2h", 0, 50), ("device", 0, 40)) == [
        ("h2d", 0, 30),
        ("d2h", 0, 50),
        ("device", 0, 65),
    ]


def test_ends_are_rounded_up_to_whole_nanoseconds_and_nothing_else_is(env, log):
    # Device: 10 at 0.3 take 33.3. Host: at 0.7 it has done 23.8 by 34, and the other 6.2 take 7.
    memory = SharedMemory(env, shares(device_beside_host=0.3, host_beside_device=0.7))
    assert working(env, log, memory, ("device", 0, 10), ("host", 0, 30)) == [("device", 0, 34), ("host", 0, 41)]


def test_shares_that_floats_cannot_hold_give_exact_ends(env, log):
    # 3 at 0.1 are 30, though 0.1 is a little more than a tenth; 21 at 0.7 are 30, though 0.7 is a little less.
    memory = SharedMemory(env, shares(device_beside_host=0.1, host_beside_device=0.7))
    assert working(env, log, memory, ("device", 0, 3), ("host", 0, 21)) == [("device", 0, 30), ("host", 0, 30)]


def test_no_work_takes_no_time(env, log):
    memory = SharedMemory(env, shares(device_beside_host=0.5))
    assert working(env, log, memory, ("device", 5, 0), ("host", 5, 0)) == [("device", 5, 5), ("host", 5, 5)]


# --- timetables of runs ---


def test_host_beside_device_in_one_memory():
    # Experts alone: device 200, host 1540. Beside each other the device takes 400, by when the host has done 320.
    timeline, result = play(
        [MIXED], "static", machine=contended(device_beside_host=0.5, host_beside_device=0.8), host="parallel"
    )
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("device", "experts", 1200, 1600),
        ("host", "experts", 1200, 2820),
        ("device", "head", 2820, 3820),
    ]
    assert parts(result) == [1000, 400, 0, 1220, 0]
    assert parts(result, "outside") == [1200, 0, 0, 0, 0]
    assert result.busy_ns == {"device": 2600, "host": 1620, "h2d": 0, "d2h": 0}


def test_host_after_device_is_not_slowed():
    machine = contended(device_beside_host=0.5, host_beside_device=0.5, device_beside_copies=0.5)
    assert play([MIXED], "static", machine=machine) == play([MIXED], "static")


def test_a_background_copy_beside_half_of_a_dense_part():
    # From 3540 on two copies of 310 run beside the head. At 0.5 they take 1240, until 4780; at 0.8 the head has done
    # 992 by then and ends 8 later.
    machine = contended(copies_beside_device=0.5, device_beside_copies=0.8)
    timeline, result = play([SWAPPED, SWAPPED], machine=machine, copies="background")
    assert timeline[3:] == [
        ("device", "head", 3540, 4788),
        ("h2d", "promote 2", 3540, 4160),
        ("h2d", "promote 3", 4160, 4780),
        ("device", "entry", 4788, 4988),
        ("device", "dense", 4988, 5988),
        ("device", "experts", 5988, 6188),
        ("device", "head", 6188, 7188),
    ]
    assert parts(result, "outside") == [200 + 1248 + 200 + 1000, 0, 0, 0, 0]
    assert result.busy_ns["h2d"] == 1240


def test_three_at_once_in_one_run():
    # Copies of 1510 each begin at 3540 beside the head of the first forward.
    machine = contended(device_beside_copies=0.5, copies_beside_device=0.5, host_beside_copies=0.25)
    timeline, result = play(
        [SWAPPED, [0, 0, 2, 2, 2, 0, 0, 0]],
        machine=machine,
        host="parallel",
        copies="background",
        copies_per_expert=121,
    )
    # Head, entry and dense part run at a half, hence for 4400 in all; so does the first copy, and then the second has
    # done 690 of its 1510 when the dense part ends. The other 820 run alone beside the host, which does 205 of its 970.
    assert timeline[3:] == [
        ("device", "head", 3540, 5540),
        ("h2d", "promote 2", 3540, 6560),
        ("device", "entry", 5540, 5940),
        ("device", "dense", 5940, 7940),
        ("h2d", "promote 3", 6560, 8760),
        ("host", "experts", 7940, 9525),
        ("device", "experts", 8760, 8960),
        ("device", "head", 9525, 10525),
    ]
    assert parts(result) == [1000 + 2000, 200, 0, 2340 + 565, 820]


def test_launching_is_not_slowed_and_slows_nobody():
    # Ops of the head outlast its 1000 by 300, while two copies run: at a half beside the head, at full speed after it.
    slow = hardware("device", eager_op_s=130e-9)
    machine = contended(slow, copies_beside_device=0.5, device_beside_copies=0.5)
    timeline, result = play(
        [SWAPPED, SWAPPED], "tide", machine=machine, copies="background", copies_per_expert=121, kernels="grouped"
    )
    # Dense part, launch 300 and host 2340 until 3840. The head is done at 5840, the copy has done 1000 of its 1510. It
    # does 300 more beside the launch, 200 beside the entry and its last 10 beside the dense part.
    assert timeline[3:6] == [
        ("device", "head", 3840, 5840),
        ("h2d", "promote 2", 3840, 6560),
        ("device", "entry", 6140, 6540),
    ]
    assert parts(result, "outside")[2] == 600


def test_blocking_copies_run_alone():
    machine = contended(copies_beside_device=0.5, copies_beside_host=0.5, device_beside_copies=0.5)
    assert play([SWAPPED], machine=machine, write_back=True) == play([SWAPPED], write_back=True)


def test_a_copy_that_the_run_leaves_unfinished_is_busy_up_to_its_end():
    # Of its 310 it does 250 beside the head.
    timeline, result = play([SWAPPED], machine=contended(copies_beside_device=0.25), copies="background")
    assert timeline[3:] == [("device", "head", 3540, 4540), ("h2d", "promote 2", 3540, 4540)]
    assert result.busy_ns["h2d"] == 1000


# --- properties ---


@st.composite
def contentions(draw: st.DrawFn) -> Contention:
    share = st.one_of(st.sampled_from([0.05, 0.3, 0.5, 0.7, 1.0]), st.floats(0.05, 1))
    return Contention(**{name: draw(share) for name in Contention.__dataclass_fields__})


def millionths(contention: Contention, resource: str, beside: set[str]) -> int:
    """Speed of `resource` in millionths of millionths, worked out here once more."""
    speed = 10**12
    for other in {WHO[name] for name in beside} - {WHO[resource]}:
        speed = speed * round(getattr(contention, f"{WHO[resource]}_beside_{other}") * 10**6) // 10**6
    return speed


def assume_routing_only(case):
    """A policy that decides by predicted times may decide otherwise where memory is shared."""
    assume(make_policy(*case[3]).is_routing_only)


def run_contended(case, contention, **changes):
    return run_case(case, machine=replace(case[2], contention=contention), **changes)


@settings(deadline=None)
@given(cases())
def test_full_shares_give_exactly_the_run_without_the_section(case):
    alone, beside, decisions, others = [], [], [], []
    result = run_case(case, timeline=alone, decisions=decisions.append)
    assert run_contended(case, shares(), timeline=beside, decisions=others.append) == result
    assert (beside, others) == (alone, decisions)


@settings(deadline=None)
@given(cases())
def test_shares_that_hardly_slow_come_out_where_no_shares_do(case):
    """The same events on the way that is taken beside others: what ends there is what ends on the plain way."""
    assume_routing_only(case)
    alone, beside = [], []
    result = run_case(case, timeline=alone)
    hardly = run_contended(case, shares(host_beside_copies=0.999999), timeline=beside)
    # A millionth of a run this short is a nanosecond for each piece of work on the host at most.
    num_pieces = len([interval for interval in alone if interval.resource == "host"])
    assert 0 <= hardly.makespan_ns - result.makespan_ns <= num_pieces


@settings(max_examples=80, deadline=None)
@given(cases(), contentions())
def test_contention_never_speeds_a_run_up_nor_slows_it_below_its_lowest_speeds(case, contention):
    assume_routing_only(case)
    workload, model, machine, (name, params), budgets, used = case
    result = run_contended(case, contention)
    lowest = {resource: 10**12 / Fraction(millionths(contention, resource, set(WHO))) for resource in WHO}
    for stretch, sign in (({}, 1), (lowest, -1)):
        times, _ = timed_by_hand(workload, model, machine, make_policy(name, params), budgets, used, stretch)
        assert sign * result.makespan_ns >= sign * sum(map(sum, times))


@settings(max_examples=80, deadline=None)
@given(cases(), contentions())
def test_everything_does_its_work_and_ends_in_the_nanosecond_in_which_it_is_done(case, contention):
    assume_routing_only(case)
    alone, beside = [], []
    run_case(case, timeline=alone)
    makespan_ns = run_contended(case, contention, timeline=beside).makespan_ns

    def done(interval, until_ns):
        """Work done by `until_ns`, in millionths of millionths of a nanosecond's."""
        edges = {edge for other in beside for edge in (other.start_ns, other.end_ns)}
        inside = sorted({interval.start_ns, until_ns} | {e for e in edges if interval.start_ns < e < until_ns})
        work = 0
        for start_ns, end_ns in pairwise(inside):
            busy = {other.resource for other in beside if other.start_ns <= start_ns and end_ns <= other.end_ns}
            work += millionths(contention, interval.resource, busy) * (end_ns - start_ns)
        return work

    for resource in WHO:
        planned, lasted = ([one for one in timeline if one.resource == resource] for timeline in (alone, beside))
        for one, two in zip(planned, lasted, strict=False):
            assert (one.name, one.forward, one.layer) == (two.name, two.forward, two.layer)
            duration = (one.end_ns - one.start_ns) * 10**12
            if two.end_ns < makespan_ns:
                assert done(two, two.end_ns) >= duration
            if duration and two.end_ns <= makespan_ns:
                assert done(two, two.end_ns - 1) < duration


@settings(deadline=None)
@given(cases(), contentions())
def test_a_contended_run_is_the_same_run_every_time_and_its_books_agree(case, contention):
    runs = []
    for _ in range(2):
        timeline, decisions = [], []
        runs.append(
            (run_contended(case, contention, timeline=timeline, decisions=decisions.append), timeline, decisions)
        )
    assert runs[0] == runs[1]
    result, timeline, decisions = runs[0]
    if make_policy(*case[3]).is_routing_only:
        uncontended = []
        run_case(case, decisions=uncontended.append)
        assert decisions == uncontended
    busy = dict.fromkeys(result.busy_ns, 0)
    for interval in timeline:
        busy[interval.resource] += min(interval.end_ns, result.makespan_ns) - interval.start_ns
    assert busy == result.busy_ns
    assert timeline == sorted(timeline, key=lambda interval: interval.start_ns)
    for resource in WHO:
        mine = [interval for interval in timeline if interval.resource == resource]
        assert all(one.end_ns <= two.start_ns for one, two in pairwise(mine))
