"""What more of something would give: which questions are asked of which machine, and what the answers are made of."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy import TOY, toy_workload

from tidesim.errors import ProfileError
from tidesim.execution import execution, largest_budget
from tidesim.hardware import CurveFigure, Hardware, load_hardware
from tidesim.moe import load_moe_config
from tidesim.policies import policy
from tidesim.timing import timed
from tidesim.what_if import shadow_prices, with_more_slots

# Eight experts with 24 MB each: a fast link or host matters to them.
MODEL = replace(TOY, num_layers=2, hidden_size=2048, moe_intermediate_size=2048)


def workload_of(num_forwards=6, **changes):
    rng = np.random.default_rng(1)
    picks = np.argsort(rng.random((num_forwards, 2, 4, 8)), axis=-1)[..., :2]
    return toy_workload(*(picks[..., None] == np.arange(8)).sum(axis=(2, 3)), **changes)


def tide(budgets):
    return policy("tide", refresh_interval=2)


def prices_on(machine, name="overlapped", budget=(3, 2), model=MODEL, policy_of=tide):
    how = execution(name)
    return shadow_prices(
        workload_of(context=how.context), model, machine, policy_of, budget=budget, execution=how, reserve_bytes=0
    )


def curved(*paths: str) -> Hardware:
    plain = load_hardware("rtx4090")
    made = {path: CurveFigure((1, 8), (100.0, 400.0), "calibrated", "a test") for path in paths}
    return Hardware.from_content(replace(plain, curves=made).content(), plain.name)


# --- what is asked ---


def test_every_question_is_a_run_on_a_changed_profile():
    machine = load_hardware("rtx4090")
    prices = {price.name: price for price in prices_on(machine)}
    assert list(prices) == sorted(prices, key=lambda name: -prices[name].gain)
    assert len(prices) == 8
    link = prices["copies to the device twice as fast"]
    assert (link.figures, link.factor, link.num_slots) == (("links.h2d_pinned.bandwidth_gb_s",), 2, 0)
    value = machine.sources[link.figures[0]].value
    faster = machine.replace_figure(link.figures[0], 2 * value)
    for hardware, tok_per_s in ((machine, link.before_tok_per_s), (faster, link.after_tok_per_s)):
        expected = timed(workload_of(), MODEL, hardware, tide(None), budget=(3, 2), execution=execution("overlapped"))
        assert tok_per_s == expected.tok_per_s
    assert link.gain == link.after_tok_per_s / link.before_tok_per_s - 1 > 0
    assert {price.before_tok_per_s for price in prices.values()} == {link.before_tok_per_s}


def test_answers_are_the_same_every_time_and_plain_data():
    prices = prices_on(load_hardware("rtx4090"))
    assert prices == prices_on(load_hardware("rtx4090"))
    told = json.loads(json.dumps([price.to_dict() for price in prices]))
    assert told[0]["name"] == prices[0].name
    assert told[0]["figures"] == list(prices[0].figures)


def test_copies_are_asked_for_as_they_are_made():
    machine = load_hardware("rtx4090")
    asked = {price.name: price.figures for price in prices_on(machine, "tide-as-coded")}
    assert asked["copies to the host twice as fast"] == (
        "links.d2h_pageable.bandwidth_gb_s",
        "links.d2h_fresh.bandwidth_gb_s",
    )
    assert asked["launches in half the time"] == ("device.eager_op_us",)
    asked = {price.name: price.figures for price in prices_on(machine, "disk")}
    assert asked["drive twice as fast"] == ("links.nvme.bandwidth_gb_s",)
    assert "copies to the device twice as fast" not in asked


def test_one_memory_has_no_link_and_no_slots_to_win():
    asked = {path.split(".")[0] for price in prices_on(load_hardware("dgx-spark")) for path in price.figures}
    assert asked == {"host", "device"}
    assert "device.memory_gib" not in {
        path for price in prices_on(load_hardware("dgx-spark")) for path in price.figures
    }


def test_measured_curves_are_raised_as_a_whole():
    machine = curved("host.expert_curve", "device.expert_curve")
    prices = {price.name: price for price in prices_on(machine)}
    assert prices["experts on the host 1.5 times as fast"].figures == ("host.expert_curve",)
    assert prices["experts on the host 1.5 times as fast"].gain > 0
    assert prices["kernels on the device 1.5 times as fast"].figures[-1] == "device.expert_curve"
    assert "host memory 1.5 times as fast" not in prices
    # The curve of the host is not for weights of fewer bits.
    names = {price.name for price in prices_on(machine, model=MODEL.with_weight_bits(8))}
    assert "host memory 1.5 times as fast" in names


def test_what_no_machine_has_is_not_asked():
    fast = load_hardware("rtx4090").replace_figure("links.h2d_pinned.bandwidth_gb_s", 1500)
    names = {price.name for price in prices_on(fast)}
    assert "copies to the device twice as fast" not in names
    assert "copies to the host twice as fast" in names


# --- memory ---


@pytest.mark.parametrize(
    ("budgets", "num_more", "expected"),
    [
        ((2, 2, 2), 0, (2, 2, 2)),
        ((2, 2, 2), 4, (4, 3, 3)),
        ((5, 1), 3, (7, 2)),
        ((8, 1, 7), 5, (8, 5, 8)),
        ((8, 7), 5, (8, 8)),
        ((2, 2), -3, (2, 2)),
    ],
)
def test_slots_go_round_the_layers_that_have_room(budgets, num_more, expected):
    assert with_more_slots(budgets, num_more, num_experts=8) == expected


def test_more_memory_is_as_many_slots_as_it_holds():
    given = []

    def policy_of(budgets):
        given.append(budgets)
        return tide(budgets)

    machine = load_hardware("rtx4090")
    memory = next(price for price in prices_on(machine, policy_of=policy_of) if price.figures == ("device.memory_gib",))
    # 1 GiB holds 42 experts of 24 MiB, more than there are.
    assert (memory.num_slots, memory.factor) == (16 - 5, 25 / 24)
    assert (8, 8) in given


def test_the_reserve_takes_its_tenth_of_more_memory():
    mini, machine, how = load_moe_config("llada2.0-mini"), load_hardware("rtx4090"), execution("overlapped")
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((2, 19, 32, 256)), axis=-1)[..., :8]
    counts = (ids.reshape(2, 19, -1, 1) == np.arange(256)).sum(axis=2)
    workload = toy_workload(
        *counts, tokens=np.array([32, 32], np.int32), model_name=mini.name, top_k=8, num_experts=256
    )
    budget = largest_budget(mini, machine, how, workload.max_tokens)
    prices = shadow_prices(workload, mini, machine, tide, budget=budget, execution=how)
    memory = next(price for price in prices if price.figures == ("device.memory_gib",))
    assert abs(memory.num_slots - 0.9 * 2**30 / mini.expert_bytes) < 1


# --- changed profiles ---


def test_a_machine_is_scaled_in_several_figures_at_once():
    machine = curved("host.expert_curve")
    faster = machine.scaled(("host.memory_gb_s", "host.expert_curve"), 1.5)
    assert faster.host.bytes_per_s == pytest.approx(1.5 * machine.host.bytes_per_s)
    assert faster.host.expert_curve.flops_per_s == (150e9, 600e9)
    assert faster.host.expert_curve.rows == (1, 8)
    assert faster.curves["host.expert_curve"].source.startswith("what-if, 1.5 times (calibrated")
    assert replace(faster.host, bytes_per_s=0, expert_curve=None) == replace(
        machine.host, bytes_per_s=0, expert_curve=None
    )
    with pytest.raises(ProfileError, match=r"no figure or curve 'host\.memory_gbs'"):
        machine.scaled(("host.memory_gbs",), 2)
    with pytest.raises(ProfileError, match="must be from"):
        machine.scaled(("host.memory_gb_s",), 1e9)
