"""Threads that share tiles do each of them once, phase by phase, and wait for nobody who has not begun."""

import threading
import time

import numpy as np
import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from tidesim.engine import cores as cores_module
from tidesim.engine.cores import Cores
from tidesim.engine.tiles import MAX_PHASES, Progress, first_tile, next_tile, no_progress, wait_for


@njit(nogil=True)
def add_up(progress: Progress, numbers: np.ndarray, sums: np.ndarray) -> None:
    """Phase 0 doubles the numbers; phase 1 gives sums[i] the sum of all that are double by then, plus i."""
    tile = first_tile(progress, 0)
    while tile < len(numbers):
        numbers[tile] *= 2
        tile = next_tile(progress, 0)
    wait_for(progress, 0, len(numbers))
    last = MAX_PHASES - 1
    tile = first_tile(progress, last)
    while tile < len(sums):
        total = tile
        for number in numbers:
            total += number
        sums[tile] += total
        tile = next_tile(progress, last)
    wait_for(progress, last, len(sums))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 300), st.integers(0, 40))
def test_every_tile_is_done_once_and_after_those_of_the_phase_before(
    num_threads: int, num_numbers: int, num_sums: int
) -> None:
    numbers, sums, progress = np.arange(num_numbers), np.zeros(num_sums, np.int64), no_progress()
    threads = [threading.Thread(target=add_up, args=(progress, numbers, sums)) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(numbers, 2 * np.arange(num_numbers))
    np.testing.assert_array_equal(sums, num_numbers * (num_numbers - 1) + np.arange(num_sums))


def test_who_comes_late_changes_nothing() -> None:
    numbers, sums, progress = np.arange(50), np.zeros(7, np.int64), no_progress()
    add_up(progress, numbers, sums)
    before = sums.copy()
    add_up(progress, numbers, sums)
    np.testing.assert_array_equal(sums, before)
    np.testing.assert_array_equal(numbers, 2 * np.arange(50))


def test_helpers_that_are_busy_elsewhere_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores_module, "_LEAST_SHARE", 1)
    with Cores(3) as cores:
        is_free = threading.Event()
        cores.run(lambda progress: None if threading.current_thread() is threading.main_thread() else wait(is_free), 9)
        for _ in range(3):
            numbers, sums = np.arange(50), np.zeros(7, np.int64)
            cores.run(add_up, 100, numbers, sums)
            np.testing.assert_array_equal(sums, 50 * 49 + np.arange(7))
        is_free.set()


def wait(event: threading.Event) -> None:
    assert event.wait(60)


def test_helpers_end_when_they_are_told_to() -> None:
    before = threading.active_count()
    cores = Cores(4)
    assert threading.active_count() == before + 3
    cores.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="num_threads"):
        Cores(0)


def test_small_calls_stay_on_one_thread() -> None:
    seen: list[str] = []
    with Cores(2) as cores:
        cores.run(lambda progress: seen.append(threading.current_thread().name), 1000)
        time.sleep(0.05)
        assert seen == [threading.current_thread().name]
