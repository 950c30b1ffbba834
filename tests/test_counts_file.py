"""Counts that are kept beside a trace: they are those that would be counted, or they are counted again."""

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import E, L, decode, writer
from test_workload import assert_same

from tidesim.moe import read_hf_config
from tidesim.shipped import find_shipped, shipped_folder
from tidesim.statistics import trace_statistics
from tidesim.synthesize import synthesize
from tidesim.trace import SequenceRouting, Trace, Workload
from tidesim.trace import reading as reading_module

CONTEXTS: tuple[Any, ...] = ("block", "full")


def counts_of(path: Path) -> Path:
    return path.with_name(path.name + ".counts")


def uncached(path: Path, context: Any, sequences: list[int] | None = None) -> Workload:
    """Counted anew, in a folder of its own that nothing can be kept in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_module.CountsFile, "read", lambda self, sequences: None)
        patch.setattr(reading_module.CountsFile, "write", lambda self, parts, like: False)
        with Trace.open(path) as trace:
            return trace.workload(context, sequences)


def workload(path: Path, context: Any = "block", sequences: list[int] | None = None, **how: bool) -> Workload:
    with Trace.open(path) as trace:
        return trace.workload(context, sequences, **how)


@pytest.fixture(params=[True, False], ids=["with a cache", "without"])
def many(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A trace of five sequences of different lengths."""
    rng = np.random.default_rng(1)
    with writer(tmp_path / "many.h5", kv_cache=request.param) as out:
        for prompt_tokens, steps in ((9, [2, 3]), (0, [1]), (5, [1, 1, 2]), (13, [4]), (4, [2, 2])):
            out.append(decode(rng, prompt_tokens, steps)[not request.param])
    return tmp_path / "many.h5"


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("sequences", [None, [], [0], [1, 2], [0, 2, 4], [4], [3, 1]])
def test_kept_counts_are_those_that_would_be_counted(many: Path, context: Any, sequences: list[int] | None) -> None:
    expected = uncached(many, context, sequences)
    assert not counts_of(many).exists()
    for _ in range(2):  # they are kept, then used
        assert_same(workload(many, context, sequences), expected)
    mapped = workload(many, context, sequences, is_mapped=True)
    assert np.array_equal(mapped.counts, expected.counts)


def test_counts_are_counted_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = workload(path)
    assert counts_of(path).is_file()
    monkeypatch.setattr(reading_module, "count_segments", lambda *_: pytest.fail("counted again"))
    monkeypatch.setattr("tidesim.counting.count_segments", lambda *_: pytest.fail("counted again"))
    assert_same(workload(path), first)
    workload(path, "full", [1])


def test_mapped_counts_take_no_memory_and_cannot_be_changed(path: Path) -> None:
    mapped = workload(path, is_mapped=True).counts
    assert mapped.dtype == np.uint8
    assert isinstance(mapped.base, np.memmap) or isinstance(mapped.base.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    own = workload(path).counts
    assert own.dtype == np.int32
    own[0] = 1
    assert np.array_equal(workload(path).counts, mapped)


def test_full_counts_are_narrow_too_when_asked_for(path: Path) -> None:
    mapped = workload(path, "full", is_mapped=True).counts
    assert mapped.dtype == np.uint8
    assert np.array_equal(mapped, workload(path, "full").counts)


def test_counting_and_describing_take_no_more_memory_for_more_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidesim.counting.WINDOW_ROWS", 256)
    config = read_hf_config(find_shipped("models", "llada2.0-flash"))
    peaks: dict[str, list[int]] = {"count": [], "recount": [], "describe": []}
    for num_sequences in (2, 8):
        file = tmp_path / f"{num_sequences}.h5"
        synthesize(config, file, model_name="flash", num_sequences=num_sequences, prompt_tokens=40, gen_length=64)
        with Trace.open(file) as trace:
            for name, work in (
                ("count", lambda trace: trace.workload(is_mapped=True)),
                ("recount", lambda trace: trace.workload(is_mapped=True)),
                ("describe", trace_statistics),
            ):
                tracemalloc.start()
                work(trace)
                peaks[name].append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            in_memory = trace.workload().counts.nbytes
    for few, many in peaks.values():
        assert many - few < in_memory / 8


def test_counts_that_need_more_bits_get_them(tmp_path: Path, rng: np.random.Generator) -> None:
    """A prefill of 300 rows, all with expert 3; and rows that name an expert twice, which routers do not."""
    sequence = decode(rng, 300, [1])[0]
    ids = sequence.expert_ids.copy()
    ids[:300, 0] = [3, 5]
    with writer(tmp_path / "long.h5") as out:
        out.append(replace_ids(sequence, ids))
    assert workload(tmp_path / "long.h5", is_mapped=True).counts.dtype == np.uint16
    assert workload(tmp_path / "long.h5").counts[0, 0, [3, 5]].tolist() == [300, 300]
    short = decode(rng, 160, [1])[0]
    ids = short.expert_ids.copy()
    ids[:160, 0] = 7
    with writer(tmp_path / "twice.h5") as out:
        out.append(replace_ids(short, ids))
    for _ in range(2):
        assert workload(tmp_path / "twice.h5").counts[0, 0, 7] == 320
    assert counts_of(tmp_path / "twice.h5").is_file()


def replace_ids(sequence: SequenceRouting, ids: np.ndarray) -> SequenceRouting:
    return SequenceRouting(
        prompt_ids=sequence.prompt_ids,
        generated_ids=sequence.generated_ids,
        forwards=sequence.forwards,
        expert_ids=ids,
    )


# --- what is not theirs, or not whole ---


def test_counts_of_another_trace_are_not_taken(path: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    workload(path)
    other = tmp_path / "other.h5"
    with writer(other) as out:
        for _ in range(2):
            out.append(decode(rng, 9, [2, 3])[0])
    shutil.copy(counts_of(path), counts_of(other))
    assert_same(workload(other), uncached(other, "block"))
    # And the trace itself may change.
    shutil.copy(other, path)
    assert_same(workload(path), uncached(path, "block"))


def test_a_trace_that_grew_is_counted_again(tmp_path: Path, sequence: SequenceRouting) -> None:
    with writer(tmp_path / "trace.h5") as out:
        for num_sequences in (1, 2, 3):
            out.append(sequence)
            assert workload(tmp_path / "trace.h5").num_sequences == num_sequences
            assert workload(tmp_path / "trace.h5").num_forwards == 7 * num_sequences


def test_a_damaged_file_is_counted_again_wherever_it_is_damaged(path: Path) -> None:
    expected = workload(path)
    whole = counts_of(path).read_bytes()
    payload = 14 * L * E
    places = [0, 40, 511, 512, 515, 519, len(whole) - payload, len(whole) - 1]
    for place in places:
        counts_of(path).write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        assert_same(workload(path), expected)
        assert counts_of(path).read_bytes() == whole


@pytest.mark.parametrize("size", [0, 1, 511, 512, 600, 4096, 4097, -1])
def test_a_file_that_was_cut_off_is_counted_again(path: Path, size: int) -> None:
    expected = workload(path)
    whole = counts_of(path).read_bytes()
    counts_of(path).write_bytes(whole[:size])
    assert_same(workload(path), expected)
    assert counts_of(path).read_bytes() == whole


def test_hostile_bytes_are_counted_again(path: Path, rng: np.random.Generator) -> None:
    expected = workload(path)
    size = counts_of(path).stat().st_size
    for content in (
        rng.bytes(size),
        bytes(size),
        b"{" * size,
        b"\x80\x04cos\nsystem\n" * 99,
        b"\x93NUMPY" + bytes(size - 6),
    ):
        counts_of(path).write_bytes(content)
        assert_same(workload(path), expected)


def test_damage_in_one_sequence_does_not_matter_to_another(path: Path) -> None:
    expected = workload(path, "block", [0])
    damaged = bytearray(counts_of(path).read_bytes())
    damaged[-1] ^= 1
    counts_of(path).write_bytes(damaged)
    assert_same(workload(path, "block", [0]), expected)
    assert counts_of(path).read_bytes() == damaged
    assert_same(workload(path, "block", [1]), uncached(path, "block", [1]))
    assert counts_of(path).read_bytes() != damaged


def test_something_else_in_their_place_is_left_alone(path: Path) -> None:
    counts_of(path).mkdir()
    assert_same(workload(path), uncached(path, "block"))
    assert counts_of(path).is_dir()
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, counts_of(path).name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_nobody_waits_for_a_pipe(path: Path) -> None:
    os.mkfifo(counts_of(path))
    assert_same(workload(path), uncached(path, "block"))


# --- where they cannot be kept ---


def test_where_nothing_can_be_kept_they_are_counted_in_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tidesim.trace.counts_file.tempfile.mkstemp", refuse)
    for context in CONTEXTS:
        assert_same(workload(path, context), uncached(path, context))
        mapped = workload(path, context, is_mapped=True).counts
        assert np.array_equal(mapped, uncached(path, context).counts)
    assert not counts_of(path).exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="to root, nothing is read-only")
def test_a_read_only_folder_is_no_obstacle(path: Path) -> None:
    path.parent.chmod(0o555)
    try:
        assert_same(workload(path), uncached(path, "block"))
    finally:
        path.parent.chmod(0o755)
    assert not counts_of(path).exists()


def test_a_full_disk_is_no_obstacle_and_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tidesim.trace.counts_file.os.replace", fail)
    assert_same(workload(path), uncached(path, "block"))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_comes_with_tidesim_is_left_as_it_is() -> None:
    before = sorted(file.name for file in shipped_folder("traces").iterdir())
    with Trace.open("llada2-tiny") as trace:
        assert trace.workload().num_forwards
    assert sorted(file.name for file in shipped_folder("traces").iterdir()) == before


COUNT = """
import sys
from tidesim.trace import Trace
with Trace.open(sys.argv[1]) as trace:
    print(int(trace.workload().counts.sum()))
"""


def test_two_processes_may_count_at_once(path: Path) -> None:
    expected = int(uncached(path, "block").counts.sum())
    words = [sys.executable, "-c", COUNT, str(path)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) for _ in range(2)]
    assert [int(one.communicate(timeout=60)[0]) for one in both] == [expected] * 2
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, counts_of(path).name]
    assert_same(workload(path), uncached(path, "block"))


def test_who_may_read_the_trace_may_read_its_counts(path: Path) -> None:
    path.chmod(0o644)
    workload(path)
    assert counts_of(path).stat().st_mode & 0o777 == 0o644
