"""Whole runs: what they count, what is refused, and what holds for runs of any kind."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recurrence import timed_by_hand
from simulator_cases import EMPTY_AT_FIRST, MIXED, SWAPPED, cases, hardware, make_policy, play, run_case
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.errors import BudgetError, InputError
from tidesim.execution import EXECUTIONS, execution
from tidesim.hardware import load_hardware
from tidesim.moe import load_moe_config
from tidesim.policies import policy
from tidesim.shipped import shipped_names
from tidesim.simulator import simulate

# --- golden counts ---


@pytest.mark.parametrize(
    ("name", "copies", "hits", "promotions"),
    [
        ("all-host", "blocking", 0, 0),
        ("static", "blocking", 4 + 0 + 3, 0),
        # Counters of experts 0 to 3 are 2211, 2244, 2547: the second forward swaps 2, 3 for 0, 1, the third 1 for 2.
        ("tide", "blocking", 4 + 6 + 6, 3),
        ("tide", "background", 4 + 0 + 3, 3),
        # Targets 01, 23, 13: the third forward keeps 3, wants 1 and gives up 2.
        ("tide-as-coded", "blocking", 4 + 6 + 6, 3),
        ("tide-as-coded", "background", 4 + 0 + 3, 3),
        # Fetches 2 and 3 in the first forward, nothing in the second, 1 in the third.
        ("lru", "blocking", 4 + 6 + 3, 3),
        ("lru", "background", 4 + 6 + 3, 3),
    ],
)
def test_golden_counts(name, copies, hits, promotions):
    _, result = play([MIXED, SWAPPED, [0, 3, 0, 3, 0, 0, 0, 0]], name, copies=copies)
    assert (result.hits, result.hits + result.misses, result.promotions) == (hits, 18, promotions)


def test_the_result_says_what_was_run():
    workload = toy_workload([MIXED, MIXED], model_name="other")
    model = replace(TOY, num_layers=2)
    result = simulate(
        workload,
        model,
        toy_hardware(),
        policy("tide", refresh_interval=[1, 4]),
        budget=[2, 3],
        execution=toy_execution(),
        seed=5,
    )
    assert (result.policy, result.budget, result.refresh_interval) == ("tide", (2, 3), (1, 4))
    assert (result.execution, result.context, result.hardware) == ("plain", "block", "paper")
    assert (result.model, result.trace_origin, result.seed) == ("routing of other at the sizes of toy", "synthetic", 5)
    assert (result.num_forwards, result.generated_tokens) == (1, 3)
    assert list(result.breakdown_by_layer_s) == ["0", "1", "outside"]


def test_decisions_are_one_per_forward_and_layer():
    seen = []
    simulate(
        toy_workload([MIXED, SWAPPED], [SWAPPED, MIXED]),
        replace(TOY, num_layers=2),
        toy_hardware(),
        policy("tide-as-coded"),
        budget=2,
        execution=toy_execution(),
        decisions=seen.append,
    )
    assert [tuple(decision)[:6] for decision in seen] == [
        (0, 0, (), (), 4, 2),
        (0, 1, (2, 3), (0, 1), 6, 0),
        (1, 0, (2, 3), (0, 1), 6, 0),
        (1, 1, (0, 1), (2, 3), 4, 2),
    ]


# --- what does not fit ---


def run_with(workload, model=TOY, **kwargs):
    return simulate(
        workload, model, toy_hardware(), policy("tide"), **{"budget": 2, "execution": toy_execution()} | kwargs
    )


def test_a_workload_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"routes to 2 of 8 experts, toy to 2 of 9; take a trace"):
        run_with(toy_workload([MIXED]), replace(TOY, num_experts=9))
    with pytest.raises(InputError, match=r"routes to 2 of 8 experts, toy to 3 of 8"):
        run_with(toy_workload([MIXED]), replace(TOY, top_k=3))
    with pytest.raises(InputError, match=r"has 1 MoE layers and toy has 3; use workload.tiled\(3\)"):
        run_with(toy_workload([MIXED]), replace(TOY, num_layers=3))
    assert run_with(toy_workload([MIXED]).tiled(3), replace(TOY, num_layers=3)).hits == 12


def test_a_cache_needs_a_workload_of_blocks_and_no_cache_one_of_whole_prefixes():
    with pytest.raises(InputError, match="keeps a KV cache; it needs a workload with context 'block', not 'full'"):
        run_with(toy_workload([MIXED], context="full"))
    with pytest.raises(InputError, match="has no KV cache; it needs a workload with context 'full', not 'block'"):
        run_with(toy_workload([MIXED]), execution=toy_execution(kv_cache=False))


def test_a_workload_without_forwards_is_refused():
    workload = toy_workload([MIXED])
    empty = replace(workload, counts=workload.counts[:0])
    with pytest.raises(InputError, match="no forward"):
        run_with(empty)


@pytest.mark.parametrize("row", [[3, 2, 0, 0, 0, 0, 0, 0], [4, 1, 1, 0, 0, 0, 0, 0]])
def test_counts_that_no_router_gives_are_refused(row):
    workload = toy_workload([MIXED])
    with pytest.raises(InputError, match="counts of the workload do not fit its tokens and top-k"):
        run_with(replace(workload, counts=np.array([[row]], np.int32)))


def test_budgets_that_do_not_fit_are_refused():
    with pytest.raises(BudgetError, match=r"budget\(=9\)"):
        run_with(toy_workload([MIXED]), budget=9, is_memory_checked=False)
    with pytest.raises(BudgetError, match="toy needs experts"):
        run_with(toy_workload([MIXED]), reserve_bytes=5 * 2**30)
    assert run_with(toy_workload([MIXED]), reserve_bytes=0)


def test_unified_memory_moves_experts_for_nothing():
    unified = replace(toy_hardware(), is_unified=True, links=None)
    for copies in ("blocking", "background"):
        _, result = play([SWAPPED, SWAPPED], machine=unified, copies=copies, write_back=True)
        assert result.promotions == 2
        assert (result.h2d_bytes, result.d2h_bytes, result.num_copies, result.breakdown_s["copy_wait"]) == (0, 0, 0, 0)


# --- properties ---


@settings(max_examples=80, deadline=None)
@given(cases())
def test_the_clock_agrees_with_a_recurrence_written_without_simpy(case):
    """Every duration, part and busy time; so nothing depends on the order of events at one instant."""
    result = run_case(case)
    workload, model, machine, (name, params), budgets, used = case
    expected = timed_by_hand(workload, model, machine, make_policy(name, params), budgets, used)
    assert (result.layer_parts_ns, dict(result.busy_ns)) == expected


@settings(deadline=None)
@given(cases())
def test_pairs_bytes_and_repetition(case):
    result, decisions, timeline = run_case(case), [], []
    assert run_case(case, decisions=decisions.append, timeline=timeline) == result
    workload, model = case[:2]
    assert result.hits + result.misses == workload.counts.sum()
    assert result.h2d_bytes == (result.promotions + result.drops) * model.expert_bytes
    assert result.d2h_bytes == (result.evictions * model.expert_bytes if case[-1].write_back else 0)
    assert sum(decision.hits for decision in decisions) == result.hits
    promoted = [decision.promote for decision in decisions]
    promoted += [promote for decision in decisions for _, promote, _ in decision.ahead]
    assert sum(map(len, promoted)) == result.promotions
    assert sum(len(decision.drop) for decision in decisions) == result.drops
    assert len(decisions) == workload.num_forwards * model.num_layers
    busy = dict.fromkeys(result.busy_ns, 0)
    for interval in timeline:
        busy[interval.resource] += min(interval.end_ns, result.makespan_ns) - interval.start_ns
    assert busy == result.busy_ns


@settings(deadline=None)
@given(cases())
def test_no_resource_does_two_things_at_once(case):
    timeline = []
    run_case(case, timeline=timeline)
    for resource in ("device", "host", "h2d", "d2h"):
        mine = [interval for interval in timeline if interval.resource == resource]
        assert all(one.end_ns <= two.start_ns for one, two in pairwise(mine))


@settings(deadline=None)
@given(cases())
def test_decisions_by_routing_do_not_depend_on_the_machine(case):
    assume(make_policy(*case[3]).is_routing_only)
    here, there = [], []
    run_case(case, decisions=here.append)
    quick = hardware("links", h2d_pinned=toy_hardware().links.d2h_fresh, duplex_factor=1.0)
    run_case(case, machine=replace(quick, device=replace(quick.device, bytes_per_s=7e9)), decisions=there.append)
    assert here == there


@settings(deadline=None)
@given(cases(), st.floats(1, 50))
def test_more_bandwidth_is_never_slower_for_the_same_decisions(case, scale):
    assume(make_policy(*case[3]).is_routing_only)
    machine = case[2]
    slow = run_case(case).makespan_ns
    for part, field in (("device", "bytes_per_s"), ("device", "experts_bytes_per_s"), ("host", "bytes_per_s")):
        changed = getattr(machine, part)
        faster = replace(machine, **{part: replace(changed, **{field: getattr(changed, field) * scale})})
        assert run_case(case, machine=faster).makespan_ns <= slow
    for name in ("h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable", "d2h_fresh"):
        link = getattr(machine.links, name)
        quick = replace(link, bytes_per_s=link.bytes_per_s * scale)
        faster = replace(machine, links=replace(machine.links, **{name: quick}))
        assert run_case(case, machine=faster).makespan_ns <= slow


@settings(deadline=None)
@given(cases())
def test_a_budget_of_all_experts_hits_always_and_copies_nothing(case):
    # The first residents are loaded before the clock starts.
    workload, model, machine, chosen, budgets, used = case
    # Whole layers are streamed whoever is resident.
    if chosen[0] not in (*EMPTY_AT_FIRST, "erratic", "ktransformers", "ktransformers-dynamic"):
        result = run_case((workload, model, machine, chosen, [8] * len(budgets), used))
        assert (result.misses, result.promotions, result.num_copies) == (0, 0, 0)
        assert result.breakdown_s["copy_wait"] == result.breakdown_s["host_wait"] == 0


@settings(deadline=None)
@given(cases())
def test_serial_host_work_is_never_faster_than_parallel(case):
    *rest, used = case
    serial = run_case((*rest, replace(used, host="serial"))).makespan_ns
    assert run_case((*rest, replace(used, host="parallel"))).makespan_ns <= serial


@pytest.mark.parametrize("name", EXECUTIONS)
def test_the_presets_run(name):
    context = execution(name).context
    workload = toy_workload([MIXED], [SWAPPED], context=context)
    result = run_with(workload, execution=execution(name))
    assert (result.execution, result.context) == (name, context)


@pytest.mark.parametrize("profile", shipped_names("hardware_profiles"))
def test_every_shipped_machine_runs_the_published_model(profile):
    rng = np.random.default_rng(0)
    mini = load_moe_config("llada2.0-mini")
    ids = np.argsort(rng.random((2, 19, 32, 256)), axis=-1)[..., :8]
    counts = (ids.reshape(2, 19, -1, 1) == np.arange(256)).sum(axis=2)
    workload = toy_workload(*counts, tokens=np.array([32, 32]), model_name=mini.name, top_k=8, num_experts=256)
    for name, context in (("overlapped", "block"), ("tide-as-coded", "full")):
        result = simulate(
            replace(workload, context=context),
            mini,
            load_hardware(profile),
            policy("tide-as-coded"),
            budget=64,
            execution=execution(name),
            is_memory_checked=False,
        )
        assert result.model == "llada2.0-mini"
        assert 1e-3 < result.makespan_s < 100
