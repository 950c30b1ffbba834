"""The training objective trains what the decoder calls, and the parts around it do what they say."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from engine_cases import SMALL, small_network

from tidesim.engine import train
from tidesim.engine.model import block_causal_mask

B = 8
WINDOW = 4 * B


def test_the_doubled_mask_allows_what_the_paper_says() -> None:
    mask = train.doubled_mask(WINDOW, B)
    assert float(mask.float().mean()) == 0.3125
    for query in range(2 * WINDOW):
        for key in range(2 * WINDOW):
            query_block, key_block = query % WINDOW // B, key % WINDOW // B
            if query < WINDOW:
                allowed = query_block == key_block if key < WINDOW else query_block > key_block
            else:
                allowed = key >= WINDOW and query_block >= key_block
            assert bool(mask[query, key]) == allowed


def test_each_half_of_the_doubled_sequence_equals_what_the_decoder_computes() -> None:
    network = small_network(seed=31)
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(10, SMALL.vocab_size, (1, WINDOW), generator=generator)
    noisy = clean.masked_fill(torch.rand(WINDOW, generator=generator) < 0.5, 2)
    positions = torch.arange(WINDOW)
    with torch.inference_mode():
        doubled, _ = network(torch.cat((noisy, clean), 1), positions.repeat(2), mask=train.doubled_mask(WINDOW, B))
        plain, _ = network(clean, positions, mask=block_causal_mask(WINDOW, B))
        torch.testing.assert_close(doubled[0, WINDOW:], plain[0], atol=1e-5, rtol=1e-4)
        for block in range(WINDOW // B):
            start, stop = block * B, (block + 1) * B
            window = torch.cat((clean[:, :start], noisy[:, start:stop]), 1)
            decoded, _ = network(window, positions[:stop], mask=block_causal_mask(stop, B))
            torch.testing.assert_close(doubled[0, start:stop], decoded[0, start:], atol=1e-5, rtol=1e-4)


def test_the_bias_moves_against_the_load_and_evens_it_out() -> None:
    network = small_network(seed=32)
    moe = network.moe_layers[0]
    rows = torch.randn(400, SMALL.hidden_size, generator=torch.Generator().manual_seed(4))

    def load() -> torch.Tensor:
        return torch.bincount(moe.gate(rows).expert_ids.flatten(), minlength=SMALL.num_experts)

    before, bias = load(), moe.gate.expert_bias.clone()
    train.balance_experts(network, [before] * 2)
    moved = moe.gate.expert_bias - bias
    mean = before.float().mean()
    torch.testing.assert_close(moved, train.BIAS_RATE * torch.sign(mean - before), atol=1e-7, rtol=0)
    for _ in range(600):
        train.balance_experts(network, [load(), before])
    assert float(load().max() / mean) < 0.5 * float(before.max() / mean)


def test_windows_depend_on_the_step_alone_and_every_block_has_its_own_rate() -> None:
    tokens = np.arange(10_000)
    first = train.masked_windows(tokens, 64, np.random.default_rng((0, 7)))
    again = train.masked_windows(tokens, 64, np.random.default_rng((0, 7)))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[0][:, 1:] - first[0][:, :-1], torch.ones(64, train.WINDOW - 1, dtype=torch.long))
    shares = first[1].view(64, -1, train.BLOCK_LENGTH).float().mean(-1)
    assert float(shares.min()) < 0.15
    assert float(shares.max()) > 0.85
    assert abs(float(shares.mean()) - 0.5) < 0.05


def test_the_unigram_baseline_is_the_entropy_of_what_it_was_fitted_on() -> None:
    tokens = np.repeat(np.arange(4), (400_000, 200_000, 100_000, 100_000))
    assert train.unigram_loss(tokens, tokens, 4) == pytest.approx(1.75 * np.log(2), rel=1e-4)


def test_the_schedule_warms_up_and_decays_to_a_twentieth() -> None:
    shares = [train.schedule(step, 1000) for step in range(1000)]
    assert shares[0] == pytest.approx(1 / 30)
    assert max(shares) == shares[29] == 1.0
    assert shares[-1] == pytest.approx(0.05, abs=1e-4)
    assert shares[30:] == sorted(shares[30:], reverse=True)


@pytest.mark.slow
def test_a_few_steps_lower_the_loss_and_a_resumed_run_goes_on(
    tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathlib import Path

    out = Path(str(tmp_path))
    train.main(out, steps=4, batch=2, every=2, windows=8)
    first = capsys.readouterr().out
    assert "unigram" in first
    assert "step 4" in first
    train.main(out, steps=6, batch=2, every=2, windows=8)
    second = capsys.readouterr().out
    assert "resumed at step 4" in second
    assert (out / "model" / "model.safetensors").stat().st_size < 40e6
