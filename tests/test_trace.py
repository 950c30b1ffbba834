"""What a trace file must keep: every finished sequence, and nothing that contradicts itself."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hand_made import CONFIG, B, E, K, L, decode, writer

from tidesim.errors import TraceError
from tidesim.trace import SequenceRouting, Trace
from tidesim.trace_format import ATTRIBUTES, DATASETS, FORWARDS, SEQUENCES


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as caught, Trace.open(path):
        pass
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what was written is read -------------------------------------------------------------------------------------


def test_everything_written_is_read_back(path: Path, sequence: SequenceRouting) -> None:
    with Trace.open(path) as trace:
        assert (trace.num_layers, trace.num_experts, trace.top_k, trace.block_length) == (L, E, K, B)
        assert (trace.model_name, trace.origin, trace.seed, trace.version) == ("hand-made", "recorded", 7, 1)
        assert trace.is_complete
        assert trace.kv_cache
        assert trace.hf_config == CONFIG
        assert trace.sampler == {"threshold": 0.95}
        assert trace.sequences["id"].tolist() == [0, 1]
        assert trace.sequences["prompt_tokens"].tolist() == [9, 9]
        assert trace.sequences["first_forward"].tolist() == [0, 7]
        assert trace.forwards["kind"].tolist() == [0, 1, 1, 2, 1, 1, 1] * 2
        assert trace.forwards["routed_tokens"].tolist() == [8, 4, 4, 4, 4, 4, 4] * 2
        assert trace.offsets.tolist() == np.append(0, np.cumsum(trace.forwards["routed_tokens"])).tolist()
        assert np.array_equal(trace.expert_ids(32, 64), sequence.expert_ids)
        assert trace.tokens(1).tolist() == list(range(16))
        assert not trace.forwards.flags.writeable


def test_a_file_holds_exactly_what_the_tables_describe(path: Path) -> None:
    with h5py.File(path) as file:
        assert sorted(file.attrs) == sorted(field.name for field in ATTRIBUTES)
        assert file["sequences"].dtype.names == tuple(field.name for field in SEQUENCES)
        assert file["forwards"].dtype.names == tuple(field.name for field in FORWARDS)
        assert h5py.check_enum_dtype(file["forwards"].dtype["kind"]) == {"prefill": 0, "denoise": 1, "commit": 2}
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert set(names) == {field.name for field in DATASETS} - {"routing/weights", "routing/lookahead_ids"}


def test_ids_are_as_narrow_as_the_number_of_experts_allows(tmp_path: Path, rng: np.random.Generator) -> None:
    for num_experts, dtype in ((256, "uint8"), (257, "uint16")):
        file = tmp_path / f"{num_experts}.h5"
        with writer(file, config=CONFIG | {"num_experts": num_experts}) as out:
            out.append(replace(decode(rng, 0, [1])[0], expert_ids=np.full((B, L, K), num_experts - 1)))
        with Trace.open(file) as trace:
            assert trace.expert_ids(0, B).dtype == dtype
            assert trace.expert_ids(0, B).max() == num_experts - 1


def test_long_settings_are_kept_whole(tmp_path: Path) -> None:
    config = CONFIG | {"id2label": {str(label): "é" * 20 for label in range(5000)}}
    with writer(tmp_path / "long.h5", config=config, model_name="modèle"):
        pass
    with Trace.open(tmp_path / "long.h5") as trace:
        assert trace.hf_config == config
        assert trace.model_name == "modèle"


def test_private_trace_keeps_lengths_but_no_tokens(tmp_path: Path, sequence: SequenceRouting) -> None:
    with writer(tmp_path / "private.h5", is_private=True) as out:
        out.append(sequence)
    with h5py.File(tmp_path / "private.h5") as file:
        assert "tokens" not in file
    with Trace.open(tmp_path / "private.h5") as trace:
        assert trace.sequences["generated_tokens"].tolist() == [7]
        with pytest.raises(TraceError, match="keeps no tokens"):
            trace.tokens(0)


def test_weights_are_kept_when_asked_for(tmp_path: Path, sequence: SequenceRouting) -> None:
    weights = np.linspace(0, 1, sequence.expert_ids.size).reshape(sequence.expert_ids.shape)
    with writer(tmp_path / "weights.h5", has_weights=True) as out:
        with pytest.raises(TraceError, match="has_weights"):
            out.append(sequence)
        out.append(replace(sequence, weights=weights))
    with Trace.open(tmp_path / "weights.h5") as trace:
        assert np.array_equal(trace.weights(8, 12), weights[8:12].astype(np.float16))
    with writer(tmp_path / "none.h5"):
        pass
    with Trace.open(tmp_path / "none.h5") as trace, pytest.raises(TraceError, match="--weights"):
        trace.weights(0, 0)


def test_look_ahead_is_kept_when_asked_for(tmp_path: Path, sequence: SequenceRouting) -> None:
    foretold = (sequence.expert_ids[:, 1:] + 1) % E
    with writer(tmp_path / "ahead.h5", has_lookahead=True) as out:
        with pytest.raises(TraceError, match="has_lookahead"):
            out.append(sequence)
        for lookahead in (foretold, foretold[::-1]):
            out.append(replace(sequence, lookahead_ids=lookahead))
    num_rows = len(foretold)
    with Trace.open(tmp_path / "ahead.h5") as trace:
        assert (trace.version, trace.has_lookahead) == (1, True)
        assert trace.lookahead_ids(0, num_rows).dtype == trace.expert_ids(0, 1).dtype
        assert np.array_equal(trace.lookahead_ids(8, 12), foretold[8:12])
        assert np.array_equal(trace.lookahead_ids(num_rows, 2 * num_rows), foretold[::-1])
        assert np.array_equal(trace.expert_ids(0, num_rows), sequence.expert_ids)
        fingerprint = trace.fingerprint
    with writer(tmp_path / "none.h5") as out:
        with pytest.raises(TraceError, match="has_lookahead"):
            out.append(replace(sequence, lookahead_ids=foretold))
        for _ in range(2):
            out.append(sequence)
    with Trace.open(tmp_path / "none.h5") as trace:
        assert (trace.has_lookahead, trace.fingerprint) == (False, fingerprint)
        with pytest.raises(TraceError, match=r"none.h5: keeps no look-ahead; record it with --lookahead"):
            trace.lookahead_ids(0, 0)


def test_fingerprint_follows_the_routing_and_nothing_else(tmp_path: Path, sequence: SequenceRouting) -> None:
    other = sequence.expert_ids.copy()
    other[-1, -1, -1] ^= 1
    slower = [replace(forward, wall_ns=forward.wall_ns + 1) for forward in sequence.forwards]
    variants = {
        "a": sequence,
        "slower": replace(sequence, forwards=slower),
        "retold": replace(sequence, prompt_ids=sequence.prompt_ids + 1),
        "rerouted": replace(sequence, expert_ids=other),
        "longer": replace(sequence, prompt_ids=np.arange(10)),
    }
    found = {}
    for name, variant in variants.items():
        with writer(tmp_path / name, seed=len(name)) as out:
            out.append(variant)
        with Trace.open(tmp_path / name) as trace:
            found[name] = trace.fingerprint
    assert found["a"] == found["slower"] == found["retold"]
    assert len(set(found.values())) == 3


# --- refusals: writing --------------------------------------------------------------------------------------------


def test_an_existing_file_is_not_overwritten_unless_told(path: Path) -> None:
    with pytest.raises(TraceError, match=r"trace.h5: exists already"):
        writer(path)
    with writer(path, overwrite=True):
        pass
    with Trace.open(path) as trace:
        assert len(trace.sequences) == 0


def test_a_file_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be created"):
        writer(tmp_path / "missing" / "trace.h5")


@pytest.mark.parametrize(("field", "value"), [("origin", "invented"), ("block_length", 0)])
def test_arguments_out_of_range_are_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(TraceError, match=field):
        writer(tmp_path / "trace.h5", **{field: value})
    assert not (tmp_path / "trace.h5").exists()


def test_a_sequence_that_does_not_fit_together_is_refused_and_leaves_the_file_as_it_was(
    tmp_path: Path, sequence: SequenceRouting
) -> None:
    first, *rest = sequence.forwards
    ids = sequence.expert_ids
    high = ids.copy()
    high[5, 1, 0] = E
    broken = {
        "must be integers": replace(sequence, expert_ids=ids[:-1]),
        "not float64": replace(sequence, expert_ids=ids.astype(float)),
        "row 5, layer 1, slot 0: expert 16 must be in 0..15": replace(sequence, expert_ids=high),
        "at least one forward": replace(sequence, forwards=[], expert_ids=ids[:0]),
        r"row 0: routed_tokens\(=0\)": replace(sequence, forwards=[replace(first, routed_tokens=0), *rest]),
        r"row 0: masked_tokens\(=-1\)": replace(sequence, forwards=[replace(first, masked_tokens=-1), *rest]),
        r"row 0: kind\(=9\)": replace(sequence, forwards=[replace(first, kind=9), *rest]),  # type: ignore[arg-type]
    }
    with writer(tmp_path / "trace.h5") as out:
        out.append(sequence)
        for message, part in broken.items():
            with pytest.raises(TraceError, match=message):
                out.append(part)
        out.append(sequence)
    with Trace.open(tmp_path / "trace.h5") as trace:
        assert len(trace.sequences) == 2
        assert np.array_equal(trace.expert_ids(len(ids), 2 * len(ids)), ids)


@pytest.mark.parametrize(
    ("foretold", "message"),
    [
        (np.zeros((32, L, K), int), r"sequence 0, lookahead_ids must be integers \[32, 1, 2\], not int64 \[32, 2, 2\]"),
        (np.zeros((31, L - 1, K), int), "lookahead_ids must be integers"),
        (np.zeros((32, L - 1, K)), "not float64"),
        (np.full((32, L - 1, K), E), "lookahead_ids row 0, layer 0, slot 0: expert 16"),
    ],
)
def test_a_look_ahead_that_does_not_fit_is_refused(
    tmp_path: Path, sequence: SequenceRouting, foretold: Any, message: str
) -> None:
    with writer(tmp_path / "x.h5", has_lookahead=True) as out, pytest.raises(TraceError, match=message):
        out.append(replace(sequence, lookahead_ids=foretold))


def test_a_single_layer_has_nothing_to_look_ahead_to(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="one MoE layer"):
        writer(tmp_path / "x.h5", config=CONFIG | {"num_hidden_layers": 2}, has_lookahead=True)
    assert not (tmp_path / "x.h5").exists()
    with writer(tmp_path / "one.h5", config=CONFIG | {"num_hidden_layers": 2}):
        pass
    with h5py.File(tmp_path / "one.h5", "a") as file:
        file["routing/lookahead_ids"] = np.zeros((0, 0, K), "u1")
    assert "needs two MoE layers" in refusal(tmp_path / "one.h5")


# --- refusals: reading --------------------------------------------------------------------------------------------


def test_a_missing_trace_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no trace"):
        Trace.open(tmp_path / "nothing.h5")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("step,layer,expert\n")
    assert "not an HDF5 file" in refusal(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1]
    assert "no tidesim trace" in refusal(tmp_path / "other.h5")
    for value in ("sparse", [1, 2], b"\xff"):
        with h5py.File(tmp_path / "other.h5", "a") as file:
            file.attrs["format"] = value
        assert "no tidesim trace" in refusal(tmp_path / "other.h5")


def test_a_newer_version_is_refused_before_anything_else(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["forwards"], file.attrs["model"]
        file.attrs["version"] = 2
    assert "version 2, newer than 1; upgrade tidesim" in refusal(path)


@pytest.mark.parametrize(
    "field", [field for field in ATTRIBUTES if field.name != "format"], ids=lambda field: field.name
)
def test_a_missing_or_mistyped_attribute_is_named(path: Path, field: Any) -> None:
    with h5py.File(path, "a") as file:
        file.attrs[field.name] = 0.5
    assert f"attribute {field.name} must be {field.dtype}" in refusal(path)
    with h5py.File(path, "a") as file:
        del file.attrs[field.name]
    assert f"attribute {field.name} is missing" in refusal(path)


@pytest.mark.parametrize("name", ["sequences", "forwards", "routing/expert_ids", "routing/offsets"])
def test_a_missing_or_shortened_dataset_is_named(path: Path, name: str) -> None:
    with h5py.File(path, "a") as file:
        file[name].resize(len(file[name]) - 1, axis=0)
    message = refusal(path)
    assert "record it again" in message
    assert name in message or name == "sequences"  # one sequence less: the forwards are then too many
    with h5py.File(path, "a") as file:
        del file[name]
    assert f"dataset /{name} is missing" in refusal(path)


def edit(name: str, row: object, column: str | None, value: int) -> Any:
    def change(file: h5py.File) -> None:
        if column is None:
            file[name][row] = value
        else:
            rows = file[name][:]
            rows[column][row] = value
            file[name][...] = rows

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("routing/expert_ids", (5, 1, 0), None, E), "/routing/expert_ids row 5, layer 1, slot 0: expert 16"),
        (edit("routing/offsets", 3, None, 11), "/routing/offsets row 3: 11 must be 16"),
        (edit("routing/offsets", 0, None, 1), "/routing/offsets row 0: 1 must be 0"),
        (edit("forwards", 2, "routed_tokens", 5), "/routing/offsets row 3: 16 must be 17"),
        (edit("forwards", 2, "routed_tokens", 0), "/forwards row 2: routed_tokens(=0) must be >= 1"),
        (edit("forwards", 2, "step", -1), "/forwards row 2: step(=-1) must be >= 0"),
        (edit("forwards", 2, "sequence", 1), "/forwards row 2: sequence(=1) must be 0"),
        (edit("forwards", 2, "kind", 3), "/forwards row 2: kind(=3) must be 0, 1 or 2"),
        (edit("sequences", 1, "first_forward", 6), "/sequences row 1: first_forward(=6) must be 7"),
        (edit("sequences", 1, "num_forwards", 0), "/sequences row 1: num_forwards(=0) must be >= 1"),
        (edit("sequences", 1, "num_forwards", 9), "/forwards has 14 rows, not 16"),
        (edit("sequences", 1, "first_token", -1), "/sequences row 1: first_token(=-1) must be 16"),
        (edit("sequences", 0, "prompt_tokens", 8), "/sequences row 1: first_token(=16) must be 15"),
    ],
)
def test_rows_that_contradict_each_other_are_named(path: Path, change: Any, message: str) -> None:
    with h5py.File(path, "a") as file:
        change(file)
    assert message in refusal(path)


def replace_dataset(name: str, value: Any) -> Any:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_dataset("routing/expert_ids", np.zeros((64, L, K + 1), "u1")), "/routing/expert_ids must hold uint8"),
        (replace_dataset("routing/expert_ids", np.zeros((64, L, K), "f4")), "not float32"),
        (replace_dataset("routing/offsets", np.zeros((15, 2), "i8")), "/routing/offsets must hold"),
        (replace_dataset("forwards", np.zeros(14, "i4")), "/forwards: column sequence, block"),
        (replace_dataset("sequences", np.zeros(2, [(field.name, "f8") for field in SEQUENCES])), "must hold integers"),
        (replace_dataset("sequences", 5), "/sequences is missing or has no rows"),
        (replace_dataset("routing/weights", np.zeros((64, L), "f2")), "/routing/weights must hold float16"),
        (replace_dataset("tokens", np.zeros(31, "i4")), "/tokens has 31 rows, not 32"),
    ],
)
def test_datasets_of_another_shape_or_type_are_named(path: Path, change: Any, message: str) -> None:
    with h5py.File(path, "a") as file:
        if "weights" in message:
            file["routing/weights"] = 0
        change(file)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("foretold", "message"),
    [
        (np.zeros((64, L, K), "u1"), "/routing/lookahead_ids must hold uint8 ['N', 1, 2], not uint8 ['N', 2, 2]"),
        (np.zeros((64, L - 1, K), "u2"), "not uint16"),
        (np.zeros((63, L - 1, K), "u1"), "/routing/lookahead_ids has 63 rows, not 64"),
        (np.full((64, L - 1, K), E, "u1"), "/routing/lookahead_ids row 0, layer 0, slot 0: expert 16"),
        (0, "/routing/lookahead_ids is missing or has no rows"),
    ],
)
def test_a_look_ahead_that_contradicts_the_rest_is_named(path: Path, foretold: Any, message: str) -> None:
    with h5py.File(path, "a") as file:
        file["routing/lookahead_ids"] = foretold
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_experts", E + 1, "num_experts(=17) must be 16, as in config"),
        ("origin", "dreamt", "origin(='dreamt')"),
        ("block_length", 0, "block_length(=0)"),
        ("version", 0, "version(=0)"),
        ("config", "{}", "attribute config: hand-made"),
        ("config", "[1]", "attribute config must be json"),
    ],
)
def test_attributes_that_make_no_sense_are_named(path: Path, name: str, value: object, message: str) -> None:
    with h5py.File(path, "a") as file:
        file.attrs[name] = value
    assert message in refusal(path)


def test_rows_that_are_not_there_cannot_be_read(path: Path) -> None:
    with Trace.open(path) as trace:
        for start, stop in ((-1, 3), (3, 2), (0, 65)):
            with pytest.raises(ValueError, match=r"must lie within 0:64"):
                trace.expert_ids(start, stop)
        with pytest.raises(ValueError, match="context"):
            trace.workload("prefix")  # type: ignore[arg-type]


# --- cut off and killed -------------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for size in np.linspace(0, len(whole) - 1, 150).astype(int):
        path.write_bytes(whole[:size])
        assert "again" in refusal(path) or "not an HDF5 file" in refusal(path)


def test_a_damaged_file_is_read_or_refused_but_never_crashes(path: Path) -> None:
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(8, len(whole), 120):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        with contextlib.suppress(TraceError), Trace.open(path) as trace:
            assert trace.num_rows == 64


def test_a_recording_that_fails_keeps_its_finished_sequences(tmp_path: Path, sequence: SequenceRouting) -> None:
    with contextlib.suppress(KeyboardInterrupt), writer(tmp_path / "trace.h5") as out:
        out.append(sequence)
        raise KeyboardInterrupt
    with Trace.open(tmp_path / "trace.h5") as trace:
        assert len(trace.sequences) == 1
        assert not trace.is_complete


def test_a_recording_can_be_opened_while_it_runs(tmp_path: Path, sequence: SequenceRouting) -> None:
    with writer(tmp_path / "trace.h5") as out:
        for num_sequences in range(4):
            with Trace.open(tmp_path / "trace.h5") as trace:
                assert len(trace.sequences) == num_sequences
                assert not trace.is_complete
            out.append(sequence)


def test_rows_of_an_unfinished_append_are_ignored(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file.attrs["complete"] = np.bool_(False)
        for name in ("sequences", "forwards", "tokens", "routing/expert_ids", "routing/offsets"):
            file[name].resize(len(file[name]) + 3, axis=0)
    with Trace.open(path) as trace:
        assert len(trace.sequences) == 2
        assert trace.num_rows == 64


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import numpy as np
from hand_made import decode, writer

folder, rng = Path(sys.argv[1]), random.Random(0)
sequence = decode(np.random.default_rng(0), 9, [3] * 40)[0]
for number in range(40):
    child = os.fork()
    if not child:
        with writer(folder / f"{number}.h5") as out, (folder / f"{number}.done").open("ab", buffering=0) as done:
            while True:
                out.append(sequence)
                done.write(b".")
    while not (folder / f"{number}.done").exists():
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked writer")
def test_a_writer_killed_at_any_moment_leaves_every_finished_sequence(tmp_path: Path) -> None:
    sequence = decode(np.random.default_rng(0), 9, [3] * 40)[0]
    tests = Path(__file__).parent
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(tests), str(tests.parent)], check=True, timeout=60)
    num_finished = []
    for number in range(40):
        num_appended = (tmp_path / f"{number}.done").stat().st_size
        with Trace.open(tmp_path / f"{number}.h5") as trace:
            assert not trace.is_complete
            # The last append may have ended, and its dot not have been written.
            assert len(trace.sequences) - num_appended in (0, 1)
            for row in trace.sequences:
                start, stop = trace.offsets[[row["first_forward"], row["first_forward"] + row["num_forwards"]]]
                assert np.array_equal(trace.expert_ids(start, stop), sequence.expert_ids)
            num_finished.append(len(trace.sequences))
    assert len(set(num_finished)) > 1  # the kills came at different moments


def test_a_writer_killed_before_its_first_flush_is_told_apart_from_damage(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[11] |= 1  # open for writing, but not yet for reading at the same time
    path.write_bytes(damaged)
    assert "stopped before the first sequence" in refusal(path)
