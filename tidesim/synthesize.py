"""Traces with stated statistics, for networks that cannot be run here.

Real traces of the large diffusion LLMs are not published, but figures about their routing are. `synthesize` draws
traces that meet those figures. The shipped trace was made by

    tidesim synthesize --shape llada2.0-mini --sequences 16 --prompt-tokens 96 --gen-length 128 --seed 0 \\
        --out traces/llada2.0-mini-synthetic.h5

The construction. Each layer has a mild popularity of its experts. Each block of a sequence has, in each layer, a local
order of the experts, drawn from the popularity and partly kept from the block before. A position draws its K experts
without replacement, with weight rank ** -skew in that order. The draw is a race: every expert gets an exponential time
divided by its weight, and the first K win (Efraimidis and Spirakis, Information Processing Letters 97, 2006). Between
two forwards a small share of these times is drawn anew, so that experts persist, and the draw keeps its distribution.
A position whose token was just accepted draws most of its times anew. Besides, a share of the experts rests, for all
positions of the block at once, and who rests changes fast. A finished block never changes: it routes as its commit
forward did. While many tokens of a block are masked, early layers draw from a steeper order.

What it leaves out: layers, and blocks of different sequences, depend on each other by the popularity only; positions
of a block differ only by chance; there are no router weights and no texts (the trace is private).

The constants are no measurements. They were chosen so that traces of LLaDA2.0-mini's shape meet these figures:

* dMoE (arXiv 2605.30876, tables 1 and 4): 65.9 to 71.5 distinct experts per layer and forward, s.d. 10 to 12;
* 0.82 of a position's experts kept at one token a step (SDAR-30B-A3B); about 0.77 is inferred for LLaDA2.0-mini;
* two masked positions of a block share 3.3 to 3.5 of their 8 experts (refineserve);
* without a KV cache, hit counts of neighbouring forwards have cosine 0.985, and above 0.95 five forwards apart (TIDE,
  arXiv 2605.20179, second hand). The longer the text, the larger the unchanged prefix and the cosine: it is met at the
  lengths of the shipped trace. Resting experts are there for this figure: if positions changed independently of each
  other at the stated rate, it would be 0.995;
* 2.55 tokens per forward at threshold 0.95, 1.24 to 5.16 by task (LLaDA2.0 and 2.1 reports); one token in about half
  of the steps, and bursts late in a block;
* the most used eighth of a layer's experts carries 25 to 50 % (DeepSeek-V3 and R1, same family of routers);
* early layers collapse onto few experts while all tokens are masked (LLaDA-MoE-7B, one prompt); here mildly.

Letters: L MoE layers, E experts, K top-k, B block length.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.moe import MoEConfig
from tidesim.trace import ForwardKind, ForwardRouting, SequenceRouting, TraceWriter
from tidesim.trace_format import ids_dtype
from tidesim.workers import Workers

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[Any]  # unsigned integers

_SEQUENCES_A_PROCESS = 8  # a process must draw so many to be worth its start

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Construction:
    """Constants of the construction, fitted to the published figures that the module names.

    Parameters
    ----------
    popularity_sd : spread of an expert's log popularity within a layer.
    order_kept : share of a block's order that comes from the block before.
    skew : exponent of the weight rank ** -skew for a position whose token is masked.
    skew_sd_block, skew_sd_layer, skew_sd_forward : spread of the exponent over blocks, over the layers of a block, and
        over the forwards of a block and layer.
    skew_drop_known : how much smaller the exponent is for a position with a known token, which depends on that token.
    skew_rise_masked : how much larger the exponent is in the first layer while the whole block is masked; it fades
        with the square of the masked share, and with the square of the distance to the last layer.
    resting : share of the experts that rest in a forward, the same for all positions of a block.
    resting_drop : how much the log weight of a resting expert falls.
    resting_redrawn : share of the experts for which it is drawn anew, between two forwards, whether they rest.
    redrawn, redrawn_accepted : share of the times of a position that are drawn anew between two forwards, usually and
        after its token was accepted.
    single : log odds that a step at the start of a block accepts one token only.
    single_drop : how much these log odds fall in the course of the block.
    burst : mean number of tokens beyond the first that any other step accepts, less one, at three quarters of a block.
    ease_sd : spread of how easy sequences are, which adds to the log of a burst and takes from the log odds of one.
    length_spread : prompts and answers are up to this share shorter or longer than asked for.
    """

    popularity_sd: float = 0.75
    order_kept: float = 0.5
    skew: float = 1.47
    skew_sd_block: float = 0.105
    skew_sd_layer: float = 0.05
    skew_sd_forward: float = 0.03
    skew_drop_known: float = 0.19
    skew_rise_masked: float = 0.3
    resting: float = 0.3
    resting_drop: float = 3.0
    resting_redrawn: float = 0.5
    redrawn: float = 0.04
    redrawn_accepted: float = 0.6
    single: float = 0.72
    single_drop: float = 2.0
    burst: float = 3.9
    ease_sd: float = 0.45
    length_spread: float = 0.25


DEFAULT = Construction()


def synthesize(
    config: Mapping[str, Any],
    path: str | Path,
    *,
    model_name: str,
    num_sequences: int,
    prompt_tokens: int = 96,
    gen_length: int = 128,
    kv_cache: bool = True,
    seed: int = 0,
    construction: Construction = DEFAULT,
    overwrite: bool = False,
    workers: int | None = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a synthetic trace as an engine would have recorded it.

    Parameters
    ----------
    config : the network's Hugging Face config.json: layers, experts, top-k and block length.
    path : file to create; an existing file is refused unless `overwrite`.
    prompt_tokens, gen_length : tokens of prompts and answers, on average; an answer ends where a block does.
    kv_cache : whether that engine keeps a KV cache. Without one every forward routes the whole prefix again, as in the
        published TIDE code: the same routing in a file that grows with the square of the lengths.
    seed : fixes the trace, together with the other arguments; sequence i does not depend on `num_sequences`.
    workers : processes that draw sequences, see `Workers`; None for one per CPU, but fewer if there is little to do.
        The trace does not depend on it.
    progress : called after each sequence with the numbers of sequences done and in all.

    Raise InputError if a number is out of range, ModelError if `config` is no network's, TraceError if `path` exists
    or cannot be created.
    """
    _check_at_least(1, num_sequences=num_sequences, prompt_tokens=prompt_tokens, gen_length=gen_length)
    _check_at_least(0, seed=seed)
    shape = MoEConfig.from_hf(config, model_name)
    rng = np.random.default_rng([seed, 0])
    popularity = rng.lognormal(sigma=construction.popularity_sd, size=(shape.num_layers, shape.num_experts))
    setting = _Setting(shape, construction, popularity, rng.random(), seed, prompt_tokens, gen_length, kv_cache)
    if workers is None:
        workers = min(os.cpu_count() or 1, -(-num_sequences // _SEQUENCES_A_PROCESS))
    with (
        Workers(setting, workers) as pool,
        TraceWriter(
            path,
            config=config,
            model_name=model_name,
            block_length=shape.block_length,
            sampler={"construction": asdict(construction), "prompt_tokens": prompt_tokens, "gen_length": gen_length},
            seed=seed,
            origin="synthetic",
            kv_cache=kv_cache,
            is_private=True,
            overwrite=overwrite,
        ) as writer,
    ):
        for number, sequence in enumerate(pool.map(_draw, range(num_sequences))):
            writer.append(sequence)
            if progress is not None:
                progress(number + 1, num_sequences)


@dataclass(frozen=True, slots=True, eq=False)
class _Setting:
    """What all sequences of a trace share. `first_ease` is where the golden-ratio sequence of their ease begins."""

    config: MoEConfig
    construction: Construction
    popularity: Floats
    first_ease: float
    seed: int
    prompt_tokens: int
    gen_length: int
    kv_cache: bool


def _draw(setting: _Setting, number: int) -> SequenceRouting:
    """The sequence of this number, whoever draws it."""
    rng = np.random.default_rng([setting.seed, 1 + number])
    router = _Router(setting.config, setting.construction, setting.popularity, rng)
    ease = setting.construction.ease_sd * _spread(setting.first_ease + number * _GOLDEN)
    sequence = _sequence(router, setting.prompt_tokens, setting.gen_length, ease)
    return sequence if setting.kv_cache else _without_cache(sequence)


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise InputError(f"{name}(={value}) must be >= {least}.")


def _spread(position: float) -> float:
    """The standard normal value at a position of a golden-ratio sequence: a short run of them is no outlier."""
    return NormalDist().inv_cdf(min(max(position % 1.0, 0.01), 0.99))


class _Router:
    """Draws the routing of one sequence: the state of its current block, in every layer."""

    def __init__(
        self, config: MoEConfig, construction: Construction, popularity: Floats, rng: np.random.Generator
    ) -> None:
        self.config, self.construction, self.rng = config, construction, rng
        self._popularity = popularity  # [L, E]
        self._order = _race(rng, popularity)  # [L, E]; the smaller, the earlier
        # To be written over: memory that is taken anew for each forward takes longer than what is done in it.
        shape = (config.block_length, *popularity.shape)
        self._rooms = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._rise = construction.skew_rise_masked * np.linspace(1, 0, config.num_layers) ** 2  # [L]

    def begin_block(self) -> None:
        """Draw the order and the skew of a new block, and the noise of its positions."""
        made, rng, (L, E) = self.construction, self.rng, self._popularity.shape
        is_new = rng.random((L, E)) >= made.order_kept
        self._order = np.where(is_new, _race(rng, self._popularity), self._order)
        self._rank = np.argsort(np.argsort(self._order, axis=1), axis=1) + 1.0  # [L, E]
        block_skew = made.skew + rng.normal(scale=made.skew_sd_block)
        self._skew = rng.normal(block_skew, made.skew_sd_layer, size=L)
        self._resting = rng.random((L, E)) < made.resting
        self._noise = rng.standard_exponential((self.config.block_length, L, E), np.float32)  # [B, L, E]

    def route(self, is_masked: Bools) -> Ids:
        """Experts of each position of the block, best first, [B, L, K]."""
        made, K = self.construction, self.config.top_k
        skew = self.rng.normal(self._skew, made.skew_sd_forward)
        skew = skew + self._rise * is_masked.mean() ** 2  # [L]
        slowness = np.where(self._resting, math.exp(made.resting_drop), 1.0)  # [L, E]
        masked, known = (
            (slowness * self._rank ** exponent[:, None]).astype(np.float32)
            for exponent in (skew, skew - made.skew_drop_known)
        )
        times, spare = self._rooms  # [B, L, E]
        np.take(np.stack([known, masked]), is_masked.astype(np.intp), axis=0, out=times, mode="clip")
        times *= self._noise
        return _first(times, K, spare).astype(ids_dtype(self.config.num_experts))

    def drift(self, is_accepted: Bools) -> None:
        """Change the block between two forwards: who rests, and some of the noise, more where a token was accepted."""
        made, rng, shape = self.construction, self.rng, self._popularity.shape
        is_new = rng.random(shape) < made.resting_redrawn
        self._resting = np.where(is_new, rng.random(shape) < made.resting, self._resting)
        share = np.where(is_accepted, made.redrawn_accepted, made.redrawn).astype(np.float32)
        is_new = rng.random(dtype=np.float32, out=self._rooms[0]) < share[:, None, None]
        self._noise[is_new] = rng.standard_exponential(np.count_nonzero(is_new), np.float32)


def _first(times: npt.NDArray[np.float32], num: int, spare: npt.NDArray[np.float32]) -> Ids:
    """Who has the `num` smallest of `times` [..., E], the smallest first, [..., num]. `spare` is written over."""
    # Sorting floats is vectorised, finding positions is not: this takes a quarter of the time of `argpartition`.
    np.copyto(spare, times)
    spare.sort(axis=-1)
    last = spare[..., num - 1 : num]
    where = np.flatnonzero(times <= last)
    if len(where) == last.size * num:
        best = (where % times.shape[-1]).reshape(*times.shape[:-1], num)
    else:  # two arrive last at the same time
        best = np.argpartition(times, num - 1, axis=-1)[..., :num]
    order = np.argsort(np.take_along_axis(times, best, axis=-1), axis=-1)
    return np.take_along_axis(best, order, axis=-1)


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One denoise forward: the positions masked before it [B], and the experts of all positions [B, L, K]."""

    forward: ForwardRouting
    is_masked: Bools
    expert_ids: Ids


def _race(rng: np.random.Generator, weight: Floats) -> Floats:
    """Times of an exponential race in which the greater weights tend to arrive first."""
    return rng.standard_exponential(weight.shape) / weight


def _sequence(router: _Router, prompt_tokens: int, gen_length: int, ease: float) -> SequenceRouting:
    B = router.config.block_length
    spread = 1 + router.construction.length_spread * router.rng.uniform(-1, 1, size=2)
    num_prompt = max(1, round(prompt_tokens * spread[0]))
    first = num_prompt // B
    num_blocks = max(first + 1, round((num_prompt + gen_length * spread[1]) / B))
    known = np.zeros(B, np.bool_)
    forwards: list[ForwardRouting] = []
    ids: list[Ids] = []
    for _ in range(first):
        router.begin_block()
        ids.append(router.route(known))
    if first:
        forwards.append(_forward(ForwardKind.PREFILL, first, 0, 0, first * B))
    for block in range(first, num_blocks):
        for step in _denoise(router, block, np.arange(block * B, (block + 1) * B) >= num_prompt, ease):
            forwards.append(step.forward)
            ids.append(step.expert_ids)
        if block < num_blocks - 1:
            forwards.append(_forward(ForwardKind.COMMIT, block, forwards[-1].step + 1, block * B, B))
            ids.append(router.route(known))
    return SequenceRouting(
        prompt_ids=np.zeros(num_prompt, np.int32),  # the trace is private: only their number counts
        generated_ids=np.zeros(num_blocks * B - num_prompt, np.int32),
        forwards=forwards,
        expert_ids=np.concatenate(ids),
    )


def _without_cache(sequence: SequenceRouting) -> SequenceRouting:
    """The same recorded without a KV cache: denoise forwards alone, each with all rows that lie before its block."""
    forwards: list[ForwardRouting] = []
    ids: list[Ids] = []
    prefix: list[Ids] = []
    start = 0
    for forward in sequence.forwards:
        rows = sequence.expert_ids[start : start + forward.routed_tokens]
        start += len(rows)
        if forward.kind == ForwardKind.DENOISE:
            num_rows = forward.context_tokens + forward.routed_tokens
            forwards.append(replace(forward, context_tokens=0, routed_tokens=num_rows))
            ids += [*prefix, rows]
        else:
            prefix.append(rows)
    return replace(sequence, forwards=forwards, expert_ids=np.concatenate(ids))


def _denoise(router: _Router, block: int, is_masked: Bools, ease: float) -> Iterator[_Step]:
    """The denoise forwards of one block that begins with these positions masked."""
    B = len(is_masked)
    router.begin_block()
    step = 0
    while is_masked.any():
        num_masked = int(is_masked.sum())
        num_accepted = min(num_masked, _accepted(router.construction, router.rng, 1 - num_masked / B, ease))
        forward = _forward(ForwardKind.DENOISE, block, step, block * B, B, masked=num_masked, accepted=num_accepted)
        yield _Step(forward, is_masked, router.route(is_masked))
        accepted = router.rng.choice(np.flatnonzero(is_masked), num_accepted, replace=False)
        is_accepted = np.isin(np.arange(B), accepted)
        is_masked = is_masked & ~is_accepted
        router.drift(is_accepted)
        step += 1


def _accepted(made: Construction, rng: np.random.Generator, progress: float, ease: float) -> int:
    """Tokens accepted in a step, once a share `progress` of the block is known."""
    if rng.random() < 1 / (1 + math.exp(made.single_drop * progress + ease - made.single)):
        return 1
    return 1 + int(rng.geometric(1 / (1 + made.burst * math.exp(ease) * (0.25 + progress))))


def _forward(
    kind: ForwardKind, block: int, step: int, context: int, rows: int, *, masked: int = 0, accepted: int = 0
) -> ForwardRouting:
    return ForwardRouting(
        block=block,
        step=step,
        kind=kind,
        context_tokens=context,
        routed_tokens=rows,
        masked_tokens=masked,
        accepted_tokens=accepted,
    )
