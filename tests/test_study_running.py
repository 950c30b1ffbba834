"""Studies that are run: every row once and the same whoever runs it, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from study_cases import LINK, content, save, small_trace, study

from tidesim.errors import InputError
from tidesim.execution import device_memory
from tidesim.policies.knowledge import Knowledge
from tidesim.simulator import simulate
from tidesim.study import COLUMNS, Study, read_results, run_study
from tidesim.study import scoring as scoring_module
from tidesim.study.columns import FIGURE, SETTINGS
from tidesim.study.scoring import make_known
from tidesim.study.sharing import SharedCounts, load_shared
from tidesim.study.store import Store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("study") / "t.h5")


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith("results")}


# --- rows ---


def test_a_row_has_every_setting_and_what_the_simulator_says(trace: Path, tmp_path: Path) -> None:
    machines = [{"profile": "rtx4090", "figures": {LINK: [12]}}, "dgx-spark"]
    asked = study(trace, machines=machines, policies=["gain"], budgets=[3], seed=1, reserve_gib=2)
    results = run_study(asked, tmp_path, workers=1)
    assert [*results.columns] == [
        *(column.name for column in COLUMNS[: len(SETTINGS) + 1]),
        FIGURE + LINK,
        *(column.name for column in COLUMNS[len(SETTINGS) + 1 :]),
    ]
    (row, unified), (case, _) = results.to_dict("records"), asked.cases
    known = make_known(case.routing)
    rules = {"execution": case.execution, "reserve_bytes": 2 * 2**30}
    policy = Knowledge(workload=known.workload, corpus=known.corpus).make("gain", {})
    result = simulate(known.workload, case.model, case.machine.hardware, policy, budget=3, seed=1, **rules)
    memory = device_memory(
        *(case.model, case.machine.hardware, case.execution, 3, known.workload.max_tokens, 2 * 2**30, policy.scratch)
    )
    for name, value in case.settings().items():
        assert (pd.isna(row[name]) and value is None) or row[name] == value, name
    names = ("tok_per_s", "makespan_s", "hits", "misses", "promotions", "evictions", "h2d_bytes", "d2h_bytes", "drops")
    assert {name: row[name] for name in names} == {name: getattr(result, name) for name in names}
    assert {name: row[f"{name}_s"] for name in result.breakdown_s} == result.breakdown_s
    assert {name: row[f"{name}_busy_share"] for name in result.busy_share} == result.busy_share
    parts = [row[f"memory_{name}_bytes"] for name in ("experts", "non_experts", "kv_cache", "transient", "reserve")]
    assert row["device_memory_bytes"] == sum(parts) == memory.total
    assert (row["status"], row["budget"], row["seed"], row["version"]) == ("ok", 3, 1, result.version)
    assert (row["trace"], row["trace_origin"], row["sequences"]) == (str(trace), "recorded", "0")
    assert json.loads(row["changes"]) == {LINK: 12}
    assert row[FIGURE + LINK] == 12
    assert pd.isna(unified[FIGURE + LINK])


def test_cases_that_do_not_fit_say_why_and_the_largest_budget_is_found(trace: Path, tmp_path: Path) -> None:
    results = run_study(study(trace, policies=["static", {"name": "decayed", "keep": 3}]), tmp_path, workers=1)
    assert [*results["status"]] == ["ok", "ok", "infeasible", "infeasible", "infeasible", "infeasible"]
    assert [*results["budget"].fillna(-1)] == [2, 16, -1, -1, -1, -1]
    assert "budget(=17)" in results["reason"][2]
    assert results["reason"][3] == "keep(=3) must be >= 0 and <= 1."
    assert results["tok_per_s"].notna().sum() == 2


def test_a_trace_that_changed_meanwhile_is_no_longer_run(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.h5")
    asked = study(trace, budgets=[2])
    small_trace(tmp_path / "other.h5", num_sequences=5).replace(trace)
    results = run_study(asked, tmp_path / "out", workers=1)
    assert {*results["status"]} == {"infeasible"}
    assert "has changed since the study was read" in results["reason"][0]


def test_one_failing_case_does_not_end_a_study(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(workload, model, hardware, policy, **rest):
        if policy.name == "static":
            raise ZeroDivisionError("no such luck")
        return simulate(workload, model, hardware, policy, **rest)

    monkeypatch.setattr(scoring_module, "timed", broken)
    results = run_study(study(trace, budgets=[2]), tmp_path, workers=1)
    assert [*results["status"]] == ["failed", "ok", "ok", "ok"]
    assert results["reason"][0] == "ZeroDivisionError: no such luck"
    monkeypatch.undo()
    done: list[tuple[int, int]] = []
    again = run_study(study(trace, budgets=[2]), tmp_path, workers=1, progress=lambda *told: done.append(told))
    assert done == [(0, 1), (1, 1)]
    assert {*again["status"]} == {"ok"}
    pd.testing.assert_frame_equal(again, run_study(study(trace, budgets=[2]), tmp_path / "anew", workers=1))


# --- whoever runs it ---


def test_rows_are_in_the_order_of_the_grid_and_the_tables_say_the_same(trace: Path, tmp_path: Path) -> None:
    # Contexts alternate along the grid, and cases run by workload.
    executions = ["overlapped", "tide-as-coded"]
    done: list[tuple[int, int]] = []
    asked = study(trace, machines=["l4", "rtx4090"], executions=executions, weight_bits=[16, 4], budgets=[2])
    results = run_study(asked, tmp_path, workers=1, progress=lambda *told: done.append(told))
    assert [*results["case"]] == [case.key for case in asked.cases]
    assert done == [(number, 32) for number in range(33)]
    pd.testing.assert_frame_equal(read_results(tmp_path), results)
    dtypes = results.dtypes.to_dict()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv", dtype=dtypes), results)
    assert not (tmp_path / "counts").exists()


@pytest.mark.slow
def test_processes_change_nothing(trace: Path, tmp_path: Path) -> None:
    asked = study(trace, executions=["overlapped", "tide-as-coded"], machines=["l4", "rtx4090"])
    one = run_study(asked, tmp_path / "one", workers=1)
    two = run_study(asked, tmp_path / "two", workers=2)
    pd.testing.assert_frame_equal(one, two)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_shared_counts_are_those_of_the_trace_and_go_away(trace: Path, tmp_path: Path) -> None:
    (case, *_) = study(trace).cases
    folder = tmp_path / "counts"
    (folder / "left by a killed sweep").mkdir(parents=True)
    with SharedCounts(folder) as shared:
        where = shared.put(case.routing)
        loaded, counted = load_shared(where), make_known(case.routing)
        for one, other in zip(loaded, counted, strict=True):
            assert (one.counts == other.counts).all()
            assert (one.step == other.step).all()
            assert (one.fingerprint, one.lookahead) == (other.fingerprint, other.lookahead)
        assert [path.name for path in folder.iterdir()] == [case.routing.key]
        shared.drop(case.routing)
        assert loaded.workload.counts.sum() == counted.workload.counts.sum()
    assert not folder.exists()


# --- going on ---


def test_a_finished_study_is_not_run_again(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = study(trace)
    first = run_study(asked, tmp_path, workers=1)
    monkeypatch.setattr(scoring_module, "timed", None)
    pd.testing.assert_frame_equal(run_study(study(trace), tmp_path, workers=1), first)


@pytest.mark.parametrize("torn", [b"", b'{"case": "12', b'{"case": "1234"}', b"\xff\xfe\x00"])
def test_a_torn_line_is_run_again(trace: Path, tmp_path: Path, torn: bytes) -> None:
    asked = study(trace)
    whole = run_study(asked, tmp_path / "whole", workers=1)
    out = tmp_path / "torn"
    run_study(asked, out, workers=1)
    log = out / "rows.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:5]) + torn)
    done: list[tuple[int, int]] = []
    results = run_study(asked, out, workers=1, progress=lambda *told: done.append(told))
    assert done[-1] == (7, 7)
    pd.testing.assert_frame_equal(results, whole)
    assert sorted(log.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert files(out) == files(tmp_path / "whole")


def test_a_damaged_log_is_refused_with_the_line(trace: Path, tmp_path: Path) -> None:
    run_study(study(trace), tmp_path, workers=1)
    log = tmp_path / "rows.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[2:]]))
    with pytest.raises(InputError, match=r"rows.jsonl: line 3 is no row of this study; remove the line"):
        run_study(study(trace), tmp_path, workers=1)


def test_what_is_there_can_be_read_while_it_runs(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidesim.study.store._LEAST_S", 0.0)
    monkeypatch.setattr("tidesim.study.store._PATIENCE", 0)
    seen: list[int] = []

    def look(done: int, total: int) -> None:
        if done:
            seen.append(len(read_results(tmp_path)))
            assert len(pd.read_csv(tmp_path / "results.csv")) == done

    run_study(study(trace), tmp_path, workers=1, progress=look)
    assert seen == [*range(1, 13)]


def test_another_study_is_refused_with_what_differs(trace: Path, tmp_path: Path) -> None:
    run_study(study(trace), tmp_path, workers=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"another study \(budget_asked: 2, largest, 17 there, 2 here\); name another"):
        run_study(study(trace, budgets=[2]), tmp_path, workers=1)
    with pytest.raises(InputError, match="the same settings in another order or combination"):
        run_study(replace(study(trace), cases=(*study(trace).cases[:6], *study(trace).cases[7:])), tmp_path, workers=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["results.csv", "rows.jsonl", "study.json"])
def test_files_of_others_are_left_alone(trace: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(InputError, match="name another --out"):
        run_study(study(trace), tmp_path, workers=1)
    assert (tmp_path / name).read_text() == "mine\n"
    with pytest.raises(InputError, match="cannot be written"):
        run_study(study(trace), tmp_path / name / "below", workers=1)


def test_two_sweeps_never_write_to_one_folder(trace: Path, tmp_path: Path) -> None:
    with Store(tmp_path, study(trace)), pytest.raises(InputError, match="another sweep is writing there"):
        run_study(study(trace), tmp_path, workers=1)
    assert len(run_study(study(trace), tmp_path, workers=1)) == 12


def test_a_full_disk_keeps_what_is_there(trace: Path, tmp_path: Path) -> None:
    asked = study(trace)
    with Store(tmp_path, asked) as store, Path("/dev/full").open("ab", buffering=0) as full:
        log, store._log = store._log, full
        with pytest.raises(InputError, match="No space left on device"):
            store.append({"case": asked.cases[0].key})
        store._log = log
    assert len(read_results(tmp_path)) == 0


def test_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"results.parquet: cannot be read"):
        read_results(tmp_path)
    (tmp_path / "results.parquet").write_text("no")
    with pytest.raises(InputError, match=r"results.parquet: cannot be read"):
        read_results(tmp_path)


def test_workers_and_a_scheduler_exclude_each_other(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"workers\(=2\) are for this machine"):
        run_study(study(trace), tmp_path, workers=2, scheduler="tcp://localhost:1")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_that_is_killed_goes_on(trace: Path, tmp_path: Path, workers: int) -> None:
    fields = content(trace, machines=["l4", "rtx4090"], intervals=[*range(1, 13)], policies=["tide", "rlx", "lru"])
    asked = Study.read(save(tmp_path / "s.yaml", **fields))
    command = [sys.executable, "-m", "tidesim", "sweep", str(tmp_path / "s.yaml"), "--workers", str(workers), "--json"]
    killed = tmp_path / "killed"
    log = killed / "rows.jsonl"
    before = -1
    for _ in range(3):
        process = subprocess.Popen([*command, "--out", str(killed)], cwd=ROOT, stdout=subprocess.DEVNULL)
        lines = _wait_for_lines(process, log, before + 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lines > before
        before = lines
    assert before < len(asked.cases)
    with log.open("ab") as file:
        file.write(b'{"case": "torn')
    done = subprocess.run([*command, "--out", str(killed)], cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["num_rows"] == len(asked.cases)
    assert done.stderr == ""
    keys = [json.loads(line)["case"] for line in log.read_text().splitlines()]
    assert sorted(keys) == sorted(case.key for case in asked.cases)
    run_study(asked, tmp_path / "whole", workers=1)
    assert files(killed) == files(tmp_path / "whole")


def _wait_for_lines(process: subprocess.Popen, log: Path, least: int) -> int:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        if lines >= max(least, 1):
            return lines
        time.sleep(0.01)
    raise AssertionError("the sweep wrote no row in a minute, or was done before it was killed")


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(trace: Path, tmp_path: Path) -> None:
    import psutil

    fields = content(trace, intervals=[*range(1, 41)], policies=["tide", "rlx"])
    command = [sys.executable, "-m", "tidesim", "sweep", str(save(tmp_path / "s.yaml", **fields)), "--workers", "2"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.DEVNULL)
    _wait_for_lines(process, tmp_path / "out" / "rows.jsonl", 2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert len(gone) == len(children)


@pytest.mark.slow
def test_a_worker_that_dies_is_told_and_the_sweep_goes_on_later(trace: Path, tmp_path: Path) -> None:
    import psutil

    fields = content(trace, intervals=[*range(1, 41)], policies=["tide", "rlx"])
    command = [sys.executable, "-m", "tidesim", "sweep", str(save(tmp_path / "s.yaml", **fields)), "--workers", "2"]
    out = ["--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, *out], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_for_lines(process, tmp_path / "out" / "rows.jsonl", 2)
    spawned = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    os.kill(spawned[0].pid, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process ended before its case did" in told
    assert "Traceback" not in told
    done = subprocess.run([*command, *out], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "0 failed" in done.stdout
    assert len(read_results(tmp_path / "out")) == 240
