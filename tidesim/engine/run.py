"""Run a network under a policy and say what came of it: answers to prompts, or the forwards of a recorded trace."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tidesim.engine.generate import Generation, Sampler, generate
from tidesim.engine.live import LiveModel
from tidesim.engine.model import block_causal_mask
from tidesim.engine.offload import Offload
from tidesim.errors import BudgetError, TraceError
from tidesim.execution import Execution
from tidesim.result import RunResult, one_or_each
from tidesim.trace import Trace
from tidesim.workload import Context, ForwardKind


def measured_result(
    offload: Offload,
    live: LiveModel,
    execution: Execution,
    *,
    machine: str,
    model: str,
    origin: str,
    tokens: int,
    seed: int | None,
) -> RunResult:
    """What a run came to.

    Parameters
    ----------
    machine, model, origin : what results call the machine, the model, and where the routing comes from.
    tokens : generated tokens.
    """
    times = offload.times
    num_copies = offload.promotions + offload.drops
    return RunResult(
        policy=offload.policy.name,
        budget=one_or_each(offload.budgets),
        refresh_interval=offload.policy.refresh_interval,
        refresh_steps=offload.policy.refresh_steps,
        execution=execution.name,
        context=execution.context,
        hardware=machine,
        model=model,
        trace_origin=origin,
        seed=seed,
        num_forwards=offload.num_forwards,
        generated_tokens=tokens,
        hits=offload.hits,
        misses=offload.misses,
        promotions=offload.promotions,
        evictions=offload.evictions,
        drops=offload.drops,
        num_copies=num_copies,
        h2d_bytes=num_copies * live.expert_bytes,
        d2h_bytes=0,
        makespan_ns=times.makespan_ns,
        layer_parts_ns=tuple(tuple(parts.values()) for parts in times.parts_ns.values()),
        busy_ns={"device": times.device_ns, "d2h": 0} | offload.busy_ns(),
        is_measured=True,
    )


def answer(
    live: LiveModel,
    offload: Offload,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    mask_id: int,
    end_id: int,
    rng: torch.Generator | None = None,
    on_block: Callable[[int, list[int]], None] | None = None,
) -> Iterator[Generation]:
    """Answer one prompt after the other; `on_block` gets the prompt's number and its answer so far.

    Raise BudgetError if the device runs out of memory; what was answered before stays answered.
    """
    for number, prompt in enumerate(prompts):

        def said(tokens: list[int], number: int = number) -> None:
            if on_block is not None:
                on_block(number, tokens)

        with memory_explained(offload):
            yield generate(
                live.network, prompt, sampler, mask_id=mask_id, end_id=end_id, rng=rng, on_block=said, watcher=offload
            )


@contextmanager
def memory_explained(offload: Offload) -> Iterator[None]:
    """Say what to do where the device runs out of memory in the middle of a run."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise BudgetError(
            f"the device ran out of memory in forward {offload.num_forwards - 1} ({reason}); the text up to there "
            f"stands. Take a smaller budget than {max(offload.budgets)} experts a layer, or shorter sequences."
        ) from None


class ForcedForward(NamedTuple):
    """One forward of a trace as an engine with or without a KV cache runs it; `expert_ids` [T, L, K]."""

    kind: ForwardKind
    block: int
    step: int
    is_first_block: bool
    context_tokens: int
    expert_ids: npt.NDArray[np.int64]


def forced_forwards(trace: Trace, context: Context, sequence: int, num_layers: int) -> Iterator[ForcedForward]:
    """The forwards of one sequence, those that `Trace.workload(context)` counts, with the routing of their rows.

    Raise TraceError if the trace was recorded without a KV cache: its rows would have to be cut first.
    """
    if not trace.kv_cache:
        raise TraceError(f"{trace.path}: was recorded without a KV cache; routing is forced from recordings with one.")
    layers = np.arange(num_layers) % trace.num_layers
    first_block = int(trace.sequences["prompt_tokens"][sequence]) // trace.block_length
    prefix: list[npt.NDArray[np.int64]] = []
    for forward in np.flatnonzero(trace.forwards["sequence"] == sequence).tolist():
        row = trace.forwards[forward]
        ids = trace.expert_ids(int(trace.offsets[forward]), int(trace.offsets[forward + 1]))[:, layers].astype(np.int64)
        kind, context_tokens = ForwardKind(row["kind"]), int(row["context_tokens"])
        if context == "full":
            if kind != ForwardKind.DENOISE:
                prefix.append(ids)
                continue
            ids, context_tokens = np.concatenate([*prefix, ids]), 0
        block = int(row["block"])
        yield ForcedForward(kind, block, int(row["step"]), block == first_block, context_tokens, ids)


def replay_trace(
    live: LiveModel,
    offload: Offload,
    trace: Trace,
    execution: Execution,
    sequences: Sequence[int],
    num_forwards: int | None = None,
) -> None:
    """Run the recorded forwards of some sequences, or the first so many, with their recorded choice of experts.

    Everything is computed as in decoding, sampling included, but which forward comes next is as recorded, and the
    tokens that go in are arbitrary. The router's own weights are used for the recorded experts, slot by slot.
    """
    with torch.inference_mode(), memory_explained(offload):
        for sequence in sequences:
            left = None if num_forwards is None else num_forwards - offload.num_forwards
            if left is None or left > 0:
                offload.begin_sequence()
                _replay_sequence(live, offload, trace, execution, sequence, left)
    offload.forced = None


def _replay_sequence(
    live: LiveModel, offload: Offload, trace: Trace, execution: Execution, sequence: int, num_forwards: int | None
) -> None:
    network, block_length = live.network, trace.block_length
    forwards = list(islice(forced_forwards(trace, execution.context, sequence, live.sizes.num_layers), num_forwards))
    size = max(forward.context_tokens + len(forward.expert_ids) for forward in forwards)
    device = network.norm.weight.device
    tokens = torch.arange(size, device=device) % network.config.vocab_size
    positions, mask = torch.arange(size, device=device), block_causal_mask(size, block_length, device)
    cache = network.new_cache(size) if execution.kv_cache else None
    for forward in forwards:
        start, num_rows = forward.context_tokens, len(forward.expert_ids)
        if cache is not None:
            cache.length = start
        offload.forced = forward.expert_ids
        offload.begin(forward.kind, forward.block, forward.step, forward.is_first_block, num_rows)
        rows = slice(start, start + num_rows)
        needs_mask = num_rows > block_length
        hidden, _ = network(tokens[None, rows], positions[rows], mask[rows, : rows.stop] if needs_mask else None, cache)
        if forward.kind == ForwardKind.DENOISE:
            network.likeliest(network.logits(hidden[0, -block_length:]))[0].tolist()
        offload.end()
