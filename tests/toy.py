"""A network and a machine with round durations, and workloads by hand, for timetables that can be checked on paper.

With `toy_execution` and the machine of `toy_hardware`, in ns: the dense part of a layer takes 1000 (and 1000 for each
15 cached tokens), the embedding of 3 rows 200, lm_head 1000; a resident expert 100; a missed expert 500, its call 50,
n of its rows 10 + 100 n each way; a promotion 310, an eviction 410 to pinned memory and 510 to fresh.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tidesim.execution import Execution
from tidesim.hardware import Device, Hardware, Host, Link, Links
from tidesim.moe import MoEConfig
from tidesim.workload import ForwardKind, Workload

NEVER_BOUND = 1e30  # a rate too high to matter

# An expert has 3 x 4 x 1 = 12 weights, or 24 bytes; attention and router of a layer have 120, lm_head has 120.
TOY = MoEConfig(
    name="toy",
    num_dense_layers=0,
    num_layers=1,
    hidden_size=4,
    intermediate_size=5,
    moe_intermediate_size=1,
    num_experts=8,
    top_k=2,
    num_shared_experts=0,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=30,
    block_length=3,
)


def toy_hardware() -> Hardware:
    return Hardware(
        name="paper",
        description="a machine of round numbers",
        is_unified=False,
        device=Device(
            memory_bytes=4 * 2**30,
            bytes_per_s=0.24e9,
            experts_bytes_per_s=0.24e9,
            flops_per_s=NEVER_BOUND,
            grouped_flops_per_s=NEVER_BOUND,
            kernel_launch_s=0.0,
            eager_op_s=0.0,
            grouped_overhead_s=0.0,
            gemm_overhead_s=0.0,
        ),
        host=Host(
            cores=1,
            memory_bytes=4 * 2**30,
            bytes_per_s=0.048e9,
            bf16_flops_per_s=NEVER_BOUND,
            fp32_flops_per_s=NEVER_BOUND,
            call_overhead_s=50e-9,
        ),
        links=Links(
            h2d_pinned=Link(bytes_per_s=0.08e9, latency_s=10e-9),
            h2d_pageable=Link(bytes_per_s=0.08e9, latency_s=10e-9),
            d2h_pinned=Link(bytes_per_s=0.06e9, latency_s=10e-9),
            d2h_pageable=Link(bytes_per_s=0.08e9, latency_s=10e-9),
            d2h_fresh=Link(bytes_per_s=0.048e9, latency_s=10e-9),
            duplex_factor=0.5,
        ),
        nvme=Link(bytes_per_s=1e9, latency_s=0.0),
        sources={},
    )


def toy_execution(**changes: object) -> Execution:
    """A serial engine with a cache and blocking, pageable copies without write-back; ops cost nothing on `paper`."""
    plain = Execution(
        name="plain",
        kv_cache=True,
        logits="block",
        is_pinned=False,
        copies="blocking",
        copies_per_expert=1,
        write_back=False,
        kernels="loop",
        host="serial",
        host_calls="expert",
        activation_bytes=2,
        returns="row",
        launch="eager",
        is_async=True,
        home="host",
        ops_per_layer=10,
        ops_per_dense_layer=10,
        ops_per_expert=5,
        ops_per_forward=10,
    )
    return replace(plain, **changes)


def toy_workload(
    *tables: Sequence[Sequence[int]],
    kinds: str | None = None,
    steps: Sequence[int] | None = None,
    first_block: bool = False,
    **changes: object,
) -> Workload:
    """One sequence; `tables[f]` is the counts [L, E] of forward f.

    `kinds` has a letter p, d or c per forward (all denoise if left out); steps count up from 0.
    """
    letters = {"p": ForwardKind.PREFILL, "d": ForwardKind.DENOISE, "c": ForwardKind.COMMIT}
    counts = np.array(tables, np.int32)
    num_forwards = len(counts)
    kind = np.array([letters[letter] for letter in kinds or "d" * num_forwards], np.uint8)
    zeros = np.zeros(num_forwards, np.int32)
    tokens = (counts[:, 0].sum(axis=1) // TOY.top_k).astype(np.int32)
    workload = Workload(
        counts=counts,
        kind=kind,
        sequence=zeros,
        block=zeros + 1,
        step=np.arange(num_forwards, dtype=np.int32) if steps is None else np.array(steps, np.int32),
        is_first_block=np.full(num_forwards, first_block),
        tokens=tokens,
        context_tokens=zeros,
        attended_pairs=tokens.astype(np.int64) ** 2,
        logit_tokens=np.where(kind == ForwardKind.DENOISE, TOY.block_length, 0).astype(np.int32),
        generated_tokens=TOY.block_length,
        num_sequences=1,
        max_tokens=2 * TOY.block_length,
        model_name=TOY.name,
        num_experts=counts.shape[2],
        top_k=TOY.top_k,
        block_length=TOY.block_length,
        origin="synthetic",
        context="block",
        fingerprint="0" * 64,
    )
    return replace(workload, **changes)
