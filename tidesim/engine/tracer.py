"""Record the expert routing of real runs: prompts in, an HDF5 trace out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tidesim.engine.checkpoint import Checkpoint, ExpertStorage, load_network
from tidesim.engine.generate import Sampler, generate
from tidesim.engine.tokenizer import Prompt, TextCodec
from tidesim.errors import InputError
from tidesim.moe import read_hf_config
from tidesim.trace import TraceWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a tracing run did: totals over its prompts, and where the time went [s]."""

    path: Path
    num_sequences: int
    generated_tokens: int
    num_forwards: int
    generate_s: float
    record_s: float

    @property
    def overhead(self) -> float:
        """Time spent on recording over time spent on generating."""
        return self.record_s / self.generate_s

    def to_dict(self) -> dict[str, object]:
        """All of it by name, ready for JSON."""
        return {**asdict(self), "path": str(self.path), "overhead": self.overhead}


def record(
    folder: Path,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    out: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    experts: ExpertStorage = "auto",
    has_weights: bool = False,
    has_lookahead: bool = False,
    is_private: bool = False,
    overwrite: bool = False,
    on_sequence: Callable[[int, str], None] | None = None,
) -> Recording:
    """Generate from every prompt with the model in `folder` and write the routing of all forwards to `out`.

    `has_weights` keeps the router's weights too, `has_lookahead` what the router of each next MoE layer makes of a
    layer's input; the time that this takes is in the wall times of the forwards. Each finished sequence is on disk
    before the next begins. `on_sequence` gets how many are finished and the text of the last one.
    Raise ModelError for an unusable folder, TraceError if `out` exists and `overwrite` is not set, and InputError for
    a prompt that cannot be answered; what was finished before stays in the file.
    """
    Checkpoint(folder)  # a folder without weights is said to be one before anything else is found missing
    codec = TextCodec(folder)
    encoded = [codec.encode(prompt) for prompt in prompts]
    for number, ids in enumerate(encoded):
        if codec.mask_id in ids:
            raise InputError(f"prompt {number}: holds the mask token, which stands for text to be generated.")
    network = load_network(folder, dtype=dtype, experts=experts)
    rng = torch.Generator().manual_seed(seed)
    generate_s = record_s = 0.0
    generated_tokens = num_forwards = 0
    with TraceWriter(
        out,
        config=read_hf_config(folder),
        model_name=folder.resolve().name,
        block_length=sampler.block_length,
        sampler=sampler.to_json(),
        seed=seed,
        origin="recorded",
        kv_cache=sampler.kv_cache,
        is_private=is_private,
        has_weights=has_weights,
        has_lookahead=has_lookahead,
        overwrite=overwrite,
    ) as writer:
        for number, ids in enumerate(encoded, start=1):
            began = time.perf_counter()
            generation = generate(
                network,
                ids,
                sampler,
                mask_id=codec.mask_id,
                end_id=codec.end_id,
                rng=rng,
                has_lookahead=has_lookahead,
            )
            generated = time.perf_counter()
            writer.append(generation.sequence_routing(has_weights, has_lookahead))
            record_s += time.perf_counter() - generated
            generate_s += generated - began
            generated_tokens += len(generation.tokens)
            num_forwards += len(generation.forwards)
            if on_sequence is not None:
                on_sequence(number, codec.decode(generation.tokens))
    return Recording(
        path=out,
        num_sequences=len(encoded),
        generated_tokens=generated_tokens,
        num_forwards=num_forwards,
        generate_s=generate_s,
        record_s=record_s,
    )
