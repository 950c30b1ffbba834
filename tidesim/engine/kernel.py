"""Routed experts on CPU cores: compiled, and the same to the last bit wherever and beside whatever an expert runs.

PyTorch's own bf16 matrix products reach a fraction of a core where it has no bf16 instructions, and its float32 ones
depend on how many rows run together. Here every row of an expert goes through the same four-row micro-kernel, padded
with zero rows where there are fewer, so its result depends on the row and the weights alone: not on how many other
rows there are, on which thread runs it, or in which memory the weights lie. Weights stay as they are stored (bfloat16
or float32) and are widened in registers; products are summed in float32, in an order that only the sizes fix.

All functions release the GIL, so threads of Python run them side by side. Letters: T tokens, K top-k, E experts,
D hidden size, I expert width, A experts that have rows, P = T * K pairs of a token and an expert.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from tidesim.engine.tiles import Progress, first_tile, next_tile, no_progress, wait_for

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

ROW_TILE = 4  # rows of one micro-kernel: time goes up in steps of so many rows
CHUNK = 32  # rows that share one sweep over the weights; they and a tile of weights stay in a core's own cache
OUTPUT_TILE = 24  # weight rows that all rows of a chunk go through before the next ones are read
# A sum may be split over the lanes of a vector and a product joined with its sum; nothing else is loosened.
FASTMATH = {"reassoc", "contract", "nsz"}

# How a stored dtype is handed to compiled code, which knows no bfloat16.
STORED = {torch.bfloat16: np.uint16, torch.float32: np.float32}


class ExpertWeights(NamedTuple):
    """Where the three matrices of each expert lie: addresses [A] of gate and up [I, D] and of down [D, I]."""

    gate: Ints
    up: Ints
    down: Ints

    def of(self, experts: Ints) -> "ExpertWeights":
        """The addresses of some of the experts."""
        return ExpertWeights(self.gate[experts], self.up[experts], self.down[experts])


class Pairs(NamedTuple):
    """The routed pairs of a forward, sorted by key: the slots 0..B-1, and behind them B + e for expert e in no slot.

    Parameters
    ----------
    counts : int32 [B + E], pairs of each key.
    first : int64 [B + E + 1], where each key's pairs begin.
    tokens : int64 [P], the token of each pair.
    places : int64 [T, K], where the pair of a token's k-th choice stands.
    """

    counts: npt.NDArray[np.int32]
    first: Ints
    tokens: Ints
    places: Ints


@intrinsic
def _widen(typing_context: Any, stored: Any) -> Any:
    """A stored weight as float32; a bfloat16 is its upper half."""

    def widen_bfloat16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        int32 = ir.IntType(32)
        shifted = builder.shl(builder.zext(arguments[0], int32), ir.Constant(int32, 16))
        return builder.bitcast(shifted, ir.FloatType())

    def keep(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    return types.float32(stored), widen_bfloat16 if stored == types.uint16 else keep


@intrinsic
def _from_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 that these 32 bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """`address` as a pointer to elements of the array `like`."""
    target = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(target))

    return target(types.int64, like), generate


@njit(inline="always")
def exp(x: Any) -> Any:
    """e^x in float32, to two units in the last place, in a form that vectorises; calls of the C library do not.

    x = n ln 2 + r, and e^r by its series to r^6 (the next term is below 2^-24 for |r| <= ln 2 / 2); at the ends of the
    range the result is the smallest normal number and infinity.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.7))
    n = np.int32(np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
    r = x - np.float32(n) * np.float32(0.693359375) - np.float32(n) * np.float32(-2.12194440e-4)
    series = np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = series * r + np.float32(1)
    series = series * r + np.float32(1)
    return series * _from_bits(np.int32((n + 127) << 23))


@njit(nogil=True, cache=True)
def _sort_pairs(choices: Ints, slots: Ints, num_slots: int) -> tuple[Any, Ints, Ints, Ints]:
    """The fields of `Pairs`, by a counting sort: tokens ascend within a slot or expert."""
    T, K = choices.shape
    num_keys = num_slots + len(slots)
    keys = np.empty(len(slots), np.int64)
    for expert in range(len(slots)):
        keys[expert] = slots[expert] if slots[expert] >= 0 else num_slots + expert
    counts = np.zeros(num_keys, np.int32)
    for token in range(T):
        for k in range(K):
            counts[keys[choices[token, k]]] += 1
    first = np.zeros(num_keys + 1, np.int64)
    for key in range(num_keys):
        first[key + 1] = first[key] + counts[key]
    free = first[:-1].copy()
    tokens = np.empty(T * K, np.int64)
    places = np.empty((T, K), np.int64)
    for token in range(T):
        for k in range(K):
            key = keys[choices[token, k]]
            places[token, k] = free[key]
            tokens[free[key]] = token
            free[key] += 1
    return counts, first, tokens, places


@njit(nogil=True, cache=True)
def busiest_first(counts: Any, keys: Ints) -> tuple[Ints, int]:
    """The order to run experts in so that no thread is left with a busy one, and how many tiles of rows they have.

    The order is one of places in `keys`; counts as in `Pairs`. A tile of rows is computed whole even if it is not full.
    """
    tiles = np.empty(len(keys), np.int64)
    for place in range(len(keys)):
        tiles[place] = -((counts[keys[place]] + ROW_TILE - 1) // ROW_TILE)
    return np.argsort(tiles, kind="mergesort"), -tiles.sum()


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def multiply(weights: Any, rows: Floats, num_rows: int, out: Floats, first_row: int, first_column: int) -> None:
    """out[first_row + r, first_column + o] = rows[r, :] . weights[o, :] for r < num_rows.

    rows [R, width] has rows to spare up to a multiple of ROW_TILE. Sums of four rows with three weight rows fill the
    registers of a core with 16 vectors; at the end the last weight row stands in for those that are missing.
    """
    num_outputs, width = weights.shape
    last = num_outputs - 1
    for tile in range(0, num_outputs, OUTPUT_TILE):
        for r in range(0, num_rows, ROW_TILE):
            x0, x1, x2, x3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
            row, left = first_row + r, num_rows - r
            for o in range(tile, min(tile + OUTPUT_TILE, num_outputs), 3):
                p, q = min(o + 1, last), min(o + 2, last)
                w0, w1, w2 = weights[o], weights[p], weights[q]
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = np.float32(0)
                for i in range(width):
                    u, v, w = _widen(w0[i]), _widen(w1[i]), _widen(w2[i])
                    a0 += u * x0[i]
                    b0 += v * x0[i]
                    c0 += w * x0[i]
                    a1 += u * x1[i]
                    b1 += v * x1[i]
                    c1 += w * x1[i]
                    a2 += u * x2[i]
                    b2 += v * x2[i]
                    c2 += w * x2[i]
                    a3 += u * x3[i]
                    b3 += v * x3[i]
                    c3 += w * x3[i]
                o, p, q = first_column + o, first_column + p, first_column + q
                out[row, o], out[row, p], out[row, q] = a0, b0, c0
                if left > 1:
                    out[row + 1, o], out[row + 1, p], out[row + 1, q] = a1, b1, c1
                if left > 2:
                    out[row + 2, o], out[row + 2, p], out[row + 2, q] = a2, b2, c2
                if left > 3:
                    out[row + 3, o], out[row + 3, p], out[row + 3, q] = a3, b3, c3


# Python's check for a division by zero keeps loops from being turned into vectors.
@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def activate(gates: Floats, ups: Floats, num_rows: int, first: int, end: int) -> None:
    """gates = silu(gates) * ups in the columns first:end of the first rows, in place."""
    for r in range(num_rows):
        for i in range(first, end):
            gates[r, i] = gates[r, i] / (np.float32(1) + exp(-gates[r, i])) * ups[r, i]


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def run_experts(
    progress: Progress,
    x: Floats,
    tokens: Ints,
    first: Ints,
    keys: Ints,
    order: Ints,
    gate_at: Ints,
    up_at: Ints,
    down_at: Ints,
    like: Any,
    width: int,
    num_parts: int,
    hidden: Floats,
    out: Floats,
) -> None:
    """out[p] = down(silu(gate x) * up x) for the pairs p of each expert, x being x[tokens[p]].

    Threads take one part of an expert after another, in an order given: first of gate and up, then of down.

    Parameters
    ----------
    x : float32 [T, D]. out : float32 [P, D]; other rows of it are left alone.
    tokens, first : see `Pairs`. keys : int64 [A], of the experts. order : int64 [A], of places in `keys`.
    gate_at, up_at, down_at : int64 [A], see `ExpertWeights`.
    like : any array of the dtype that weights are stored in. width : I.
    num_parts : of each expert's outputs; with one, a few experts would keep a few threads busy.
    hidden : float32 [P + ROW_TILE, I], memory for what is between the two.
    """
    D, num_tiles = x.shape[1], len(keys) * num_parts
    rows, gates, ups = (
        np.zeros((CHUNK, D), np.float32),
        np.empty((CHUNK, width), np.float32),
        np.empty((CHUNK, width), np.float32),
    )
    turn = first_tile(progress, 0)
    while turn < num_tiles:
        a, part = order[turn // num_parts], turn % num_parts
        here, there = width * part // num_parts, width * (part + 1) // num_parts
        gate = carray(_pointer(gate_at[a], like), (width, D))[here:there]
        up = carray(_pointer(up_at[a], like), (width, D))[here:there]
        end = first[keys[a] + 1]
        for start in range(first[keys[a]], end, CHUNK):
            num_rows = min(CHUNK, end - start)
            for r in range(num_rows):
                rows[r] = x[tokens[start + r]]
            multiply(gate, rows, num_rows, gates, 0, 0)
            multiply(up, rows, num_rows, ups, 0, 0)
            activate(gates, ups, num_rows, 0, there - here)
            for r in range(num_rows):
                hidden[start + r, here:there] = gates[r, : there - here]
        turn = next_tile(progress, 0)
    wait_for(progress, 0, num_tiles)
    turn = first_tile(progress, 1)
    while turn < num_tiles:
        a, part = order[turn // num_parts], turn % num_parts
        here, there = D * part // num_parts, D * (part + 1) // num_parts
        down = carray(_pointer(down_at[a], like), (D, width))[here:there]
        end = first[keys[a] + 1]
        for start in range(first[keys[a]], end, CHUNK):
            multiply(down, hidden[start:], min(CHUNK, end - start), out, start, here)
        turn = next_tile(progress, 1)
    wait_for(progress, 1, num_tiles)


@njit(nogil=True, cache=True, fastmath={"contract"})
def combine(outputs: Floats, places: Ints, weights: Floats) -> Floats:
    """Weighted sum of each token's expert outputs, in the order of its choices. [P, D], [T, K], [T, K] -> [T, D]."""
    T, K = places.shape
    total = np.zeros((T, outputs.shape[1]), np.float32)
    for token in range(T):
        for k in range(K):
            weight, output = weights[token, k], outputs[places[token, k]]
            for i in range(len(output)):
                total[token, i] += weight * output[i]
    return total


def padded(num_rows: int) -> int:
    """So many rows, and what is missing to whole tiles of rows."""
    return -(-num_rows // ROW_TILE) * ROW_TILE


def stored_like(dtype: torch.dtype) -> npt.NDArray[Any]:
    """An empty array of the type that compiled code reads weights of `dtype` in.

    Raise TypeError for a dtype that it does not read.
    """
    if dtype not in STORED:
        raise TypeError(f"weights stored as {dtype} cannot be used on the CPU; store them as bfloat16 or float32.")
    return np.empty(0, STORED[dtype])


def stored(weight: torch.Tensor) -> npt.NDArray[Any]:
    """A weight as compiled code reads it; it shares the tensor's memory if that is contiguous.

    Raise TypeError for a dtype that it does not read.
    """
    dtype = stored_like(weight.dtype).dtype
    same_width = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    return weight.detach().contiguous().view(same_width).numpy().view(dtype)


def compile_experts(dtype: torch.dtype) -> None:
    """Call what runs experts of `dtype` once, so that no run waits for its compilation."""
    pairs, only = sorted_pairs(np.zeros((1, 1), np.int64), np.array([0]), 1), np.array([0])
    x, weights, out = np.zeros((1, 2), np.float32), np.zeros(4, STORED[dtype]), np.zeros((1, 2), np.float32)
    at = (np.array([weights.ctypes.data]),) * 3
    order, _ = busiest_first(pairs.counts, only)
    hidden = np.zeros((1 + ROW_TILE, 2), np.float32)
    run_experts(no_progress(), x, pairs.tokens, pairs.first, only, order, *at, weights[:0], 2, 1, hidden, out)
    combine(out, pairs.places, np.zeros((1, 1), np.float32))


def sorted_pairs(choices: Ints, slots: Ints, num_slots: int) -> Pairs:
    """The pairs of choices [T, K], given the slot of each expert, [E]; -1 for one that is in none."""
    return Pairs(*_sort_pairs(choices, slots, num_slots))
