"""How threads of compiled code share work without a lock: in phases, and a phase in tiles.

All threads call the same compiled function with the same counters. In each phase every thread takes the next tile that
nobody has taken, until none is left, and then waits for those that others still work on. A thread that comes late finds
what is left to do; one that never comes is not waited for. A tile is computed whole by one thread, so results do not
depend on how many there are.

    tile = first_tile(progress, phase)
    while tile < num_tiles:
        ...
        tile = next_tile(progress, phase)
    wait_for(progress, phase, num_tiles)

`progress` holds two counters for each phase, each in a cache line of its own: tiles taken, and tiles done.
"""

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Progress = npt.NDArray[np.int64]

MAX_PHASES = 9
_LINE = 8  # int64 in a cache line


def no_progress() -> Progress:
    """Counters for a function that begins."""
    return np.zeros(MAX_PHASES * 2 * _LINE, np.int64)


@intrinsic
def _count(typing_context: Any, progress: Any, index: Any) -> Any:
    """Add one to a counter; its value before. What this thread wrote before is seen by who then reads the counter."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(progress)(context, builder, arguments[0]).data
        counter = builder.gep(data, [arguments[1]])
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(progress, types.int64), generate


@intrinsic
def _read(typing_context: Any, progress: Any, index: Any) -> Any:
    """The value of a counter now."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(progress)(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(progress, types.int64), generate


@intrinsic
def _let_others_run(typing_context: Any) -> Any:
    """Give the core to a thread that waits for one, where the system has a call for that."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if sys.platform != "win32":
            call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield")
            builder.call(call, [])
        return context.get_dummy_value()

    return types.void(), generate


@njit(inline="always")
def first_tile(progress: Progress, phase: int) -> int:
    """Take a tile of `phase`; a number past the last one says that none is left."""
    tile: int = _count(progress, np.int64(2 * phase * _LINE))
    return tile


@njit(inline="always")
def next_tile(progress: Progress, phase: int) -> int:
    """The tile taken last is done; take another."""
    _count(progress, np.int64((2 * phase + 1) * _LINE))
    tile: int = first_tile(progress, phase)
    return tile


@njit(inline="always")
def wait_for(progress: Progress, phase: int, num_tiles: int) -> None:
    """Wait until all tiles of `phase` are done."""
    while _read(progress, np.int64((2 * phase + 1) * _LINE)) < num_tiles:
        _let_others_run()
