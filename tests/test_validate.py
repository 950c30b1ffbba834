"""Predicted beside measured: grids, logs that go on, and figures that can be recomputed by hand."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

from tidesim.cli import app
from tidesim.engine.live import DeviceSettings, dummy_model
from tidesim.engine.session import Session
from tidesim.errors import InputError, ProfileError
from tidesim.execution import EXECUTIONS
from tidesim.hardware import load_hardware
from tidesim.shipped import shipped_folder
from tidesim.trace import Trace
from tidesim.validate import (
    Case,
    ForcedSource,
    Row,
    Validation,
    checked_profile,
    default_grid,
    grid,
    predict,
    read_grid,
    validate,
)
from tidesim.validate.checked_profile import paced, step_error

TINY = shipped_folder("models") / "llada2-tiny"
CPU = DeviceSettings(device="cpu", device_threads=1, host_threads=1)


def test_a_grid_leaves_out_what_makes_no_sense() -> None:
    cases = grid(["all-host", "lru", "tide"], [8, 16], [1, 4], 32)
    assert cases == [
        Case("all-host", 0, None),
        Case("lru", 8, None),
        Case("lru", 16, None),
        *(Case("tide", budget, interval) for budget in (8, 16) for interval in (1, 4)),
    ]
    assert [case.label for case in cases[:1] + cases[-1:]] == ["all-host B=0", "tide τ=4 B=16"]
    foretold = grid(["pre-gated", "rlx"], [8], [1, 4], 32, predictor="oracle")
    assert [case.label for case in foretold] == ["pre-gated, oracle B=8", "rlx τ=1 B=8", "rlx τ=4 B=8"]
    assert len(default_grid(256)) >= 24
    assert len(set(default_grid(256))) == len(default_grid(256))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("nonsense", "must be JSON"),
        ('{"policies": ["lru"]}', "must be JSON"),
        ('{"policies": ["lfo"], "budgets": [8], "intervals": [1]}', "no policy 'lfo'"),
        ('{"policies": ["lru"], "budgets": [8.5], "intervals": [1]}', "whole numbers"),
        ('{"policies": ["lru"], "budgets": [300], "intervals": [1]}', r"in 0\.\.256"),
        ('{"policies": ["lru"], "budgets": [8], "intervals": [0]}', ">= 1"),
    ],
)
def test_a_bad_grid_file_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "grid.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_grid(tmp_path / "grid.json", 256)
    with pytest.raises(InputError, match="cannot be read"):
        read_grid(tmp_path / "none.json", 256)


def row(predicted: float, measured: float, differences: int = 0) -> Row:
    return Row(
        case="c",
        policy="lru",
        budget=8,
        refresh_interval=None,
        predicted_tok_per_s=predicted,
        measured_tok_per_s=measured,
        repeats_tok_per_s=(measured,),
        spread=0.0,
        error=predicted / measured - 1,
        steady_tok_per_s=2 * measured,
        steady_spread=0.1,
        steady_error=predicted / (2 * measured) - 1,
        hit_rate=0.5,
        promotions=1,
        num_differences=differences,
        measured_parts_s={"dense": 1.0},
        predicted_parts_s={"dense": 1.0},
    )


def test_agreement_is_what_it_says() -> None:
    rows = [row(11, 10), row(19, 20), row(33, 30), row(29, 31, differences=2)]
    found = Validation(rows=rows, machine="m", model="n", trace_origin="synthetic", profile="p", num_forwards=3, seed=0)
    raw, steady = found.agreement(is_steady=False), found.agreement(is_steady=True)
    assert raw["median_error"] == pytest.approx((0.1 + 2 / 31) / 2)
    assert raw["worst_error"] == pytest.approx(0.1)
    # Of the six pairs, only the last two cases are ranked the wrong way round.
    assert raw["kendall_tau"] == steady["kendall_tau"] == pytest.approx((5 - 1) / 6)
    assert steady["worst_error"] == pytest.approx(1 - 29 / 62)
    assert (raw["median_spread"], steady["median_spread"]) == (0.0, pytest.approx(0.1))
    # Those two differ by less than their spreads at one speed, and only there.
    assert (raw["num_told_apart"], raw["ranked_alike"]) == (6, pytest.approx(5 / 6))
    assert (steady["num_told_apart"], steady["ranked_alike"]) == (5, 1.0)
    assert found.num_differences == 2


@pytest.fixture(scope="module")
def trace() -> Any:
    with Trace.open("llada2-tiny") as opened:
        yield opened


def run(
    live: Any, trace: Trace, log: Path, cases: list[Case], repeats: int = 2, profile: str = "rtx4090"
) -> Validation:
    how = EXECUTIONS["overlapped"]
    workload = trace.workload("block").tiled(live.sizes.num_layers)
    machine = load_hardware(profile)
    first = Session(live, Case("all-host", 0, None).choice(live, how, workload, machine), machine="here", seed=0)
    source = ForcedSource(first, trace, [0], 10)
    return validate(live, source, cases, how, machine, log, machine="here", repeats=repeats, seed=0)


def test_sequences_that_run_together_are_no_run_that_can_be_measured(trace: Trace) -> None:
    workload = trace.workload("block", [0, 1]).batched(2)
    with pytest.raises(InputError, match=r"batch_size\(=2\) must be 1 .* simulate --batch"):
        predict(None, workload, None, None)  # type: ignore[arg-type]


def test_a_grid_is_measured_simulated_and_decided_alike(trace: Trace, tmp_path: Path) -> None:
    cases = grid(["all-host", "static", "lru", "tide-as-coded"], [32], [1], 256)
    with dummy_model(TINY, CPU, 2, seed=0) as live:
        found = run(live, trace, tmp_path / "log.jsonl", cases)
        assert [one.case for one in found.rows] == [case.label for case in cases]
        assert found.num_differences == 0
        assert found.num_forwards == 10
        for one in found.rows:
            assert len(one.repeats_tok_per_s) == 2
            assert one.measured_tok_per_s == pytest.approx(np.median(one.repeats_tok_per_s))
            assert one.error == pytest.approx(one.predicted_tok_per_s / one.measured_tok_per_s - 1)
        log = (tmp_path / "log.jsonl").read_text()
        assert len(log.splitlines()) == 1 + 2 * len(cases)
        assert all(min(json.loads(line)["speed"]) > 1e6 for line in log.splitlines()[1:])
        # What is there is not measured again; one more repeat adds one measurement a case.
        again = run(live, trace, tmp_path / "log.jsonl", cases)
        assert again == found
        assert (tmp_path / "log.jsonl").read_text() == log
        (tmp_path / "log.jsonl").write_text("\n".join(log.splitlines()[:4]) + "\n")  # stopped after three
        resumed = run(live, trace, tmp_path / "log.jsonl", cases)
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1 + 2 * len(cases)
        assert len(resumed.rows) == len(found.rows)
    found.save_csv(tmp_path / "v.csv")
    with (tmp_path / "v.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["error"]) for line in lines] == [one.error for one in found.rows]
    assert {"measured_dense_s", "predicted_host_wait_s"} <= set(lines[0])


def test_every_policy_is_decided_alike_whatever_it_wants_to_know(trace: Trace, tmp_path: Path) -> None:
    cases = grid(["gain", "freetoken-hybrid", "fiddler", "finemoe", "pre-gated"], [32], [1], 256, predictor="oracle")
    with dummy_model(TINY, CPU, 2, seed=0) as live:
        found = run(live, trace, tmp_path / "log.jsonl", cases, repeats=1)
        with pytest.raises(InputError, match="another setting"):
            run(live, trace, tmp_path / "log.jsonl", cases, repeats=1, profile="rtx4060-laptop")
    assert [one.num_differences for one in found.rows] == [0] * len(cases)


def test_a_policy_decides_by_the_profile_that_it_was_given_whatever_the_machine_is_like(trace: Trace) -> None:
    machine, other = load_hardware("rtx4090"), load_hardware("rtx4060-laptop")
    workload = trace.workload("block", [0]).tiled(2).first(12)
    how, case = EXECUTIONS["overlapped"], Case("gain", 32, None)
    with dummy_model(TINY, CPU, 2, seed=0) as live:
        choice, changed = (case.choice(live, how, workload, profile) for profile in (machine, other))
        result, decisions = predict(live, workload, machine, choice)
        same, alike = predict(live, workload, other, choice)
        _, different = predict(live, workload, other, changed)
    assert alike == decisions != different
    assert same.makespan_ns != result.makespan_ns
    assert (result.hardware, same.hardware) == ("rtx4090", "rtx4060-laptop")


def test_a_log_of_another_setting_is_refused(trace: Trace, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with dummy_model(TINY, CPU, 1, seed=0) as live:
        log.write_text(json.dumps({"machine": "there"}) + "\n")
        with pytest.raises(InputError, match="another setting"):
            run(live, trace, log, [Case("lru", 32, None)])
        log.write_text("x\n")
        with pytest.raises(InputError, match="no log of measurements"):
            run(live, trace, log, [Case("lru", 32, None)])
        with pytest.raises(InputError, match="repeats"):
            run(live, trace, tmp_path / "new.jsonl", [Case("lru", 32, None)], repeats=0)


def test_the_command_writes_table_and_picture(tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text('{"policies": ["pre-gated", "all-host"], "budgets": [64], "intervals": [1]}')
    words = ["validate", "--out", tmp_path / "out", "--hardware", "rtx4090", "--grid", tmp_path / "grid.json"]
    words += ["--device", "cpu", "--limit", 1, "--gen-length", 32, "--repeats", 1, "--predictor", "oracle"]
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--json"]])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [one["case"] for one in document["rows"]] == ["pre-gated, oracle B=64", "all-host B=0"]
    assert document["num_differences"] == 0
    assert document["trace_origin"] == "recorded"
    assert (tmp_path / "out" / "validation.png").read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(app, [str(word) for word in words])
    assert "Kendall's tau" in shown.stdout
    assert "all-host B=0" in shown.stdout


def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("tidesim.cli.live._profile", lambda *_: pytest.fail("it began"))
    done = CliRunner().invoke(app, ["validate", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert isinstance(done.exception, InputError)
    assert "drawing needs matplotlib" in str(done.exception)


def test_a_profile_that_does_not_predict_a_real_step_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProfileError, match=r"a denoising step takes .* ms, measured are .* calibrate again"):
        step_error(TINY, CPU, load_hardware("h200"), seed=0)
    monkeypatch.setattr(checked_profile, "check_step", lambda predicted_s, measured_s: None)
    assert step_error(TINY, CPU, load_hardware("h200"), seed=0) < -0.25


def test_a_paced_machine_has_the_links_of_its_pace_but_none_faster_than_memory() -> None:
    from tidesim.engine.emulated import Pace

    slow, fast = load_hardware("rtx4060-laptop"), load_hardware("rtx5090")
    settings = DeviceSettings(device="emulated", pace=Pace.of(slow))
    assert paced(fast, settings).links.h2d_pinned == slow.links.h2d_pinned
    settings = DeviceSettings(device="emulated", pace=Pace.of(fast))
    assert paced(slow, settings).links.h2d_pinned.bytes_per_s == slow.links.h2d_pinned.bytes_per_s
    assert paced(slow, CPU) == slow


def test_a_profile_is_set_to_the_speed_of_the_moment() -> None:
    from dataclasses import replace

    from tidesim.engine.cores import Cores
    from tidesim.engine.yardstick import Speed, Yardstick
    from tidesim.hardware.machine import Curve
    from tidesim.moe import load_moe_config

    plain = load_hardware("rtx4090")
    curve = Curve((1, 4, 32), (1e9, 4e9, 8e9))
    device = replace(plain.device, dense_curve=curve, head_curve=curve, expert_curve=curve)
    profile = replace(plain, device=device, host=replace(plain.host, expert_curve=curve))
    with Cores(1) as cores:
        yardstick = Yardstick(load_moe_config("llada2-tiny"), cores, seed=0)
        assert min(yardstick.measure()) > 1e6
        slow = yardstick.adjusted(profile, Speed(dense=4e9, experts=3e9))
        assert yardstick.adjusted(plain, Speed(1e9, 1e9)) is plain
    assert slow.device.dense_curve.flops_per_s == slow.device.head_curve.flops_per_s == pytest.approx((0.5e9, 2e9, 4e9))
    assert (
        slow.device.expert_curve.flops_per_s == slow.host.expert_curve.flops_per_s == pytest.approx((0.75e9, 3e9, 6e9))
    )
    assert Speed.between(Speed(1, 4), Speed(3, 8)) == Speed(2, 6)
