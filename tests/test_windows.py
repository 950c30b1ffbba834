"""Counts of many forwards are the same in windows, in files, and after they were forgotten."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hand_made import decode, writer

from tidesim import windows
from tidesim.replay import Replayer
from tidesim.trace import Context, Trace
from tidesim.windows import forget, spans, taken, zeros


def test_windows_hold_whole_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spans((0, 2, 3)) == []
    assert spans((5, 2, 3), 12) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert spans((2, 2, 3), 1) == [slice(0, 1), slice(1, 2)]
    monkeypatch.setattr(windows, "WINDOW_CELLS", 12)
    counts = np.arange(30).reshape(5, 2, 3)
    assert np.array_equal(np.concatenate([part for _, part in windows.windows(counts)]), counts)


def test_many_zeros_lie_in_a_file_that_may_be_forgotten_and_is_gone_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_MOST_BYTES", 1 << 10)
    monkeypatch.setattr(windows.tempfile, "tempdir", str(tmp_path))
    made = zeros((100, 4, 8), np.uint16)
    made[:] = np.arange(100)[:, None, None]
    forget(made, is_shared=True)
    assert not list(tmp_path.iterdir())
    assert np.array_equal(made[:, 0, 0], np.arange(100))
    index = np.array([99, 5, 7])
    assert np.array_equal(taken(made, index), made[index])
    assert zeros((3, 4), np.uint8).base is None


def test_zeros_stay_in_memory_where_the_disk_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(windows, "_MOST_BYTES", 0)
    monkeypatch.setattr(windows.os, "posix_fallocate", refuse)
    assert zeros((3, 4), np.uint8).base is None


def test_what_may_be_written_is_never_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    np.zeros(9000, np.uint8).tofile(path)
    copy = np.asarray(np.memmap(path, np.uint8, "c"))
    copy[:] = 3
    forget(copy)
    assert (copy == 3).all()


@pytest.mark.parametrize("kv_cache", [True, False])
def test_counts_of_every_kind_are_the_same_in_files(
    kv_cache: bool, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writer(tmp_path / "trace.h5", kv_cache=kv_cache) as out:
        for _ in range(4):
            out.append(decode(rng, prompt_tokens=9, steps=[2, 3])[0 if kv_cache else 1])
    with Trace.open(tmp_path / "trace.h5") as trace:
        for context in get_args(Context):
            for sequences in (None, [0], [0, 2]):
                expected = trace.workload(context, sequences)
                with monkeypatch.context() as patch:
                    patch.setattr(windows, "_MOST_BYTES", 0)
                    patch.setattr(windows, "WINDOW_CELLS", 1)
                    mapped = trace.workload(context, sequences, is_mapped=True)
                    Replayer(mapped)
                assert np.array_equal(mapped.counts, expected.counts)
                assert not mapped.counts.flags.writeable
                assert mapped.counts.dtype.itemsize < expected.counts.dtype.itemsize
