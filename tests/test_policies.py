"""TIDE, LRU and the references: golden moves by hand, and the contract that every policy keeps."""

import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import Answer, Step, answers, forward, run, runs, steps_of
from simulator_cases import EMPTY_AT_FIRST, data_of
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.errors import BudgetError, InputError
from tidesim.execution import Costs
from tidesim.policies import POLICIES, Policy, Shape, policy
from tidesim.policies.predictors import Oracle
from tidesim.residency import Moves
from tidesim.workload import ForwardKind


def one_layer(*rows: Sequence[int]) -> list[Step]:
    """Steps 0, 1, 2 of block 1, then step 0 of block 2, as far as there are rows; none is a first decoded block."""
    infos = [forward(0), forward(1, step=1), forward(2, step=2), forward(3, block=2)]
    return [(info, np.array([row], np.int32)) for info, row in zip(infos, rows, strict=False)]


TRACE = ((0, 3, 2, 1), (4, 0, 1, 1), (0, 1, 0, 0), (0, 0, 1, 0))


# --- golden moves ---


def test_tide_swaps_the_hottest_host_expert_with_the_coldest_device_expert():
    # Counters after each forward: 0321, 4332, 4432, 4442. In the last one expert 2 is as hot as expert 0: no swap.
    log, residency = run(policy("tide"), [2], one_layer(*TRACE))
    assert log == [(0, 0, (2,), (0,)), (1, 0, (0,), (1,)), (2, 0, (1,), (2,))]
    assert residency.placement().experts == ((0, 1),)


def test_tide_counts_between_refreshes_but_moves_only_when_one_is_due():
    # Interval 2: steps 0 and 2, and step 0 of the next block. At step 2 the counters are 4432.
    log, _ = run(policy("tide", refresh_interval=2), [2], one_layer(*TRACE))
    assert log == [(0, 0, (2,), (0,)), (2, 0, (0,), (2,))]


def test_tide_swaps_several_in_order_and_breaks_ties_by_the_lower_id():
    log, _ = run(policy("tide"), [3], one_layer((0, 0, 5, 7, 1, 7)))
    # Hottest on the host: 3, 5 (7 each), 4; coldest on the device: 0, 1 (0 each), 2.
    assert log == [(0, 0, (3, 5), (0, 1))]


def test_tide_as_coded_looks_at_one_forward_and_evicts_in_set_order():
    # Forward 2 wants expert 1 alone; the set {0, 2} gives up 0, though 0 had more tokens than 2.
    log, residency = run(policy("tide-as-coded"), [2], one_layer(*TRACE))
    assert log == [(0, 0, (2,), (0,)), (1, 0, (0,), (1,)), (2, 0, (1,), (0,))]
    assert residency.placement().experts == ((1, 2),)


def test_tide_as_coded_promotes_most_tokens_first_and_ties_by_the_lower_id():
    log, _ = run(policy("tide-as-coded"), [3], one_layer((0, 0, 0, 2, 5, 2)))
    assert log == [(0, 0, (4, 3, 5), (0, 1, 2))]


def test_tide_as_coded_refreshes_on_every_step_of_the_first_decoded_block():
    rows = np.eye(6, dtype=np.int32)
    first = [(forward(i, step=i, first=True), rows[[i]]) for i in range(2, 6)]
    later = [(forward(i + 4, block=2, step=i), rows[[i]]) for i in range(6)]
    log, _ = run(policy("tide-as-coded", refresh_interval=4), [1], first + later)
    assert [index for index, *_ in log] == [2, 3, 4, 5, 4 + 0, 4 + 4]
    log, _ = run(policy("tide", refresh_interval=4), [1], first + later)
    assert all(index in (4, 4 + 0, 4 + 4) for index, *_ in log)


def test_lru_fetches_misses_in_order_and_evicts_the_least_recently_used():
    # Most recent first: 0123; 3210, so 2 and 3 are there; 3201, so 0 is not kept; 1320; 2130.
    log, residency = run(policy("lru"), [2], one_layer(*TRACE))
    assert log == [(0, 0, (2, 3), (0, 1)), (2, 0, (1,), (2,)), (3, 0, (2,), (3,))]
    assert residency.placement().experts == ((1, 2),)


def test_lru_drops_the_lowest_ids_where_a_forward_uses_more_experts_than_slots():
    # 1 is resident and in use, and 2 is missed; neither is among the two most recent of 1 to 4.
    (answer,) = answers(policy("lru"), [2], steps_of([[0, 1, 1, 1, 1, 0]]))
    assert answer == Answer(Moves((3, 4), (0, 1)), (2,), ())


@settings(deadline=None)
@given(runs())
def test_lru_has_the_most_recently_used_experts_whatever_the_budget(case):
    budgets, steps = case
    num_layers, num_experts = steps[0][1].shape
    log, residency = run(policy("lru"), budgets, steps)
    assert all(len(promote) == len(evict) for *_, promote, evict in log)
    for layer in range(num_layers):
        order = list(range(num_experts))
        for _, table in steps:
            used = np.flatnonzero(table[layer])[::-1].tolist()
            order = [*used, *(expert for expert in order if expert not in used)]
        assert residency.placement().experts[layer] == tuple(sorted(order[: budgets[layer]]))


def test_static_takes_the_most_popular_of_each_layer_and_never_moves():
    popularity = [[1, 5, 5, 0], [0, 0, 0, 0]]
    static = policy("static", popularity=popularity)
    assert static.initial(Shape(4, (1, 2))).experts == ((1,), (0, 1))
    assert run(static, (1, 2), [(forward(), np.ones((2, 4), np.int32))])[0] == []


def test_the_references_hold_everything_or_nothing():
    assert policy("all-device").initial(Shape(3, (3, 3))).experts == ((0, 1, 2),) * 2
    assert policy("all-host").initial(Shape(3, (2, 2))).experts == ((), ())
    with pytest.raises(BudgetError, match="needs a budget of all 3 experts in every layer, not 2"):
        policy("all-device").initial(Shape(3, (3, 2)))


# --- parameters ---


def test_each_layer_may_have_its_own_interval():
    steps = [(forward(i, step=i), np.roll(np.eye(4, dtype=np.int32), i, 1)[[0, 0]]) for i in range(4)]
    log, _ = run(policy("tide-as-coded", refresh_interval=[1, 2]), [1, 1], steps)
    assert [(index, layer) for index, layer, *_ in log] == [(1, 0), (2, 0), (2, 1), (3, 0)]
    with pytest.raises(InputError, match="refresh_interval has 2 numbers"):
        policy("tide", refresh_interval=[1, 2]).initial(Shape(4, (1, 1, 1)))


def test_refreshes_may_be_listed_step_by_step():
    """At steps 1 and 2 of each block, or of layer 0 alone; after those the residents stay, into the next block too."""
    blocks = [forward(i, step=i % 4, block=i // 4) for i in range(8)]
    steps = [(info, np.roll(np.eye(4, dtype=np.int32), i, 1)[[0, 0]]) for i, info in enumerate(blocks)]
    log, _ = run(policy("tide-as-coded", refresh_steps=[1, 2]), [1, 1], steps)
    assert [(index, layer) for index, layer, *_ in log] == [(i, layer) for i in (1, 2, 5, 6) for layer in (0, 1)]
    made = policy("rlx", refresh_steps=[[1, 2], []])
    log, _ = run(made, [1, 1], steps)
    assert [(index, layer) for index, layer, *_ in log] == [(i, 0) for i in (1, 2, 5, 6)]
    assert (made.refresh_interval, made.refresh_steps) == (None, ((1, 2), ()))


def test_listed_multiples_are_an_interval():
    """The first block is refreshed at each step by both where the policy says so."""
    infos = [forward(i, step=i % 5, block=i // 5, first=i < 5) for i in range(15)]
    rng = np.random.default_rng(0)
    steps = [(info, rng.integers(0, 5, (2, 6)).astype(np.int32)) for info in infos]
    for name in ("tide", "tide-as-coded", "rlx"):
        by_interval, _ = run(policy(name, refresh_interval=[2, 3]), [2, 3], steps)
        by_steps, _ = run(policy(name, refresh_steps=((0, 2, 4), (0, 3))), [2, 3], steps)
        assert by_interval == by_steps


def test_steps_for_another_number_of_layers_or_beside_an_interval_are_refused():
    with pytest.raises(InputError, match="refresh_steps has 2 lists; give one, or one for each of the 3"):
        policy("tide", refresh_steps=[[1], [2]]).initial(Shape(4, (1, 1, 1)))
    with pytest.raises(InputError, match="either refresh_interval or refresh_steps"):
        policy("tide", refresh_interval=2, refresh_steps=[0])


@pytest.mark.parametrize("bad", [3, "0,1", [1, 0], [0, 0], [-1], [0.5], ["0"], [True], [[0], 1], [[0], [2, 1]]])
def test_steps_that_are_no_ascending_steps_are_refused(bad):
    with pytest.raises(InputError, match="refresh_steps"):
        policy("tide", refresh_steps=bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4", [1, 0]])
def test_intervals_below_one_or_not_whole_are_refused(bad):
    with pytest.raises(InputError, match="refresh_interval"):
        policy("tide", refresh_interval=bad)


def test_unknown_policies_and_parameters_name_the_way_out():
    with pytest.raises(InputError, match="no policy 'tied'; did you mean 'tide'"):
        policy("tied")
    with pytest.raises(InputError, match="there are all-device, all-host, static, lru, tide, tide-as-coded"):
        policy("xyzzy")
    with pytest.raises(InputError, match="policy 'lru' takes no 'refresh_interval'; it takes no parameter"):
        policy("lru", refresh_interval=2)
    with pytest.raises(InputError, match="policy 'tide' takes no 'tau'; it takes refresh_interval"):
        policy("tide", tau=2)
    with pytest.raises(InputError, match="policy 'static' needs 'popularity'"):
        policy("static")


def test_popularity_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"popularity has shape \[1, 4\]; it must be \[L, E\] = \[2, 4\]"):
        policy("static", popularity=[[1, 2, 3, 4]]).initial(Shape(4, (1, 1)))


def test_lru_needs_a_slot_to_fetch_into():
    with pytest.raises(BudgetError, match="must be >= 1"):
        policy("lru").initial(Shape(4, (1, 0)))


# --- the contract that every policy keeps ---


def make(name: str, steps: Sequence[Step]) -> Policy:
    workload = toy_workload(*(table for _, table in steps))
    # A threshold small enough for every forward of `runs` to reach it.
    small = {"threshold": 4} if "threshold" in inspect.signature(POLICIES[name]).parameters else {}
    return policy(name, **data_of(name, workload, Oracle(workload)), **small)


def costs_of(steps: Sequence[Step]) -> Costs:
    """For policies that decide by predicted times."""
    num_layers, num_experts = steps[0][1].shape
    model = replace(TOY, num_layers=num_layers, num_experts=num_experts)
    return Costs(model, toy_hardware(), toy_execution(copies="background", host="parallel"), max_rows=4)


contract = pytest.mark.parametrize("name", POLICIES)


@contract
@settings(deadline=None, max_examples=30)
@given(case=runs(), is_background=st.booleans())
def test_moves_are_legal_and_never_exceed_the_budget(name, case, is_background):
    budgets, steps = case
    budgets = [steps[0][1].shape[1]] * len(budgets) if name == "all-device" else budgets
    _, residency = run(make(name, steps), budgets, steps, is_background=is_background, costs=costs_of(steps))
    residents = [residency.num_resident(layer) for layer in range(len(budgets))]
    assert sum(residents) <= sum(budgets)
    assert residency.is_pooled or all(num <= budget for num, budget in zip(residents, budgets, strict=True))


@contract
@settings(deadline=None, max_examples=30)
@given(case=runs())
def test_a_second_run_with_the_same_object_repeats_the_first(name, case):
    budgets, steps = case
    budgets = [steps[0][1].shape[1]] * len(budgets) if name == "all-device" else budgets
    once, other = make(name, steps), make(name, steps)
    first, second, third = (run(made, budgets, steps, costs=costs_of(steps))[0] for made in (once, once, other))
    assert first == second == third


@contract
@settings(deadline=None, max_examples=30)
@given(case=runs())
def test_a_budget_of_all_experts_needs_no_moves(name, case):
    budgets, steps = case
    budgets = [steps[0][1].shape[1]] * len(budgets)
    if name not in EMPTY_AT_FIRST:
        assert run(make(name, steps), budgets, steps, costs=costs_of(steps))[0] == []


@contract
def test_the_object_says_what_it_is(name):
    made = make(name, one_layer(*TRACE))
    assert made.name == name
    assert made.miss_action in ("host", "fetch", "split")
    assert (made.refresh_interval is None) == (not name.startswith(("tide", "rlx")))


@pytest.mark.parametrize("name", ["tide", "tide-as-coded", "rlx"])
@settings(deadline=None)
@given(case=runs())
def test_tide_moves_on_denoise_forwards_only_and_keeps_the_budget_full(name, case):
    budgets, steps = case
    log, residency = run(make(name, steps), budgets, steps)
    assert all(steps[index][0].kind == ForwardKind.DENOISE for index, *_ in log)
    assert all(len(promote) == len(evict) for _, _, promote, evict in log)
    assert [residency.num_resident(layer) for layer in range(len(budgets))] == budgets


# --- CPython's set order ---


class SpelledOutSet:
    """A set of small integers with the hash table of CPython (Objects/setobject.c) spelled out."""

    def __init__(self, items: Iterable[int]) -> None:
        self.table: list[int | None] = [None] * 8
        self.used = 0
        self.update(items)

    def update(self, items: Iterable[int]) -> None:
        for item in items:
            self.table[self._slot(item)] = item
            self.used += 1
            if self.used * 5 >= (len(self.table) - 1) * 3:
                self._grow()

    def _slot(self, item: int) -> int:
        mask, start, perturb = len(self.table) - 1, item & (len(self.table) - 1), item
        while True:
            # Nine more slots in a row are tried, if that many follow before the end of the table.
            for slot in range(start, start + (10 if start + 9 <= mask else 1)):
                if self.table[slot] is None:
                    return slot
            perturb >>= 5
            start = (start * 5 + 1 + perturb) & mask

    def _grow(self) -> None:
        old, size = list(self), 8
        while size <= self.used * 4:
            size *= 2
        self.table = [None] * size
        for item in old:
            self.table[self._slot(item)] = item

    def __iter__(self):
        return (item for item in self.table if item is not None)


def moves_by_the_description(counts: np.ndarray, budget: int) -> list[tuple[list[int], list[int]]]:
    """TIDE's released rule, word for word, on spelled-out sets; one (promote, evict) per row of `counts`."""
    residents, log = SpelledOutSet(range(budget)), []
    for row in counts.tolist():
        by_count = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))
        targets = [expert for expert in by_count[:budget] if row[expert] > 0]
        promote = [expert for expert in targets if expert not in list(residents)]
        candidates = [expert for expert in residents if expert not in targets]
        residents = SpelledOutSet(targets)
        residents.update(candidates[len(promote) :])
        log.append((promote, candidates[: len(promote)]))
    return log


only_cpython = pytest.mark.skipif(sys.implementation.name != "cpython", reason="set order is CPython's own")


@only_cpython
@pytest.mark.parametrize("budget", [1, 4, 5, 18, 19, 32, 64, 76, 77, 96, 128, 200])
def test_tide_as_coded_evicts_as_the_description_says(budget):
    rng = np.random.default_rng(budget)
    # Some forwards touch few experts, so that the targets are fewer than the budget.
    counts = rng.poisson(rng.choice([0.2, 1.0, 4.0], (60, 1)), (60, 256)).astype(np.int32)
    log, _ = run(policy("tide-as-coded"), [budget], [(forward(i), row[None]) for i, row in enumerate(counts)])
    expected = [(i, 0, tuple(p), tuple(e)) for i, (p, e) in enumerate(moves_by_the_description(counts, budget)) if p]
    assert log == expected
    assert len(log) > 40


@only_cpython
@settings(deadline=None)
@given(
    st.lists(st.integers(0, 511), unique=True, max_size=130), st.lists(st.integers(0, 511), unique=True, max_size=60)
)
def test_real_sets_iterate_like_the_spelled_out_table(first, second):
    real, spelled_out = set(first), SpelledOutSet(first)
    rest = [item for item in second if item not in real]
    real.update(rest)
    spelled_out.update(rest)
    assert list(real) == list(spelled_out)


@only_cpython
def test_sets_of_77_and_more_small_integers_iterate_in_ascending_order():
    rng = np.random.default_rng(0)
    for size in (77, 96, 128):
        ids = rng.permutation(256)[:size].tolist()
        assert list(set(ids)) == sorted(ids)
    ids = rng.permutation(256)[:76].tolist()
    assert list(set(ids)) != sorted(ids)
