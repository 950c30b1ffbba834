"""The integer programme: what it chooses, what it proves, and what it says when there is nothing to choose."""

import itertools
import random

import pulp
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from knapsack import least_ns

from tidesim.errors import PlanError
from tidesim.planner.integer_programme import (
    Aim,
    InfeasibleError,
    Option,
    UnboundedError,
    best_uniform,
    choose,
    frontier,
    solve,
)

SOLVERS = ("highs", "cbc")
Table = list[list[Option]]


def brute_force(table: Table, slots: int) -> int | None:
    """The least total time by trying every combination; None if none fits."""
    fitting = (choice for choice in itertools.product(*table) if sum(option.budget for option in choice) <= slots)
    return min((sum(option.time_ns for option in choice) for choice in fitting), default=None)


def tables(max_layers: int = 4, max_options: int = 4) -> st.SearchStrategy[Table]:
    option = st.builds(Option, st.integers(0, 6), st.sampled_from([1, 2, 4]), st.integers(0, 10**12), st.just(()))
    return st.lists(st.lists(option, min_size=1, max_size=max_options), min_size=1, max_size=max_layers)


def hard_table(num_layers: int = 60, seed: int = 1) -> Table:
    """A table that takes HiGHS and CBC some tenths of a second."""
    rng = random.Random(seed)
    shape = [rng.uniform(1, 3) for _ in range(num_layers)]
    return [
        [Option(budget, 1, int(1e9 * (1 - budget / 300) ** power + rng.random() * 1e8)) for budget in range(0, 256, 4)]
        for power in shape
    ]


# --- the best choice ---


@pytest.mark.parametrize("solver", SOLVERS)
def test_slots_go_where_they_save_most(solver):
    # Layer 0 gains 1 from its first slot, layer 1 gains 7 from its first and 2 from its second.
    table = [
        [Option(0, None, 10), Option(1, None, 9), Option(2, None, 8)],
        [Option(0, None, 10), Option(1, None, 3), Option(2, None, 1)],
    ]
    budgets = [choose(table, slots, solver=solver).budget for slots in range(5)]
    assert budgets == [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)]


def test_each_layer_takes_its_own_interval():
    table = [
        [Option(4, 1, 10), Option(4, 2, 8), Option(4, 8, 9)],
        [Option(4, 1, 5), Option(4, 2, 6), Option(4, 8, 7)],
    ]
    choice = choose(table, 8)
    assert (choice.budget, choice.interval) == ((4, 4), (2, 1))
    assert choice.report.status == "optimal"
    assert choice.report.objective == 13e-9


def test_options_that_never_refresh_have_no_interval():
    assert choose([[Option(1, None, 5)], [Option(2, None, 6)]], 3).interval is None


def test_time_that_no_choice_changes_is_in_objective_and_bound():
    table = [[Option(0, 1, 40), Option(1, 1, 10)]]
    plain, shifted = choose(table, 1).report, choose(table, 1, fixed_ns=100).report
    assert shifted.objective == pytest.approx(plain.objective + 100e-9)
    assert shifted.bound == pytest.approx(plain.bound + 100e-9)


@settings(max_examples=30, deadline=None)
@given(table=tables(), slots=st.integers(0, 24))
def test_the_choice_is_the_one_that_trying_everything_finds(table, slots):
    best_ns = brute_force(table, slots)
    assume(best_ns is not None)
    choice = choose(table, slots)
    largest = max(option.time_ns for options in table for option in options)
    assert sum(choice.budget) <= slots
    assert choice.report.status == "optimal"
    assert choice.report.objective == sum(option.time_ns for option in choice.options) / 1e9
    assert best_ns / 1e9 <= choice.report.objective <= (best_ns + 1e-8 * largest) / 1e9


@settings(max_examples=30, deadline=None)
@given(table=tables(), slots=st.integers(0, 24))
def test_no_choice_out_of_the_table_is_below_the_bound(table, slots):
    best_ns = brute_force(table, slots)
    assume(best_ns is not None)
    report = choose(table, slots).report
    assert report.bound <= best_ns / 1e9
    largest = max(option.time_ns for options in table for option in options)
    assert 0 <= report.objective - report.bound <= 2e-8 * largest / 1e9


@settings(max_examples=12, deadline=None)
@given(table=tables(), slots=st.integers(0, 24))
def test_both_solvers_find_the_same_time(table, slots):
    assume(brute_force(table, slots) is not None)
    highs, cbc = (choose(table, slots, solver=solver).report for solver in SOLVERS)
    largest = max(option.time_ns for options in table for option in options)
    assert abs(highs.objective - cbc.objective) <= 1e-8 * largest / 1e9


@given(table=tables(max_layers=1, max_options=8), slots=st.integers(0, 6))
def test_leaving_out_what_another_option_beats_loses_nothing(table, slots):
    kept = frontier(table[0])
    assert brute_force([kept], slots) == brute_force(table, slots)
    assert all(low.budget < high.budget and low.time_ns > high.time_ns for low, high in itertools.pairwise(kept))


# --- memory ---


def test_memory_binds_exactly():
    table = [[Option(0, 1, 100), Option(3, 1, 50), Option(5, 1, 20)] for _ in range(3)]
    assert [sum(choose(table, slots).budget) for slots in (15, 14, 13, 8, 2)] == [15, 13, 13, 8, 0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_too_little_memory_is_infeasible_and_says_what_would_do(solver):
    table = [[Option(4, 1, 100), Option(3, 1, 50)], [Option(5, 1, 20)]]
    with pytest.raises(InfeasibleError, match=r"smallest budgets take 8 slots.*slots\(=7\).*room for 1 more"):
        choose(table, 7, solver=solver)
    assert choose(table, 8, solver=solver).budget == (3, 5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_infeasible_and_unbounded_are_told_apart(solver):
    infeasible = pulp.LpProblem("infeasible", pulp.LpMinimize)
    count = infeasible.add_variable("count", lowBound=0, upBound=1, cat="Integer")
    infeasible.setObjective(pulp.lpSum([3 * count]))
    infeasible.addConstraint(count >= 2)
    with pytest.raises(InfeasibleError, match="loosen"):
        solve(infeasible, solver, 10)
    unbounded = pulp.LpProblem("unbounded", pulp.LpMinimize)
    count = unbounded.add_variable("count", cat="Integer")
    unbounded.setObjective(pulp.lpSum([3 * count]))
    unbounded.addConstraint(count <= 2)
    with pytest.raises(UnboundedError, match="no lower bound"):
        solve(unbounded, solver, 10)


# --- the time limit ---


@pytest.mark.parametrize("solver", SOLVERS)
def test_out_of_time_gives_the_best_so_far_and_is_not_called_optimal(solver):
    table, slots = hard_table(), 6001
    best = choose(table, slots, solver="highs").report
    assert best.status == "optimal"
    cut_off = choose(table, slots, solver=solver, time_limit_s=1e-3)
    uniform_s = sum(option.time_ns for option in best_uniform(table, slots)) / 1e9
    assert cut_off.report.status == "uniform"
    assert cut_off.report.objective == uniform_s
    assert cut_off.report.bound <= best.objective < cut_off.report.objective
    assert cut_off.report.gap == pytest.approx(1 - cut_off.report.bound / uniform_s)


def test_out_of_time_without_any_choice_is_an_error():
    table = hard_table(num_layers=40)
    table[0] = [Option(option.budget + 1, 1, option.time_ns) for option in table[0]]
    with pytest.raises(PlanError, match="allow more time"):
        choose(table, 4001, time_limit_s=1e-6)


@settings(max_examples=30, deadline=None)
@given(table=tables(), slots=st.integers(0, 24))
def test_the_best_uniform_choice_is_uniform_and_best(table, slots):
    found = best_uniform(table, slots)
    pairs = {(option.budget, option.interval) for options in table for option in options}
    totals = []
    for pair in pairs:
        same = [[option.time_ns for option in options if option[:2] == pair] for options in table]
        if all(same) and pair[0] * len(table) <= slots:
            totals.append(sum(map(min, same)))
    assert (found is None) == (not totals)
    if found is not None:
        assert len({option[:2] for option in found}) == 1
        assert sum(option.time_ns for option in found) == min(totals)


# --- what is refused ---


@pytest.mark.parametrize("table", [[], [[]], [[Option(0, 1, 5)], []], [[Option(-1, 1, 5)]], [[Option(0, 1, -5)]]])
def test_a_table_with_holes_or_negative_numbers_is_refused(table):
    with pytest.raises(ValueError, match="must have"):
        choose(table, 3)


@pytest.mark.parametrize("time_limit_s", [0, -1, float("nan"), float("inf")])
def test_a_senseless_time_limit_is_refused(time_limit_s):
    with pytest.raises(PlanError, match="time_limit_s"):
        choose([[Option(0, 1, 5)]], 3, time_limit_s=time_limit_s)


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(PlanError, match="no solver 'gurobi'; there are highs, cbc"):
        choose([[Option(0, 1, 5)]], 3, solver="gurobi")


# --- other aims, and bounds on blocks ---

BLOCKS = 2


def with_blocks() -> st.SearchStrategy[Table]:
    times = st.lists(st.integers(0, 10**6), min_size=BLOCKS, max_size=BLOCKS).map(tuple)
    option = st.builds(
        lambda budget, interval, times: Option(budget, interval, sum(times), times),
        st.integers(0, 6),
        st.sampled_from([1, 2]),
        times,
    )
    return st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=4)


def slowest(choice) -> int:
    return max(sum(times) for times in zip(*(option.block_ns for option in choice), strict=True))


def every_choice(table: Table, slots: int):
    return [c for c in itertools.product(*table) if sum(option.budget for option in c) <= slots]


@pytest.mark.parametrize("solver", SOLVERS)
@settings(deadline=None, max_examples=20)
@given(table=with_blocks(), slots=st.integers(0, 20))
def test_the_slowest_block_is_as_fast_as_any_choice_makes_it_and_the_rest_no_slower_than_it_must(table, slots, solver):
    choices = every_choice(table, slots)
    assume(choices)
    choice = choose(table, slots, aim=Aim("slowest block"), fixed_block_ns=[0] * BLOCKS, solver=solver)
    best_ns = min(slowest(c) for c in choices)
    assert slowest(choice.options) == best_ns
    assert choice.report.bound <= best_ns / 1e9 == pytest.approx(choice.report.objective)
    alike = [sum(option.time_ns for option in c) for c in choices if slowest(c) == best_ns]
    assert sum(option.time_ns for option in choice.options) == min(alike)


@settings(deadline=None)
@given(table=with_blocks(), slots=st.integers(0, 20), most_ns=st.integers(0, 3 * 10**6))
def test_a_bound_on_every_block_is_kept_or_said_to_be_too_tight(table, slots, most_ns):
    choices = every_choice(table, slots)
    assume(choices)
    allowed = [sum(option.time_ns for option in c) for c in choices if slowest(c) <= most_ns]
    aim = Aim(most_block_ns=most_ns)
    if allowed:
        choice = choose(table, slots, aim=aim, fixed_block_ns=[0] * BLOCKS)
        assert slowest(choice.options) <= most_ns
        assert sum(option.time_ns for option in choice.options) == min(allowed)
        return
    nearest = min(slowest(c) for c in choices) / 1e9
    with pytest.raises(InfeasibleError, match="the best one takes") as error:
        choose(table, slots, aim=aim, fixed_block_ns=[0] * BLOCKS)
    assert f"the best one takes {nearest:.4g} s" in str(error.value)


@settings(deadline=None)
@given(table=tables(), slots=st.integers(0, 20), most_ns=st.integers(0, 3 * 10**12))
def test_least_memory_is_what_trying_everything_finds(table, slots, most_ns):
    choices = every_choice(table, slots)
    assume(choices)
    sums = [(sum(o.budget for o in c), sum(o.time_ns for o in c)) for c in choices]
    allowed = [used for used, time_ns in sums if time_ns <= most_ns]
    aim = Aim("slots", most_ns=most_ns)
    if allowed:
        report = choose(table, slots, aim=aim).report
        assert report.objective == report.bound == min(allowed)
        assert report.gap == 0
        return
    with pytest.raises(InfeasibleError, match="the fastest one takes"):
        choose(table, slots, aim=aim)


# --- the same answer by another method ---


@settings(deadline=None, max_examples=25)
@given(table=tables(max_layers=30, max_options=12), slots=st.integers(0, 120))
def test_a_dynamic_programme_agrees(table, slots):
    best_ns = least_ns(table, slots)
    if best_ns is None:
        with pytest.raises(InfeasibleError):
            choose(table, slots)
        return
    choice = choose(table, slots)
    spread = max(max(o.time_ns for o in row) - min(o.time_ns for o in row) for row in table)
    assert sum(option.time_ns for option in choice.options) == pytest.approx(best_ns, abs=1e-8 * spread + 1)
    assert choice.report.bound <= best_ns / 1e9


def test_a_dynamic_programme_agrees_on_a_hard_table():
    table = hard_table(30)
    best_ns = least_ns(table, 900)
    assert sum(option.time_ns for option in choose(table, 900).options) == pytest.approx(best_ns, rel=1e-9)
