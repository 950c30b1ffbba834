"""Studies on a Dask cluster: a real scheduler, real processes, one of which dies."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from study_cases import content, save, small_trace, study

from tidesim.errors import InputError
from tidesim.study import Study, run_study
from tidesim.study.cluster import _row

distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("study") / "t.h5")


@pytest.fixture
def cluster() -> Iterator["distributed.LocalCluster"]:
    with distributed.LocalCluster(
        n_workers=3, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs=50
    ) as started:
        yield started


def test_a_worker_that_dies_loses_and_doubles_no_row(trace: Path, tmp_path: Path, cluster) -> None:
    asked = study(
        trace,
        machines=["l4", "rtx4090", "dgx-spark"],
        executions=["overlapped", "tide-as-coded"],
        policies=["static", "gain", "tide", "rlx"],
        intervals=[*range(1, 9)],
    )
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if done == 20 and not killed:
            # The counts went to one worker first: kill who holds them.
            pids = sorted(nanny.pid for nanny in cluster.workers.values())
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])

    there = run_study(asked, tmp_path / "there", scheduler=cluster.scheduler_address, progress=kill_one)
    assert killed
    assert [*there["case"]] == [case.key for case in asked.cases]
    lines = (tmp_path / "there" / "rows.jsonl").read_bytes().splitlines()
    assert len(lines) == len(set(lines)) == len(asked.cases)
    here = run_study(asked, tmp_path / "here", workers=1)
    pd.testing.assert_frame_equal(there, here)
    for name in ("results.csv", "results.parquet"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_all_workers_may_die_one_after_another(trace: Path, tmp_path: Path, cluster) -> None:
    asked = study(trace, policies=["tide", "rlx"], intervals=[*range(1, 21)])
    first = {nanny.pid for nanny in cluster.workers.values()}
    left = sorted(first)

    def kill_next(done: int, total: int) -> None:
        if left and done and not done % 15:
            os.kill(left.pop(), signal.SIGKILL)

    there = run_study(asked, tmp_path / "there", scheduler=cluster.scheduler_address, progress=kill_next)
    assert not left
    pd.testing.assert_frame_equal(there, run_study(asked, tmp_path / "here", workers=1))


def test_a_stopped_sweep_goes_on_elsewhere(trace: Path, tmp_path: Path, cluster) -> None:
    asked = study(trace)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(asked, tmp_path / "out", scheduler=cluster.scheduler_address, progress=stop)
    assert len((tmp_path / "out" / "rows.jsonl").read_bytes().splitlines()) == 5
    there = run_study(asked, tmp_path / "out", workers=1)
    pd.testing.assert_frame_equal(there, run_study(asked, tmp_path / "here", workers=1))
    again = run_study(asked, tmp_path / "out", scheduler="tcp://127.0.0.1:1")
    pd.testing.assert_frame_equal(again, there)


def test_a_case_that_kills_its_workers_fails_alone(trace: Path) -> None:
    case = study(trace).cases[0]

    class GivenUp:
        def exception(self) -> Exception:
            return distributed.KilledWorker("score", SimpleNamespace(address="tcp://there"), 3)

        def cancelled(self) -> bool:
            return False

    row = _row(GivenUp(), case, (), "tcp://there")
    assert (row["case"], row["status"]) == (case.key, "failed")
    assert str(row["reason"]).startswith("KilledWorker: ")


def test_a_scheduler_without_workers_is_told(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidesim.study.cluster._PATIENCE_S", 1)
    with (
        distributed.LocalCluster(n_workers=0, processes=True, dashboard_address="127.0.0.1:0") as empty,
        pytest.raises(InputError, match="has no worker; start one with: dask worker tcp"),
    ):
        run_study(study(trace), tmp_path, scheduler=empty.scheduler_address)


@pytest.mark.parametrize("address", ["", "nonsense://x", "tcp://127.0.0.1:1"])
def test_no_scheduler_is_told(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("tidesim.study.cluster._PATIENCE_S", 1)
    with pytest.raises(InputError, match="no Dask scheduler at"):
        run_study(study(trace), tmp_path, scheduler=address)


def test_workers_with_another_tidesim_are_refused(
    trace: Path, tmp_path: Path, cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Study.read(save(tmp_path / "s.yaml", **content(trace)))
    monkeypatch.setattr("tidesim.study.cluster.tool_version", lambda: "0.0.0")
    with pytest.raises(InputError, match=f"{socket.gethostname()} has tidesim .*, and the study is run by 0.0.0"):
        run_study(asked, tmp_path / "out", scheduler=cluster.scheduler_address)
