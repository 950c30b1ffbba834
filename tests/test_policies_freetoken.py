"""FreeToken, on its pool of slots and with its balance of copies and host: by hand, and its rule by brute force."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from policy_cases import COMMIT, DENOISE, PREFILL, Answer, answers, costs_of, steps_of
from simulator_cases import MIXED, SWAPPED, hardware, parts, play
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.errors import BudgetError
from tidesim.execution import Costs, device_memory
from tidesim.hardware import Contention
from tidesim.policies import Shape, policy
from tidesim.policies.hybrid import freetoken_cpu, freetoken_hybrid
from tidesim.policies.pieces import LastActiveBefore
from tidesim.policies.schedules import Balanced
from tidesim.policies.splits import StreamLayer
from tidesim.residency import NO_MOVES, Moves
from tidesim.simulator import simulate


def test_freetoken_takes_the_slot_of_whoever_in_the_network_was_used_longest_ago():
    # Two layers of three experts share two slots: expert 0 of layer 0 lies in slot 0, that of layer 1 in slot 1.
    # Victims are named l * 3 + e. Turns are counted 1, 2 (forward 0), 3, 4 (forward 1), ...
    tables = ([[0, 2, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 1]], [[1, 1, 1], [0, 0, 0]])
    log = answers(policy("freetoken-offload"), [1, 1], steps_of(*tables))
    assert log == [
        # Neither was used: the lower slot goes, slot 0.
        Answer(Moves((1,), (0,)), (), ()),
        # (1, 0) has rows; (0, 1) goes. Then (1, 2) lies in slot 0 and (1, 0) in slot 1, both used in turn 2.
        Answer(Moves((2,), (1,)), (), ()),
        # The lower slot is that of (1, 2), though its id is higher.
        Answer(Moves((0,), (5,)), (), ()),
        # (1, 0) is from turn 2, (0, 0) from turn 3. Experts 1 and 2 come into slots 1 and 0.
        Answer(Moves((1, 2), (3, 0)), (), ()),
        # The last of three finds nobody without rows in this layer.
        Answer(Moves((0, 1), (5, 4)), (2,), ()),
        Answer(NO_MOVES, (), ()),
    ]


def test_a_hit_is_a_use_for_freetoken():
    # Expert 0 is used again in forward 1, so 1 goes in forward 2 (never used), and then 0 (turn 2 against 3).
    log = answers(policy("freetoken-offload"), [2], steps_of(*([row] for row in np.eye(5, dtype=int)[[0, 0, 2, 3]])))
    assert [answer.keep for answer in log] == [NO_MOVES, NO_MOVES, Moves((2,), (1,)), Moves((3,), (0,))]


def test_freetoken_streams_who_is_absent_while_a_prompt_is_read():
    row = [0, 0, 3, 1, 0]
    for name in ("freetoken-offload", "freetoken-hybrid", "freetoken-cpu"):
        made = policy(name, streams_prefill=True)
        assert made.scratch_experts(5) == 1 + 10
        log = answers(made, [2], steps_of([row], [row], [row], kinds=[PREFILL, DENOISE, COMMIT]))
        assert log[0] == Answer(NO_MOVES, (2, 3, 4), ())
        assert log[1].keep.promote == {"offload": (2, 3), "hybrid": (2,), "cpu": ()}[name.removeprefix("freetoken-")]


def test_freetoken_may_serve_a_prompt_like_any_other_forward():
    for name, promoted in (("freetoken-offload", (2, 3)), ("freetoken-hybrid", (2,)), ("freetoken-cpu", ())):
        (answer,) = answers(policy(name), [2], steps_of([[0, 0, 3, 1, 0]], kinds=[PREFILL]))
        assert (answer.keep.promote, answer.drop) == (promoted, ())


def test_a_streamed_layer_has_residents_in_it_or_not():
    info, counts = steps_of([[1, 0, 2]])[0]
    is_resident = np.array([[False, True, False]])
    for split, everybody in ((StreamLayer(), [0, 1, 2]), (StreamLayer(with_residents=False), [0, 2])):
        fetched = split.choose(info, 0, [0, 2], counts[0], is_resident)
        assert (list(fetched.keep), list(fetched.drop)) == ([], everybody)


def test_whole_layers_of_scratch_memory_must_fit_the_device():
    # Two layers of eight experts, and one place, besides the two slots.
    need = device_memory(TOY, toy_hardware(), toy_execution(), 2, 2 * TOY.block_length, 0, scratch=17)
    room = toy_hardware().device.memory_bytes - need.total
    workload, made = toy_workload([MIXED]), policy("freetoken-offload", streams_prefill=True)
    used = {"budget": 2, "execution": toy_execution()}
    assert simulate(workload, TOY, toy_hardware(), made, **used, reserve_bytes=room)
    with pytest.raises(BudgetError, match="toy needs experts"):
        simulate(workload, TOY, toy_hardware(), made, **used, reserve_bytes=room + 1)


def test_streamed_experts_run_as_they_arrive():
    timeline, result = play([SWAPPED], freetoken_cpu(streams_prefill=True), kinds="p", copies="background")
    assert timeline[2:] == [
        ("h2d", "promote 2", 1200, 1510),
        ("device", "expert 2", 1510, 1610),
        ("h2d", "promote 3", 1510, 1820),
        ("device", "expert 3", 1820, 1920),
        ("h2d", "promote 4", 1820, 2130),
    ]
    assert (result.drops, result.promotions, result.makespan_ns) == (6, 0, 1920)


def test_freetoken_fetches_who_was_routed_to_most_recently():
    # Without a profile one expert each time. One slot; the first resident is 0.
    rows = ([0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0])
    log = answers(freetoken_hybrid(), [1], steps_of(*([row] for row in rows)))
    assert [(answer.keep, answer.host) for answer in log] == [
        (Moves((1,), (0,)), (2,)),  # neither before: the lower id
        (Moves((2,), (1,)), (3,)),  # 2 in forward 0, 3 never
        (Moves((3,), (2,)), (1,)),  # 3 in forward 1, 1 in forward 0
        (Moves((1,), (3,)), (0,)),  # 1 in forward 2, 0 never
    ]


def number_fetched(num_missed: int, costs: Costs | None) -> int:
    recency = LastActiveBefore()
    split = Balanced(recency)
    for piece in (recency, split):
        piece.begin(Shape(num_missed, (0,), costs))
    info, table = steps_of([[1] * num_missed])[0]
    return len(split.choose(info, 0, list(range(num_missed)), table[0], np.zeros((1, num_missed), bool)).keep)


def test_freetoken_balances_copies_and_host():
    # A copy takes 310, an expert of one row 770 on the host. max(310 F, 770 (M - F)):
    # M = 2: 1540, 770, 620. M = 3: .., 1540, 770, 930. M = 4: .., 1540, 930, 1240. M = 5: 3: 1540, 4: 1240, 5: 1550.
    assert [number_fetched(m, costs_of()) for m in range(6)] == [0, 1, 2, 2, 3, 4]
    assert [number_fetched(m, None) for m in range(4)] == [0, 1, 1, 1]
    # Both 310: ties go to the smaller F, so of an odd number of misses the smaller half.
    even = hardware("host", bytes_per_s=24 / 40e-9)
    assert costs_of(even).host_expert_ns[1] == 310
    assert [number_fetched(m, costs_of(even)) for m in range(6)] == [0, 0, 1, 1, 2, 2]


def test_freetoken_counts_with_what_copies_and_host_get_beside_each_other():
    # Copies at half speed take 620. M = 2: 1540, 770, 1240. M = 3: .., 1540, 1240, 1860.
    shares = dict.fromkeys(
        ("host_beside_device", "device_beside_host", "host_beside_copies", "device_beside_copies"), 1.0
    )
    shared = replace(toy_hardware(), contention=Contention(**shares, copies_beside_host=0.5, copies_beside_device=1.0))
    assert [number_fetched(m, costs_of(shared)) for m in range(4)] == [0, 1, 1, 2]
    # The host at a quarter takes 3080 beside copies of 310 ns: up to 8 copies are shorter than one expert there.
    shared = replace(
        toy_hardware(),
        contention=Contention(
            **shares | {"host_beside_copies": 0.25}, copies_beside_host=1.0, copies_beside_device=1.0
        ),
    )
    assert [number_fetched(m, costs_of(shared)) for m in (1, 5, 8)] == [1, 5, 8]


@given(st.integers(0, 256), st.integers(1, 10**6), st.integers(1, 10**6))
@example(3, 310, 310)
def test_the_balance_is_the_published_rule(num_missed, copy_ns, host_ns):
    # In experts per second the link gets through 1 / copy and the host through 1 / host.
    rho = Fraction(1, copy_ns) / (Fraction(1, copy_ns) + Fraction(1, host_ns))
    expected = min(range(num_missed + 1), key=lambda fetched: max(fetched * (1 - rho), (num_missed - fetched) * rho))
    costs = costs_of()
    costs.promote_ns, costs.host_expert_ns = copy_ns, np.array([0, host_ns])
    assert number_fetched(num_missed, costs) == expected


def test_freetoken_hybrid_copies_while_the_host_computes():
    # Of three misses two are fetched; the host needs 500 + 50 + 2 x 210 = 970 for the third.
    timeline, result = play([[0, 0, 2, 2, 2, 0, 0, 0]], "freetoken-hybrid", copies="background", host="parallel")
    assert timeline[2:] == [
        ("h2d", "promote 2", 1200, 1510),
        ("host", "experts", 1200, 2170),
        ("device", "expert 2", 1510, 1610),
        ("h2d", "promote 3", 1510, 1820),
        ("device", "expert 3", 1820, 1920),
        ("device", "head", 2170, 3170),
    ]
    assert parts(result) == [1000, 200, 0, 250, 520]
