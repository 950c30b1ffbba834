"""What recording costs: the same prompts generated with and without a trace being written, in turn.

    python tests/benchmarks/tracing_overhead.py [--repeats 5]

Prints one JSON line. `overhead` is the time from a finished generation to its sequence on disk, over the time of
generating, inside one run; `paired_overhead` compares whole runs with and without recording, median of the pairs.
The first pair is thrown away. Bar: 0.02.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tidesim.engine.checkpoint import load_network
from tidesim.engine.generate import Sampler, generate
from tidesim.engine.tokenizer import TextCodec, read_prompts
from tidesim.moe import read_hf_config
from tidesim.shipped import find_shipped
from tidesim.trace import TraceWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="llada2-tiny")
    arguments = parser.parse_args()
    folder = find_shipped("models", arguments.model)
    codec, network = TextCodec(folder), load_network(folder, dtype=torch.float32)
    prompts = [codec.encode(prompt) for prompt in read_prompts(None, 6, is_chat=False)]
    sampler = Sampler(gen_length=96)

    def run(out: Path | None) -> tuple[float, float]:
        """Seconds of the whole run, and of them those spent on recording."""
        began, recording_s = time.perf_counter(), 0.0
        writer = None
        if out is not None:
            writer = TraceWriter(
                out,
                config=read_hf_config(folder),
                model_name=folder.name,
                block_length=sampler.block_length,
                sampler=sampler.to_json(),
                seed=0,
                origin="recorded",
                kv_cache=True,
            )
        for ids in prompts:
            generation = generate(network, ids, sampler, mask_id=codec.mask_id, end_id=codec.end_id)
            if writer is not None:
                generated = time.perf_counter()
                writer.append(generation.sequence_routing())
                recording_s += time.perf_counter() - generated
        if writer is not None:
            writer.close()
        return time.perf_counter() - began, recording_s

    shares, ratios = [], []
    with tempfile.TemporaryDirectory() as folder_name:
        for repeat in range(arguments.repeats + 1):
            plain_s, _ = run(None)
            recorded_s, recording_s = run(Path(folder_name) / f"{repeat}.h5")
            if repeat:
                shares.append(recording_s / (recorded_s - recording_s))
                ratios.append(recorded_s / plain_s - 1)
    document = {
        "benchmark": "tracing_overhead",
        "model": arguments.model,
        "repeats": arguments.repeats,
        "overhead": statistics.median(shares),
        "overhead_range": [min(shares), max(shares)],
        "paired_overhead": statistics.median(ratios),
        "paired_range": [min(ratios), max(ratios)],
        "torch": torch.__version__,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
