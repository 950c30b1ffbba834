"""Threads that share the work of the compiled kernels.

Every output of a linear map and every expert is computed whole by one thread, so the results do not depend on how many
threads there are.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tidesim.engine import kernel
from tidesim.engine.kernel import ExpertWeights, Pairs

_TILE = 64  # outputs of a linear map are dealt to threads in multiples of so many
# Multiply-adds below which a part is not worth handing to another thread: waking one takes as long as some 4 million.
_LEAST_PART = 1 << 22


class Cores:
    """A number of threads for the compiled kernels; the calling thread is one of them.

    Use it in a `with` statement, or call `close`. Raise ValueError if `num_threads` < 1.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads(={num_threads}) must be >= 1.")
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads - 1) if num_threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def run_experts(
        self,
        x: npt.NDArray[np.float32],
        pairs: Pairs,
        experts: npt.NDArray[np.int64],
        weights: ExpertWeights,
        like: npt.NDArray[Any],
        width: int,
        out: npt.NDArray[np.float32],
    ) -> None:
        """Run `experts` on their pairs; see `kernel.run_experts`. `weights` has the addresses of these, in order."""
        begin, end = pairs.first[experts], pairs.first[experts + 1]

        def run(part: npt.NDArray[np.int64]) -> None:
            gate, up, down = weights.of(part)
            kernel.run_experts(x, pairs.tokens, begin[part], end[part], gate, up, down, like, width, out)

        # A tile of rows is computed whole even if it is not full.
        tiles = (end - begin + kernel.ROW_TILE - 1) // kernel.ROW_TILE
        num_parts = self._num_parts(int(tiles.sum()) * kernel.ROW_TILE * 3 * width * x.shape[1])
        # Dealt from the busiest down, so that no thread is left with several busy ones.
        busiest_first = np.argsort(-tiles, kind="stable")
        self._share(run, [busiest_first[start::num_parts] for start in range(num_parts)])

    def multiply(
        self, weights_at: int, like: npt.NDArray[Any], rows: npt.NDArray[np.float32], out: npt.NDArray[np.float32]
    ) -> None:
        """out[t, :] = weights . rows[t, :], see `kernel.multiply_rows`."""
        num_outputs = out.shape[1]
        num_parts = self._num_parts(rows.size * num_outputs)
        if num_parts == 1:
            kernel.multiply_rows(weights_at, like, rows, 0, num_outputs, out)
            return
        step = -(-num_outputs // (num_parts * _TILE)) * _TILE

        def run(first: int) -> None:
            kernel.multiply_rows(weights_at, like, rows, first, min(first + step, num_outputs), out)

        self._share(run, range(0, num_outputs, step))

    def _num_parts(self, num_products: int) -> int:
        """In how many parts so many multiply-adds are worth sharing."""
        return max(1, min(self.num_threads, num_products // _LEAST_PART))

    def _share(self, run: Callable[[Any], None], parts: Sequence[Any]) -> None:
        """Call `run` with each part: the first on this thread, the others on those of the pool."""
        if self._pool is None or len(parts) == 1:
            for part in parts:
                run(part)
            return
        waiting: list[Future[None]] = [self._pool.submit(run, part) for part in parts[1:]]
        run(parts[0])
        for future in waiting:
            future.result()
