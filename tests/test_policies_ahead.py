"""What is fetched ahead by predictors, and the systems that do so, against cases worked by hand."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefetch_cases import Foretold, forward, moves_of
from simulator_cases import data_of
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.errors import InputError
from tidesim.policies import Shape, policy
from tidesim.policies.composition import Composition, first_ids
from tidesim.policies.pieces import LastUse, ThisForward
from tidesim.policies.predictors import (
    Noisy,
    Oracle,
    Previous,
    Recorded,
)
from tidesim.policies.prefetch import CumulativeShare, MostExpected, Prefetch, all_expected
from tidesim.policies.splits import KeepAll
from tidesim.policies.victims import Lowest
from tidesim.simulator import simulate

# --- whom to fetch ---


def test_choices_take_all_some_or_as_many_as_the_confidence_asks_for():
    tokens = np.array([1.0, 5.0, 2.0, 2.0, 0.0])
    assert all_expected(tokens, 1.0) == [0, 1, 2, 3]
    assert MostExpected(2)(tokens, 1.0) == [1, 2]
    assert MostExpected(9)(tokens, 1.0) == [1, 2, 3, 0]
    # Shares 0.5, 0.2, 0.2, 0.1, which add up to 0.5, 0.7, 0.9, 1.
    assert CumulativeShare(0)(tokens, 0.25) == [1, 2]
    assert CumulativeShare(3)(tokens, 0.25) == [1, 2, 3]
    assert CumulativeShare(1)(tokens, 1.0) == [1]
    assert CumulativeShare(9)(tokens, 1.0) == [1, 2, 3, 0]
    assert CumulativeShare(0)(np.zeros(3), 0.0) == []


TABLE = [[9, 9, 9], [1, 4, 0], [4, 2, 5]]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [(1, [1, 0])]),
        ({"furthest": None}, [(1, [1, 0]), (2, [2, 0, 1])]),
        ({"furthest": None, "nearest": 2}, [(2, [2, 0, 1])]),
        ({"furthest": 2, "order": "network"}, [(2, [2]), (1, [1]), (2, [0, 1]), (1, [0])]),
    ],
)
def test_prefetches_are_ordered_by_layer_or_over_the_network(settings, wanted):
    prefetch = Prefetch(Foretold(TABLE), **settings)
    prefetch.begin(Shape(3, (1, 1, 1)))
    assert prefetch.wanted(forward(), 0, np.zeros((3, 3), np.bool_)) == wanted
    assert prefetch.wanted(forward(), 2, np.zeros((3, 3), np.bool_)) == []


def test_residents_are_expected_but_not_fetched_and_expectations_end_with_the_layer():
    prefetch = Prefetch(Foretold(TABLE))
    prefetch.begin(Shape(3, (1, 1, 1)))
    assert prefetch.wanted(forward(), 0, np.array(TABLE) == 4) == [(1, [0])]
    assert prefetch.expected.tolist() == [[False] * 3, [True, True, False], [False] * 3]
    prefetch.observe(forward(), 1, np.array([1, 0, 0]), np.zeros((3, 3), np.bool_))
    assert not prefetch.expected.any()


@pytest.mark.parametrize("bad", [{"nearest": 0}, {"nearest": 3, "furthest": 2}])
def test_distances_that_make_no_sense_are_refused(bad):
    with pytest.raises(InputError, match="nearest"):
        Prefetch(Previous(), **bad)


def cache(scope, **changes):
    """An LRU cache with a prefetch of all later layers."""
    victims = Lowest(LastUse(), scope=scope)
    prefetch = Prefetch(Foretold([[0, 0, 0, 0], [0, 1, 2, 3]]))
    settings = {"split": KeepAll(), "victims": victims, "prefetch": prefetch, "scratch": 1, "scope": scope} | changes
    return Composition("cache", first_ids, **settings)


def test_a_cache_by_layer_prefetches_into_the_slots_of_the_target():
    # Layer 1 has a slot for two, and 0, 1 in them: 1 is expected itself, so 3 takes the slot of 0 and 2 has none.
    log = moves_of(cache("layer"), [2, 2], [[[2, 2, 0, 0], [0, 0, 2, 2]]])
    assert log[0, 0] == ((), (), (), [(1, (3,), (0,))])
    assert log[0, 1] == ((2,), (1,), (), [])


def test_a_shared_cache_spares_the_running_layer_and_whom_it_expects():
    # Experts 0, 1 of layer 0 run and 1 of layer 1 is expected: only 0 of layer 1, which is 4, may go.
    log = moves_of(cache("network"), [2, 2], [[[2, 2, 0, 0], [0, 0, 2, 2]]])
    assert log[0, 0] == ((), (), (), [(1, (3,), (4,))])
    # Then 0 and 1 of layer 0 were used longest ago, but 1 of layer 1 never was.
    assert log[0, 1] == ((2,), (5,), (), [])


def test_a_miss_does_not_take_the_slot_of_who_is_expected():
    # From layer 0 both slots of layer 2 are expected to be used; layer 1 misses, and layer 0's slots go.
    prefetch = Prefetch(Foretold([[0, 0], [0, 0], [1, 1]]), nearest=2, furthest=2)
    made = cache("network", victims=Lowest(ThisForward(), scope="network"), prefetch=prefetch)
    log = moves_of(made, [1, 1, 1], [[[2, 0], [0, 2], [2, 2]]])
    assert log[0, 0] == ((), (), (), [(2, (1,), (2,))])
    assert log[0, 1] == ((1,), (0,), (), [])
    assert log[0, 2] == ((), (), (), [])


# --- Pre-gated MoE ---

STAIRS = [[2, 2, 0, 0], [0, 2, 2, 0], [0, 0, 2, 2]]


def pre_gated(budgets, tables, foretold=None):
    workload = toy_workload(*tables)
    lookahead = None if foretold is None else np.array(foretold, np.int32)
    predictor = Oracle(workload) if lookahead is None else Recorded(lookahead)
    return moves_of(policy("pre-gated", predictor=predictor), budgets, tables)


def test_pre_gated_fills_one_buffer_while_the_other_is_used_and_keeps_nothing():
    log = pre_gated([2, 1, 1], [STAIRS, STAIRS])
    for index in (0, 1):
        assert log[index, 0] == ((0, 1), (), (), [(1, (1, 2), ())])
        assert log[index, 1] == ((), (), (), [(2, (2, 3), (0, 1))])
        # Experts 1, 2 of layer 1 are 5, 6; 2, 3 of layer 2 are 10, 11.
        assert log[index, 2] == ((), (), (), [(2, (), (5, 6, 10, 11))])


def test_pre_gated_with_too_few_slots_fetches_the_rest_on_demand():
    log = pre_gated([1, 1, 1], [STAIRS])
    assert log[0, 0] == ((0, 1), (), (), [(1, (1,), ())])
    assert log[0, 1] == ((2,), (0,), (), [(2, (2,), (1,))])
    assert log[0, 2] == ((3,), (5,), (), [(2, (), (6, 10, 11))])


def test_pre_gated_with_less_than_a_layer_of_slots_goes_through_scratch():
    log = pre_gated([1, 0, 0], [STAIRS])
    assert log[0, 0] == ((0,), (), (1,), [])
    assert log[0, 1] == ((1,), (0,), (2,), [])
    assert log[0, 2] == ((2,), (5,), (3,), [(2, (), (10,))])


def test_pre_gated_fetches_on_demand_what_nobody_foretold():
    # Layer 1 is foretold to use 0 and 1 and uses 1 and 2; layer 2 is foretold to use 3 alone.
    log = pre_gated([2, 2, 1], [STAIRS], [[[0, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 4]]])
    assert log[0, 0] == ((0, 1), (), (), [(1, (0, 1), ())])
    # One slot is free. Then 0, 1 of layer 0 and 0 of layer 1 (which is 4) give up theirs.
    assert log[0, 1] == ((2,), (), (), [(2, (3,), (0, 1, 4))])
    assert log[0, 2] == ((2,), (), (), [(2, (), (5, 6, 10, 11))])


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 6))
def test_pre_gated_by_an_oracle_misses_in_the_first_layer_only(seed, num_layers, num_experts):
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, 3, (4, num_layers, num_experts)) * 2
    active = (tables > 0).sum(axis=2)
    # Slots for the two layers that need most, one after the other.
    slots = max([*(active[:, 0]), *(int(one + two) for row in active for one, two in pairwise(row))])
    budgets = [slots // num_layers + (layer < slots % num_layers) for layer in range(num_layers)]
    log = pre_gated(budgets, tables)
    for (index, layer), (keep, evict, drop, _) in log.items():
        assert (evict, drop) == ((), ())
        assert keep == (tuple(np.flatnonzero(tables[index, 0])) if layer == 0 else ())


# --- MoE-Infinity ---

# One sequence; layer 1 is like [0 0 3 1].
LIKE = toy_workload([[2, 2, 0, 0], [0, 0, 3, 1]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (
            "published",
            {
                # Visits of layer 0: 1 1. Of layer 1 nobody was used; 2 and 3 are expected and take the slots of 0, 1.
                (0, 0): ((), (), (), [(1, (2, 3), (4, 5))]),
                # Visits 11.. and ..21, as copies count; 0 of layer 0 is the first of those with the fewest.
                (0, 1): ((1,), (0,), (), []),
                # Visits .2.. and .121. The expected 2 and 3 stay.
                (1, 0): ((), (), (), []),
                # 3 is there; visits .2.. and .122.
                (1, 1): ((), (), (), []),
                # Visits of those on the device .2.. and .122: 1 of layer 1 has the fewest.
                (2, 0): ((0,), (5,), (), []),
                (2, 1): ((), (), (), []),
            },
        ),
        (
            "coded",
            {
                # Everybody in layer 1 is a candidate and layer 0 is in use: no victim.
                (0, 0): ((), (), (), []),
                # Visits 11.. and 01..: 0 of layer 0 is the first of those with the most.
                (0, 1): ((2,), (0,), (), []),
                (1, 0): ((), (), (), []),
                # Visits .2.. and 011.: the most visited one goes.
                (1, 1): ((3,), (1,), (), []),
                # Nobody is expected before layer 0 runs: visits 0111, so 1 of layer 1 goes.
                (2, 0): ((0,), (5,), (), []),
                # Visits 2... and 0.12, as counts outlast evictions.
                (2, 1): ((), (), (), []),
            },
        ),
    ],
)
def test_moe_infinity_prefetches_what_the_nearest_sequence_used(mode, expected):
    tables = [
        [[2, 2, 0, 0], [0, 2, 2, 0]],
        [[0, 4, 0, 0], [0, 0, 0, 4]],
        [[4, 0, 0, 0], [0, 0, 0, 4]],
    ]
    assert moves_of(policy("moe-infinity-paper", corpus=LIKE, mode=mode), [2, 2], tables) == expected


def test_moe_infinity_fetches_the_most_expected_first_over_all_layers():
    # From layer 0 of three: layer 1 weighs 3/4, layer 2 weighs 1/2: 3 x .75, 1 x .75 against 4 x .5.
    corpus = toy_workload([[4, 0, 0, 0], [0, 0, 3, 1], [0, 0, 0, 4]])
    log = moves_of(policy("moe-infinity-paper", corpus=corpus), [2, 2, 2], [[[4, 0, 0, 0]] * 3])
    # Victims: 1 of layer 0, and then 0, 1 of layer 1.
    assert log[0, 0] == ((), (), (), [(1, (2,), (1,)), (2, (3,), (4,)), (1, (3,), (5,))])


def test_moe_infinity_counts_visits_of_one_sequence():
    # Within a sequence 1 of layer 1 would have the fewest, none; in a new one 0 of layer 0 has none either.
    same, other = [[4, 0, 0, 0], [4, 0, 0, 0]], [[0, 2, 2, 0], [4, 0, 0, 0]]
    made = policy("moe-infinity-paper", corpus=toy_workload(same))
    for sequences, victim in (([3, 3], 5), ([3, 4], 0)):
        log = moves_of(made, [2, 2], [same, other], sequence=np.array(sequences, np.int32))
        assert log[1, 0] == ((2,), (victim,), (), [])


def test_modes_that_are_none_are_refused():
    with pytest.raises(InputError, match=r"mode\(='broken'\) must be 'coded' or 'published'"):
        policy("moe-infinity-paper", corpus=LIKE, mode="broken")


# --- FineMoE ---


def test_finemoe_fetches_more_the_less_a_forward_is_like_a_known_one():
    # Layer 1 of the known forward has shares 0 .5 .25 .25.
    corpus = toy_workload([[4, 0, 0, 0], [0, 2, 1, 1]])
    like, unlike = [[4, 0, 0, 0], [0, 4, 0, 0]], [[2, 2, 0, 0], [0, 4, 0, 0]]
    made = policy("finemoe", corpus=corpus, distance=1, least=1)
    # Cosine 1: just one, 1, which is there.
    assert moves_of(made, [2, 2], [like])[0, 0] == ((), (), (), [])
    # Cosine 0.707: shares may add up to 0.293, so it is still one.
    assert moves_of(made, [2, 2], [unlike])[0, 0] == ((), (), (), [])
    # Cosine 1 / sqrt(17), 0.243: shares may add up to 0.757, which is two, 1 and 2.
    half = [[1, 4, 0, 0], [0, 4, 0, 0]]
    assert moves_of(made, [2, 2], [half])[0, 0] == ((), (), (), [(1, (2,), (4,))])
    # Cosine 0: all three. The first victims of those worth nothing are 0 of layer 0 and 0 of layer 1.
    alien = [[0, 4, 0, 0], [0, 4, 0, 0]]
    assert moves_of(made, [2, 2], [alien])[0, 0] == ((), (), (), [(1, (2, 3), (0, 4))])
    made = policy("finemoe", corpus=corpus, distance=1, least=2)
    assert moves_of(made, [2, 2], [like])[0, 0] == ((), (), (), [(1, (2,), (1,))])


def test_finemoe_fetches_by_share_over_distance_from_its_distance_on():
    # Cosine 0, as layer 0 is unlike: everybody. Layer 2 weighs 1/2 (shares .75 .25), layer 3 weighs 1/3 (shares 0 1).
    corpus = toy_workload([[4, 0], [4, 0], [3, 1], [0, 4]])
    log = moves_of(policy("finemoe", corpus=corpus, distance=2), [1] * 4, [[[0, 4], [4, 0], [4, 0], [0, 4]]])
    # Layer 0 fetches 1 for itself in the place of its own 0. Then 0 of layer 2, .375, is there and stays, 1 of layer 3,
    # .333, takes the slot of 0 in layer 1, which is 2, and 1 of layer 2, .125, that of 0 in layer 3, which is 6.
    assert log[0, 0] == ((1,), (0,), (), [(3, (1,), (2,)), (2, (1,), (6,))])
    # All but 1 of layer 0 are expected, so it goes; layer 1 was too near to be foretold.
    assert log[0, 1] == ((0,), (1,), (), [])
    # Whom layers 2 and 3 use is there.
    assert log[0, 2] == log[0, 3] == ((), (), (), [])


def test_finemoe_evicts_the_lowest_share_times_visits():
    corpus = toy_workload([[4, 0, 0, 0], [3, 1, 0, 0]])
    made = policy("finemoe", corpus=corpus, distance=1, least=2)
    tables = [[[4, 0, 0, 0], [1, 1, 2, 0]], [[4, 0, 0, 0], [0, 4, 0, 0]], [[0, 0, 4, 0], [4, 0, 0, 0]]]
    log = moves_of(made, [1, 2], tables)
    # Layer 1 misses 2; 0 and 1 are in use, and 0 of layer 0 is worth nothing.
    assert log[0, 1] == ((2,), (0,), (), [])
    # Layer 0 misses 0. Worth in layer 1: 0 is 0.75 x 1, 1 is 0.25 x 1, 2 is 0 x 1; so 2, which is 6, goes.
    assert log[1, 0] == ((0,), (6,), (), [])
    # Layer 0 misses 2. Worth: 0 of layer 0 nothing.
    assert log[2, 0] == ((2,), (0,), (), [])


@pytest.mark.parametrize("bad", [{"distance": 0}, {"least": -1}])
def test_finemoe_refuses_what_makes_no_sense(bad):
    with pytest.raises(InputError, match="must be >= 1, and least"):
        policy("finemoe", corpus=LIKE, **bad)


# --- next-layer prefetch ---


def test_next_layer_prefetch_fills_the_next_layers_cache():
    tables = [[[2, 2, 0, 0], [0, 0, 3, 1]], [[0, 0, 2, 2], [2, 0, 1, 1]]]
    log = moves_of(policy("next-layer-prefetch", predictor=Oracle(toy_workload(*tables))), [2, 2], tables)
    assert log[0, 0] == ((), (), (), [(1, (2, 3), (0, 1))])
    assert log[0, 1] == ((), (), (), [])
    # 0 and 1 have one use two forwards ago, 1/2; then 2 has one just now, 1/1. In layer 1 both are expected: no victim.
    assert log[1, 0] == ((2, 3), (0, 1), (), [])
    # 2 and 3 have three uses, that ahead and two in forwards, just now: the lower id goes.
    assert log[1, 1] == ((0,), (2,), (), [])
    few = policy("next-layer-prefetch", predictor=Oracle(toy_workload(*tables)), most=1)
    log = moves_of(few, [2, 2], tables)
    assert log[0, 0] == ((), (), (), [(1, (2,), (0,))])
    assert log[0, 1] == ((3,), (1,), (), [])
    with pytest.raises(InputError, match=r"most\(=-1\) must be >= 0"):
        policy("next-layer-prefetch", predictor=Previous(), most=-1)


# --- timetables ---

SWAPPED = [0, 0, 3, 3, 0, 0, 0, 0]


def timetable(name="pre-gated", copies="background", **changes):
    """Two layers with the same routing, from an oracle; (timeline, parts of both layers)."""
    workload = toy_workload([SWAPPED, SWAPPED])
    timeline = []
    result = simulate(
        workload,
        replace(TOY, num_layers=2),
        toy_hardware(),
        policy(name, predictor=Oracle(workload)),
        budget=2,
        execution=toy_execution(copies=copies, **changes),
        timeline=timeline,
        is_memory_checked=False,
    )
    timeline.sort(key=lambda interval: (interval.start_ns, interval.resource))
    waits = [round(1e9 * result.breakdown_by_layer_s[layer]["copy_wait"]) for layer in "01"]
    return [tuple(interval[:4]) for interval in timeline], waits


def test_a_prefetch_hides_behind_the_dense_part():
    # A promotion takes 310. Layer 0 waits for its own two; those of layer 1 end at 2440, and its dense part at 2920.
    timeline, waits = timetable()
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("h2d", "promote 2", 1200, 1510),
        ("device", "expert 2", 1510, 1610),
        ("h2d", "promote 3", 1510, 1820),
        ("device", "expert 3", 1820, 1920),
        ("h2d", "promote 2", 1820, 2130),
        ("device", "dense", 1920, 2920),
        ("h2d", "promote 3", 2130, 2440),
        ("device", "experts", 2920, 3120),
        ("device", "head", 3120, 4120),
    ]
    assert waits == [310 + 210, 0]


def test_a_prefetch_that_is_late_is_waited_for():
    # 121 latencies make a promotion 1510 long: layer 1 is ready at 5320, and its experts arrive at 5730 and 7240.
    timeline, waits = timetable(copies_per_expert=121)
    assert timeline[2:] == [
        ("h2d", "promote 2", 1200, 2710),
        ("device", "expert 2", 2710, 2810),
        ("h2d", "promote 3", 2710, 4220),
        ("device", "expert 3", 4220, 4320),
        ("h2d", "promote 2", 4220, 5730),
        ("device", "dense", 4320, 5320),
        ("h2d", "promote 3", 5730, 7240),
        ("device", "experts", 7240, 7440),
        ("device", "head", 7440, 8440),
    ]
    assert waits == [1510 + 1410, 7240 - 5320]


def test_blocking_prefetches_hide_nothing():
    timeline, waits = timetable(copies="blocking")
    assert [entry for entry in timeline if entry[0] == "h2d"] == [
        ("h2d", "promote 2", 1200, 1510),
        ("h2d", "promote 3", 1610, 1920),
        ("h2d", "promote 2", 2020, 2330),
        ("h2d", "promote 3", 2330, 2640),
    ]
    assert ("device", "dense", 2640, 3640) in timeline
    assert waits == [4 * 310, 0]


def test_a_prefetch_waits_behind_the_misses_of_its_own_layer():
    # The cache has 0 and 1 everywhere: layer 0 fetches 2 and 3, and right after them come those of layer 1.
    timeline, waits = timetable("next-layer-prefetch")
    assert [entry for entry in timeline if entry[0] == "h2d"] == [
        ("h2d", "promote 2", 1200, 1510),
        ("h2d", "promote 3", 1510, 1820),
        ("h2d", "promote 2", 1820, 2130),
        ("h2d", "promote 3", 2130, 2440),
    ]
    assert waits == [520, 0]


# --- contracts over more layers ---


@pytest.mark.parametrize("name", ["pre-gated", "moe-infinity-paper", "finemoe", "next-layer-prefetch"])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), num_layers=st.integers(2, 5), accuracy=st.floats(0, 1))
def test_every_miss_is_served_and_every_run_repeats(name, seed, num_layers, accuracy):
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, 4, (5, num_layers, 6)) * rng.integers(0, 2, (5, num_layers, 6))
    workload = toy_workload(*tables, sequence=np.sort(rng.integers(0, 3, 5)).astype(np.int32))
    params = data_of(name, workload, Noisy(workload, accuracy))
    if name == "finemoe":
        params |= {"distance": int(rng.integers(1, 4)), "least": int(rng.integers(0, 4))}
    if name == "moe-infinity-paper":
        params |= {"mode": str(rng.choice(["coded", "published"]))}
    budgets = rng.integers(1, 7, num_layers).tolist()
    made = policy(name, **params)
    # The residency refuses moves that do not fit; `moves_of` checks that residents are never fetched ahead.
    assert moves_of(made, budgets, tables) == moves_of(made, budgets, tables)
    assert moves_of(policy(name, **params), budgets, tables) == moves_of(made, budgets, tables)
