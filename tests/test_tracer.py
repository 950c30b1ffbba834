"""Recording real runs, including runs that are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from engine_cases import SMALL, small_network

from tidesim.engine.checkpoint import ExpertStorage, save_network
from tidesim.engine.generate import Sampler
from tidesim.engine.tokenizer import Prompt, read_prompts
from tidesim.engine.tracer import record
from tidesim.errors import InputError, ModelError, TraceError
from tidesim.shipped import shipped_folder
from tidesim.statistics import trace_statistics
from tidesim.trace import ForwardKind, Trace

TINY = shipped_folder("models") / "llada2-tiny"
PROMPTS = [Prompt(text="import os\n"), Prompt(text="def f(x):\n    return")]
SAMPLER = Sampler(gen_length=24, steps=8, threshold=0.5, block_length=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model that reads text: the tiny model's tokenizer and a network of that vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "small"
    config = SMALL.__class__(**{**_fields(), "vocab_size": 4096})
    save_network(small_network(seed=5, config=config), {**_fields(), "vocab_size": 4096}, folder, torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return folder


def _fields() -> dict[str, float]:
    return {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}


def test_a_recording_holds_every_forward_of_every_prompt(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    recording = record(
        folder,
        PROMPTS,
        SAMPLER,
        tmp_path / "t.h5",
        has_weights=True,
        on_sequence=lambda n, text: seen.append((n, text)),
    )
    with Trace.open(tmp_path / "t.h5") as trace:
        assert trace.is_complete
        assert trace.origin == "recorded"
        assert trace.model_name == "small"
        assert trace.sampler == SAMPLER.to_json()
        assert len(trace.sequences) == recording.num_sequences == 2
        assert len(trace.forwards) == recording.num_forwards
        assert trace.sequences["generated_tokens"].sum() == recording.generated_tokens
        denoise = trace.forwards["kind"] == ForwardKind.DENOISE
        assert (trace.forwards["routed_tokens"][denoise] == 8).all()
        # Weights are stored in half precision, so their sum is the scale to a part in a thousand.
        weights = trace.weights(0, trace.num_rows).astype(np.float32)
        np.testing.assert_allclose(weights.sum(-1), SMALL.routed_scaling_factor, rtol=2e-3)
    assert [number for number, _ in seen] == [1, 2]


def test_the_same_seed_records_the_same_routing(folder: Path, tmp_path: Path) -> None:
    sampler = Sampler(gen_length=16, block_length=8, steps=8, temperature=1.5)
    prints = []
    for number, seed in enumerate((1, 1, 2)):
        record(folder, PROMPTS, sampler, tmp_path / f"{number}.h5", seed=seed)
        with Trace.open(tmp_path / f"{number}.h5") as trace:
            prints.append(trace.fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("storage", ["stacked", "mapped"])
@pytest.mark.parametrize("kv_cache", [True, False])
def test_looking_ahead_changes_nothing_else(
    folder: Path, tmp_path: Path, storage: ExpertStorage, kv_cache: bool
) -> None:
    sampler = replace(SAMPLER, kv_cache=kv_cache)
    for name in ("plain", "ahead"):
        record(folder, PROMPTS, sampler, tmp_path / f"{name}.h5", experts=storage, has_lookahead=name == "ahead")
    with Trace.open(tmp_path / "plain.h5") as plain, Trace.open(tmp_path / "ahead.h5") as ahead:
        assert ahead.fingerprint == plain.fingerprint
        for sequence in range(len(PROMPTS)):
            assert ahead.tokens(sequence).tolist() == plain.tokens(sequence).tolist()
        assert (plain.has_lookahead, ahead.has_lookahead) == (False, True)
        foretold = ahead.lookahead_ids(0, ahead.num_rows)
    assert foretold.shape == (plain.num_rows, 1, SMALL.num_experts_per_tok)
    assert all(len(set(row.tolist())) == SMALL.num_experts_per_tok for row in foretold[:, 0])


def test_the_tiny_model_foretells_its_experts_far_better_than_chance(tmp_path: Path) -> None:
    prompts = read_prompts(None, 2, is_chat=False)
    record(TINY, prompts, Sampler(gen_length=32), tmp_path / "t.h5", dtype=torch.float32, has_lookahead=True)
    with Trace.open(tmp_path / "t.h5") as trace:
        found = trace_statistics(trace)
    assert found.lookahead_share_random == 8 / 256
    first, *others = found.lookahead_share_by_layer
    assert first is None
    assert len(others) == 3
    assert min(share for share in others if share is not None) > 0.2


def test_private_recordings_leave_the_tokens_out(folder: Path, tmp_path: Path) -> None:
    record(folder, PROMPTS, SAMPLER, tmp_path / "t.h5", is_private=True)
    with Trace.open(tmp_path / "t.h5") as trace:
        assert trace.is_private
        assert trace.sequences["prompt_tokens"].min() > 0


def test_a_recording_never_replaces_a_file_unasked(folder: Path, tmp_path: Path) -> None:
    record(folder, PROMPTS[:1], SAMPLER, tmp_path / "t.h5")
    before = (tmp_path / "t.h5").read_bytes()
    with pytest.raises(TraceError, match="exists"):
        record(folder, PROMPTS, SAMPLER, tmp_path / "t.h5")
    assert (tmp_path / "t.h5").read_bytes() == before
    record(folder, PROMPTS, SAMPLER, tmp_path / "t.h5", overwrite=True)


def test_unusable_models_and_prompts_leave_no_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prompt 1.*mask token"):
        record(folder, [PROMPTS[0], Prompt(text="x <|mask|> y")], SAMPLER, tmp_path / "t.h5")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        record(bare, PROMPTS, SAMPLER, tmp_path / "t.h5")
    assert not (tmp_path / "t.h5").exists()


def test_a_killed_recording_keeps_its_finished_sequences(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "import os\n"}) + "\n")
    prompts.write_text(prompts.read_text() * 400)
    out = tmp_path / "t.h5"
    arguments = ["trace", "--model", str(folder), "--prompts", str(prompts), "--gen-length", "32", "--out", str(out)]
    command = [sys.executable, "-m", "tidesim", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and _finished(out) < 3:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with Trace.open(out) as trace:
        assert not trace.is_complete
        assert 3 <= len(trace.sequences) < 400
        assert trace.workload("full").num_forwards > 0


def _finished(out: Path) -> int:
    try:
        with Trace.open(out) as trace:
            return len(trace.sequences)
    except TraceError:
        return 0


def test_the_tiny_model_answers_the_same_with_and_without_cache(tmp_path: Path) -> None:
    prompts = read_prompts(None, 3, is_chat=False)
    tokens, counts = [], []
    for kv_cache in (True, False):
        out = tmp_path / f"{kv_cache}.h5"
        record(TINY, prompts, Sampler(gen_length=64, kv_cache=kv_cache), out, dtype=torch.float32)
        with Trace.open(out) as trace:
            tokens.append([trace.tokens(sequence).tolist() for sequence in range(len(prompts))])
            counts.append(trace.workload("full").counts)
    assert tokens[0] == tokens[1]
    assert max(map(len, tokens[0])) > 64
    # A near-tie between two experts may fall either way where matrices have other shapes; anything more is a fault.
    assert np.abs(counts[0] - counts[1]).sum() <= 1e-4 * counts[0].sum()


def test_the_tiny_model_takes_several_steps_a_block_and_varies_its_tokens() -> None:
    with Trace.open("llada2-tiny") as trace:
        assert trace.origin == "recorded"
        steps = np.bincount(trace.forwards["block"][trace.forwards["kind"] == ForwardKind.DENOISE])
        assert steps.max() > len(trace.sequences)
        answers = [trace.tokens(i)[row["prompt_tokens"] :] for i, row in enumerate(trace.sequences)]
    drawn = np.concatenate(answers)
    assert np.bincount(drawn).max() < 0.25 * len(drawn)
    assert len(np.unique(drawn)) > 80
