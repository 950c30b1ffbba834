"""Processes, or threads, that work on many cases of one setting: each gets it once, and then case after case."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

# Called with how many cases are done, and how many are known to be needed so far.
Progress = Callable[[int, int], None]

# Cases that are with the pool for each process: the one it works on, and enough that it never waits for the next.
_UNDER_WAY = 4

Setting = TypeVar("Setting")
Case = TypeVar("Case")
Outcome = TypeVar("Outcome")


class Workers(Generic[Setting]):
    """A pool of processes; use it in a `with` statement.

    Parameters
    ----------
    setting : what all cases share. It travels to each process once, not with every case.
    num_workers : processes, None for one per CPU. With 1, everything runs in this process. With more, a script needs
        the usual `if __name__ == "__main__":` guard, as new processes import it.
    are_threads : threads of this process in place of processes: for work that leaves the GIL for most of its time, as
        compiled code does. They begin at once and share what they work on.

    Raise ValueError if `num_workers` < 1.
    """

    def __init__(self, setting: Setting, num_workers: int | None = None, *, are_threads: bool = False) -> None:
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"workers(={num_workers}) must be >= 1.")
        self.setting = setting
        self._num_workers = num_workers or os.cpu_count() or 1
        self._are_threads = are_threads
        self._pool: ProcessPoolExecutor | ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._num_workers > 1 and self._are_threads:
            self._pool = ThreadPoolExecutor(self._num_workers)
        elif self._num_workers > 1:
            # Not "fork": it copies locks that threads of the caller, or of numpy, may hold.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._num_workers, mp_context=context, initializer=_begin, initargs=(self.setting,)
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def start(self) -> None:
        """Start the processes now and not with the first case, so that they do while this one prepares it."""
        if self._pool is not None:
            self._pool.submit(_nothing)

    def map(self, work: Callable[[Setting, Case], Outcome], cases: Iterable[Case]) -> Iterator[Outcome]:
        """`work(setting, case)` for each case, in order. For processes `work` must be a function of a module.

        Cases are begun while outcomes are taken, and only a few ahead of them, so that outcomes do not pile up.
        """
        if self._pool is None:
            yield from (work(self.setting, case) for case in cases)
            return
        waiting: deque[Future[Outcome]] = deque()
        for case in cases:
            waiting.append(self._submit(work, case))
            if len(waiting) >= _UNDER_WAY * self._num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def as_done(self, work: Callable[[Setting, Case], Outcome], cases: Iterable[Case]) -> Iterator[Outcome]:
        """`work(setting, case)` for each case as they are done, in any order; `work` as for `map`.

        Cases are taken from the iterable no sooner than they are needed, so that it may prepare them.
        """
        if self._pool is None:
            yield from (work(self.setting, case) for case in cases)
            return
        running: set[Future[Outcome]] = set()
        for case in cases:
            running.add(self._submit(work, case))
            if len(running) >= _UNDER_WAY * self._num_workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)

    def _submit(self, work: Callable[[Setting, Case], Outcome], case: Case) -> Future[Outcome]:
        assert self._pool is not None
        if self._are_threads:
            return self._pool.submit(work, self.setting, case)
        return self._pool.submit(_run, (work, case))


_setting: list[Any] = []


def _begin(setting: object) -> None:
    _setting.append(setting)
    # A process that waits for cases does not notice that who should send them was killed, and would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _nothing() -> None:
    """What a process does first; to be told so it must have imported this module, and with it the package."""


def _run(order: tuple[Callable[[Any, Any], Any], Any]) -> Any:
    work, case = order
    return work(_setting[0], case)
