"""`tidesim sweep` as a user types it."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from study_cases import LINK, content, save, small_trace
from test_cli import Run, run

from tidesim.simulator import simulate
from tidesim.study import read_results
from tidesim.study import scoring as scoring_module

__all__ = ["run"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    machines = [{"profile": "rtx4090", "figures": {LINK: ["x1", 50]}}, "dgx-spark"]
    return save(tmp_path / "s.yaml", **content(small_trace(tmp_path / "t.h5"), machines=machines))


def test_a_sweep_says_where_its_rows_are_and_who_is_best(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "sweep"
    code, printed, err = run("sweep", file, "--out", out, "--workers", 1, "--json")
    assert (code, err) == (0, "")
    told = json.loads(printed)
    assert (told["num_rows"], told["infeasible"], told["failed"], told["failure"]) == (36, 12, 0, None)
    assert (told["traces"], told["seed"]) == ({str(tmp_path / "t.h5"): "recorded"}, 0)
    results = read_results(out)
    assert [told["csv"], told["parquet"]] == [str(out / "results.csv"), str(out / "results.parquet")]
    assert len(pd.read_csv(told["csv"])) == len(pd.read_parquet(told["parquet"])) == len(results) == 36
    ran = results[results["status"] == "ok"]
    fastest = {row["machine"]: row["tok_per_s"] for row in told["best"]}
    assert fastest == ran.groupby("machine")["tok_per_s"].max().to_dict()
    assert [*fastest] == ["rtx4090", f"rtx4090, {LINK}=50", "dgx-spark"]
    assert {row["machine"] for row in told["pareto"]} == {*fastest}


def test_tables_name_the_trace_and_its_origin(run: Run, file: Path, tmp_path: Path) -> None:
    code, printed, err = run("sweep", file, "--out", tmp_path / "out", "--workers", 1)
    assert (code, err) == (0, "")
    for said in ("(recorded)", "hand-made", "36: 12 infeasible, 0 failed", "Fastest on each machine", "dgx-spark"):
        assert said in printed


def test_the_seed_is_kept_with_the_rows(run: Run, file: Path, tmp_path: Path) -> None:
    code, printed, _ = run("sweep", file, "--out", tmp_path / "out", "--workers", 1, "--seed", 7, "--json")
    assert (code, json.loads(printed)["seed"]) == (0, 7)
    assert {*read_results(tmp_path / "out")["seed"]} == {7}
    code, _, err = run("sweep", file, "--out", tmp_path / "out", "--workers", 1)
    assert code == 2
    assert "holds another study" in err
    assert "seed: 7 there, 0 here" in err


def test_failed_cases_end_the_command_with_1_and_are_told(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(workload, model, hardware, policy, **rest):
        if policy.name == "static":
            raise ZeroDivisionError("no such luck")
        return simulate(workload, model, hardware, policy, **rest)

    monkeypatch.setattr(scoring_module, "timed", broken)
    code, printed, err = run("sweep", file, "--out", tmp_path / "out", "--workers", 1, "--json")
    assert code == 1
    assert json.loads(printed)["failed"] == 6
    assert "6 of 36 cases failed, and should not have. The first: ZeroDivisionError: no such luck (case " in err
    assert "Traceback" not in err


def test_what_the_user_can_mend_ends_with_2(run: Run, file: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    empty = save(tmp_path / "empty.yaml", traces=[], machines=["rtx4091"], policies=["lru"])
    monkeypatch.setitem(sys.modules, "distributed", None)
    for words, said in (
        ((tmp_path / "none.yaml", "--out", out), "none.yaml: cannot be read"),
        ((empty, "--out", out), "did you mean rtx4090"),
        ((file, "--out", file), "cannot be written"),
        ((file, "--out", out, "--workers", 2, "--scheduler", "tcp://x:1"), "leave one out"),
        ((file, "--out", out, "--scheduler", "tcp://x:1"), "pip install 'tidesim[cluster]'"),
    ):
        code, printed, err = run("sweep", *words)
        assert (code, printed) == (2, "")
        assert said in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_help_does_not_wait_for_pandas() -> None:
    import subprocess

    code = "import sys, tidesim, tidesim.cli; sys.exit(any(name in sys.modules for name in ('pandas', 'dask')))"
    subprocess.run([sys.executable, "-c", code], check=True)
