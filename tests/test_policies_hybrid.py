"""Policies that share misses between host and device: golden answers by hand, and their rules by brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import COMMIT, DENOISE, PREFILL, Answer, answers, costs_of, run, runs, steps_of
from simulator_cases import MIXED, SWAPPED, hardware, parts, play

from tidesim.errors import InputError
from tidesim.policies import Shape, policy
from tidesim.policies.hybrid import daop, fiddler, freetoken_hybrid, freetoken_offload, hybrimoe
from tidesim.policies.schedules import LeastSum, Tariff, TwoPointers
from tidesim.residency import NO_MOVES, Moves
from tidesim.workload import ForwardKind

# --- Fiddler ---


def test_fiddler_holds_the_most_popular_of_the_whole_network():
    # Three slots: expert 2 of layer 0 and 0, 1 of layer 1, all with 9; without the tie at the end, layer 0 first.
    popularity = [[5, 1, 9, 0], [9, 9, 2, 9]]
    assert fiddler(popularity).initial(Shape(4, (1, 2))).experts == ((2,), (0, 1))
    assert fiddler(popularity).initial(Shape(4, (3, 3))).experts == ((0, 2), (0, 1, 2, 3))


def test_fiddler_as_coded_sends_up_to_nine_tokens_to_the_host():
    # 7 x 9 = 63 < 70; 7 x 10 = 70 is a tie.
    made = fiddler([[9, 0, 0, 0, 0]])
    assert made.scratch_experts(5) == 1
    assert answers(made, [1], steps_of([[30, 9, 10, 1, 11]])) == [Answer(NO_MOVES, (2, 4), (1, 3))]
    made = fiddler([[9, 0, 0, 0, 0]], cpu_offload=False)
    assert answers(made, [1], steps_of([[30, 9, 10, 1, 11]])) == [Answer(NO_MOVES, (1, 2, 3, 4), ())]


def test_fiddler_as_published_compares_the_times_of_the_profile():
    # Faster host: 100 + 50 + 20 + 200 n, so 370 for one row and 570 for two; copy and run 310 + 100 = 410.
    quick = hardware("host", bytes_per_s=0.24e9)
    made = fiddler([[2, 2, 1, 1, 0, 0, 0, 0]], mode="published")
    timeline, result = play([[2, 0, 1, 2, 1, 0, 0, 0]], made, machine=quick)
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("device", "experts", 1200, 1300),
        ("h2d", "promote 3", 1300, 1610),
        ("device", "expert 3", 1610, 1710),
        ("host", "experts", 1710, 2450),
        ("device", "head", 2450, 3450),
    ]
    assert (result.policy, result.drops, result.promotions) == ("fiddler-as-published", 1, 0)
    assert answers(fiddler([[2] * 2 + [1] * 6]), [2], steps_of([[2, 0, 1, 2, 1, 0, 0, 0]]))[0].host == (2, 3, 4)
    # Ties go to the device: in 17 copies an expert takes 470 + 100, as as two rows on the host; in 18 it is 580.
    for copies_per_expert, dropped, on_host in ((17, (3,), (2, 4)), (18, (), (2, 3, 4))):
        costs = costs_of(quick, copies_per_expert=copies_per_expert)
        log = answers(made, [2], steps_of([[2, 0, 1, 2, 1, 0, 0, 0]]), costs)
        assert log == [Answer(NO_MOVES, dropped, on_host)]


@pytest.mark.parametrize("made", [fiddler([[1] * 8], mode="published"), daop([[1] * 8], mode="published")])
def test_times_of_a_profile_are_asked_for_where_there_are_none(made):
    assert not made.is_routing_only
    with pytest.raises(InputError, match="this run has no profile; take mode 'coded'"):
        made.initial(Shape(8, (2,)))


def test_modes_and_prices_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"mode\(='draft'\) must be 'coded' or 'published'"):
        policy("hybrimoe", mode="draft")
    with pytest.raises(InputError, match=r"prices\(=-1, 40.0\) must be >= 0"):
        policy("daop", popularity=[[1]], host_cost=-1)


class Priced(Tariff):
    """Prices of experts 0, 1, ... whatever their tokens."""

    def __init__(self, on_host, fetched):
        self.prices = np.array(on_host, float), np.array(fetched, float)

    def of(self, tokens):
        return self.prices


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_comparing_expert_by_expert_gives_the_least_sum_of_all_assignments(prices):
    on_host, fetched = zip(*prices, strict=True)
    missed, counts = list(range(len(prices))), np.ones(len(prices), np.int32)
    split = LeastSum(Priced(on_host, fetched))
    info, _ = steps_of([[1]])[0]
    dropped = split.choose(info, 0, missed, counts, np.zeros((1, len(prices)), bool)).drop
    # Of all 2^M assignments with the least sum, the one with most experts on the device.
    best = min(
        product([True, False], repeat=len(prices)),
        key=lambda picks: (
            sum(fetched[e] if on_device else on_host[e] for e, on_device in enumerate(picks)),
            -sum(picks),
        ),
    )
    assert dropped == [expert for expert in missed if best[expert]]


# --- HybriMoE ---


def test_hybrimoe_as_coded_shares_the_experts_of_one_token():
    # Device: hit 0 at 0.5 <= 1.79, miss 2 at 1.418 <= 1.79. Miss 3 at 2.336 > 1.79: the host takes 4. Then
    # 2.336 <= 2.79: the device takes 3. Scores are 0 for 1 and 1/8 for 0, 2, 3: after 1 the lowest id goes.
    log = answers(hybrimoe(), [2], steps_of([[1, 0, 1, 1, 1, 0, 0, 0]], tokens=1))
    assert log == [Answer(Moves((2, 3), (1, 0)), (), (4,))]


def test_hybrimoe_as_coded_streams_the_misses_of_several_tokens():
    made = hybrimoe()
    assert made.scratch_experts(8) == 8
    rows = [[2, 0, 1, 1, 6, 0, 0, 0]], [[0, 3, 0, 9, 0, 0, 0, 0]]
    log = answers(made, [2], steps_of(*rows, kinds=[PREFILL, DENOISE]))
    assert log == [Answer(NO_MOVES, (2, 3, 4), ()), Answer(NO_MOVES, (3,), ())]


def test_hybrimoe_as_published_gives_the_device_the_experts_with_most_tokens():
    # Misses in order: 5 (6 tokens), 2, 3, 4 (1 each). Device: hit 0.5, then 5 at 1.418 <= 1.79; 2.336 > 1.79: host 4.
    # 2.336 <= 2.79: 2. 3.254 > 2.79: host 3.
    made = hybrimoe(mode="published")
    assert (made.name, made.scratch_experts(8)) == ("hybrimoe-as-published", 0)
    for kind in ForwardKind:
        log = answers(made, [2], steps_of([[10, 0, 1, 1, 1, 6, 0, 0]], kinds=[kind]))
        # Half the shares are the scores: 1 has none and goes for 5; then 5 (6/19) goes for 2, for 0 has 10/19.
        assert log == [Answer(Moves((5, 2), (1, 5)), (), (3, 4))]


def test_hybrimoe_evicts_the_lowest_smoothed_share():
    # Shares of 0 and 1: 6/8 and 2/8, then 0 and 1/4; halved and added: 0.1875 and 0.1875 are equal, so 0 goes.
    rows = [[6, 2, 0, 0]], [[0, 1, 3, 0]]
    log = answers(hybrimoe(mode="published"), [2], steps_of(*rows))
    assert log[1].keep == Moves((2,), (0,))
    # With 7/8 and 1/8 before, they are 0.21875 and 0.15625: 1 goes, though it has a token and 0 has none.
    log = answers(hybrimoe(mode="published"), [2], steps_of([[7, 1, 0, 0]], rows[1]))
    assert log[1].keep == Moves((2,), (1,))


def test_hybrimoe_copies_the_misses_of_the_device_while_the_host_computes_its_own():
    # Device: hit 0.5, then 2 at 1.418 <= 1.79; 2.336 > 1.79: host 4, at 770 ns; 2.336 <= 2.79: 3.
    # 1 goes for 2. Of 0 and 2, equal at 1/6, 0 goes for 3: its slot is free at 1300.
    made = hybrimoe(mode="published")
    timeline, result = play([[2, 0, 2, 1, 1, 0, 0, 0]], made, copies="background", host="parallel")
    assert timeline[2:] == [
        ("device", "experts", 1200, 1300),
        ("h2d", "promote 2", 1200, 1510),
        ("host", "experts", 1200, 1970),
        ("device", "expert 2", 1510, 1610),
        ("h2d", "promote 3", 1510, 1820),
        ("device", "expert 3", 1820, 1920),
        ("device", "head", 1970, 2970),
    ]
    assert parts(result) == [1000, 300, 0, 50, 420]


def listed_by_hand(hits, misses, counts):
    """Experts that the device takes of the one list, and those of the host, each step spelled out."""
    waiting = [*hits, *misses]
    device_total, host_total, on_device, on_host = 0.0, 0.0, [], []
    while waiting:
        front, back = waiting[0], waiting[-1]
        device = 0.5 + (0.418 if front in misses else 0)
        host = 1.0 * counts[back] + (0 if on_host else 0.79)
        if device_total + device <= host_total + host:
            on_device.append(waiting.pop(0))
            device_total += device
        else:
            on_host.append(waiting.pop())
            host_total += host
    return on_device, on_host


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=12))
def test_hits_in_the_list_change_no_miss(experts):
    counts = np.array([count for count, _ in experts], np.int32)
    is_hit = np.array([hit for _, hit in experts])
    by_count = sorted(range(len(experts)), key=lambda expert: (-counts[expert], expert))
    hits, misses = ([e for e in by_count if is_hit[e] == wanted] for wanted in (True, False))
    on_device, _ = listed_by_hand(hits, misses, counts.tolist())
    info, _ = steps_of([[1]])[0]
    split = TwoPointers(device=0.5, wait=0.418, host=1, call=0.79)
    assert list(split.choose(info, 0, sorted(misses), counts, is_hit[None]).keep) == [
        expert for expert in on_device if expert in misses
    ]


# --- KTransformers ---


def test_ktransformers_lets_a_large_forward_choose_the_residents():
    made = policy("ktransformers-dynamic", threshold=32)
    assert made.scratch_experts(6) == 6
    rows = [[2, 2, 5, 0, 1, 0]], [[0, 0, 0, 4, 0, 0]], [[9, 0, 9, 9, 0, 0]]
    # Top 2 are 2 and, of two equal ones, 0: so 1 goes. Then 3 and, of those without tokens, 0: so 2 goes. Then 0, 2.
    assert answers(made, [2], steps_of(*rows)) == [
        Answer(Moves((2,), (1,)), (0, 1, 3, 4, 5), ()),
        Answer(Moves((3,), (2,)), (0, 1, 2, 4, 5), ()),
        Answer(Moves((2,), (3,)), (0, 1, 3, 4, 5), ()),
    ]
    assert answers(made, [2], steps_of(*rows, tokens=31)) == [
        Answer(NO_MOVES, (), (2, 4)),
        Answer(NO_MOVES, (), (3,)),
        Answer(NO_MOVES, (), (2, 3)),
    ]


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_the_residents_of_ktransformers_are_those_with_most_tokens(rows, budget):
    made = policy("ktransformers-dynamic", threshold=4)
    for number in range(1, len(rows) + 1):
        log, residency = run(made, [budget], steps_of(*([row] for row in rows[:number]), tokens=4))
        top = sorted(range(6), key=lambda expert: (-rows[number - 1][expert], expert))[:budget]
        assert residency.placement().experts == (tuple(sorted(top)),)
        assert all(len(promote) == len(evict) for _, _, promote, evict in log)


def test_ktransformers_copies_every_expert_once_while_the_layer_runs():
    # Those that stay come first; the others arrive under the rest of the run.
    made = policy("ktransformers-dynamic", threshold=3)
    timeline, result = play([SWAPPED, SWAPPED], made, copies="background")
    assert timeline[2:9] == [
        ("h2d", "promote 2", 1200, 1510),
        ("device", "expert 2", 1510, 1610),
        ("h2d", "promote 3", 1510, 1820),
        ("device", "expert 3", 1820, 1920),
        ("h2d", "promote 0", 1820, 2130),
        ("device", "head", 1920, 2920),
        ("h2d", "promote 1", 2130, 2440),
    ]
    assert (result.hits, result.promotions, result.drops) == (6, 2, 6 + 8)
    _, result = play([MIXED], made)
    assert parts(result) == [1000, 400, 0, 0, 8 * 310]
    # Nobody is resident anew: 0 and 1 run from their slots, 2 and 3 from scratch memory.
    assert (result.promotions, result.drops) == (0, 8)


def test_a_resident_that_is_streamed_may_give_up_its_slot():
    # Top 2 are 2 and 0. The copy of 2 waits for nobody but the residents, which run until 1400.
    made = policy("ktransformers-dynamic", threshold=3)
    timeline, _ = play([[2, 1, 3, 0, 0, 0, 0, 0]], made, copies="background")
    assert timeline[2:5] == [
        ("device", "experts", 1200, 1400),
        ("h2d", "promote 2", 1400, 1710),
        ("device", "expert 2", 1710, 1810),
    ]


# --- DAOP ---


def test_daop_swaps_while_the_absent_one_is_hotter_by_a_twentieth():
    # 0, 1 are resident. 106 > 1.05 x 20; then 21 against 100. 105 is not more than 1.05 x 100, 106 is.
    made = daop([[9, 8, 1, 1, 1]])
    for row, expected in [
        ([100, 20, 21, 106, 0], Moves((3,), (1,))),
        ([100, 101, 105, 0, 0], NO_MOVES),
        ([100, 101, 106, 0, 0], Moves((2,), (0,))),
        ([0, 0, 1, 1, 0], Moves((2, 3), (0, 1))),
    ]:
        assert answers(made, [2], steps_of([row], kinds=[PREFILL]))[0].refresh == expected
        for kind in (DENOISE, COMMIT):
            assert answers(made, [2], steps_of([row], kinds=[kind]))[0].refresh == NO_MOVES


def test_daop_swaps_eight_times_at_most():
    made = daop([[1] * 10 + [0] * 10])
    (answer,) = answers(made, [10], steps_of([[0] * 10 + [9] * 10], kinds=[PREFILL]))
    assert answer.refresh == Moves(tuple(range(10, 18)), tuple(range(8)))
    assert answer.drop == (18, 19)


@pytest.mark.parametrize(
    ("prices", "dropped", "on_host"),
    [
        ((5, 40), (2, 4), (1, 3)),
        ((8.5, 210), (), (1, 2, 3, 4)),
        ((3.5, 30), (2, 4), (1, 3)),
        ((5, 35), (1, 2, 4), (3,)),
    ],
)
def test_daop_sends_few_tokens_of_a_prompt_to_the_host_and_all_of_a_block(prices, dropped, on_host):
    # 5 x 7 = 35 < 40, and 5 x 8 is a tie. 8.5 x 24 = 204 < 210. 3.5 x 7 = 24.5 and 3.5 x 8 = 28 < 30 < 3.5 x 9.
    made = daop([[1, 0, 0, 0, 0]], host_cost=prices[0], copy_cost=prices[1])
    row = [24, 7, 9 if prices[0] == 3.5 else 8, 1, 24]
    log = answers(made, [1], steps_of([row], [row], [row], kinds=[PREFILL, DENOISE, COMMIT]))
    assert log[0] == Answer(NO_MOVES, dropped, on_host)
    assert log[1] == log[2] == Answer(NO_MOVES, (), (1, 2, 3, 4))


def test_daop_swaps_before_the_experts_of_a_prompt_run():
    timeline, result = play([[0, 3, 3, 0, 0, 0, 0, 0]], daop([[2, 2, 1, 1, 0, 0, 0, 0]]), kinds="p")
    assert timeline[2:] == [("h2d", "promote 2", 1200, 1510), ("device", "experts", 1510, 1710)]
    assert (result.hits, result.promotions, result.evictions) == (6, 1, 1)


def test_daop_as_published_asks_the_profile():
    # On the toy machine a miss takes 770 or more on the host and 410 with its copy.
    made = daop([[2, 2, 1, 1, 0, 0, 0, 0]], mode="published")
    (answer,) = answers(made, [2], steps_of([[3, 3, 1, 1, 0, 0, 0, 0]], kinds=[PREFILL]), costs_of())
    assert (made.name, answer) == ("daop-as-published", Answer(NO_MOVES, (2, 3), ()))


# --- the contract, for the modes that are not the default ---

VARIANTS = {
    "fiddler": lambda popularity: fiddler(popularity, mode="published"),
    "fiddler without host": lambda popularity: fiddler(popularity, cpu_offload=False),
    "freetoken-hybrid": lambda _: freetoken_hybrid(),
    "freetoken-offload, streaming": lambda _: freetoken_offload(streams_prefill=True),
    "hybrimoe": lambda _: hybrimoe(mode="published"),
    "daop": lambda popularity: daop(popularity, mode="published"),
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
@settings(deadline=None, max_examples=30)
@given(case=runs(), is_background=st.booleans())
def test_every_mode_keeps_the_contract(make, case, is_background):
    budgets, steps = case
    num_experts = steps[0][1].shape[1]
    costs = costs_of(num_experts=num_experts)
    popularity = sum(table for _, table in steps)
    made = make(popularity)
    log, residency = run(made, budgets, steps, is_background=is_background, costs=costs)
    assert residency.placement().num_experts <= sum(budgets)
    again, _ = run(made, budgets, steps, is_background=is_background, costs=costs)
    assert again == log == run(make(popularity), budgets, steps, is_background=is_background, costs=costs)[0]
    assert run(made, [num_experts] * len(budgets), steps, costs=costs)[0] == []
