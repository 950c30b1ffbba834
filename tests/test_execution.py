from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import NEVER_BOUND, TOY, toy_execution, toy_hardware

from tidesim.errors import BudgetError, InputError
from tidesim.execution import (
    EXECUTIONS,
    GIB,
    Costs,
    check_memory,
    device_memory,
    execution,
    largest_budget,
)
from tidesim.hardware import Curve, Link
from tidesim.moe import load_moe_config


def costs(model=TOY, hardware=None, max_rows=6, **changes) -> Costs:
    return Costs(model, hardware or toy_hardware(), toy_execution(**changes), max_rows)


def hardware(part: str, **changes):
    """The machine of round numbers with some figures of one part changed."""
    plain = toy_hardware()
    return replace(plain, **{part: replace(getattr(plain, part), **changes)})


def ints(*arrays) -> tuple[list[int], ...]:
    return tuple(array.tolist() for array in arrays)


# --- presets ---


def test_the_presets_say_what_the_published_engines_do():
    tide, ours = execution("tide-as-coded"), execution("overlapped")
    assert (tide.kv_cache, tide.is_pinned, tide.copies, tide.write_back) == (False, False, "blocking", True)
    assert (tide.kernels, tide.host, tide.host_calls, tide.copies_per_expert) == ("loop", "serial", "expert", 3)
    assert (ours.kv_cache, ours.is_pinned, ours.copies, ours.write_back) == (True, True, "background", False)
    assert (ours.kernels, ours.host, ours.host_calls, ours.copies_per_expert) == ("grouped", "parallel", "layer", 1)
    assert all(name == preset.name for name, preset in EXECUTIONS.items())


def test_the_presets_of_our_engine_differ_where_their_devices_do():
    engine, emulated, disk = execution("engine"), execution("emulated"), execution("disk")
    assert (engine.kv_cache, engine.logits, engine.is_pinned, engine.copies) == (True, "block", True, "background")
    assert (engine.kernels, engine.host, engine.host_calls, engine.launch) == ("grouped", "parallel", "layer", "eager")
    assert (engine.copies_per_expert, engine.write_back, engine.is_async, engine.home) == (1, False, True, "host")
    ops = {"ops_per_layer": 22, "ops_per_dense_layer": 13, "ops_per_expert": 6, "ops_per_forward": 35}
    ops |= {f"graph_kernels_per_{part}": 0 for part in ("layer", "dense_layer", "forward")}
    assert emulated == replace(engine, name="emulated", activation_bytes=4, is_async=False, fetched="alone", **ops)
    assert disk == replace(emulated, name="disk", home="disk", host="serial")


def particulars(preset):
    """What the presets of other systems differ in."""
    copies = (preset.is_pinned, preset.copies, preset.copies_per_expert, preset.write_back)
    return (preset.kv_cache, *copies, preset.kernels, preset.host, preset.host_calls, preset.launch)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fiddler", (True, False, "blocking", 3, False, "loop", "serial", "expert", "eager")),
        ("mixtral-offloading", (True, True, "blocking", 1, True, "loop", "serial", "expert", "eager")),
        ("moe-infinity", (True, True, "background", 1, False, "loop", "serial", "expert", "eager")),
        ("ktransformers", (True, True, "blocking", 1, False, "grouped", "parallel", "layer", "stream")),
        ("llama-cpp", (False, False, "blocking", 3, False, "grouped", "serial", "layer", "stream")),
        ("freetoken", (True, True, "blocking", 1, False, "grouped", "parallel", "layer", "stream")),
    ],
)
def test_the_presets_of_other_systems_say_what_their_sources_do(name, said):
    assert particulars(execution(name)) == said


def test_other_systems_have_the_ops_of_an_eager_or_of_a_fused_engine():
    ops = ("ops_per_layer", "ops_per_dense_layer", "ops_per_expert", "ops_per_forward")
    for name, preset in EXECUTIONS.items():
        if name not in ("engine", "emulated", "disk"):
            kin = execution("tide-as-coded" if preset.launch == "eager" else "overlapped")
            assert [getattr(preset, op) for op in ops] == [getattr(kin, op) for op in ops]


def test_copies_of_other_systems_pay_what_is_particular_to_them():
    # One copy is 10 + 300 ns in; a victim that goes out to pinned memory is 10 + 400.
    paid = {name: Costs(TOY, toy_hardware(), execution(name), 6) for name in EXECUTIONS}
    assert (paid["fiddler"].promote_ns, paid["fiddler"].evict_ns) == (330, 0)
    assert (paid["mixtral-offloading"].promote_ns, paid["mixtral-offloading"].evict_ns) == (310, 410)
    assert (paid["moe-infinity"].promote_ns, paid["moe-infinity"].evict_ns) == (310, 0)
    assert (paid["llama-cpp"].promote_ns, paid["llama-cpp"].evict_ns) == (330, 0)
    assert (paid["freetoken"].promote_ns, paid["ktransformers"].evict_ns) == (310, 0)


def test_a_disk_takes_nothing_back():
    with pytest.raises(ValueError, match=r"plain: write_back\(=True\) must be False with home 'disk'"):
        toy_execution(home="disk", write_back=True)


def test_unknown_executions_name_the_nearest():
    with pytest.raises(InputError, match="no execution 'overlaped'; did you mean 'overlapped'"):
        execution("overlaped")
    with pytest.raises(InputError, match="there are tide-as-coded, overlapped"):
        execution("xyzzy")


# --- dense parts ---


def test_a_layer_reads_its_weights_and_the_cache():
    rows, context = np.array([3, 3, 1]), np.array([0, 15, 30])
    assert ints(*costs().layer_ns(rows, context)) == ([1000, 2000, 3000], [0, 0, 0])


def test_a_layer_with_many_rows_is_bound_by_operations():
    # 240 + 7 x 16 bytes are 1467 ns; 2 x 3 x 120 + 4 x 3 x (7 + 3) x 4 operations at 0.6 a ns are 2000 ns.
    for flops_per_s, kernel_ns in ((NEVER_BOUND, 1467), (0.6e9, 2000)):
        kernel, _ = costs(hardware=hardware("device", flops_per_s=flops_per_s)).layer_ns(np.array([3]), np.array([7]))
        assert kernel.tolist() == [kernel_ns]


def test_launching_costs_only_what_outlasts_the_kernels():
    slow = hardware("device", eager_op_s=130e-9, kernel_launch_s=20e-9)
    one = np.array([3]), np.array([0])
    assert ints(*costs(hardware=slow).layer_ns(*one)) == ([1000], [300])
    assert ints(*costs(hardware=slow, launch="stream").layer_ns(*one)) == ([1000], [0])
    assert ints(*costs(hardware=slow, ops_per_forward=11).head_ns(*one[:1], np.array([3]))) == ([1000], [430])


def test_launches_that_wait_for_their_kernels_cost_their_full_time():
    made = costs(hardware=hardware("device", eager_op_s=130e-9), is_async=False)
    rows, context = np.array([3, 3]), np.array([0, 15])
    assert ints(*made.layer_ns(rows, context)) == ([1000, 2000], [1300, 1300])
    assert ints(*made.entry_ns(rows, context)) == ([200, 200], [0, 0])
    assert ints(*made.head_ns(rows, np.array([3, 0]))) == ([1000, 0], [1300, 0])
    assert made.experts_ns(200, 2, 6) == (200, 1300)
    assert made.alone_ns(100) == (100, 650)
    assert made.experts_ns(0, 0, 0) == (0, 0)
    grouped = costs(hardware=hardware("device", eager_op_s=130e-9), is_async=False, kernels="grouped")
    assert grouped.experts_ns(200, 2, 6) == (200, 0)


def test_the_entry_is_the_embedding_and_the_dense_layers():
    rows, context = np.array([3]), np.array([0])
    assert ints(*costs().entry_ns(rows, context)) == ([200], [0])
    # A dense layer has 80 weights of attention and 3 x 4 x 5 of its MLP: 280 bytes, 1166.67 ns; two are rounded once.
    two = replace(TOY, num_dense_layers=2)
    slow = hardware("device", eager_op_s=200e-9)
    assert ints(*costs(two, slow).entry_ns(rows, context)) == ([2533], [4000 - 2533])


def test_the_head_runs_over_the_block_or_over_all_rows_and_only_where_logits_are_needed():
    slow = hardware("device", flops_per_s=1e9)
    tokens, logits = np.array([9, 9, 5]), np.array([3, 0, 5])
    # 2 x rows x 120 operations against 240 bytes in 1000 ns.
    assert ints(*costs(hardware=slow).head_ns(tokens, logits)) == ([1000, 0, 1200], [0, 0, 0])
    assert ints(*costs(hardware=slow, logits="all").head_ns(tokens, logits)) == ([2160, 0, 1200], [0, 0, 0])


def test_rows_may_be_32_bit_numbers_without_overflow():
    flash, machine = load_moe_config("llada2.0-flash"), hardware("device", flops_per_s=1e12)
    made = Costs(flash, machine, toy_execution(), 8)
    wide, narrow = np.array([32_768]), np.array([32_768], np.int32)
    for part in (made.layer_ns, made.entry_ns, made.head_ns):
        assert ints(*part(wide, wide)) == ints(*part(narrow, narrow))


# --- routed experts ---


def test_an_expert_of_the_loop_pays_its_gemms_and_its_bytes_or_operations():
    slow = hardware("device", gemm_overhead_s=7e-9, flops_per_s=0.4e9)
    # 24 operations a row at 0.4 a ns are 60 ns a row; 24 bytes are 100 ns.
    assert costs(hardware=slow, max_rows=3).loop_ns.tolist() == [0, 121, 141, 201]


def test_the_loop_hides_its_launches_under_its_kernels():
    made = costs(hardware=hardware("device", eager_op_s=30e-9))
    assert made.expert_launch_ns == 150
    assert made.experts_ns(200, 2, 6) == (200, 100)
    assert made.experts_ns(0, 0, 0) == (0, 0)
    assert costs().experts_ns(200, 2, 6) == (200, 0)
    assert (made.alone_ns(100), made.alone_ns(170)) == ((100, 50), (170, 0))


def test_the_grouped_kernel_is_one_fixed_part_and_one_roofline():
    quick = hardware("device", grouped_overhead_s=40e-9, grouped_flops_per_s=1e9, eager_op_s=1.0)
    made = costs(hardware=quick, kernels="grouped")
    assert made.experts_ns(0, 2, 6) == (40 + 200, 0)
    assert made.experts_ns(0, 2, 12) == (40 + 288, 0)
    assert made.experts_ns(0, 0, 0) == (0, 0)


# 24 operations a row: 200 ns for one row, 200 for two, 300 for four; so 250 for three and 75 for each row above four.
CURVE = Curve((1, 2, 4), (0.12e9, 0.24e9, 0.32e9))


def test_a_curve_of_the_device_replaces_the_roofline_of_an_expert():
    measured = {"expert_curve": CURVE, "gemm_overhead_s": 7e-9, "eager_op_s": 50e-9, "grouped_overhead_s": 40e-9}
    loop = costs(hardware=hardware("device", **measured))
    assert loop.loop_ns.tolist() == [0, 200, 200, 250, 300, 375, 450]
    assert loop.experts_ns(450, 2, 4) == (450, 50)
    assert loop.alone_ns(200) == (200, 50)
    grouped = costs(hardware=hardware("device", **measured), kernels="grouped")
    assert grouped.loop_ns.tolist() == loop.loop_ns.tolist()
    assert grouped.experts_ns(450, 2, 4) == (490, 0)
    assert grouped.experts_ns(0, 0, 0) == (0, 0)
    # Alone, a fetched expert takes GEMMs of its own; where the device is a CPU, it is a group of one.
    assert grouped.alone_ns(200) == (200, 50)
    assert costs(hardware=hardware("device", **measured), kernels="grouped", is_async=False).alone_ns(200) == (240, 0)


def test_kernels_of_a_graph_are_the_devices_own_time_and_hide_no_ops():
    slow = hardware("device", eager_op_s=100e-9, kernel_launch_s=30e-9)
    counts = {
        f"graph_kernels_per_{part}": number for part, number in (("layer", 7), ("dense_layer", 5), ("forward", 3))
    }
    made = costs(replace(TOY, num_dense_layers=2), slow, **counts)
    one = np.array([3]), np.array([0])
    assert ints(*made.layer_ns(*one)) == ([1000], [1000])
    assert ints(*made.entry_ns(*one)) == ([2533], [2000])
    assert ints(*made.head_ns(*one[:1], np.array([3]))) == ([1000 + 90], [0])
    slower = costs(replace(TOY, num_dense_layers=2), hardware("device", kernel_launch_s=300e-9), **counts)
    assert ints(*slower.layer_ns(*one)) == ([2100], [0])
    assert ints(*slower.entry_ns(*one)) == ([3000], [0])


def test_experts_that_run_together_are_begun_while_they_are_copied():
    slow = hardware("device", eager_op_s=100e-9)
    made = costs(hardware=slow, kernels="grouped", copies="background", fetched="together")
    alone = costs(hardware=slow, kernels="grouped", copies="background")
    assert alone.alone_ns(100) == (100, 400)
    assert made.alone_ns(100) == (100, max(0, 400 - made.promote_ns))
    assert costs(hardware=slow, kernels="grouped", copies="blocking", fetched="together").alone_ns(100) == (100, 400)
    for each in (made, alone):
        assert each.fetched_ns.tolist() == [0, *(sum(each.alone_ns(ns)) for ns in each.loop_ns[1:].tolist())]


def test_a_curve_of_the_host_replaces_the_roofline_of_an_expert():
    made = costs(hardware=hardware("host", expert_curve=CURVE), host_calls="layer")
    assert made.host_expert_ns.tolist() == [0, 200, 200, 250, 300, 375, 450]
    assert made.loop_ns.tolist() == costs().loop_ns.tolist()


def test_curves_hold_for_weights_of_16_bits_only():
    curved = replace(hardware("host", expert_curve=CURVE), device=hardware("device", expert_curve=CURVE).device)
    for kernels in ("loop", "grouped"):
        made, plain = (costs(TOY.with_weight_bits(8), machine, kernels=kernels) for machine in (curved, None))
        assert made.loop_ns.tolist() == plain.loop_ns.tolist()
        assert made.host_expert_ns.tolist() == plain.host_expert_ns.tolist()
        assert made.experts_ns(450, 2, 4) == plain.experts_ns(450, 2, 4)
        assert made.alone_ns(200) == plain.alone_ns(200)


def test_the_host_is_called_per_expert_or_per_layer():
    # One expert is 500 ns; a call is 50 ns; n rows take 10 + 100 n ns each way.
    per_expert, per_layer = costs(max_rows=2), costs(max_rows=2, host_calls="layer")
    rows = np.arange(3)
    assert ints(per_expert.host_expert_ns, per_expert.host_call_ns(rows, rows)) == ([0, 770, 970], [0, 0, 0])
    assert ints(per_layer.host_expert_ns, per_layer.host_call_ns(rows, rows)) == ([0, 500, 500], [0, 270, 470])


def test_the_host_sends_back_a_row_for_each_token_or_for_each_missed_pair():
    # Two rows go out, five of their experts are missed; n rows take 10 + 100 n ns each way, twice that in float32.
    assert costs(host_calls="layer").host_call_ns(2, 5) == 50 + 210 + 210
    assert costs(host_calls="layer", returns="pair").host_call_ns(2, 5) == 50 + 210 + 510
    assert costs(host_calls="layer", returns="pair", activation_bytes=4).host_call_ns(2, 5) == 50 + 410 + 1010
    assert costs(host_calls="layer", returns="pair").host_call_ns(0, 0) == 0


def test_the_host_is_bound_by_operations_when_an_expert_has_many_rows():
    slow = hardware("host", bf16_flops_per_s=0.04e9)
    assert costs(hardware=slow, host_calls="layer", max_rows=2).host_expert_ns.tolist() == [0, 600, 1200]


# --- copies ---


@pytest.mark.parametrize(
    ("changes", "promote_ns", "evict_ns"),
    [
        ({}, 310, 0),
        ({"write_back": True}, 310, 510),
        ({"write_back": True, "is_pinned": True}, 310, 410),
        ({"write_back": True, "copies_per_expert": 3}, 330, 530),
        ({"write_back": True, "is_pinned": True, "copies": "background"}, 610, 810),
        ({"copies": "background"}, 310, 0),
    ],
)
def test_copies_pay_latency_bytes_and_a_shared_link(changes, promote_ns, evict_ns):
    made = costs(**changes)
    assert (made.promote_ns, made.evict_ns) == (promote_ns, evict_ns)
    assert (made.promote_bytes, made.evict_bytes) == (24, 24 if evict_ns else 0)


def test_unified_memory_copies_nothing():
    unified = replace(toy_hardware(), is_unified=True, links=None)
    made = costs(hardware=unified, write_back=True, max_rows=2)
    assert (made.promote_ns, made.evict_ns, made.promote_bytes, made.evict_bytes) == (0, 0, 0, 0)
    assert made.host_expert_ns.tolist() == [0, 550, 550]


@pytest.mark.parametrize("is_unified", [True, False])
def test_an_expert_on_disk_is_read_whole_and_no_row_travels(is_unified):
    # A read is 20 + 24 bytes at 0.08 a ns; an expert on the host is 500, its call 50.
    machine = replace(toy_hardware(), nvme=Link(bytes_per_s=0.08e9, latency_s=20e-9))
    if is_unified:
        machine = replace(machine, is_unified=True, links=None)
    made = costs(hardware=machine, home="disk", max_rows=2)
    assert (made.promote_ns, made.evict_ns, made.promote_bytes, made.evict_bytes) == (320, 0, 24, 0)
    assert made.host_expert_ns.tolist() == [0, 870, 870]
    per_layer = costs(hardware=machine, home="disk", max_rows=2, host_calls="layer")
    assert per_layer.host_expert_ns.tolist() == [0, 820, 820]
    assert per_layer.host_call_ns(np.arange(3), 3 * np.arange(3)).tolist() == [0, 50, 50]


def test_experts_of_fewer_bits_move_and_stream_faster():
    made = costs(TOY.with_weight_bits(8), max_rows=1)
    assert (made.promote_ns, made.loop_ns.tolist(), made.host_expert_ns.tolist()) == (160, [0, 50], [0, 520])


@settings(deadline=None)
@given(rows=st.integers(1, 40), context=st.integers(0, 4000), scale=st.floats(1, 100))
def test_a_faster_memory_is_never_slower(rows, context, scale):
    fast = hardware("device", bytes_per_s=0.24e9 * scale)
    one = np.array([rows]), np.array([context])
    for slow_ns, fast_ns in zip(costs().layer_ns(*one), costs(hardware=fast).layer_ns(*one), strict=True):
        assert fast_ns <= slow_ns


# --- memory ---


@pytest.fixture
def mini():
    return load_moe_config("llada2.0-mini")


@pytest.fixture
def a100():
    plain = toy_hardware()
    return replace(
        plain,
        name="a100",
        device=replace(plain.device, memory_bytes=40 * GIB),
        host=replace(plain.host, memory_bytes=1024 * GIB),
    )


def test_device_memory_is_the_sum_of_its_parts(mini, a100):
    need = device_memory(mini, a100, execution("overlapped"), 128, 1024)
    assert need.experts == 19 * 128 * 6 * 2**20
    assert need.non_experts == mini.non_expert_bytes
    assert need.kv_cache == 1024 * 40_960
    assert need.reserve == 4 * GIB
    # Rows: 1024 x 8 x 2048 values of 10 bytes; logits: 32 rows x 157184 x 10 bytes.
    assert need.transient == max(1024 * 8 * 2048 * 10, 32 * 157_184 * 10)
    assert need.total == sum((need.experts, need.non_experts, need.kv_cache, need.reserve, need.transient))


def test_the_published_engine_keeps_no_cache_but_the_logits_of_all_rows(mini, a100):
    need = device_memory(mini, a100, execution("tide-as-coded"), 128, 1024)
    assert need.kv_cache == 0
    assert need.transient == 157_184 * (1024 * 6 + 32 * 4)


def test_the_reserve_is_a_tenth_but_at_least_one_and_a_half_gib(mini, a100):
    small = replace(a100, device=replace(a100.device, memory_bytes=8 * GIB))
    assert device_memory(mini, small, execution("overlapped"), 1, 64).reserve == 3 * GIB // 2
    assert device_memory(mini, small, execution("overlapped"), 1, 64, reserve_bytes=5).reserve == 5


def test_the_largest_budget_fits_and_one_more_does_not(mini, a100):
    card = replace(a100, device=replace(a100.device, memory_bytes=24 * GIB))
    for name in EXECUTIONS:
        preset = execution(name)
        largest = largest_budget(mini, card, preset, 1024)
        assert 128 <= largest < 256
        assert check_memory(mini, card, preset, largest, 1024).total <= 24 * GIB
        with pytest.raises(BudgetError, match=f"the largest budget that fits is {largest} experts a layer"):
            check_memory(mini, card, preset, largest + 1, 1024)


def test_the_message_gives_every_figure(mini, a100):
    small = replace(a100, device=replace(a100.device, memory_bytes=8 * GIB))
    with pytest.raises(BudgetError) as caught:
        check_memory(mini, small, execution("overlapped"), 128, 1024)
    assert str(caught.value) == (
        "llada2.0-mini needs experts 14.25 + other weights 1.78 + KV cache 0.04 + transient peak 0.16 + reserve 1.50 "
        "= 17.72 GiB on the device, and a100 has 8.00 GiB; the largest budget that fits is 40 experts a layer."
    )


def test_budgets_may_differ_by_layer_and_never_exceed_the_experts(mini, a100):
    budgets = [100] * 18 + [256]
    need = check_memory(mini, a100, execution("overlapped"), budgets, 64)
    assert need.experts == sum(budgets) * mini.expert_bytes
    with pytest.raises(BudgetError, match=r"budget\(=257\) of layer 18"):
        check_memory(mini, a100, execution("overlapped"), [1] * 18 + [257], 64)


def test_a_device_too_small_for_the_rest_says_that_no_budget_fits(mini, a100):
    tiny = replace(a100, device=replace(a100.device, memory_bytes=2 * GIB))
    with pytest.raises(BudgetError, match="not even a budget of 0 fits"):
        check_memory(mini, tiny, execution("overlapped"), 1, 64)


def test_the_host_must_hold_every_expert(mini, a100):
    poor = replace(a100, host=replace(a100.host, memory_bytes=16 * GIB))
    with pytest.raises(BudgetError, match=r"take 28.50 GiB in all, and the host of a100 has 16.00 GiB"):
        check_memory(mini, poor, execution("overlapped"), 1, 64)
    assert check_memory(mini.with_weight_bits(8), poor, execution("overlapped"), 1, 64)


def test_unified_memory_stores_each_expert_once(mini, a100):
    shared = replace(a100, is_unified=True, links=None)
    assert largest_budget(mini, shared, execution("overlapped"), 1024) == 256
    assert check_memory(mini, shared, execution("overlapped"), 1, 1024).experts == mini.experts_bytes(256)
    small = replace(shared, device=replace(a100.device, memory_bytes=32 * GIB))
    with pytest.raises(BudgetError, match="not even a budget of 0 fits"):
        check_memory(mini, small, execution("overlapped"), 1, 1024)


def test_experts_on_disk_need_no_host_memory_and_keep_to_the_budget(mini, a100):
    poor = replace(a100, host=replace(a100.host, memory_bytes=GIB), is_unified=True, links=None)
    disk = execution("disk")
    assert check_memory(mini, poor, disk, 64, 1024).experts == mini.experts_bytes(64)
    assert check_memory(mini, replace(poor, is_unified=False), disk, 64, 1024).experts == mini.experts_bytes(64)
    small = replace(poor, device=replace(poor.device, memory_bytes=16 * GIB))
    largest = largest_budget(mini, small, disk, 1024)
    assert 64 < largest < 128
    with pytest.raises(BudgetError, match=f"the largest budget that fits is {largest} experts a layer"):
        check_memory(mini, small, disk, largest + 1, 1024)


def test_one_machine_wide_duration_per_thing_is_a_whole_number():
    made = costs(write_back=True)
    for name in ("promote_ns", "evict_ns", "expert_launch_ns"):
        assert type(getattr(made, name)) is int
    for table in (made.loop_ns, made.host_expert_ns, made.host_call_ns(np.arange(3), np.arange(3))):
        assert table.dtype == np.int64
