"""Other processes map workloads, and nothing stays behind."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from toy import toy_workload

from tidesim.lending import Lent
from tidesim.workers import Workers


def total(lent: Lent, name: str) -> tuple[int, int, bool]:
    workload = lent[name]
    assert lent[name] is workload
    return int(workload.counts.sum()), len(lent), workload.counts.flags.writeable


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_lent_is_the_same_elsewhere_and_is_gone_in_the_end(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one, other = toy_workload([[3, 3, 0, 0, 0, 0, 0, 0]]), toy_workload([[1, 2, 1, 2, 0, 0, 0, 0]], [[6] + 7 * [0]])
    with Lent({"one": one, "other": other}) as lent:
        assert list(lent) == ["one", "other"]
        assert lent["one"] is one
        with Workers(lent, num_workers) as pool:
            found = list(pool.map(total, ["one", "other", "one"]))
        is_here = num_workers == 1
        assert found == [(6, 2, is_here), (12, 2, is_here), (6, 2, is_here)]
        with pytest.raises(KeyError):
            lent["another"]
    assert not list(tmp_path.iterdir())


def test_values_travel_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workload = toy_workload([[3, 3, 0, 0, 0, 0, 0, 0]])
    with Lent({"one": workload}) as lent:
        state, away = lent.__getstate__(), Lent({})
        with away:
            away.__setstate__(state)
            found = away["one"]
        for name in workload.__slots__:
            expected = getattr(workload, name)
            if isinstance(expected, np.ndarray):
                assert np.array_equal(getattr(found, name), expected)
                assert getattr(found, name).dtype == expected.dtype
            else:
                assert getattr(found, name) == expected
