"""Timetables of runs, worked by hand on the machine of round numbers."""

from dataclasses import replace

import pytest
from simulator_cases import MIXED, SWAPPED, hardware, parts, play
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.hardware import Curve, Link
from tidesim.policies import Serving, policy
from tidesim.residency import Moves
from tidesim.simulator import simulate

# --- timetables ---


def test_host_after_device():
    # Experts 2 and 3 miss with one row each: 500 + 50 + 2 x 110 ns for each.
    timeline, result = play([MIXED], "static")
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("device", "experts", 1200, 1400),
        ("host", "experts", 1400, 2940),
        ("device", "head", 2940, 3940),
    ]
    assert parts(result) == [1000, 200, 0, 1540, 0]
    assert parts(result, "outside") == [1200, 0, 0, 0, 0]
    assert (result.hits, result.misses, result.makespan_ns) == (4, 2, 3940)
    assert result.busy_ns == {"device": 2400, "host": 1540, "h2d": 0, "d2h": 0}


def test_host_beside_device():
    timeline, result = play([MIXED], "static", host="parallel")
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("device", "experts", 1200, 1400),
        ("host", "experts", 1200, 2740),
        ("device", "head", 2740, 3740),
    ]
    assert parts(result) == [1000, 200, 0, 1340, 0]


def test_host_called_once_per_layer():
    # One call 50, two rows there and back 2 x 210, two experts 1000.
    _, result = play([MIXED], "static", host_calls="layer")
    assert parts(result) == [1000, 200, 0, 1470, 0]
    # Six missed pairs, but only three rows travel: 50 + 2 x 310 + 1000.
    _, result = play([SWAPPED], "all-host", host_calls="layer")
    assert parts(result) == [1000, 0, 0, 1670, 0]


def test_launches_show_only_where_they_outlast_kernels():
    # Dense 10 x 130 against 1000, experts 2 x 5 x 130 against 200, entry without dense layers none, head like dense.
    slow = hardware("device", eager_op_s=130e-9)
    timeline, result = play([[3, 3, 0, 0, 0, 0, 0, 0]], "static", machine=slow)
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("device", "experts", 1500, 1700),
        ("device", "head", 2800, 3800),
    ]
    assert parts(result) == [1000, 200, 300 + 1100, 0, 0]
    assert result.makespan_ns == 4100


def test_grouped_experts_are_one_kernel():
    fixed = hardware("device", grouped_overhead_s=40e-9, eager_op_s=20e-9)
    _, result = play([[3, 3, 0, 0, 0, 0, 0, 0]], "static", machine=fixed, kernels="grouped")
    assert parts(result) == [1000, 240, 0, 0, 0]


def test_launches_that_wait_for_their_kernels_cost_all_of_their_time():
    # Ops as above: 10 x 130 for the dense part and for the head, 2 x 5 x 130 for the experts.
    slow = hardware("device", eager_op_s=130e-9)
    timeline, result = play([[3, 3, 0, 0, 0, 0, 0, 0]], "static", machine=slow, is_async=False)
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("device", "experts", 2500, 2700),
        ("device", "head", 4000, 5000),
    ]
    assert parts(result) == [1000, 200, 2600, 0, 0]
    assert parts(result, "outside") == [1200, 0, 1300, 0, 0]
    assert result.makespan_ns == 6300
    assert result.busy_ns["device"] == 2400
    _, result = play([[3, 3, 0, 0, 0, 0, 0, 0]], "static", machine=slow, is_async=False, kernels="grouped")
    assert parts(result) == [1000, 200, 1300, 0, 0]


def test_measured_experts_take_their_own_times():
    # Device: 200 for one row or two. Host: 24 operations at 0.04 a ns are 600; with its call and its row, 870.
    machine = hardware("device", expert_curve=Curve((1, 2), (0.12e9, 0.24e9)), grouped_overhead_s=40e-9)
    machine = replace(machine, host=replace(machine.host, expert_curve=Curve((1,), (0.04e9,))))
    timeline, result = play([MIXED], "static", machine=machine, kernels="grouped")
    assert timeline[2:] == [
        ("device", "experts", 1200, 1640),
        ("host", "experts", 1640, 3380),
        ("device", "head", 3380, 4380),
    ]
    timeline, result = play([FETCHED], "lru", machine=machine, kernels="grouped", copies="background")
    assert timeline[2:] == [
        ("device", "experts", 1200, 1440),
        ("h2d", "promote 2", 1200, 1510),
        ("device", "expert 2", 1510, 1710),
        ("h2d", "promote 3", 1510, 1820),
        ("device", "expert 3", 1820, 2020),
        ("device", "head", 2020, 3020),
    ]
    assert parts(result) == [1000, 640, 0, 0, 180]


def test_blocking_moves_come_before_the_experts_evictions_first():
    timeline, result = play([SWAPPED], write_back=True)
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("d2h", "evict 0", 1200, 1710),
        ("d2h", "evict 1", 1710, 2220),
        ("h2d", "promote 2", 2220, 2530),
        ("h2d", "promote 3", 2530, 2840),
        ("device", "experts", 2840, 3040),
        ("device", "head", 3040, 4040),
    ]
    assert parts(result) == [1000, 200, 0, 0, 1640]
    assert (result.hits, result.promotions, result.evictions) == (6, 2, 2)
    assert (result.h2d_bytes, result.d2h_bytes, result.num_copies) == (48, 48, 4)


def test_evictions_without_write_back_are_free():
    timeline, result = play([SWAPPED])
    assert [entry for entry in timeline if entry[0] in ("d2h", "h2d")] == [
        ("h2d", "promote 2", 1200, 1510),
        ("h2d", "promote 3", 1510, 1820),
    ]
    assert (result.evictions, result.d2h_bytes, result.num_copies) == (2, 0, 2)


def test_background_moves_run_under_later_work_and_count_from_the_next_forward():
    timeline, result = play([SWAPPED, SWAPPED], copies="background")
    # Two misses with three rows each: 2 x (500 + 50 + 2 x 310).
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("host", "experts", 1200, 3540),
        ("device", "head", 3540, 4540),
        ("h2d", "promote 2", 3540, 3850),
        ("h2d", "promote 3", 3850, 4160),
        ("device", "entry", 4540, 4740),
        ("device", "dense", 4740, 5740),
        ("device", "experts", 5740, 5940),
        ("device", "head", 5940, 6940),
    ]
    assert (result.hits, result.misses, result.promotions) == (6, 6, 2)
    assert parts(result) == [2000, 200, 0, 2340, 0]


def test_a_layer_waits_for_the_last_arrival_it_needs_while_the_host_starts_at_once():
    # 121 latencies make a promotion 1510 ns long. The second forward also misses expert 4: 500 + 50 + 2 x 210.
    slow = {"copies": "background", "copies_per_expert": 121}
    timeline, result = play([SWAPPED, [0, 0, 2, 2, 2, 0, 0, 0]], host="parallel", **slow)
    assert (
        timeline[4:]
        == [
            ("h2d", "promote 2", 3540, 5050),
            ("device", "entry", 4540, 4740),
            ("device", "dense", 4740, 5740),
            ("h2d", "promote 3", 5050, 6560),
            ("host", "experts", 5740, 6710),
            ("device", "experts", 6560, 6760),
            ("device", "head", 6760, 7760),
        ]
        or timeline[3:] == []
    )
    assert parts(result) == [2000, 200, 0, 2340, 820]
    serial, result = play([SWAPPED, [0, 0, 2, 2, 2, 0, 0, 0]], **slow)
    assert serial[-2:] == [("host", "experts", 6760, 7730), ("device", "head", 7730, 8730)]


def test_arrivals_that_nobody_needs_are_not_waited_for():
    slow = {"copies": "background", "copies_per_expert": 121}
    timeline, result = play([SWAPPED, [0, 0, 3, 0, 3, 0, 0, 0]], **slow)
    assert ("h2d", "promote 3", 5050, 6560) in timeline
    assert ("device", "experts", 5740, 5840) in timeline
    assert parts(result)[4] == 0


def test_background_write_back_saves_the_victim_before_its_slot_is_written():
    # Both directions at half bandwidth: eviction 810, promotion 610. Rows go by pinned memory: host 2 x 1270.
    timeline, result = play([SWAPPED, SWAPPED], copies="background", write_back=True, is_pinned=True)
    assert [entry for entry in timeline if entry[2] >= 3740] == [
        ("d2h", "evict 0", 3740, 4550),
        ("device", "head", 3740, 4740),
        ("d2h", "evict 1", 4550, 5360),
        ("h2d", "promote 2", 4550, 5160),
        ("device", "entry", 4740, 4940),
        ("device", "dense", 4940, 5940),
        ("h2d", "promote 3", 5360, 5970),
        ("device", "experts", 5970, 6170),
        ("device", "head", 6170, 7170),
    ]
    assert parts(result)[4] == 30


def test_links_count_as_busy_up_to_the_end_of_the_run_only():
    _, result = play([SWAPPED], copies="background", write_back=True, is_pinned=True)
    assert result.makespan_ns == 4740
    assert result.busy_ns == {"device": 2200, "host": 2540, "h2d": 4740 - 4550, "d2h": 4740 - 3740}
    assert (result.promotions, result.h2d_bytes, result.d2h_bytes) == (2, 48, 48)


def test_prefill_and_commit_forwards_have_no_head_and_no_refresh():
    timeline, result = play([SWAPPED, SWAPPED, SWAPPED], kinds="pdc", steps=[0, 0, 1])
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("host", "experts", 1200, 3540),
        ("device", "entry", 3540, 3740),
        ("device", "dense", 3740, 4740),
        ("h2d", "promote 2", 4740, 5050),
        ("h2d", "promote 3", 5050, 5360),
        ("device", "experts", 5360, 5560),
        ("device", "head", 5560, 6560),
        ("device", "entry", 6560, 6760),
        ("device", "dense", 6760, 7760),
        ("device", "experts", 7760, 7960),
    ]
    assert (result.hits, result.misses) == (12, 6)


# --- fetching ---

# Expert 0 hits; 2 and 3 are fetched, 2 in the place of 1, which is idle, and 3 in the place of 0, which has rows.
FETCHED = [2, 0, 2, 2, 0, 0, 0, 0]


def test_fetched_experts_run_as_they_arrive_and_active_victims_leave_after_the_residents_ran():
    timeline, result = play([FETCHED], "lru", copies="background")
    assert timeline[2:] == [
        ("device", "experts", 1200, 1300),
        ("h2d", "promote 2", 1200, 1510),
        ("device", "expert 2", 1510, 1610),
        ("h2d", "promote 3", 1510, 1820),
        ("device", "expert 3", 1820, 1920),
        ("device", "head", 1920, 2920),
    ]
    assert parts(result) == [1000, 300, 0, 0, 420]
    assert (result.hits, result.misses, result.promotions, result.evictions) == (2, 4, 2, 2)


def test_a_copy_waits_for_residents_that_still_use_its_slot():
    # Residents take 1000 ns, so the copy into the slot of expert 0 starts after them though the link is free.
    slow = hardware("device", gemm_overhead_s=300e-9)
    timeline, _ = play([FETCHED], "lru", machine=slow, copies="background")
    assert [entry for entry in timeline if entry[0] == "h2d"] == [
        ("h2d", "promote 2", 1200, 1510),
        ("h2d", "promote 3", 2200, 2510),
    ]
    assert ("device", "expert 2", 2200, 3200) in timeline
    assert ("device", "expert 3", 3200, 4200) in timeline


def test_more_misses_than_slots_take_turns_in_them():
    timeline, result = play([[0, 2, 2, 2, 0, 0, 0, 0]], "mixtral-offloading", budget=1, copies="background")
    assert timeline[2:] == [
        ("h2d", "promote 1", 1200, 1510),
        ("device", "expert 1", 1510, 1610),
        ("h2d", "promote 2", 1610, 1920),
        ("device", "expert 2", 1920, 2020),
        ("h2d", "promote 3", 2020, 2330),
        ("device", "expert 3", 2330, 2430),
        ("device", "head", 2430, 3430),
    ]
    assert parts(result) == [1000, 300, 0, 0, 930]


def test_lru_passes_what_it_does_not_keep_through_scratch_memory():
    # 3 takes the slot of 0, which has no rows; 2 waits until 1 has run out of the one place.
    timeline, result = play([[0, 2, 2, 2, 0, 0, 0, 0]], "lru", budget=1, copies="background")
    assert timeline[2:] == [
        ("h2d", "promote 3", 1200, 1510),
        ("device", "expert 3", 1510, 1610),
        ("h2d", "promote 1", 1510, 1820),
        ("device", "expert 1", 1820, 1920),
        ("h2d", "promote 2", 1920, 2230),
        ("device", "expert 2", 2230, 2330),
        ("device", "head", 2330, 3330),
    ]
    assert (result.promotions, result.evictions, result.drops) == (1, 1, 2)


def test_blocking_fetches_run_nothing_beside_them():
    timeline, result = play([FETCHED], "lru", write_back=True)
    assert timeline[2:] == [
        ("device", "experts", 1200, 1300),
        ("d2h", "evict 1", 1300, 1810),
        ("h2d", "promote 2", 1810, 2120),
        ("device", "expert 2", 2120, 2220),
        ("d2h", "evict 0", 2220, 2730),
        ("h2d", "promote 3", 2730, 3040),
        ("device", "expert 3", 3040, 3140),
        ("device", "head", 3140, 4140),
    ]
    assert parts(result) == [1000, 300, 0, 0, 1640]


def test_background_fetches_with_write_back_send_the_victim_out_first():
    timeline, _ = play([FETCHED], "lru", copies="background", write_back=True, is_pinned=True)
    assert timeline[2:] == [
        ("d2h", "evict 1", 1200, 2010),
        ("device", "experts", 1200, 1300),
        ("d2h", "evict 0", 2010, 2820),
        ("h2d", "promote 2", 2010, 2620),
        ("device", "expert 2", 2620, 2720),
        ("h2d", "promote 3", 2820, 3430),
        ("device", "expert 3", 3430, 3530),
        ("device", "head", 3530, 4530),
    ]


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        (Serving(Moves((2,)), (2,)), "must name an expert at most once"),
        (Serving(drop=(3, 3)), "must name an expert at most once"),
        (Serving(drop=(2, 3)), r"needs scratch memory; the policy has scratch\(=0\)"),
    ],
)
def test_fetches_that_are_not_possible_are_refused(serving, message):
    careless = policy("all-host")
    careless.serve = lambda *_: serving
    workload = toy_workload([FETCHED])
    with pytest.raises(ValueError, match=message):
        simulate(workload, TOY, toy_hardware(), careless, budget=2, execution=toy_execution(), is_memory_checked=False)


# --- a drive below the device ---


def disk_machine():
    """Host memory is the device, and the drive reads an expert in 20 + 300 ns."""
    return replace(toy_hardware(), is_unified=True, links=None, nvme=Link(bytes_per_s=0.08e9, latency_s=20e-9))


def test_a_missed_expert_is_read_from_the_drive_before_the_host_computes_it():
    # 320 to read, 50 the call, 500 to compute; no rows travel.
    timeline, result = play([MIXED], "static", machine=disk_machine(), home="disk")
    assert timeline[2:] == [
        ("device", "experts", 1200, 1400),
        ("host", "experts", 1400, 3140),
        ("device", "head", 3140, 4140),
    ]
    assert parts(result) == [1000, 200, 0, 1740, 0]
    _, result = play([MIXED], "static", machine=disk_machine(), home="disk", host_calls="layer")
    assert parts(result)[3] == 50 + 2 * 820


@pytest.mark.parametrize("machine", [disk_machine(), replace(toy_hardware(), nvme=disk_machine().nvme)])
def test_promotions_from_a_disk_are_reads_whatever_links_there_are(machine):
    timeline, result = play([SWAPPED], machine=machine, home="disk")
    assert timeline[2:] == [
        ("h2d", "promote 2", 1200, 1520),
        ("h2d", "promote 3", 1520, 1840),
        ("device", "experts", 1840, 2040),
        ("device", "head", 2040, 3040),
    ]
    assert (result.promotions, result.evictions, result.num_copies) == (2, 2, 2)
    assert (result.h2d_bytes, result.d2h_bytes) == (48, 0)


def test_reads_in_the_background_are_waited_for_by_those_who_need_them():
    # A read takes 20 + 2400. The first forward misses two experts: a read, 50 and 500 for each.
    machine = replace(disk_machine(), nvme=Link(bytes_per_s=0.01e9, latency_s=20e-9))
    timeline, result = play([SWAPPED, SWAPPED], machine=machine, home="disk", copies="background")
    host_end = 1200 + 2 * (2420 + 550)
    assert timeline[2:] == [
        ("host", "experts", 1200, host_end),
        ("device", "head", host_end, host_end + 1000),
        ("h2d", "promote 2", host_end, host_end + 2420),
        ("device", "entry", host_end + 1000, host_end + 1200),
        ("device", "dense", host_end + 1200, host_end + 2200),
        ("h2d", "promote 3", host_end + 2420, host_end + 4840),
        ("device", "experts", host_end + 4840, host_end + 5040),
        ("device", "head", host_end + 5040, host_end + 6040),
    ]
    assert parts(result)[4] == 4840 - 2200
