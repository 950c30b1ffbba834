"""The compiled replay says what the simulator says, to the nanosecond."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import cases, data_of, make_policy, run_case
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim import windows
from tidesim.errors import BudgetError, InputError
from tidesim.execution import EXECUTIONS, execution
from tidesim.hardware import Contention, Hardware, load_hardware
from tidesim.moe import load_moe_config
from tidesim.policies import POLICIES, Shape, policy
from tidesim.policies.predictors import Previous
from tidesim.policies.victims import SetOrder
from tidesim.replay import Replayer, clock, replay, replaying, script, stretches
from tidesim.replay.rules import build_set, list_set
from tidesim.shipped import find_shipped
from tidesim.simulator import simulate
from tidesim.trace import Trace

RULED = ("all-host", "static", "tide", "tide-as-coded", "lru", "mixtral-offloading")


def replay_case(case):
    workload, model, machine, (name, params), budgets, used = case
    made = make_policy(name, params)
    return replay(workload, model, machine, made, budget=budgets, execution=used, is_memory_checked=False)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_every_policy_under_every_execution_is_replayed_as_it_is_simulated(case):
    assert replay_case(case) == run_case(case)


@settings(deadline=None)
@given(cases())
def test_every_visit_of_a_layer_takes_as_long_as_simulated(case):
    workload, model, machine, (name, params), budgets, used = case
    spent = [np.zeros((workload.num_forwards, workload.num_layers + 1), np.int64) for _ in range(2)]
    for run, times_ns in zip((simulate, replay), spent, strict=True):
        kwargs = {"budget": budgets, "execution": used, "is_memory_checked": False, "spent": times_ns}
        result = run(workload, model, machine, make_policy(name, params), **kwargs)
        assert times_ns.sum() == result.makespan_ns
        assert times_ns.sum(axis=0).tolist() == [sum(parts) for parts in result.layer_parts_ns]
    assert np.array_equal(*spent)


@settings(deadline=None)
@given(cases())
def test_a_policy_is_asked_once_for_all_machines(case):
    workload, model, machine, (name, params), budgets, used = case
    made, replayer = make_policy(name, params), Replayer(workload)
    slower = replace(machine, name="slower", host=replace(machine.host, bytes_per_s=machine.host.bytes_per_s / 3))
    for each in (machine, slower, machine):
        kwargs = {"budget": budgets, "execution": used, "is_memory_checked": False}
        expected = simulate(workload, model, each, make_policy(name, params), **kwargs)
        assert replayer.run(model, each, made, **kwargs) == expected


def large_workload(rng: np.random.Generator, num_experts: int, num_forwards: int):
    """Many experts, two layers, rows that prefer some experts for a while, as routing does."""
    taste = rng.random((1, 2, 1, num_experts)) + np.cumsum(rng.normal(0, 0.15, (num_forwards, 2, 1, num_experts)), 0)
    scores = taste + rng.random((num_forwards, 2, 5, num_experts))
    picks = np.argsort(-scores, axis=-1)[..., :2]
    counts = (picks[..., None] == np.arange(num_experts)).sum(axis=(2, 3))
    kinds = "".join(rng.choice(list("ddddddcp"), num_forwards))
    steps = rng.integers(0, 6, num_forwards).tolist()
    return toy_workload(*counts, kinds=kinds, steps=steps, first_block=bool(rng.integers(2)))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(RULED),
    num_experts=st.sampled_from([8, 40, 130, 600]),
    share=st.floats(0.01, 1),
    interval=st.integers(1, 4),
    copies=st.sampled_from(["blocking", "background"]),
)
def test_rules_decide_as_the_policies_that_state_them(seed, name, num_experts, share, interval, copies):
    workload = large_workload(np.random.default_rng(seed), num_experts, 12)
    params = data_of(name, workload, None)
    if name.startswith("tide"):
        params["refresh_interval"] = interval
    model = replace(TOY, num_layers=2, num_experts=num_experts)
    asked, ruled = policy(name, **params), policy(name, **params)
    assert ruled.rule is not None
    asked.rule = None
    kwargs = {"execution": toy_execution(copies=copies, write_back=True), "is_memory_checked": False}
    kwargs["budget"] = max(1, round(share * num_experts))
    by_rule = replay(workload, model, toy_hardware(), ruled, **kwargs)
    assert by_rule == replay(workload, model, toy_hardware(), asked, **kwargs)


def in_set_order(members: list[int]) -> list[int]:
    table, taken, found = np.zeros(8192, np.int32), np.zeros(129, np.uint64), np.zeros(len(members), np.int32)
    mask = build_set(table, taken, np.array(members, np.int32), len(members), found.copy())
    assert list_set(table, taken, mask, found) == len(members)
    return found.tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 700), unique=True, max_size=200), st.lists(st.integers(0, 700), unique=True))
def test_a_set_is_filled_as_cpython_does(first, more):
    members = [*first, *(member for member in more if member not in first)]
    real = set(first)
    real.update(more)
    assert in_set_order(members) == list(real)


def test_the_policy_and_the_rule_reckon_with_the_same_set() -> None:
    """Should CPython ever order sets in another way, the policy and its rule part, and this says so."""
    order = SetOrder()
    order.begin(Shape(8, (5,)))
    order.settled(0, [7, 3, 1], [0, 6])
    assert order.order(0, [], np.ones(8, np.bool_)) == in_set_order([7, 3, 1, 0, 6])


def test_mapped_counts_are_replayed_like_those_in_memory(path: Path) -> None:
    """They are of one byte each, in which a policy that subtracts counts would go below zero and come out on top."""
    with Trace.open(path) as trace:
        workload, mapped = trace.workload(), trace.workload(is_mapped=True)
    assert mapped.counts.dtype.itemsize < workload.counts.dtype.itemsize
    model = replace(TOY, **{name: getattr(workload, name) for name in ("num_layers", "num_experts", "top_k")})
    for name in POLICIES:
        budget = model.num_experts if name == "all-device" else 3
        kwargs = {"budget": budget, "execution": toy_execution(), "is_memory_checked": False}
        by_memory, by_map = (
            replay(each, model, toy_hardware(), policy(name, **data_of(name, workload, Previous())), **kwargs)
            for each in (workload, mapped)
        )
        assert by_map == by_memory, name


def test_only_policies_with_a_rule_are_not_asked() -> None:
    workload = toy_workload([[3, 3, 0, 0, 0, 0, 0, 0]])
    for name in POLICIES:
        made = policy(name, **data_of(name, workload, Previous()))
        assert (made.rule is not None) == (name in (*RULED, "all-device")), name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXECUTIONS))
def test_shipped_routing_is_replayed_as_it_is_simulated(name: str) -> None:
    """All policies, on the first forwards of an answer, at a budget that most experts do not fit."""
    used = execution(name)
    with Trace.open(find_shipped("traces", "llada2.0-mini-synthetic", ".h5")) as trace:
        workload = trace.workload(used.context, [0]).first(8).tiled(3)
    model, machine = replace(load_moe_config("llada2.0-mini"), num_layers=3), load_hardware("rtx4090")
    replayer = Replayer(workload)
    for policy_name in POLICIES:
        params = data_of(policy_name, workload, Previous())
        budget = 256 if policy_name == "all-device" else 90
        kwargs = {"budget": budget, "execution": used, "is_memory_checked": False}
        expected = simulate(workload, model, machine, policy(policy_name, **params), **kwargs)
        assert replayer.run(model, machine, policy(policy_name, **params), **kwargs) == expected, policy_name


def test_copies_that_pile_up_are_given_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward wants two other experts, of whom more are under way than there is room for."""
    tables = [[3, 3, 0, 0, 0, 0, 0, 0], [0, 0, 3, 3, 0, 0, 0, 0], [0, 0, 0, 0, 3, 3, 0, 0], [0, 0, 0, 0, 0, 0, 3, 3]]
    workload = toy_workload(*([row] for row in tables * 20))
    links = toy_hardware().links
    slow = replace(toy_hardware(), links=replace(links, h2d_pageable=replace(links.h2d_pageable, latency_s=1e-5)))
    kwargs = {"budget": 2, "execution": toy_execution(copies="background"), "is_memory_checked": False}
    monkeypatch.setattr(replaying, "FIRST_ROOM", 1)
    rooms = []

    def noted(*args):
        rooms.append(args[5].links.shape[1] - clock.RING)
        return clock.play(*args)

    monkeypatch.setattr(stretches, "play", noted)
    made = policy("tide-as-coded")
    expected = simulate(workload, TOY, slow, made, **kwargs)
    assert replay(workload, TOY, slow, made, **kwargs) == expected
    assert rooms == [1, 16]
    # Short stretches find more room when they need it, and keep it.
    monkeypatch.setattr(windows, "WINDOW_CELLS", 8 * 13)
    rooms.clear()
    assert replay(workload, TOY, slow, made, **kwargs) == expected
    assert set(rooms) == {1, 16}
    assert rooms == sorted(rooms)


@settings(deadline=None, max_examples=80)
@given(cases(), st.integers(1, 3))
def test_stretches_are_one_run(case, num_forwards):
    """Of one forward to three, so that copies under way, refreshes and places in scratch memory reach across."""
    workload, model, machine, (name, params), budgets, used = case
    kwargs = {"budget": budgets, "execution": used, "is_memory_checked": False}
    expected = replay_case(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW_CELLS", num_forwards * model.num_layers * model.num_experts)
        made, replayer = make_policy(name, params), Replayer(workload)
        assert replayer.run(model, machine, made, **kwargs) == expected
        assert replayer.run(model, machine, made, **kwargs) == expected


@pytest.mark.parametrize("kept_bytes", [1 << 12, 1 << 28])
def test_threads_may_share_a_replayer(monkeypatch, kept_bytes: int) -> None:
    """Whether there is room for a part of the stretches or for all."""
    workload, model = large_workload(np.random.default_rng(3), 40, 60), replace(TOY, num_layers=2, num_experts=40)
    monkeypatch.setattr(windows, "WINDOW_CELLS", 5 * 80)
    monkeypatch.setattr(replaying, "_KEPT_ROUTING_BYTES", kept_bytes)
    slower = replace(toy_hardware(), host=replace(toy_hardware().host, call_overhead_s=1e-6))
    machines, names = (toy_hardware(), slower), (*RULED, "gain", "arc")
    asked = [(name, budget, machine) for machine in machines for budget in (9, 20) for name in names]
    shared = Replayer(workload)

    def run(replayer: Replayer, name: str, budget: int, machine: Hardware):
        made = policy(name, **data_of(name, workload, None))
        kwargs = {"budget": budget, "execution": toy_execution(copies="background"), "is_memory_checked": False}
        return replayer.run(model, machine, made, **kwargs)

    expected = [run(Replayer(workload), *each) for each in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda each: run(shared, *each), asked)) == expected


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(RULED), num_forwards=st.integers(1, 12))
def test_rules_remember_across_stretches(seed, name, num_forwards):
    workload = large_workload(np.random.default_rng(seed), 40, 60)
    model = replace(TOY, num_layers=2, num_experts=40)
    links = toy_hardware().links
    slow = replace(toy_hardware(), links=replace(links, h2d_pageable=replace(links.h2d_pageable, latency_s=1e-5)))
    for copies in ("blocking", "background"):
        kwargs = {"execution": toy_execution(copies=copies, write_back=True), "is_memory_checked": False, "budget": 9}
        made = policy(name, **data_of(name, workload, None))
        expected = replay(workload, model, slow, made, **kwargs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(windows, "WINDOW_CELLS", num_forwards * 80)
            patch.setattr(replaying, "_KEPT_ROUTING_BYTES", 1 << 12)
            assert replay(workload, model, slow, made, **kwargs) == expected


def test_long_scripts_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = large_workload(np.random.default_rng(0), 40, 30)
    model = replace(TOY, num_layers=2, num_experts=40)
    kwargs = {"budget": 9, "execution": toy_execution(copies="background"), "is_memory_checked": False}
    expected = simulate(workload, model, toy_hardware(), policy("lfu"), **kwargs)
    asked = []

    def noted(*args, **kwargs):
        asked.append(args)
        return script.decide(*args, **kwargs)

    monkeypatch.setattr(replaying, "decide", noted)
    monkeypatch.setattr(windows, "WINDOW_CELLS", 5 * 80)
    for limit, num_asked in ((1 << 20, 1), (1 << 10, 2)):
        monkeypatch.setattr(replaying, "_KEPT_SCRIPT_BYTES", limit)
        made, replayer = policy("lfu"), Replayer(workload)
        asked.clear()
        assert [replayer.run(model, toy_hardware(), made, **kwargs) for _ in range(2)] == [expected, expected]
        assert len(asked) == num_asked


def test_machines_whose_parts_slow_each_other_are_for_the_simulator() -> None:
    free = dict.fromkeys(Contention.__slots__, 1.0)
    machine = replace(toy_hardware(), contention=Contention(**free))
    workload = toy_workload([[3, 3, 0, 0, 0, 0, 0, 0]])
    kwargs = {"budget": 2, "execution": toy_execution(), "is_memory_checked": False}
    made = policy("lru")
    assert replay(workload, TOY, machine, made, **kwargs) == simulate(workload, TOY, machine, made, **kwargs)
    slowed = replace(machine, contention=Contention(**{**free, "host_beside_copies": 0.9}))
    with pytest.raises(InputError, match=r"'paper' .*contention.*use simulate\(\), or --engine simpy"):
        replay(workload, TOY, slowed, made, **kwargs)


def test_inputs_are_checked_as_for_the_simulator() -> None:
    workload, kwargs = toy_workload([[3, 3, 0, 0, 0, 0, 0, 0]]), {"execution": toy_execution()}
    with pytest.raises(InputError, match="budget has 2 numbers"):
        replay(workload, TOY, toy_hardware(), policy("lru"), budget=[1, 2], **kwargs)
    with pytest.raises(BudgetError, match="must be in 0"):
        replay(workload, TOY, toy_hardware(), policy("lru"), budget=9, **kwargs)
    with pytest.raises(BudgetError, match="fetches into slots"):
        replay(workload, TOY, toy_hardware(), policy("lru"), budget=0, **kwargs)
    with pytest.raises(InputError, match="KV cache"):
        replay(workload, TOY, toy_hardware(), policy("lru"), budget=2, execution=toy_execution(kv_cache=False))
