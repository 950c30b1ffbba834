"""One run from its inputs to its figures: prompts or a trace in, texts and a measured `RunResult` out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tidesim.engine.choice import Choice
from tidesim.engine.generate import Sampler
from tidesim.engine.live import LiveModel
from tidesim.engine.offload import Offload
from tidesim.engine.run import answer, measured_result, replay_trace
from tidesim.engine.tokenizer import Prompt, TextCodec
from tidesim.errors import InputError
from tidesim.execution import DeviceMemory
from tidesim.moe import read_hf_config
from tidesim.result import Decision, Interval, RunResult
from tidesim.trace import Trace, TraceWriter, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run gave: its figures, the answers as text (none for a replayed trace), and who ran when if asked for.

    `memory` is what it took on the device at its peak, as reckoned before.
    """

    result: RunResult
    texts: list[str]
    intervals: list[Interval]
    memory: DeviceMemory

    def to_dict(self) -> dict[str, Any]:
        """The result by name, and the texts, ready for JSON."""
        return {**self.result.to_dict(), "texts": self.texts, "device_memory_bytes": asdict(self.memory)}


class Session:
    """A model on a device, and what to do with its experts.

    Parameters
    ----------
    machine : what results call the machine.
    decisions, is_detailed : see `Offload`.
    """

    def __init__(
        self,
        live: LiveModel,
        choice: Choice,
        *,
        machine: str,
        seed: int,
        decisions: Callable[[Decision], None] | None = None,
        is_detailed: bool = False,
    ) -> None:
        self.live, self.choice, self.machine, self.seed = live, choice, machine, seed
        self._decisions, self._is_detailed = decisions, is_detailed

    def answer(
        self,
        folder: Path,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        *,
        record: Path | None = None,
        overwrite: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Outcome:
        """Answer prompts with the model of `folder`.

        Parameters
        ----------
        record : trace file for the routing of this run.
        on_text : gets the prompt's number and its answer so far, block by block.

        Raise InputError for a prompt that cannot be answered, BudgetError if the device's memory does not do.
        """
        sampler = replace(sampler, kv_cache=self.choice.execution.kv_cache)
        codec = TextCodec(folder)
        encoded = [codec.encode(prompt) for prompt in prompts]
        if not all(encoded):
            raise InputError(f"prompt {[bool(ids) for ids in encoded].index(False)} is empty; give it some text.")
        longest = max(-(-(len(ids) + sampler.gen_length) // sampler.block_length) for ids in encoded)
        max_tokens = longest * sampler.block_length
        memory = self.choice.check_memory(self.live, max_tokens)

        def said(number: int, tokens: list[int]) -> None:
            if on_text is not None:
                on_text(number, codec.decode(tokens))

        rng = torch.Generator().manual_seed(self.seed)
        texts, tokens = [], 0
        with (
            self._recorder(record, folder, sampler, overwrite) as writer,
            self._started(max_tokens) as offload,
        ):
            for generation in answer(
                self.live, offload, encoded, sampler, mask_id=codec.mask_id, end_id=codec.end_id, rng=rng, on_block=said
            ):
                texts.append(codec.decode(generation.tokens))
                tokens += len(generation.tokens)
                if writer is not None:
                    writer.append(generation.sequence_routing())
            return self._outcome(offload, self.live.sizes.name, "live", tokens, texts, memory)

    def _started(self, max_tokens: int) -> Offload:
        """A run of sequences of `max_tokens` tokens, of which a forward routes all at most."""
        costs = self.choice.costs(self.live, max_tokens)
        return self.live.start(*self.choice[:3], self._decisions, self._is_detailed, costs)

    def _recorder(
        self, path: Path | None, folder: Path, sampler: Sampler, overwrite: bool
    ) -> AbstractContextManager[TraceWriter | None]:
        """A writer for the routing of this run, or nothing."""
        if path is None:
            return nullcontext()
        return TraceWriter(
            path,
            config=read_hf_config(folder),
            model_name=self.live.sizes.name,
            block_length=sampler.block_length,
            sampler=sampler.to_json(),
            seed=self.seed,
            origin="recorded",
            kv_cache=sampler.kv_cache,
            overwrite=overwrite,
        )

    def replay(self, trace: Trace, sequences: Sequence[int], num_forwards: int | None = None) -> Outcome:
        """Run the recorded forwards of some sequences, or the first so many, with their recorded choice of experts.

        Raise InputError if the trace routes to other experts than the model has, BudgetError if memory does not do.
        """
        workload = self.forced_workload(trace, sequences, num_forwards)
        memory = self.choice.check_memory(self.live, workload.max_tokens)
        with self._started(workload.max_tokens) as offload:
            replay_trace(self.live, offload, trace, self.choice.execution, sequences, num_forwards)
            model = f"routing of {trace.model_name} forced on {self.live.sizes.name}"
            return self._outcome(offload, model, trace.origin, workload.generated_tokens, [], memory)

    def forced_workload(self, trace: Trace, sequences: Sequence[int], num_forwards: int | None = None) -> Workload:
        """What `replay` runs, as a simulator sees it. Raise InputError as `replay` does."""
        sizes = self.live.sizes
        if (trace.num_experts, trace.top_k) != (sizes.num_experts, sizes.top_k):
            raise InputError(
                f"{trace.path} routes to {trace.top_k} of {trace.num_experts} experts, {sizes.name} to {sizes.top_k} "
                f"of {sizes.num_experts}; take a trace of a model with the same experts and top-k."
            )
        context = self.choice.execution.context
        workload = trace.workload(context, sequences, has_lookahead=trace.has_lookahead)
        return workload.tiled(sizes.num_layers).first(num_forwards)

    def _outcome(
        self, offload: Offload, model: str, origin: str, tokens: int, texts: list[str], memory: DeviceMemory
    ) -> Outcome:
        """What the run that has just ended came to; whatever still moves now is not part of it."""
        result = measured_result(
            offload,
            self.live,
            self.choice.execution,
            machine=self.machine,
            model=model,
            origin=origin,
            tokens=tokens,
            seed=self.seed,
        )
        intervals = offload.times.timeline(offload.backend.spans or [])
        return Outcome(result=result, texts=texts, intervals=intervals, memory=memory)
