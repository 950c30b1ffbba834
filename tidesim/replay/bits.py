"""Sets of experts as words of 64 bits each, and what a processor can ask of a word.

A set has as many words as hold all experts of a layer, in whole `STRIDE`s, so that loops over words have no odd ends.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from tidesim.compiling import Whole, inlined

Words = npt.NDArray[np.uint64]

WORD = 64
STRIDE = 4


def num_words(num_experts: int) -> int:
    """Words of a set of a layer's experts."""
    return STRIDE * -(-num_experts // (STRIDE * WORD))


def num_bits(num_experts: int) -> int:
    """Bits of a set of a layer's experts."""
    return WORD * num_words(num_experts)


def words_of(experts: Iterable[int], num_experts: int) -> Words:
    """The set of `experts`: uint64 [W]."""
    is_in = np.zeros(num_bits(num_experts), np.bool_)
    is_in[list(experts)] = True
    # The lowest id is the lowest bit of the first word, on machines of either byte order.
    return np.packbits(is_in, bitorder="little").view("<u8").astype(np.uint64)


@intrinsic  # type: ignore[untyped-decorator]
def ones(_: Any, word: Any) -> Any:
    """How many bits of a word are set; int64."""
    return types.int64(word), lambda __, builder, ___, args: builder.ctpop(args[0])


@intrinsic  # type: ignore[untyped-decorator]
def lowest(_: Any, word: Any) -> Any:
    """The number of the lowest bit that is set, of a word that is not 0; int64."""

    def build(context: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.cttz(args[0], context.get_constant(types.boolean, 1))

    return types.int64(word), build


@inlined
def is_in(words: Any, expert: Whole) -> Whole:
    """1 if `expert` is in a set, else 0."""
    return np.int64((words[np.uint64(expert) >> np.uint64(6)] >> (np.uint64(expert) & np.uint64(63))) & np.uint64(1))


@inlined
def put(words: Any, expert: Whole) -> None:
    """Add `expert` to a set."""
    words[np.uint64(expert) >> np.uint64(6)] |= np.uint64(1) << (np.uint64(expert) & np.uint64(63))


@inlined
def take(words: Any, expert: Whole) -> None:
    """Take `expert` out of a set."""
    words[np.uint64(expert) >> np.uint64(6)] &= ~(np.uint64(1) << (np.uint64(expert) & np.uint64(63)))
