"""A small block-causal network that exists on paper only, and recordings of it."""

from pathlib import Path
from typing import Any

import numpy as np

from tidesim.trace import ForwardKind, ForwardRouting, SequenceRouting, TraceWriter

L, E, K, B = 2, 16, 2, 4
CONFIG = {
    "num_hidden_layers": L + 1,
    "first_k_dense_replace": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 4,
    "num_experts": E,
    "num_experts_per_tok": K,
    "num_shared_experts": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 32,
}
PREFILL, DENOISE, COMMIT = ForwardKind.PREFILL, ForwardKind.DENOISE, ForwardKind.COMMIT


def writer(path: Path, *, kv_cache: bool = True, **changes: Any) -> TraceWriter:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "model_name": "hand-made",
        "block_length": B,
        "sampler": {"threshold": 0.95},
        "seed": 7,
        "origin": "recorded",
        "kv_cache": kv_cache,
    }
    return TraceWriter(path, **(arguments | changes))


def decode(
    rng: np.random.Generator, prompt_tokens: int, steps: list[int], *, has_lookahead: bool = False
) -> tuple[SequenceRouting, SequenceRouting]:
    """One answer of a block-causal network, as an engine with a KV cache records it and as one without.

    `steps` are the denoising steps of each decoded block. A finished block routes, and foretells its routing, in the
    same way ever after.
    """
    first = prompt_tokens // B
    layers = L + (L - 1) * has_lookahead  # what is foretold stands behind what is routed

    def routed() -> np.ndarray:
        return rng.permuted(np.tile(np.arange(E), (B, layers, 1)), axis=2)[..., :K]

    finished = [routed() for _ in range(first + len(steps))]
    forwards: tuple[list[ForwardRouting], list[ForwardRouting]] = ([], [])
    ids: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(side: int, kind: ForwardKind, block: int, step: int, rows: list[np.ndarray], context: int) -> None:
        ids[side].extend(rows)
        num_rows = sum(map(len, rows))
        forwards[side].append(
            ForwardRouting(
                block=block,
                step=step,
                kind=kind,
                context_tokens=context,
                routed_tokens=num_rows,
                masked_tokens=1 if kind == DENOISE else 0,
                accepted_tokens=1 if kind == DENOISE else 0,
                wall_ns=len(ids[side]),
            )
        )

    if first:
        add(0, PREFILL, first, 0, finished[:first], 0)
    for block, num_steps in enumerate(steps, first):
        for step in range(num_steps):
            rows = routed()
            add(0, DENOISE, block, step, [rows], block * B)
            add(1, DENOISE, block, step, [*finished[:block], rows], 0)
        if block < first + len(steps) - 1:
            add(0, COMMIT, block, num_steps, [finished[block]], block * B)
    tokens = np.arange(prompt_tokens + len(steps) * B - prompt_tokens % B, dtype=np.int32)
    parts = [
        SequenceRouting(
            prompt_ids=tokens[:prompt_tokens],
            generated_ids=tokens[prompt_tokens:],
            forwards=forwards[side],
            expert_ids=np.concatenate(ids[side])[:, :L],
            lookahead_ids=np.concatenate(ids[side])[:, L:] if has_lookahead else None,
        )
        for side in (0, 1)
    ]
    return parts[0], parts[1]
