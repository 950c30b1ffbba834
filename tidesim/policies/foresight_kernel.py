"""What `foresight` remembers and expects, compiled.

Nothing here allocates, and loops over experts hold no branch, so that several experts are done at once. Sums are taken
in one order only: every run on a machine expects the same to the last bit. A `Memory` is handed over as a plain tuple,
as to take a named one apart costs more than the work itself. Letters: L MoE layers, E experts per layer, N features.
"""

from math import log1p
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.compiling import Whole, compiled, inlined
from tidesim.policies.foresight import ALWAYS, NUM_FEATURES

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Columns of `Memory.since`: which sequence and block it was, and how many forwards of them were seen.
_SEQUENCE, _BLOCK, _IN_BLOCK, _IN_SEQUENCE = range(4)


class Memory(NamedTuple):
    """What is known of every expert of every layer, and expected of it.

    Parameters
    ----------
    seen : float64 [L, 6, E], how often lately, fading in three ways; how much lately; in how many forwards of this
        block, and of this sequence. since : int64 [L, 4].
    known : float64 [L, 2, E], the shares of the corpus, and of the first steps of its blocks, that used it.
    weights : float64 [situations, N], what each feature says. features : float64 [N, E], a buffer.
    table : float64 [L, E], what is expected. rows : int64 [L, E], those that it got when it was used last.
    """

    seen: Floats
    since: Ints
    known: Floats
    weights: Floats
    features: Floats
    table: Floats
    rows: Ints


def new_memory(popularity: Floats, at_start: Floats, weights: Floats) -> Memory:
    """Nothing was seen, and those are expected who begin blocks; [L, E] are the two shares of the corpus."""
    L, E = popularity.shape
    since = np.zeros((L, 4), np.int64)
    since[:, [_SEQUENCE, _BLOCK]] = -1
    return Memory(
        seen=np.zeros((L, 6, E)),
        since=since,
        known=np.stack([popularity, at_start], axis=1),
        weights=weights,
        features=np.zeros((NUM_FEATURES, E)),
        table=at_start.copy(),
        rows=np.ones((L, E), np.int64),
    )


@compiled
def see(memory: Any, layer: Whole, sequence: Whole, block: Whole, tokens: Whole, counts: Any, features: Any) -> None:
    """Take note of the counts of a layer [E], and write the features [N, E] that follow; see `foresight`."""
    told = Memory(*memory)
    since, seen, known = told.since[layer], told.seen[layer], told.known[layer]
    is_new_sequence = since[_SEQUENCE] != sequence
    if is_new_sequence or since[_BLOCK] != block:
        seen[4] = 0.0
        since[_IN_BLOCK] = 0
    if is_new_sequence:
        seen[2] = 0.0
        seen[5] = 0.0
        since[_IN_SEQUENCE] = 0
    since[_SEQUENCE], since[_BLOCK] = sequence, block
    since[_IN_BLOCK] += 1
    since[_IN_SEQUENCE] += 1
    used, much, share = features[1], features[2], 32 / max(tokens, 1)
    for expert in range(len(counts)):
        features[0, expert] = 1.0
        used[expert] = counts[expert] > 0
    most = 0
    for expert in range(len(counts)):
        most = max(most, counts[expert])
    if most < len(counts):
        # Few different counts are common: their logarithms stand for a while where the next feature comes.
        logarithms = features[3]
        for count in range(most + 1):
            logarithms[count] = log1p(count * share)
        for expert in range(len(counts)):
            much[expert] = logarithms[counts[expert]]
    else:
        for expert in range(len(counts)):
            much[expert] = log1p(counts[expert] * share)
    _fade(seen[0], 0.5, used, features[3])
    _fade(seen[1], 0.8, used, features[4])
    _fade(seen[2], 0.95, used, features[5])
    _fade(seen[3], 0.5, much, features[6])
    _count(seen[4], used, since[_IN_BLOCK], features[7])
    _count(seen[5], used, since[_IN_SEQUENCE], features[8])
    for expert in range(len(counts)):
        features[9, expert] = known[0, expert]
        features[10, expert] = known[1, expert]


@inlined
def _fade(before: Any, keep: float, now: Any, feature: Any) -> None:
    """What was before fades, and what is now comes on top."""
    for expert in range(len(now)):
        before[expert] = keep * before[expert] + (1 - keep) * now[expert]
        feature[expert] = before[expert]


@inlined
def _count(before: Any, used: Any, num_forwards: Whole, feature: Any) -> None:
    """The share of so many forwards in which each was used."""
    for expert in range(len(used)):
        before[expert] += used[expert]
        feature[expert] = before[expert] / num_forwards


@compiled
def look_ahead(
    memory: Any,
    layer: Whole,
    sequence: Whole,
    block: Whole,
    situation: Whole,
    tokens: Whole,
    counts: Any,
) -> None:
    """Take note of the counts of a layer [E], and expect from there: nobody less than never or more than always."""
    told = Memory(*memory)
    features, weights, table, rows = told.features, told.weights[situation], told.table[layer], told.rows[layer]
    see(memory, layer, sequence, block, tokens, counts, features)
    for expert in range(len(counts)):
        table[expert] = features[0, expert] * weights[0]
    for number in range(1, NUM_FEATURES):
        for expert in range(len(counts)):
            table[expert] += features[number, expert] * weights[number]
    for expert in range(len(counts)):
        table[expert] = min(max(table[expert], 0.0), ALWAYS)
        rows[expert] = counts[expert] if counts[expert] > 0 else rows[expert]
