"""A layer of the network without its routed experts on CPU cores: compiled, in as few calls as routing allows.

Each function is called by all threads at once, see `tidesim.engine.tiles`. Like an expert's output, every number is
computed whole by one thread, in an order that only the sizes fix: a row does not depend on the rows beside it, nor on
whether what it attends to was computed in this forward or an earlier one.

Letters: T tokens, D hidden size, H query heads, G key/value heads, C head size, S tokens attended to, E experts,
K top-k, I width of a gated MLP. Arrays with [T+] rows have some to spare, up to a multiple of `kernel.ROW_TILE`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from tidesim.engine import kernel
from tidesim.engine.kernel import CHUNK, FASTMATH, OUTPUT_TILE
from tidesim.engine.tiles import Progress, first_tile, next_tile, wait_for

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Stored = npt.NDArray[Any]  # weights as they are stored, see `kernel.STORED`

_ROWS = 8  # tokens of one tile


class AttentionWeights(NamedTuple):
    """norm [D], query_key_value [(H + 2 G) C, D], query_norm, key_norm [C], out [D, H C], next_norm [D] behind it."""

    norm: Floats
    query_key_value: Stored
    query_norm: Floats
    key_norm: Floats
    out: Stored
    next_norm: Floats


class RouterWeights(NamedTuple):
    """map [E, D], bias [E]: it takes part in the choice, never in the weights."""

    map: Stored
    bias: Floats


class GatedWeights(NamedTuple):
    """gate and up [I, D], down [D, I]."""

    gate: Stored
    up: Stored
    down: Stored


class Rotation(NamedTuple):
    """cos and sin [T, R]: R leading dimensions of a head rotate, halves paired."""

    cos: Floats
    sin: Floats


class Context(NamedTuple):
    """What a layer attends to: keys and values [G, S+, C], where the rows of this forward begin, and for each of them
    the number of leading tokens that it sees [T]."""

    keys: Floats
    values: Floats
    start: int
    visible: Ints


class Space(NamedTuple):
    """Room for what a layer computes: normed and added [T+, D], heads [T+, (H + 2 G) C], mixed [T+, H C],
    logits [T+, E], gates and ups [T+, I]."""

    normed: Floats
    added: Floats
    heads: Floats
    mixed: Floats
    logits: Floats
    gates: Floats
    ups: Floats


# --- whole functions ------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def attend_and_route(
    progress: Progress,
    x: Floats,
    attention: AttentionWeights,
    eps: float,
    rotation: Rotation,
    context: Context,
    space: Space,
    router: RouterWeights,
    num_groups: int,
    top_groups: int,
    scale: float,
    ids: Ints,
    weights: Floats,
) -> None:
    """Attention is added to x [T, D]; space.normed is what experts get, ids and weights [T, K] the router's choice."""
    _attend(progress, x, attention, eps, rotation, context, space)
    _map(progress, 6, router.map, space.normed, len(x), space.logits)
    choose_experts(progress, 7, space.logits, router.bias, num_groups, top_groups, scale, ids, weights)


@njit(nogil=True, cache=True)
def run_dense_layer(
    progress: Progress,
    x: Floats,
    attention: AttentionWeights,
    eps: float,
    rotation: Rotation,
    context: Context,
    space: Space,
    mlp: GatedWeights,
) -> None:
    """Attention and a gated MLP are added to x [T, D]."""
    _attend(progress, x, attention, eps, rotation, context, space)
    _gate(progress, 6, mlp, space, len(x))
    _map(progress, 7, mlp.down, space.gates, len(x), space.added)
    _add(progress, 8, space.added, x)


@njit(nogil=True, cache=True)
def add_experts(progress: Progress, x: Floats, routed: Floats, shared: GatedWeights, space: Space) -> None:
    """The weighted sum of the routed experts, `routed` [T, D], and the shared expert's output are added to x."""
    _gate(progress, 0, shared, space, len(x))
    _map(progress, 1, shared.down, space.gates, len(x), space.added)
    _add(progress, 2, routed, space.added)
    _add(progress, 3, space.added, x)


@njit(nogil=True, cache=True)
def multiply_rows(progress: Progress, weights: Stored, rows: Floats, out: Floats) -> None:
    """out[t, :] = weights . rows[t, :]. weights [O, D], rows [T+, D], out [T, O]."""
    _map(progress, 0, weights, rows, len(out), out)


@njit(nogil=True, cache=True)
def normalize(progress: Progress, x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """out[t] = x[t] / root mean square of x[t] * weight. x and out [T, D]."""
    _normalize(progress, 0, x, weight, eps, out)


@njit(nogil=True, cache=True)
def take_likeliest(progress: Progress, logits: Floats, tokens: Ints, confidences: Floats) -> None:
    """The likeliest token of each row of logits [T, V], the first of equals, and its probability."""
    t = first_tile(progress, 0)
    while t < len(logits):
        tokens[t], confidences[t] = _likeliest(logits[t])
        t = next_tile(progress, 0)
    wait_for(progress, 0, len(logits))


# --- phases: all threads go through them together ---------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _num_tiles(size: int, tile: int) -> int:
    return (size + tile - 1) // tile


@njit(nogil=True, cache=True)
def _normalize(progress: Progress, phase: int, x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    num_tiles = _num_tiles(len(x), _ROWS)
    tile = first_tile(progress, phase)
    while tile < num_tiles:
        for t in range(tile * _ROWS, min(len(x), (tile + 1) * _ROWS)):
            _normalize_row(x[t], weight, eps, out[t])
        tile = next_tile(progress, phase)
    wait_for(progress, phase, num_tiles)


@njit(nogil=True, cache=True)
def _add_and_normalize(
    progress: Progress, phase: int, x: Floats, added: Floats, weight: Floats, eps: float, out: Floats
) -> None:
    num_tiles = _num_tiles(len(x), _ROWS)
    tile = first_tile(progress, phase)
    while tile < num_tiles:
        for t in range(tile * _ROWS, min(len(x), (tile + 1) * _ROWS)):
            _add_row(added[t], x[t])
            _normalize_row(x[t], weight, eps, out[t])
        tile = next_tile(progress, phase)
    wait_for(progress, phase, num_tiles)


@njit(nogil=True, cache=True)
def _add(progress: Progress, phase: int, added: Floats, x: Floats) -> None:
    num_tiles = _num_tiles(len(x), _ROWS)
    tile = first_tile(progress, phase)
    while tile < num_tiles:
        for t in range(tile * _ROWS, min(len(x), (tile + 1) * _ROWS)):
            _add_row(added[t], x[t])
        tile = next_tile(progress, phase)
    wait_for(progress, phase, num_tiles)


@njit(nogil=True, cache=True)
def _map(progress: Progress, phase: int, weights: Stored, rows: Floats, num_rows: int, out: Floats) -> None:
    """out[t, :] = weights . rows[t, :]."""
    num_tiles = _num_tiles(len(weights), OUTPUT_TILE)
    tile = first_tile(progress, phase)
    while tile < num_tiles:
        _map_tile(weights, rows, num_rows, out, tile * OUTPUT_TILE)
        tile = next_tile(progress, phase)
    wait_for(progress, phase, num_tiles)


@njit(nogil=True, cache=True)
def _gate(progress: Progress, phase: int, mlp: GatedWeights, space: Space, num_rows: int) -> None:
    """space.gates = silu(gate . row) * (up . row) for the rows of space.normed."""
    width = len(mlp.gate)
    num_tiles = _num_tiles(width, OUTPUT_TILE)
    tile = first_tile(progress, phase)
    while tile < num_tiles:
        first = tile * OUTPUT_TILE
        _map_tile(mlp.gate, space.normed, num_rows, space.gates, first)
        _map_tile(mlp.up, space.normed, num_rows, space.ups, first)
        kernel.activate(space.gates, space.ups, num_rows, first, min(width, first + OUTPUT_TILE))
        tile = next_tile(progress, phase)
    wait_for(progress, phase, num_tiles)


@njit(nogil=True, cache=True)
def _attend(
    progress: Progress,
    x: Floats,
    attention: AttentionWeights,
    eps: float,
    rotation: Rotation,
    context: Context,
    space: Space,
) -> None:
    """Phases 0 to 5: attention is added to x, and space.normed is x as what comes next takes it."""
    T, G, C = len(x), len(context.keys), context.keys.shape[2]
    H = space.mixed.shape[1] // C
    _normalize(progress, 0, x, attention.norm, eps, space.normed)
    _map(progress, 1, attention.query_key_value, space.normed, T, space.heads)

    num_row_tiles = _num_tiles(T, _ROWS)
    tile = first_tile(progress, 2)
    while tile < num_row_tiles:
        for t in range(tile * _ROWS, min(T, (tile + 1) * _ROWS)):
            for g in range(G):
                key, value = space.heads[t, (H + g) * C :], space.heads[t, (H + G + g) * C :]
                _normalize_row(key[:C], attention.key_norm, eps, context.keys[g, context.start + t])
                _rotate(context.keys[g, context.start + t], rotation.cos[t], rotation.sin[t])
                _copy_row(value, context.values[g, context.start + t])
        tile = next_tile(progress, 2)
    wait_for(progress, 2, num_row_tiles)

    num_tiles = G * num_row_tiles
    queries = np.zeros((H // G * _ROWS, C), np.float32)
    outputs = np.empty((H // G * _ROWS, C), np.float32)
    tile = first_tile(progress, 3)
    if tile < num_tiles:
        scores = np.empty((H // G * _ROWS, context.start + T), np.float32)
    while tile < num_tiles:
        # The busiest rows, which see most, are dealt first.
        g, first = tile % G, (num_row_tiles - 1 - tile // G) * _ROWS
        _attend_rows(attention, eps, rotation, context, space, g, first, queries, scores, outputs)
        tile = next_tile(progress, 3)
    wait_for(progress, 3, num_tiles)

    _map(progress, 4, attention.out, space.mixed, T, space.added)
    _add_and_normalize(progress, 5, x, space.added, attention.next_norm, eps, space.normed)


@njit(nogil=True, cache=True)
def choose_experts(
    progress: Progress,
    phase: int,
    logits: Floats,
    bias: Floats,
    num_groups: int,
    top_groups: int,
    scale: float,
    ids: Ints,
    weights: Floats,
) -> None:
    num_tiles = _num_tiles(len(ids), _ROWS)
    scores, choice = np.empty(len(bias), np.float32), np.empty(len(bias), np.float32)
    groups = np.empty(num_groups, np.float32)
    tile = first_tile(progress, phase)
    while tile < num_tiles:
        for t in range(tile * _ROWS, min(len(ids), (tile + 1) * _ROWS)):
            _choose_row(logits[t], bias, top_groups, scale, scores, choice, groups, ids[t], weights[t])
        tile = next_tile(progress, phase)
    wait_for(progress, phase, num_tiles)


# --- one tile, or one row ---------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _map_tile(weights: Stored, rows: Floats, num_rows: int, out: Floats, first: int) -> None:
    """Some outputs of a linear map, for all rows: `CHUNK` of them at a time stay in a core's own cache."""
    some = weights[first : min(len(weights), first + OUTPUT_TILE)]
    for start in range(0, num_rows, CHUNK):
        kernel.multiply(some, rows[start:], min(CHUNK, num_rows - start), out, start, first)


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def _normalize_row(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1) / math.sqrt(total / np.float32(len(x)) + np.float32(eps))
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@njit(nogil=True, cache=True)
def _add_row(added: Floats, x: Floats) -> None:
    for i in range(len(x)):
        x[i] += added[i]


@njit(nogil=True, cache=True)
def _copy_row(row: Floats, out: Floats) -> None:
    """As many numbers as `out` holds. An assignment would take seconds to compile, for an error about shapes."""
    for i in range(len(out)):
        out[i] = row[i]


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def _rotate(head: Floats, cos: Floats, sin: Floats) -> None:
    """Rotate a head in place."""
    half = len(cos) // 2
    for i in range(half):
        first, second = head[i], head[i + half]
        head[i] = first * cos[i] - second * sin[i]
        head[i + half] = second * cos[i + half] + first * sin[i + half]


@njit(nogil=True, cache=True)
def _attend_rows(
    attention: AttentionWeights,
    eps: float,
    rotation: Rotation,
    context: Context,
    space: Space,
    g: int,
    first: int,
    queries: Floats,
    scores: Floats,
    outputs: Floats,
) -> None:
    """What `_ROWS` tokens from `first` on get from the query heads that share key/value head g, into space.mixed."""
    C = queries.shape[1]
    num_heads, num_rows = len(queries) // _ROWS, min(_ROWS, len(rotation.cos) - first)
    limit = 0
    for r in range(num_rows):
        limit = max(limit, context.visible[first + r])
    for head in range(num_heads):
        column = (g * num_heads + head) * C
        for r in range(num_rows):
            query = queries[head * _ROWS + r]
            _normalize_row(space.heads[first + r, column : column + C], attention.query_norm, eps, query)
            _rotate(query, rotation.cos[first + r], rotation.sin[first + r])
    kernel.multiply(context.keys[g, :limit], queries, len(queries), scores, 0, 0)
    scale = np.float32(1 / math.sqrt(C))
    for head in range(num_heads):
        for r in range(num_rows):
            _soften(scores[head * _ROWS + r, :limit], scale, context.visible[first + r])
    _mix(scores, context.values[g], limit, outputs)
    for head in range(num_heads):
        column = (g * num_heads + head) * C
        for r in range(num_rows):
            _copy_row(outputs[head * _ROWS + r], space.mixed[first + r, column : column + C])


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def _soften(scores: Floats, scale: np.float32, num_visible: int) -> None:
    """Softmax of scale * scores over the first ones; the others get no weight."""
    best = scores[0]
    for s in range(num_visible):
        best = max(best, scores[s])
    total = np.float32(0)
    for s in range(num_visible):
        scores[s] = kernel.exp((scores[s] - best) * scale)
        total += scores[s]
    share = np.float32(1) / total
    for s in range(num_visible):
        scores[s] *= share
    scores[num_visible:] = 0


@njit(nogil=True, cache=True, fastmath={"contract"})
def _mix(scores: Floats, values: Floats, num_values: int, out: Floats) -> None:
    """out[r] = sum over s of scores[r, s] values[s], in ascending s: values without weight at the end change nothing.

    Two rows and four values at a time; out [R, C], R even.
    """
    C = out.shape[1]
    out[:] = 0
    whole = num_values // 4 * 4
    for s in range(0, whole, 4):
        v0, v1, v2, v3 = values[s], values[s + 1], values[s + 2], values[s + 3]
        for r in range(0, len(out), 2):
            a, b = out[r], out[r + 1]
            a0, a1, a2, a3 = scores[r, s], scores[r, s + 1], scores[r, s + 2], scores[r, s + 3]
            b0, b1, b2, b3 = scores[r + 1, s], scores[r + 1, s + 1], scores[r + 1, s + 2], scores[r + 1, s + 3]
            for i in range(C):
                a[i] = a[i] + a0 * v0[i] + a1 * v1[i] + a2 * v2[i] + a3 * v3[i]
                b[i] = b[i] + b0 * v0[i] + b1 * v1[i] + b2 * v2[i] + b3 * v3[i]
    for s in range(whole, num_values):
        for r in range(len(out)):
            for i in range(C):
                out[r, i] = out[r, i] + scores[r, s] * values[s, i]


@njit(nogil=True, cache=True, error_model="numpy")
def _score(logits: Floats, bias: Floats, scores: Floats, choice: Floats) -> None:
    """scores = sigmoid of logits, choice = scores + bias; all [E]."""
    for e in range(len(logits)):
        scores[e] = np.float32(1) / (np.float32(1) + kernel.exp(-logits[e]))
    for e in range(len(logits)):
        choice[e] = scores[e] + bias[e]


@njit(nogil=True, cache=True)
def _choose_row(
    logits: Floats,
    bias: Floats,
    top_groups: int,
    scale: float,
    scores: Floats,
    choice: Floats,
    groups: Floats,
    ids: Ints,
    weights: Floats,
) -> None:
    """See `tidesim.engine.model.Router`: ids in descending score; ties go to the lower id."""
    K, num_groups = len(ids), len(groups)
    by_group = choice.reshape((num_groups, len(choice) // num_groups))
    _score(logits, bias, scores, choice)
    for group in range(num_groups):
        best, second = _two_best(by_group[group])
        groups[group] = best + second
    # A group is dropped if so many are better, or as good and before it.
    for group in range(num_groups):
        num_better = 0
        for other in range(num_groups):
            if groups[other] > groups[group] or (groups[other] == groups[group] and other < group):
                num_better += 1
        if num_better >= top_groups:
            by_group[group] = -np.inf
    # From here on, the best expert of each group.
    for group in range(num_groups):
        groups[group] = by_group[group, _first_of_best(by_group[group])]
    total = np.float32(0)
    for k in range(K):
        group = _first_of_best(groups)
        place = _first_of_best(by_group[group])
        top = group * by_group.shape[1] + place
        ids[k], weights[k] = top, scores[top]
        total += scores[top]
        by_group[group, place] = -np.inf
        groups[group] = by_group[group, _first_of_best(by_group[group])]
    for k in range(K):
        share = weights[k] / (total + np.float32(1e-20)) if K > 1 else weights[k]
        weights[k] = share * np.float32(scale)


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def _two_best(numbers: Floats) -> tuple[np.float32, np.float32]:
    """The largest number and the next one, which may be as large."""
    best = second = np.float32(-np.inf)
    for i in range(len(numbers)):
        best = max(best, numbers[i])
    num_best = 0
    for i in range(len(numbers)):
        num_best += numbers[i] == best
        second = max(second, numbers[i] if numbers[i] < best else np.float32(-np.inf))
    return best, best if num_best > 1 else second


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def _first_of_best(numbers: Floats) -> int:
    """Where the largest number stands, the first of equals."""
    best = numbers[0]
    for i in range(len(numbers)):
        best = max(best, numbers[i])
    for i in range(len(numbers)):
        if numbers[i] == best:
            return i
    return 0


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def _likeliest(logits: Floats) -> tuple[int, np.float32]:
    """The likeliest token of logits [V], the first of equals, and its probability."""
    token = _first_of_best(logits)
    best, total = logits[token], np.float32(0)
    for i in range(len(logits)):
        total += kernel.exp(logits[i] - best)
    return token, np.float32(1) / total
