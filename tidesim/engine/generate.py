"""Block-diffusion decoding: denoise one block of tokens after the other, and note which experts were used.

Blocks tile the sequence from position 0, so the first one decoded holds the prompt's tail. In each denoising step
every masked position proposes a token; those above the confidence threshold are accepted for good, and at least one
(`steps` = block length) always is. With a KV cache a finished block goes through the network once more, with its
final tokens (commit), because the keys of its last denoising step still saw masks. Without one the whole prefix is
computed again in every forward, as the published TIDE code does. Both ways give the same tokens.

Sources: decoding rule of LLaDA2.0 (its technical report and the `generate` of its published model code); cached
decoding after dInfer and SGLang. The mask token is never predicted: the next best token is taken instead, so every
step makes progress and no mask is left in the text. Positions are masked by place, not by token id.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tidesim.engine.model import LLaDA2, Routing, block_causal_mask
from tidesim.errors import InputError
from tidesim.trace import ForwardKind, ForwardRouting, SequenceRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Settings of the decoding loop.

    Parameters
    ----------
    gen_length : tokens to generate at most; the answer ends earlier after an end-of-text token.
    steps : denoising steps a block may take; fewer than `block_length` accept more tokens in each.
    threshold : confidence above which (strictly) a proposed token is accepted, in 0..1.
    temperature : 0 takes the likeliest token; above 0, tokens are drawn from the softmax at this temperature.
    block_length : tokens denoised together.
    kv_cache : keep keys and values of finished blocks instead of computing the prefix in every forward.
    """

    gen_length: int = 128
    steps: int = 32
    threshold: float = 0.95
    temperature: float = 0.0
    block_length: int = 32
    kv_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("gen_length", "steps", "block_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}(={getattr(self, name)}) must be >= 1.")
        if not 0.0 <= self.threshold <= 1.0:
            raise InputError(f"threshold(={self.threshold}) must be in 0..1.")
        if not self.temperature >= 0.0:
            raise InputError(f"temperature(={self.temperature}) must be >= 0.")

    def quota(self, step: int) -> int:
        """Tokens that `step` (from 0) accepts at least; over all steps they make up the block."""
        steps = min(self.steps, self.gen_length)
        return self.block_length // steps + (step < self.block_length % steps)

    def to_json(self) -> dict[str, Any]:
        """The settings as a plain mapping, as kept in a trace."""
        return asdict(self)


class Watcher(Protocol):
    """Who wants to know which forward is running; the words are those of `ForwardRouting`."""

    def begin_sequence(self) -> None:
        """The forwards from now on belong to a new sequence."""

    def begin(self, kind: ForwardKind, block: int, step: int, is_first_block: bool, tokens: int) -> None:
        """A forward begins that routes `tokens` rows."""

    def end(self) -> None:
        """That forward is done, its sampling included."""


@dataclass(slots=True)
class Generation:
    """What one prompt gave: the tokens of the answer, and every forward with the routing of its rows."""

    prompt_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    forwards: list[ForwardRouting] = field(default_factory=list)
    routings: list[list[Routing]] = field(default_factory=list)  # [F][L]: ids and weights [T, K]

    def sequence_routing(self, has_weights: bool = False, has_lookahead: bool = False) -> SequenceRouting:
        """All of it as one record of a trace; the look-ahead must have been asked for when generating."""
        return SequenceRouting(
            prompt_ids=np.array(self.prompt_ids, dtype=np.int32),
            generated_ids=np.array(self.tokens, dtype=np.int32),
            forwards=self.forwards,
            expert_ids=self._rows("expert_ids", torch.int16),
            weights=self._rows("expert_weights", torch.float16) if has_weights else None,
            lookahead_ids=self._rows("lookahead_ids", torch.int16, slice(-1)) if has_lookahead else None,
        )

    def _rows(self, name: str, dtype: torch.dtype, layers: slice = slice(None)) -> npt.NDArray[Any]:
        """One field of all routings, by row and layer [N, layers, K]."""
        forwards = [torch.stack([getattr(layer, name) for layer in each[layers]], dim=1) for each in self.routings]
        return _to_numpy(torch.cat(forwards), dtype)


def generate(
    network: LLaDA2,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    *,
    mask_id: int,
    end_id: int,
    rng: torch.Generator | None = None,
    on_block: Callable[[list[int]], None] | None = None,
    watcher: Watcher | None = None,
    has_lookahead: bool = False,
) -> Generation:
    """Answer one prompt.

    `rng` is drawn from only at a temperature above 0. `on_block` is called after each block with the answer so far,
    `watcher` is told of every forward. With `has_lookahead` every layer is also asked what the next one will choose.
    Raise InputError for an empty prompt, a mask token in it (it would be overwritten), or ids outside the vocabulary.
    """
    prompt = list(prompt_ids)
    if not prompt:
        raise InputError("the prompt is empty: at least one token is needed.")
    if mask_id in prompt:
        raise InputError("the prompt holds the mask token, which stands for text to be generated; remove it.")
    if not 0 <= min(prompt) <= max(prompt) < network.config.vocab_size:
        raise InputError(f"prompt ids must be in 0..{network.config.vocab_size - 1}.")
    with torch.inference_mode():
        return _Decoder(network, prompt, sampler, mask_id, end_id, rng, watcher, has_lookahead).run(on_block)


class _Decoder:
    """State of one generation: the canvas of all tokens, the cache and what has been recorded."""

    def __init__(
        self,
        network: LLaDA2,
        prompt: list[int],
        sampler: Sampler,
        mask_id: int,
        end_id: int,
        rng: torch.Generator | None,
        watcher: Watcher | None,
        has_lookahead: bool,
    ) -> None:
        self.network, self.sampler, self.mask_id, self.end_id, self.rng = network, sampler, mask_id, end_id, rng
        self.watcher, self.has_lookahead = watcher, has_lookahead
        self.block_length = sampler.block_length
        self.num_prompt = len(prompt)
        self.num_blocks = -(-(len(prompt) + sampler.gen_length) // self.block_length)
        size = self.num_blocks * self.block_length
        device = network.word_embeddings.weight.device
        self.canvas = torch.full((size,), mask_id, device=device)
        self.canvas[: len(prompt)] = torch.tensor(prompt, device=device)
        self.positions = torch.arange(size, device=device)
        self.mask = block_causal_mask(size, self.block_length, device)
        self.cache = network.new_cache(size) if sampler.kv_cache else None
        self.generation = Generation(prompt)
        self.began_ns = 0

    def run(self, on_block: Callable[[list[int]], None] | None) -> Generation:
        first = self.num_prompt // self.block_length
        if self.watcher is not None:
            self.watcher.begin_sequence()
        if self.cache is not None and first > 0:
            self._forward(first, 0, ForwardKind.PREFILL, 0, first * self.block_length)
            self.cache.length = first * self.block_length
        for block in range(first, self.num_blocks):
            steps = self._denoise(block)
            is_last = block == self.num_blocks - 1 or self._has_ended((block + 1) * self.block_length)
            if on_block is not None:
                on_block(self._answer((block + 1) * self.block_length))
            if is_last:
                break
            if self.cache is not None:
                self._forward(block, steps, ForwardKind.COMMIT, self.cache.length, (block + 1) * self.block_length)
                self.cache.length += self.block_length
        self.generation.tokens = self._answer((block + 1) * self.block_length)
        return self.generation

    def _denoise(self, block: int) -> int:
        """Fill the masks of `block`; returns the number of steps it took."""
        start, stop = block * self.block_length, (block + 1) * self.block_length
        is_masked = self.positions[start:stop] >= self.num_prompt  # [B]; the prompt's tail stands
        step = 0
        while bool(is_masked.any()):
            first_row = start if self.cache is not None else 0
            hidden = self._forward(block, step, ForwardKind.DENOISE, first_row, stop, int(is_masked.sum()))
            logits = self.network.logits(hidden[-self.block_length :])
            logits[:, self.mask_id] = float("-inf")
            tokens, confidences = self._propose(logits)
            accepted = self._accept(confidences.masked_fill(~is_masked, float("-inf")), self.sampler.quota(step))
            self.canvas[start:stop] = torch.where(accepted, tokens, self.canvas[start:stop])
            is_masked &= ~accepted
            self._finish_step(num_accepted=int(accepted.sum()))
            step += 1
        return step

    def _propose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence of each row. logits [B, V] -> [B], [B]. The confidence is the token's probability."""
        if self.sampler.temperature == 0:
            proposed: tuple[Tensor, Tensor] = self.network.likeliest(logits)
            return proposed
        probabilities = torch.softmax(logits / self.sampler.temperature, dim=-1)
        tokens = torch.multinomial(probabilities, 1, generator=self.rng)[:, 0]
        return tokens, probabilities.gather(1, tokens[:, None])[:, 0]

    def _accept(self, confidences: Tensor, quota: int) -> Tensor:
        """Which positions [B] to accept: all above the threshold, or the `quota` best if those are fewer."""
        above = confidences > self.sampler.threshold
        if int(above.sum()) >= quota:
            return above
        num_open = int((confidences > float("-inf")).sum())
        best = confidences.topk(min(quota, num_open)).indices
        return torch.zeros_like(above).index_fill_(0, best, True)

    def _forward(self, block: int, step: int, kind: ForwardKind, start: int, stop: int, num_masked: int = 0) -> Tensor:
        """Run the network on canvas[start:stop], record it, and return its hidden states [T, D]."""
        if self.watcher is not None:
            self.watcher.begin(kind, block, step, block == self.num_prompt // self.block_length, stop - start)
        self.began_ns = time.perf_counter_ns()
        context = self.cache.length if self.cache is not None else 0
        # Behind a cache a block sees all of itself and everything finished: no mask is needed, nor for a lone block.
        needs_mask = stop - start > self.block_length
        hidden, routings = self.network(
            self.canvas[None, start:stop],
            self.positions[start:stop],
            mask=self.mask[start:stop, :stop] if needs_mask else None,
            cache=self.cache,
            has_lookahead=self.has_lookahead,
        )
        self.generation.routings.append(routings)
        self.generation.forwards.append(
            ForwardRouting(
                block=block,
                step=step,
                kind=kind,
                context_tokens=context,
                routed_tokens=stop - start,
                masked_tokens=num_masked,
                accepted_tokens=0,
            )
        )
        if kind is not ForwardKind.DENOISE:
            self._finish_step(num_accepted=0)
        return cast(Tensor, hidden[0])

    def _finish_step(self, num_accepted: int) -> None:
        """Complete the record of the last forward: what it gave, and its wall time with the sampling behind it."""
        if self.canvas.device.type != "cpu":
            torch.accelerator.synchronize(self.canvas.device)
        wall_ns = time.perf_counter_ns() - self.began_ns
        if self.watcher is not None:
            self.watcher.end()
        last = self.generation.forwards[-1]
        self.generation.forwards[-1] = replace(last, accepted_tokens=num_accepted, wall_ns=wall_ns)

    def _has_ended(self, stop: int) -> bool:
        return bool((self.canvas[self.num_prompt : stop] == self.end_id).any())

    def _answer(self, stop: int) -> list[int]:
        """Tokens generated up to position `stop`, cut after the first end-of-text and at gen_length."""
        tokens = self.canvas[self.num_prompt : min(stop, self.num_prompt + self.sampler.gen_length)].tolist()
        return tokens[: tokens.index(self.end_id) + 1] if self.end_id in tokens else tokens


def _to_numpy(tensor: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    return tensor.to("cpu", dtype).numpy()
