"""Bounds that know the routing in advance: right by hand, by other algorithms, and never above what a policy gets."""

from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise, product

import networkx as nx
import numpy as np
import pytest
from ceiling_programme import Programme
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult
from simulator_cases import cases, make_policy
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim import Trace, load_hardware, load_moe_config
from tidesim.ceiling import hit_ceiling, time_ceiling
from tidesim.ceiling import relaxation as relaxing
from tidesim.ceiling.ascent import ascend
from tidesim.ceiling.relaxation import Relaxation
from tidesim.errors import BudgetError, InputError, TidesimError
from tidesim.execution import Costs, execution
from tidesim.hardware.machine import Contention, Curve
from tidesim.policies import Policy, Serving, policy
from tidesim.residency import Moves, Placement
from tidesim.simulator import simulate

FIRST = [3, 3, 0, 0, 0, 0, 0, 0]
SECOND = [0, 0, 3, 3, 0, 0, 0, 0]


def ceiling_of(*rows, budget=2, machine=None, is_pooled=False, **changes):
    """The bound, for forwards with one MoE layer each on the machine of round numbers."""
    workload = toy_workload(*([row] for row in rows))
    costs = Costs(TOY, machine or toy_hardware(), toy_execution(**changes), 3)
    return time_ceiling(workload, costs, budget, is_pooled=is_pooled)


def nearly(exact_ns: int):
    """At most the exact bound, and close to it."""
    return pytest.approx(exact_ns * 0.998, rel=0.0021)


# --- hits ---


def test_hits_by_hand() -> None:
    # One slot: for expert 0 at first, then for one that is used in both forwards between which 0 would have to wait.
    rows = ([3, 2, 1], [0, 3, 3], [3, 1, 2], [2, 2, 2])
    assert hit_ceiling(toy_workload(*([row] for row in rows)), 1) == 3 + 3 + 2 + 2
    assert hit_ceiling(toy_workload(*([row] for row in rows)), 3) == sum(map(sum, rows))
    assert hit_ceiling(toy_workload(*([row] for row in rows)), 0) == 0


def random_counts(rng, num_forwards, num_layers, num_experts=8):
    """Counts [F, L, E] of three rows with two experts each, some liked better than others."""
    liked = rng.random(num_experts)
    picks = np.argsort(rng.random((num_forwards, num_layers, 3, num_experts)) - liked, axis=-1)[..., :2]
    return (picks[..., None] == np.arange(num_experts)).sum(axis=(2, 3))


@pytest.mark.parametrize("seed", range(10))
def test_hits_are_a_flow_of_slots(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts, slots = random_counts(rng, 12, 2), [1, 3]
    flows = [
        flow_of_slots(budget, counts[:, layer] > 0, counts[:, layer], np.zeros((12, 8), int), 0)
        for layer, budget in enumerate(slots)
    ]
    assert hit_ceiling(toy_workload(*counts), slots) == -sum(flows)


def test_a_solver_that_gives_up_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scipy.optimize.linprog", lambda *_, **__: OptimizeResult(fun=None, message="tired"))
    with pytest.raises(TidesimError, match="the solver gave up on the most hits of a layer: tired"):
        hit_ceiling(toy_workload([FIRST]), 1)


def flow_of_slots(slots, is_used, saving, entering, evict):
    """The cheapest way of `slots` units through a network in which a unit that passes an expert is a slot that it has.

    A slot is free after a forward (node f) or holds an expert that has just been used (node (e, f)). To be kept until
    the next use brings that one's `saving`, to come in costs `entering`, to leave `evict`; all but saving are [F, E].
    """
    num_forwards, num_experts = is_used.shape
    network = nx.DiGraph()
    network.add_node(-1, demand=-slots)
    network.add_node(num_forwards, demand=slots)
    for forward in range(-1, num_forwards):
        network.add_edge(forward, forward + 1, capacity=slots, weight=0)
    for expert in range(num_experts):
        before = -1
        for forward in np.flatnonzero(is_used[:, expert]).tolist():
            here = (expert, forward)
            network.add_edge(before, here, capacity=1, weight=-int(saving[forward, expert]))
            network.add_edge(forward, here, capacity=1, weight=int(entering[forward, expert]))
            network.add_edge(here, forward, capacity=1, weight=evict)
            network.add_edge(here, num_forwards, capacity=1, weight=0)  # whoever is there at the end never leaves
            before = here
    return nx.min_cost_flow_cost(network)


class Script(Policy):
    """Anything goes: who is resident, who is promoted, fetched and makes room is drawn at random, or foreseen."""

    name = "script"
    scratch = 8

    def __init__(self, rng, keeps, drops, counts, is_foreseeing):
        self._keeps, self._drops = keeps, drops
        self._rng, self._counts, self._is_foreseeing = rng, counts, is_foreseeing

    def _best(self, forward, layer, number):
        """The experts with most rows in a forward to come."""
        counts = self._counts[min(forward, len(self._counts) - 1), layer]
        liked = counts if self._is_foreseeing else self._rng.random(len(counts))
        return np.argsort(-liked, kind="stable")[:number].tolist()

    def initial(self, shape):
        self._budgets = shape.budgets
        return Placement.of(self._best(0, layer, budget) for layer, budget in enumerate(shape.budgets))

    def refresh(self, forward, layer, counts, is_resident):
        mine = is_resident[layer]
        wanted = self._best(forward.index + 1, layer, self._budgets[layer])
        promote = [expert for expert in wanted if not mine[expert]]
        promote = promote[: int(self._rng.integers(0, len(promote) + 1))]
        others = [expert for expert in np.flatnonzero(mine).tolist() if expert not in wanted]
        num_over = len(promote) + int(mine.sum()) - self._budgets[layer]
        return Moves(tuple(promote), tuple(others[: max(num_over, 0)]))

    def serve(self, forward, layer, missed, counts, is_resident):
        residents, victims, keep, drop = np.flatnonzero(is_resident[layer]).tolist(), [], [], []
        for expert in missed:
            what = self._rng.random()
            if what < self._keeps:
                if len(residents) == self._budgets[layer]:
                    victims.append(residents.pop(int(self._rng.integers(len(residents)))))
                residents.append(expert)
                keep.append(expert)
            elif what < self._keeps + self._drops:
                drop.append(expert)
        return Serving(Moves(tuple(keep), tuple(victims)), tuple(drop))


@st.composite
def machines(draw, plain):
    """Machines with fixed parts of every kind, measured experts, and a memory that all share."""
    device = {"grouped_overhead_s": draw(st.sampled_from([0.0, 70e-9, 900e-9, 5e-6]))}
    if draw(st.booleans()):
        device["expert_curve"] = Curve((1, 2, 8), (0.3e9, 0.4e9, 0.5e9))
    device["grouped_flops_per_s"] = draw(st.sampled_from([1e30, 0.2e9, 1e9]))
    machine = replace(plain, device=replace(plain.device, **device))
    machine = replace(machine, host=replace(machine.host, call_overhead_s=draw(st.sampled_from([0.0, 50e-9, 4e-6]))))
    if draw(st.booleans()):
        machine = replace(machine, contention=Contention(**dict.fromkeys(Contention.__slots__, 0.5)))
    return machine


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_policy_is_faster_than_the_time_or_hits_more_than_the_hits(data) -> None:
    workload, model, plain, (name, params), budgets, used = data.draw(cases())
    machine = data.draw(machines(plain))
    used = replace(used, returns=data.draw(st.sampled_from(["row", "pair"])))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    players = [make_policy(name, params)]
    players += [
        Script(rng, keeps, drops, workload.counts, is_foreseeing)
        for keeps, drops in ((0.0, 0.0), (1.0, 0.0), (0.3, 0.3))
        for is_foreseeing in (False, True)
    ]
    costs = Costs(model, machine, used, int(workload.tokens.max()))
    relaxation = Relaxation.of(workload, costs)
    exact_ns, pooled_ns = (Programme(relaxation, budgets, is_pooled).solve() for is_pooled in (False, True))
    assert time_ceiling(workload, costs, budgets).makespan_ns <= exact_ns * (1 + 1e-7)
    for player in players:
        result = simulate(workload, model, machine, player, budget=budgets, execution=used, is_memory_checked=False)
        least_ns = pooled_ns if player.scope == "network" else exact_ns
        assert least_ns * (1 - 1e-7) <= result.makespan_ns, player.name
        is_on_demand = player.name in ("lru", "static", "all-host", "all-device") or (
            player.name == "tide-as-coded" and used.copies == "background"
        )
        if is_on_demand:
            assert result.hits <= hit_ceiling(workload, budgets)


# --- time, by hand: entry 200, dense part 1000, head 1000; resident 100; missed 1170 with its rows; promotion 310 ---


def test_residents_of_the_first_forward_are_free() -> None:
    assert ceiling_of(FIRST).makespan_ns == nearly(2200 + 200)


def test_blocking_copies_add_to_the_time() -> None:
    assert ceiling_of(FIRST, SECOND).makespan_ns == nearly(2 * (2200 + 200) + 2 * 310)


def test_background_copies_hide_behind_the_forwards_before() -> None:
    assert ceiling_of(FIRST, SECOND, copies="background").makespan_ns == nearly(2 * (2200 + 200))


def test_the_link_copies_no_more_than_a_run_has_time_for() -> None:
    # A copy takes 10 300 and saves 1170 - 100; without any the run takes 4600 + 2 * 1170. Both are full of copies.
    bound = ceiling_of(FIRST, SECOND, copies="background", copies_per_expert=1000)
    assert bound.makespan_ns == nearly(6940 / (1 + 1070 / 10300))


def test_sides_that_run_beside_each_other_are_balanced() -> None:
    # Both experts are resident. The host takes 1170 where the device takes 100, so it gets 1 part in 12.7 of the work.
    bound = ceiling_of(FIRST, budget=8, host="parallel")
    assert bound.makespan_ns == nearly(2200 + 200 * 1170 / 1270)


def test_without_slots_experts_come_for_one_forward_at_a_time() -> None:
    assert ceiling_of(FIRST, budget=0).makespan_ns == nearly(2200 + 2 * (310 + 100))


def test_a_fixed_part_that_nobody_need_pay_is_not_charged() -> None:
    # The residents' kernel takes 5000 besides its experts, the host 4000 for each call: fetched experts pay neither.
    machine = toy_hardware()
    machine = replace(machine, device=replace(machine.device, grouped_overhead_s=5e-6))
    machine = replace(machine, host=replace(machine.host, call_overhead_s=4e-6))
    changes = {"copies": "background", "host": "parallel", "kernels": "grouped"}
    result = simulate(
        toy_workload([SECOND]),
        TOY,
        machine,
        policy("lru"),
        budget=2,
        execution=toy_execution(**changes),
        is_memory_checked=False,
    )
    assert result.makespan_ns == 2200 + 2 * 310 + 100
    assert ceiling_of(SECOND, machine=machine, **changes).makespan_ns <= result.makespan_ns


def test_slots_that_layers_share_are_worth_at_least_as_much() -> None:
    rng = np.random.default_rng(5)
    workload = toy_workload(*random_counts(rng, 20, 2))
    for changes in ({}, {"copies": "background", "host": "parallel"}):
        costs = Costs(replace(TOY, num_layers=2), toy_hardware(), toy_execution(**changes), 3)
        each = time_ceiling(workload, costs, [1, 3]).makespan_ns
        assert time_ceiling(workload, costs, [1, 3], is_pooled=True).makespan_ns <= each * 1.001
        exact = Programme(Relaxation.of(workload, costs), [1, 3], True).solve()
        assert time_ceiling(workload, costs, [1, 3], is_pooled=True).makespan_ns == nearly(exact)


def test_more_slots_never_raise_the_bound() -> None:
    workload = toy_workload(*random_counts(np.random.default_rng(3), 30, 1))
    for changes in ({}, {"copies": "background"}, {"copies": "background", "host": "parallel", "write_back": True}):
        costs = Costs(TOY, toy_hardware(), toy_execution(**changes), 3)
        bounds = [time_ceiling(workload, costs, budget).makespan_ns for budget in range(9)]
        assert all(after <= before * 1.001 for before, after in pairwise(bounds))


@pytest.mark.parametrize("kept_bytes", [0, 1 << 12])
def test_a_run_that_is_relaxed_part_by_part_has_the_same_bound(
    kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = toy_workload(*random_counts(np.random.default_rng(7), 40, 2))
    model, slots = replace(TOY, num_layers=2), {False: np.array([1.0, 3.0]), True: np.array([4.0])}
    for changes in ({}, {"host": "parallel"}, {"copies": "background", "host": "parallel"}):
        costs = Costs(model, toy_hardware(), toy_execution(**changes), 3)
        whole = Relaxation.of(workload, costs)
        monkeypatch.setattr(relaxing, "_WINDOW_CELLS", 16 * 7)
        monkeypatch.setattr(relaxing, "_KEPT_BYTES", kept_bytes)
        parts = relaxing.RelaxedRun(workload, costs)
        assert len(parts.spans) == 6
        for is_pooled in (False, True):
            found, expected = (ascend(relaxed, slots[is_pooled]) for relaxed in (parts, whole))
            assert found.bound_ns == pytest.approx(expected.bound_ns, rel=1e-12)


def test_a_ceiling_says_what_it_is_of() -> None:
    ceiling = ceiling_of(FIRST, budget=2)
    assert (ceiling.budgets, ceiling.is_pooled) == ((2,), False)
    assert ceiling.tok_per_s == pytest.approx(3 / (ceiling.makespan_ns * 1e-9))


def test_what_does_not_fit_together_is_refused() -> None:
    workload = toy_workload([FIRST])
    costs = Costs(TOY, toy_hardware(), toy_execution(), 3)
    with pytest.raises(BudgetError, match="budget"):
        time_ceiling(workload, costs, 9)
    with pytest.raises(BudgetError, match="budget"):
        hit_ceiling(workload, 9)
    with pytest.raises(InputError, match="2 MoE layers"):
        time_ceiling(workload.tiled(2), costs, 2)
    with pytest.raises(InputError, match="2 rows"):
        time_ceiling(workload, Costs(TOY, toy_hardware(), toy_execution(), 2), 2)
    with pytest.raises(InputError, match="no forward"):
        time_ceiling(replace(workload, counts=workload.counts[:0]), costs, 2)


# --- time, by other algorithms ---


def random_relaxation(rng, num_forwards, num_experts, evict=0):
    """One layer in which everything adds up, in whole numbers."""
    is_used = rng.random((num_forwards, 1, num_experts)) < 0.6
    zeros = np.zeros((num_forwards, 1))
    return Relaxation(
        dense=np.full(num_forwards, 10.0),
        device=rng.integers(1, 9, is_used.shape) * is_used * 1.0,
        host=rng.integers(5, 60, is_used.shape) * is_used * 1.0,
        device_fixed=zeros,
        host_fixed=zeros,
        promote=20.0,
        evict=float(evict),
        is_parallel=False,
        is_background=False,
    )


@pytest.mark.parametrize("evict", [0, 7])
@pytest.mark.parametrize("seed", range(5))
def test_time_that_adds_up_is_a_flow_of_slots(seed: int, evict: int) -> None:
    relaxation = random_relaxation(np.random.default_rng(seed), 15, 8, evict)
    device, host = relaxation.device[:, 0], relaxation.host[:, 0]
    there, not_there = np.minimum(device, host), np.minimum(host, device + relaxation.promote)
    entering = relaxation.promote + there - not_there
    flow_ns = flow_of_slots(3, host > 0, not_there - there, entering, evict)
    optimum = flow_ns + not_there.sum() + relaxation.dense.sum()
    assert Programme(relaxation, [3], False).solve() == pytest.approx(optimum)
    assert ascend(relaxation, np.array([3.0])).bound_ns == nearly(optimum)


@pytest.mark.parametrize("evict", [0, 7])
@pytest.mark.parametrize("seed", range(3))
def test_time_that_adds_up_is_the_best_of_all_residencies(seed: int, evict: int) -> None:
    relaxation = random_relaxation(np.random.default_rng(seed), 4, 4, evict)
    sets = [set(chosen) for size in range(3) for chosen in combinations(range(4), size)]
    optimum = min(time_of(relaxation, path) for path in product(sets, repeat=4))
    assert Programme(relaxation, [2], False).solve() == pytest.approx(optimum)
    assert ascend(relaxation, np.array([2.0])).bound_ns == nearly(optimum)


def time_of(relaxation, residents):
    """The time of a run with `residents[f]` before forward f."""
    device, host, total = relaxation.device[:, 0], relaxation.host[:, 0], relaxation.dense.sum()
    for forward, here in enumerate(residents):
        after = residents[forward + 1] if forward + 1 < len(residents) else set()
        total += relaxation.promote * len(after - here)
        total += relaxation.evict * len(here - after) * (forward + 1 < len(residents))
        for expert in range(host.shape[1]):
            extra = 0 if expert in here | after else relaxation.promote
            total += min(host[forward, expert], device[forward, expert] + extra)
    return total


def test_a_bound_that_is_out_of_time_is_one_all_the_same() -> None:
    relaxation, slots = random_relaxation(np.random.default_rng(1), 15, 8, 7), np.array([3.0])
    whole, cut = ascend(relaxation, slots), ascend(relaxation, slots, time_limit_s=0.0)
    assert (cut.num_iterations, cut.is_settled) == (1, False)
    assert whole.is_settled
    assert 0 < cut.bound_ns <= whole.bound_ns
    assert ascend(relaxation, slots, time_limit_s=1e9) == whole
    workload = toy_workload([FIRST], [SECOND])
    limited = time_ceiling(workload, Costs(TOY, toy_hardware(), toy_execution(), 3), 2, time_limit_s=0.0)
    assert (limited.num_iterations, limited.is_settled) == (1, False)
    assert limited.makespan_ns <= ceiling_of(FIRST, SECOND).makespan_ns


class FetchesOne(Policy):
    """Expert 0 is resident, and expert 1 fetched for each forward."""

    name, scratch, miss_action = "fetches-one", 1, "split"

    def initial(self, shape):
        return Placement(((0,),))

    def serve(self, forward, layer, missed, counts, is_resident):
        return Serving(drop=(1,))


def test_blocking_copies_of_fetched_experts_run_beside_a_parallel_host() -> None:
    workload, used = toy_workload([[2, 1, 1, 0, 0, 0, 0, 0]]), toy_execution(host="parallel")
    kwargs = {"budget": 1, "execution": used, "is_memory_checked": False}
    # The device takes 100 + 310 + 100, and the host, beside it, 50 + 500 + 2 * 110 for expert 2.
    relaxation = Relaxation.of(workload, Costs(TOY, toy_hardware(), used, 2))
    dense = float(relaxation.dense.sum())
    assert simulate(workload, TOY, toy_hardware(), FetchesOne(), **kwargs).makespan_ns == dense + 770
    # If shares may be moved, 100 + 410 x = 770 (2 - x) is least; with copies beside nothing it were 779.
    least = dense + 100 + 410 * 1440 / 1180
    assert Programme(relaxation, [1], False).solve() == pytest.approx(least)
    assert ascend(relaxation, np.array([1.0])).bound_ns == nearly(least)


# --- time, at full size ---


@cache
def mini_layer(context, num_forwards):
    with Trace.open("llada2.0-mini-synthetic.h5") as trace:
        workload = trace.workload(context)
    return replace(workload, counts=workload.counts[:, [5]]).first(num_forwards)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "name", "num_forwards"), [("rtx4090", "overlapped", 200), ("a100-40gb", "tide-as-coded", 60)]
)
def test_the_ascent_ends_close_to_the_best_prices(profile: str, name: str, num_forwards: int) -> None:
    workload = mini_layer(execution(name).context, num_forwards)
    model = replace(load_moe_config("llada2.0-mini"), num_layers=1)
    costs = Costs(model, load_hardware(profile), execution(name), int(workload.tokens.max()))
    relaxation = Relaxation.of(workload, costs)
    exact = Programme(relaxation, [64], False).solve()
    found = ascend(relaxation, np.array([64.0])).bound_ns
    assert 0.995 * exact <= found <= exact * (1 + 1e-7)
