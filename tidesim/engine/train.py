"""Train `llada2-tiny` from scratch on the source code of Python's standard library.

    python -m tidesim.engine.train --out runs/llada2-tiny --steps 5600

The objective is block diffusion: every block of a window is masked at its own random rate, and the network reads the
doubled sequence [noisy | clean] under a mask that lets a noisy block see itself and the clean blocks before it. That
trains exactly what the decoder calls, the commit forward included. Experts are kept in balance without an auxiliary
loss: after each step the expert bias moves by a fixed amount against the load.

Sources: block-diffusion objective and doubled mask, BD3-LM (arXiv 2503.09573) and the LLaDA2.0 report; bias update,
auxiliary-loss-free balancing (arXiv 2408.15664), with its customary rate of 1e-3.

Training resumes from its own checkpoints; batches depend on the seed and the step alone, so a resumed run draws the
same data as one that was never stopped.
"""

import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from tidesim.engine.checkpoint import save_network
from tidesim.engine.model import LLaDA2, NetworkConfig, StackedExperts
from tidesim.engine.tokenizer import END_TOKEN, MASK_TOKEN
from tidesim.moe import read_hf_config
from tidesim.shipped import find_shipped

SPECIAL_TOKENS = (END_TOKEN, "<|startoftext|>", MASK_TOKEN, "<role>", "</role>", "<|role_end|>")
BLOCK_LENGTH = 32
WINDOW = 256  # tokens of one training sequence: eight blocks
BIAS_RATE = 1e-3
ROUTER_STD = 0.02
EMBEDDING_PEAK = 0.03
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}
_HELD_OUT_EVERY = 20  # every 20th file, in sorted order, is never trained on


def standard_library_files() -> list[Path]:
    """Python files of this interpreter's standard library, sorted; tests and generated tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` entries with LLaDA2's special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_corpus(out: Path, vocab_size: int) -> tuple[Tokenizer, NDArray[np.int64], NDArray[np.int64]]:
    """Tokenizer (kept in `out`), training tokens and held-out tokens; end-of-text joins the files."""
    files = standard_library_files()
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    trained = [text for index, text in enumerate(texts) if index % _HELD_OUT_EVERY]
    held_out = texts[::_HELD_OUT_EVERY]
    saved = out / "tokenizer.json"
    if not saved.exists():
        train_tokenizer(iter(trained), vocab_size).save(str(saved))
    tokenizer = Tokenizer.from_file(str(saved))
    end = tokenizer.token_to_id(END_TOKEN)

    def joined(parts: list[str]) -> NDArray[np.int64]:
        encoded = tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        return np.concatenate([np.array([*item.ids, end], dtype=np.int64) for item in encoded])

    return tokenizer, joined(trained), joined(held_out)


def doubled_mask(window: int, block_length: int) -> Tensor:
    """[2n, 2n] bool over [noisy | clean]: noisy sees its own block and earlier clean blocks, clean is block-causal."""
    block = torch.arange(window) // block_length
    same, earlier = block[:, None] == block[None, :], block[:, None] > block[None, :]
    noisy_rows = torch.cat((same, earlier), dim=1)
    clean_rows = torch.cat((torch.zeros_like(same), same | earlier), dim=1)
    return torch.cat((noisy_rows, clean_rows))


def masked_windows(tokens: NDArray[np.int64], batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Clean windows [N, n] at random places, and which tokens to mask: each block at its own uniform rate."""
    starts = rng.integers(0, len(tokens) - WINDOW, size=batch)
    clean = tokens[starts[:, None] + np.arange(WINDOW)]
    rates = rng.uniform(size=(batch, WINDOW // BLOCK_LENGTH)).repeat(BLOCK_LENGTH, axis=1)
    is_masked = rng.uniform(size=clean.shape) < rates
    is_masked[0, 0] = True  # at least one target, whatever the draw
    return torch.from_numpy(clean), torch.from_numpy(is_masked)


class Objective:
    """Block-diffusion loss of a network on masked windows."""

    def __init__(self, network: LLaDA2, mask_id: int) -> None:
        self.network, self.mask_id = network, mask_id
        self.mask = doubled_mask(WINDOW, BLOCK_LENGTH)
        self.positions = torch.arange(WINDOW).repeat(2)

    def __call__(self, clean: Tensor, is_masked: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mean cross-entropy of masked tokens and mean entropy of right guesses [nats]; each layer's load [E]."""
        noisy = clean.masked_fill(is_masked, self.mask_id)
        hidden, routings = self.network(torch.cat((noisy, clean), dim=1), self.positions, mask=self.mask)
        logits = self.network.logits(hidden[:, :WINDOW][is_masked])
        targets = clean[is_masked]
        log_probs = functional.log_softmax(logits, dim=-1)
        is_right = log_probs.detach().argmax(-1) == targets
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        sharpness = (entropy * is_right).sum() / is_right.sum().clamp(min=1)
        loads = [torch.bincount(r.expert_ids.flatten(), minlength=self.network.config.num_experts) for r in routings]
        return functional.nll_loss(log_probs, targets), sharpness, loads


def balance_experts(network: LLaDA2, loads: list[Tensor]) -> None:
    """Move every expert's bias by BIAS_RATE against its load: up if it got less than the mean, down if more."""
    for moe, load in zip(network.moe_layers, loads, strict=True):
        moe.gate.expert_bias += BIAS_RATE * torch.sign(load.float().mean() - load)


def held_out_loss(objective: Objective, tokens: NDArray[np.int64], windows: int) -> float:
    """Mean cross-entropy at masked held-out tokens, in nats, over fixed windows and masks."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        losses = [float(objective(*masked_windows(tokens, 8, rng))[0]) for _ in range(windows // 8)]
    return float(np.mean(losses))


def unigram_loss(trained: NDArray[np.int64], held_out: NDArray[np.int64], vocab_size: int) -> float:
    """Cross-entropy of held-out tokens under the training tokens' frequencies (one added to each), in nats."""
    counts = np.bincount(trained, minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[held_out].mean())


def initialise(network: LLaDA2, seed: int) -> None:
    """Normal weights of variance 1 / fan-in, output projections scaled down by depth; norms stay at one.

    Embeddings get deviation 1, so that what tells tokens apart outweighs what attention has averaged: otherwise every
    token looks alike to the routers and they collapse onto the same experts. Routers start small, with scores close
    together, so that the bias evens the load out within the first hundred steps.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * network.config.num_hidden_layers)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            is_output = name.endswith(("attention.dense.weight", "down_proj.weight", "experts.down"))
            width_scale = parameter.shape[-1] ** -0.5
            std = width_scale / depth if is_output else width_scale
            if "embeddings" in name:
                std = 1.0
            elif "gate.weight" in name:
                std = ROUTER_STD
            torch.nn.init.normal_(parameter, std=std, generator=generator)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 3 % of the steps, then a cosine to a twentieth."""
    warm_up = max(1, round(0.03 * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(network: LLaDA2, peak: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and embeddings do not. Each group's own peak rate is kept in it as `peak`."""
    embedding = network.word_embeddings.weight
    others = [parameter for parameter in network.parameters() if parameter is not embedding]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": 0.1, "peak": peak},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0, "peak": peak},
        # Embeddings have deviation 1, ten times that of a matrix, and each row is met rarely: larger steps.
        {"params": [embedding], "weight_decay": 0.0, "peak": EMBEDDING_PEAK},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, tokenizer and the exported model.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 5600,
    batch: Annotated[int, typer.Option(help="Windows of 256 tokens a step.")] = 8,
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    sharpen: Annotated[
        float, typer.Option(help="Weight of the entropy of right guesses (CAP) in the last fifth.")
    ] = 0.0,
    every: Annotated[int, typer.Option(help="Steps between reports and checkpoints.")] = 50,
    windows: Annotated[int, typer.Option(help="Held-out windows that the loss is told on at the end.")] = 512,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train llada2-tiny, resuming from `out` if a checkpoint is there, and export it in Hugging Face layout."""
    out.mkdir(parents=True, exist_ok=True)
    hf_config = read_hf_config(find_shipped("models", "llada2-tiny"))
    config = NetworkConfig.from_hf(hf_config)
    tokenizer, trained, held_out = load_corpus(out, config.vocab_size)
    unigram = unigram_loss(trained, held_out, config.vocab_size)
    print(f"{len(trained):,} training tokens, {len(held_out):,} held out; unigram {unigram:.3f} nats", flush=True)

    network = LLaDA2(config)
    for moe in network.moe_layers:
        moe.experts = StackedExperts(config)
    initialise(network, seed)
    optimizer = make_optimizer(network, peak)
    first = resume(out / "state.pt", network, optimizer)
    objective = Objective(network, SPECIAL_TOKENS.index(MASK_TOKEN))
    began, losses, load_sum = time.perf_counter(), [], [torch.zeros(config.num_experts) for _ in network.moe_layers]
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps)
        clean, is_masked = masked_windows(trained, batch, np.random.default_rng((seed, step)))
        loss, sharpness, loads = objective(clean, is_masked)
        weight = sharpen if step >= 0.8 * steps else 0.0
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + weight * sharpness)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        balance_experts(network, loads)
        losses.append(float(loss.detach()))
        load_sum = [total + load for total, load in zip(load_sum, loads, strict=True)]
        if (step + 1) % every == 0 or step + 1 == steps:
            report(step + 1, losses, load_sum, len(losses) * batch * WINDOW / (time.perf_counter() - began))
            if (step + 1) % (10 * every) == 0 or step + 1 == steps:
                print(f"    held-out {held_out_loss(objective, held_out, min(64, windows)):.3f} nats", flush=True)
            keep(out / "state.pt", network, optimizer, step + 1)
            began, losses, load_sum = time.perf_counter(), [], [torch.zeros_like(total) for total in load_sum]
    save_network(network, hf_config, out / "model", torch.bfloat16)
    tokenizer.save(str(out / "model" / "tokenizer.json"))
    final = held_out_loss(objective, held_out, windows)
    print(f"held-out {final:.3f} nats against a unigram baseline of {unigram:.3f}", flush=True)


def resume(file: Path, network: LLaDA2, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint `file`, if there is one; the number of steps that are done."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"resumed at step {state['step']}", flush=True)
    return int(state["step"])


def keep(file: Path, network: LLaDA2, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the checkpoint `file`; one that a killed run left half written never takes its place."""
    temporary = file.with_suffix(".tmp")
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    temporary.replace(file)


def report(step: int, losses: list[float], load_sum: list[Tensor], tokens_per_s: float) -> None:
    """One line: mean loss since the last one, and how far each layer's busiest expert is above the mean."""
    excess = " ".join(f"{float(load.max() / load.mean() - 1):.2f}" for load in load_sum)
    unused = sum(int((load == 0).sum()) for load in load_sum)
    print(
        f"step {step}: loss {np.mean(losses):.3f} nats, busiest expert over mean {excess}, unused {unused}, "
        f"{tokens_per_s:,.0f} tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
