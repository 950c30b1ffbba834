"""Caches, static masks and the Rust port of TIDE: golden moves by hand, and their rules spelled out once more."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import Answer, answers, forward, run, steps_of
from simulator_cases import MIXED, parts, play

from tidesim.errors import BudgetError, InputError
from tidesim.policies import Shape, policy
from tidesim.policies.arc import Lists
from tidesim.residency import NO_MOVES, Moves
from tidesim.workload import ForwardKind

Move = tuple[int, tuple[int, ...], tuple[int, ...]]  # forward, promoted, evicted


def moves(name: str, budget: int, *rows: Sequence[int], **params: object) -> list[Move]:
    """What moves in a single layer, forward by forward as far as anything does."""
    log, _ = run(policy(name, **params), [budget], steps_of(*([row] for row in rows)))
    return [(index, promote, evict) for index, _, promote, evict in log]


@st.composite
def one_layer_runs(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    """A budget, and counts [F, E] of a single layer, few or many experts in a forward."""
    num_experts = draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = rng.poisson(draw(st.sampled_from([0.2, 0.6, 2.0])), (draw(st.integers(1, 40)), num_experts))
    return draw(st.integers(1, num_experts)), counts.astype(np.int32)


# --- rlx ---


def test_rlx_evicts_fewest_tokens_first_then_who_was_there_longest_then_the_lower_id():
    # Forward 0: 0 goes. Forward 1: 1 goes, 0 is back. Forward 2: 0 and 2 have no tokens, 2 has been there longer.
    # Forward 3: 3 has no token, 0 has one, and both are not wanted.
    rows = [[0, 2, 5, 0], [3, 0, 4, 0], [0, 0, 0, 9], [1, 5, 4, 0]]
    assert moves("rlx", 2, *rows) == [(0, (2,), (0,)), (1, (0,), (1,)), (2, (3,), (2,)), (3, (1, 2), (3, 0))]
    assert moves("rlx", 2, [0, 0, 3, 0]) == [(0, (2,), (0,))]


def test_rlx_leaves_small_gains_alone():
    # 4 takes the slot of 1, which has no token. For 3 against 0 it needs 5 >= 4 x 1.5, or 5 >= 4 x 1.25.
    assert moves("rlx", 2, [4, 0, 0, 5, 6], margin=0.5) == [(0, (4,), (1,))]
    assert moves("rlx", 2, [4, 0, 0, 5, 6], margin=0.25) == [(0, (4, 3), (1, 0))]


def test_rlx_leaves_newcomers_alone():
    # Refreshes that residents have been there for: 1, 2 (both go), 1, 2 (2 goes), and then 1 for expert 1, which has
    # fewest tokens but is too young, and 3 for expert 3, whose slot is the only one.
    rows = [[0, 0, 3, 0, 0], [0, 0, 3, 2, 0], [5, 4, 0, 0, 0], [0, 5, 0, 0, 0], [6, 0, 0, 1, 9]]
    assert moves("rlx", 2, *rows, min_dwell=2) == [(1, (2, 3), (0, 1)), (3, (1,), (2,)), (4, (4,), (3,))]


def test_rlx_refreshes_when_tide_as_coded_does():
    rows = np.eye(6, dtype=np.int32)
    first = [(forward(i, step=i, first=True), rows[[i]]) for i in range(1, 4)]
    later = [(forward(i + 3, block=2, step=i), rows[[5 - i]]) for i in range(1, 6)]
    prefill = [(forward(9, kind=ForwardKind.PREFILL, first=True), rows[[4]])]
    for name in ("rlx", "tide-as-coded"):
        log, _ = run(policy(name, refresh_interval=3), [1], first + later + prefill)
        assert [index for index, *_ in log] == [1, 2, 3, 3 + 3]


def swaps_by_the_description(counts: np.ndarray, budget: int, margin: float, min_dwell: int) -> list[Move]:
    """The rule of the Rust port word for word: one challenger after another, victims in their order."""
    since, log = dict.fromkeys(range(budget), 0), []
    for clock, row in enumerate(counts.tolist(), start=1):
        hottest = sorted((expert for expert in range(len(row)) if row[expert]), key=lambda e: (-row[e], e))
        desired = hottest[:budget]
        waiting = sorted((e for e in since if e not in desired), key=lambda e: (row[e], since[e], e))
        log.append((clock - 1, [], []))
        for challenger in [expert for expert in desired if expert not in since]:
            while waiting and clock - since[waiting[0]] < min_dwell:
                waiting.pop(0)
            if not waiting or row[challenger] < row[waiting[0]] * (1 + margin):
                break
            log[-1][1].append(challenger)
            log[-1][2].append(waiting.pop(0))
            del since[log[-1][2][-1]]
            since[challenger] = clock
    return [(index, tuple(promote), tuple(evict)) for index, promote, evict in log if promote]


@settings(deadline=None)
@given(one_layer_runs(), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 3))
def test_rlx_is_its_description(case, margin, min_dwell):
    budget, counts = case
    expected = swaps_by_the_description(counts, budget, margin, min_dwell)
    assert moves("rlx", budget, *counts, margin=margin, min_dwell=min_dwell) == expected


@pytest.mark.parametrize("params", [{"margin": -0.1}, {"min_dwell": -1}])
def test_guards_below_zero_are_refused(params):
    with pytest.raises(InputError, match=r"margin\(=.*\) and min_dwell\(=.*\) must be >= 0"):
        policy("rlx", **params)


# --- mixtral-offloading ---


def test_mixtral_offloading_begins_with_the_highest_ids_and_evicts_the_least_recent():
    # Oldest first: 23; 3 is used and 0 comes for 2: 30; 1 and 2 come for 3 and 0: 12; both are used, 0 and 3 come.
    rows = [[1, 0, 0, 2], [0, 1, 1, 0], [1, 1, 1, 1], [0, 3, 0, 0]]
    assert moves("mixtral-offloading", 2, *rows) == [
        (0, (0,), (2,)),
        (1, (1, 2), (3, 0)),
        (2, (0, 3), (1, 2)),
        (3, (1,), (0,)),
    ]
    assert moves("mixtral-offloading", 1, [1, 1, 1, 0]) == [(0, (0, 1, 2), (3, 0, 1))]


def test_mixtral_offloading_swaps_both_ways_on_the_stream_that_computes():
    # 6 and 7 run; both are in use, 6 was marked first. Out to pinned memory 410, in 310.
    timeline, result = play([[2, 0, 0, 0, 0, 0, 2, 2]], "mixtral-offloading", is_pinned=True, write_back=True)
    assert timeline[2:] == [
        ("device", "experts", 1200, 1400),
        ("d2h", "evict 6", 1400, 1810),
        ("h2d", "promote 0", 1810, 2120),
        ("device", "expert 0", 2120, 2220),
        ("device", "head", 2220, 3220),
    ]
    assert parts(result) == [1000, 300, 0, 0, 720]


def swaps_with_a_window(counts: np.ndarray, budget: int, window: int = 3) -> list[Move]:
    """The original's bookkeeping: all active experts are marked, some swaps are issued up front, the others later."""
    num_experts, log = counts.shape[1], []
    resident = OrderedDict.fromkeys(range(num_experts - budget, num_experts))
    for index, row in enumerate(counts.tolist()):
        active = sorted((expert for expert in range(num_experts) if row[expert]), key=lambda e: e not in resident)
        to_load = [expert for expert in active if expert not in resident]
        for expert in active:
            if expert in resident:
                resident.move_to_end(expert)
        num_ahead, swapped = min(window, budget, len(to_load)), ([], [])

        def swap(expert, swapped=swapped):
            swapped[0].append(expert)
            swapped[1].append(resident.popitem(last=False)[0])
            resident[expert] = None

        for expert in to_load[:num_ahead]:
            swap(expert)
        rest = to_load[num_ahead:]
        for expert in active:
            if expert in to_load and rest:
                swap(rest.pop(0))
        log.append((index, tuple(swapped[0]), tuple(swapped[1])))
    return [move for move in log if move[1]]


@settings(deadline=None)
@given(one_layer_runs())
def test_the_window_of_mixtral_offloading_does_not_change_who_goes(case):
    budget, counts = case
    assert moves("mixtral-offloading", budget, *counts) == swaps_with_a_window(counts, budget)


# --- moe-infinity ---


def test_moe_infinity_evicts_the_fewest_visits_of_the_whole_network():
    steps = steps_of([[1, 0, 1], [0, 1, 0]], [[1, 0, 0], [1, 1, 1]], [[0, 1, 0], [0, 0, 0]])
    steps[2] = (replace(steps[2][0], sequence=1), steps[2][1])
    # Pairs of layer and id. Forward 0: 00 hits; 02 takes the slot of 10, which has no visit. 00 and 02 have one each,
    # the lower id goes for 11. Forward 1: of 02 and 11 the lower id goes for 00, which has two now, as visits outlast
    # an eviction. In layer 1 then 02 (one visit) goes for 10, 00 for 11 as 10 is in use, and 10 (one) before 11 (two).
    # Forward 2 begins a sequence, so 11 and 12 have none: the lower id goes, though 12 had fewer visits.
    assert [answer.keep for answer in answers(policy("moe-infinity"), [1, 1], steps)] == [
        Moves((2,), (3,)),
        Moves((1,), (0,)),
        Moves((0,), (4,)),
        Moves((0, 1, 2), (2, 0, 3)),
        Moves((1,), (4,)),
        NO_MOVES,
    ]


def test_moe_infinity_scans_ids_before_layers():
    # Nobody was visited: 01 is the first in order of layers, 10 the first in order of ids.
    steps = steps_of([[1, 0, 1, 0], [0, 0, 0, 0]])
    made = policy("moe-infinity")
    assert answers(made, [2, 1], steps)[0].keep == Moves((2,), (4,))


def test_moe_infinity_needs_a_slot_somewhere():
    assert policy("moe-infinity").initial(Shape(4, (1, 0))).experts == ((0,), ())
    with pytest.raises(BudgetError, match=r"'moe-infinity' fetches into slots; budget\(=0\) must be >= 1"):
        policy("moe-infinity").initial(Shape(4, (0, 0)))


# --- vllm-expert-cache ---


def test_vllm_expert_cache_evicts_the_fewest_uses_for_their_age():
    # Uses of a layer are its clock. Forward 0: 0 is used at 1; 1 has no use; 2 comes at 2. Forward 1: 0 at 3, and 2
    # goes, as 0 is in use; 3 comes at 4. Forward 2: 0 has 2 / 2 and 3 has 1 / 1, 0 came first; 4 comes at 5.
    # Forwards 3, 4: 3 at 6 and 7. Forward 5: 3 has 3 / 1 and 4 has 1 / 3. 0 comes at 8 with one use again, and so
    # has 1 / 1 against 3 / 2 in forward 6. Forward 7: 1 of 9 has 1 / 1, 3 has 3 / 3 and came in first.
    used = [(0, 2), (0, 3), (4,), (3,), (3,), (0,), (1,), (2,)]
    rows = [[int(expert in ids) for expert in range(5)] for ids in used]
    assert moves("vllm-expert-cache", 2, *rows) == [
        (0, (2,), (1,)),
        (1, (3,), (2,)),
        (2, (4,), (0,)),
        (5, (0,), (4,)),
        (6, (1,), (0,)),
        (7, (2,), (3,)),
    ]


def test_vllm_expert_cache_evicts_nobody_in_use_while_there_is_another_one():
    # 0 is used at 1, 2, 3. For expert 3, 0 has 3 / 2 and 2 has 1 / 1, but 2 is in use.
    rows = [[1, 0, 0, 0]] * 3 + [[0, 0, 1, 1]]
    assert moves("vllm-expert-cache", 2, *rows) == [(3, (2, 3), (1, 0))]


def test_vllm_expert_cache_passes_more_experts_than_slots_through_in_ascending_ids():
    # 0 and 1 are used at 1 and 2: 1 / 2 and 1 / 1. Then 1 has 1 / 2 and 2 has 1 / 1, and so on.
    assert moves("vllm-expert-cache", 2, [1, 1, 1, 1, 1]) == [(0, (2, 3, 4), (0, 1, 2))]


# --- lfu, decayed ---


def test_lfu_evicts_the_fewest_uses_since_an_expert_came_in():
    # 0 has two uses. 2 and 3 have one each when they go, and 2 has one again. At last 1 goes for 3 as soon as it came.
    rows = [[7, 0, 0, 0], [1, 0, 9, 0], [0, 0, 0, 9], [0, 0, 9, 0], [0, 1, 0, 1]]
    assert moves("lfu", 2, *rows) == [(1, (2,), (1,)), (2, (3,), (2,)), (3, (2,), (3,)), (4, (1, 3), (2, 1))]


def test_lfu_breaks_ties_by_the_last_use_and_then_the_lower_id():
    assert moves("lfu", 2, [0, 1, 0], [1, 0, 0], [0, 0, 1]) == [(2, (2,), (1,))]
    assert moves("lfu", 2, [0, 0, 1]) == [(0, (2,), (0,))]


def test_decayed_evicts_the_least_tokens_of_late():
    # With keep 1/2: 4 1 0 0; 2 1.5 1 0; 1 2.75 .5 0; .5 1.375 .25 1.
    rows = [[4, 1, 0, 0], [0, 1, 1, 0], [0, 2, 0, 0], [0, 0, 0, 1]]
    assert moves("decayed", 2, *rows, keep=0.5) == [(1, (2,), (1,)), (2, (1,), (2,)), (3, (3,), (0,))]
    # With keep 1: 4 1 0 0; 4 2 1 0; 4 4 1 0; then 0 and 1 have 4 each, and the lower id goes.
    assert moves("decayed", 2, *rows, keep=1) == [(1, (2,), (1,)), (2, (1,), (2,)), (3, (3,), (0,))]
    # With keep 0: for 2 goes 0, which has no token; then 1 hits; for 3 goes 1, as 1 and 2 have none.
    assert moves("decayed", 2, *rows, keep=0) == [(1, (2,), (0,)), (3, (3,), (1,))]
    with pytest.raises(InputError, match=r"keep\(=1.5\) must be >= 0 and <= 1"):
        policy("decayed", keep=1.5)


# --- arc ---


def test_arc_shifts_slots_to_the_kind_whose_evicted_are_missed():
    # T1 and T2 are residents requested once and more often, B1 and B2 their evicted, oldest first; p is T1's share.
    # 0: 1 hits, so T1 0, T2 1; 2 is new and 0 goes.              T1 2  T2 1   B1 0  B2 -    p 0
    # 1: 3 is new; B1 forgets 0, 2 goes.                          T1 3  T2 1   B1 2  B2 -    p 0
    # 2: 2 is in B1: p grows by 1, so T1 keeps its one, 1 goes.   T1 3  T2 2   B1 -  B2 1    p 1
    # 3: 1 is in B2: p falls by 1, so T1 gives up 3.              T1 -  T2 21  B1 3  B2 -    p 0
    # 4: 4 is new; T1 is empty, 2 goes.                           T1 4  T2 1   B1 3  B2 2    p 0
    # 5: 5 is new; T1 and B1 are full: B1 forgets 3, 4 goes.      T1 5  T2 1   B1 4  B2 2    p 0
    # 6: 1 and 5 hit; 0 is new; B2 forgets 2, 1 goes.             T1 0  T2 5   B1 4  B2 1    p 0
    # 7: 4 is in B1: p grows by 1, 5 goes.                        T1 0  T2 4   B1 -  B2 15   p 1
    used = [(1, 2), (3,), (2,), (1,), (4,), (5,), (0, 1, 5), (4,)]
    rows = [[int(expert in ids) for expert in range(6)] for ids in used]
    assert moves("arc", 2, *rows) == [
        (0, (2,), (0,)),
        (1, (3,), (2,)),
        (2, (2,), (1,)),
        (3, (1,), (3,)),
        (4, (4,), (2,)),
        (5, (5,), (4,)),
        (6, (0,), (1,)),
        (7, (4,), (5,)),
    ]


def test_arc_passes_more_new_experts_than_slots_through():
    assert moves("arc", 2, [0, 0, 1, 1, 1]) == [(0, (2, 3, 4), (0, 1, 2))]


def test_arc_needs_a_slot_in_each_layer():
    with pytest.raises(BudgetError, match=r"'arc' fetches into slots; budget\(=0\) must be >= 1"):
        policy("arc").initial(Shape(4, (1, 0)))


class Textbook:
    """ARC with its four lists as one table, of where each expert is and since when."""

    def __init__(self, num_slots: int) -> None:
        self.c, self.p, self.now = num_slots, 0.0, num_slots
        self.where = {expert: ("T1", expert) for expert in range(num_slots)}

    def size(self, *names: str) -> int:
        return sum(name in names for name, _ in self.where.values())

    def put(self, expert: int, name: str) -> None:
        self.now += 1
        self.where[expert] = (name, self.now)

    def oldest(self, name: str) -> int:
        return min((time, expert) for expert, (list_name, time) in self.where.items() if list_name == name)[1]

    def demote(self, is_in_b2: bool) -> int:
        once = self.size("T1")
        name = "T1" if once >= 1 and ((is_in_b2 and once == self.p) or once > self.p) else "T2"
        victim = self.oldest(name)
        self.put(victim, "B" + name[1])
        return victim

    def request(self, expert: int) -> int | None:
        """Who goes, if anybody does."""
        name, victim = self.where.get(expert, ("", 0))[0], None
        if name == "B1":
            self.p = min(self.c, self.p + max(self.size("B2") / self.size("B1"), 1))
            victim = self.demote(False)
        elif name == "B2":
            self.p = max(0, self.p - max(self.size("B1") / self.size("B2"), 1))
            victim = self.demote(True)
        elif not name and self.size("T1", "B1") == self.c:
            if self.size("T1") < self.c:
                del self.where[self.oldest("B1")]
                victim = self.demote(False)
            else:
                victim = self.oldest("T1")
                del self.where[victim]
        elif not name:
            if self.size("T1", "T2", "B1", "B2") == 2 * self.c:
                del self.where[self.oldest("B2")]
            victim = self.demote(False)
        self.put(expert, "T2" if name else "T1")
        return victim


@settings(deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 14), max_size=120))
def test_arc_is_the_one_of_the_paper(num_slots, requests):
    ours, textbook, resident = Lists(range(num_slots)), Textbook(num_slots), set(range(num_slots))
    for expert in requests:
        victim = textbook.request(expert)
        if expert in resident:
            ours.hit(expert)
            assert victim is None
        else:
            assert ours.replace(expert) == victim
            resident = (resident - {victim}) | {expert}


# --- ktransformers ---


def test_ktransformers_fills_its_mask_by_four_strategies():
    shape = Shape(3, (1, 2))
    assert policy("ktransformers").initial(shape).experts == ((0,), (0, 1))
    assert policy("ktransformers", strategy="front-loading").initial(Shape(3, (2, 2))).experts == ((0, 1, 2), (0,))
    # Of the three slots one is for 9, two for 3; the three of layer 0 comes first in the tie, and both fit.
    popular = policy("ktransformers", strategy="frequency", popularity=[[1, 2, 3], [9, 0, 3]])
    assert popular.initial(shape).experts == ((2,), (0, 2))
    assert popular.initial(Shape(3, (1, 1))).experts == ((2,), (0,))
    drawn = policy("ktransformers", strategy="random")
    assert drawn.initial(shape).num_experts == 3
    assert drawn.initial(shape) == policy("ktransformers", strategy="random").initial(shape)
    wide = drawn.initial(Shape(64, (8,) * 8))
    assert wide.num_experts == 64
    assert len({len(ids) for ids in wide.experts}) > 1


def test_ktransformers_streams_every_expert_of_a_layer_in_large_forwards_and_keeps_nobody():
    rows = ([[2, 0, 1, 0]], [[0, 0, 0, 3]])
    streamed = Answer(NO_MOVES, (0, 1, 2, 3), ())
    assert answers(policy("ktransformers", threshold=32), [1], steps_of(*rows)) == [streamed, streamed]
    hosted = [Answer(NO_MOVES, (), (2,)), Answer(NO_MOVES, (), (3,))]
    assert answers(policy("ktransformers", threshold=33), [1], steps_of(*rows)) == hosted
    assert answers(policy("ktransformers"), [1], steps_of(*rows, tokens=499)) == hosted
    assert answers(policy("ktransformers"), [1], steps_of(*rows, tokens=500)) == [streamed, streamed]
    never = policy("ktransformers", threshold=None)
    assert answers(never, [1], steps_of(*rows, tokens=5000)) == hosted
    assert (never.scratch_experts(4), policy("ktransformers").scratch_experts(4)) == (0, 4)


def test_ktransformers_pays_for_the_whole_layer():
    # All eight are copied at 310, and 2 and 3 run as they come. A forward below the threshold: 2 x (50 + 500 + 220).
    timeline, result = play([MIXED], policy("ktransformers", threshold=3))
    assert timeline[2:] == [
        ("device", "experts", 1200, 1400),
        ("h2d", "promote 0", 1400, 1710),
        ("h2d", "promote 1", 1710, 2020),
        ("h2d", "promote 2", 2020, 2330),
        ("device", "expert 2", 2330, 2430),
        ("h2d", "promote 3", 2430, 2740),
        ("device", "expert 3", 2740, 2840),
        ("h2d", "promote 4", 2840, 3150),
        ("h2d", "promote 5", 3150, 3460),
        ("h2d", "promote 6", 3460, 3770),
        ("h2d", "promote 7", 3770, 4080),
        ("device", "head", 4080, 5080),
    ]
    assert (result.drops, result.promotions, parts(result)) == (8, 0, [1000, 400, 0, 0, 2480])
    assert parts(play([MIXED], policy("ktransformers", threshold=4))[1]) == [1000, 200, 0, 1540, 0]


def test_ktransformers_says_which_strategies_there_are():
    with pytest.raises(InputError, match=r"strategy\(='even'\) must be one of 'uniform', 'frequency', 'front-loading'"):
        policy("ktransformers", strategy="even")
    with pytest.raises(InputError, match="strategy 'frequency' needs popularity"):
        policy("ktransformers", strategy="frequency")
    assert policy("ktransformers", strategy="random").name == "ktransformers-random"


# --- llama-cpp ---


def test_llama_cpp_holds_as_many_of_the_last_layers_as_fit_whole():
    made = policy("llama-cpp")
    assert made.initial(Shape(3, (2, 3, 1))).experts == ((), (0, 1, 2), (0, 1, 2))
    assert made.initial(Shape(3, (2, 3, 0))).experts == ((), (), (0, 1, 2))
    assert made.initial(Shape(3, (1, 1))).experts == ((), ())


def test_llama_cpp_copies_the_used_experts_of_host_layers_in_forwards_of_32_tokens_and_forgets_them():
    tables = [[3, 0, 1], [1, 1, 0]]
    small, large = (steps_of(tables, tables, tokens=tokens) for tokens in (31, 32))
    kept = Answer(NO_MOVES, (), ())
    assert answers(policy("llama-cpp"), [2, 2], small) == [Answer(NO_MOVES, (), (0, 2)), kept] * 2
    assert answers(policy("llama-cpp"), [2, 2], large) == [Answer(NO_MOVES, (0, 2), ()), kept] * 2
    assert policy("llama-cpp").scratch_experts(3) == 3


def test_llama_cpp_takes_turns_between_copies_and_kernels():
    # Two slots hold no layer of eight. Copied: 310 and 100 each. On the host: 50 + 500 + 2 x (10 + 100 n) each.
    timeline, result = play([MIXED], policy("llama-cpp", threshold=3))
    assert timeline[2:] == [
        ("h2d", "promote 0", 1200, 1510),
        ("device", "expert 0", 1510, 1610),
        ("h2d", "promote 1", 1610, 1920),
        ("device", "expert 1", 1920, 2020),
        ("h2d", "promote 2", 2020, 2330),
        ("device", "expert 2", 2330, 2430),
        ("h2d", "promote 3", 2430, 2740),
        ("device", "expert 3", 2740, 2840),
        ("device", "head", 2840, 3840),
    ]
    assert (result.hits, result.drops) == (0, 4)
    timeline, _ = play([MIXED], "llama-cpp")
    assert timeline[2:] == [("host", "experts", 1200, 1200 + 2 * 970 + 2 * 770), ("device", "head", 4680, 5680)]
