"""Threads that share the work of compiled functions."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tidesim.engine import kernel
from tidesim.engine.kernel import ExpertWeights, Pairs
from tidesim.engine.tiles import no_progress

# Multiply-adds below which a share is not worth another thread: waking one takes as long as about so many.
_LEAST_SHARE = 1 << 20
# Parts of work for each thread, so that they end together; and the fewest outputs that are worth a part.
_TURNS = 4
_LEAST_OUTPUTS = 32

Call = tuple[Callable[..., None], tuple[Any, ...]]


class Cores:
    """A number of threads for compiled functions; the calling thread is one of them.

    Results do not depend on how many there are, see `tidesim.engine.tiles`. One call at a time; use it in a `with`
    statement, or call `close`. Raise ValueError if `num_threads` < 1.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads(={num_threads}) must be >= 1.")
        self.num_threads = num_threads
        self._hidden = np.zeros((0, 0), np.float32)
        self._calls: list[SimpleQueue[Call | None]] = [SimpleQueue() for _ in range(num_threads - 1)]
        self._helpers = [threading.Thread(target=_help, args=(calls,), daemon=True) for calls in self._calls]
        for helper in self._helpers:
            helper.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        for calls in self._calls:
            calls.put(None)
        for helper in self._helpers:
            helper.join()

    def run(self, function: Callable[..., None], num_products: int, *arguments: Any) -> None:
        """Call compiled `function(progress, *arguments)` on as many threads as `num_products` multiply-adds are worth.

        A helper that comes late does less, and one that comes too late finds nothing left to do.
        """
        progress = no_progress()
        num_helpers = min(len(self._calls), num_products // _LEAST_SHARE - 1)
        if num_helpers > 0:
            call = (function, (progress, *arguments))
            for calls in self._calls[:num_helpers]:
                calls.put(call)
        function(progress, *arguments)

    def run_experts(
        self,
        x: npt.NDArray[np.float32],
        pairs: Pairs,
        keys: npt.NDArray[np.int64],
        weights: ExpertWeights,
        like: npt.NDArray[Any],
        width: int,
        out: npt.NDArray[np.float32],
    ) -> None:
        """Run the experts under `keys` on their pairs, see `kernel.run_experts`; `weights` has their addresses."""
        order, num_tiles = kernel.busiest_first(pairs.counts, keys)
        num_products = num_tiles * kernel.ROW_TILE * 3 * width * x.shape[1]
        which = (pairs.tokens, pairs.first, keys, order)
        num_parts = min(-(-_TURNS * self.num_threads // max(1, len(keys))), max(1, width // _LEAST_OUTPUTS))
        if self._hidden.shape[1] != width or len(self._hidden) < len(out) + kernel.ROW_TILE:
            self._hidden = np.zeros((len(out) + kernel.ROW_TILE, width), np.float32)
        self.run(kernel.run_experts, num_products, x, *which, *weights, like, width, num_parts, self._hidden, out)


def _help(calls: "SimpleQueue[Call | None]") -> None:
    """Call what comes, until told to end."""
    while (call := calls.get()) is not None:
        function, arguments = call
        function(*arguments)
