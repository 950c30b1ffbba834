"""Cases on several processes or threads: in order, and only a few ahead of who takes the outcomes."""

import os
from collections.abc import Iterator

import pytest

from tidesim.workers import Workers


def add(setting: int, case: int) -> int:
    return setting + case


@pytest.mark.parametrize(("num_workers", "are_threads"), [(1, False), (2, False), (2, True)])
def test_outcomes_come_in_order_and_cases_are_not_begun_far_ahead(num_workers: int, are_threads: bool) -> None:
    asked = []

    def cases() -> Iterator[int]:
        for case in range(40):
            asked.append(case)
            yield case

    with Workers(100, num_workers, are_threads=are_threads) as workers:
        outcomes = workers.map(add, cases())
        assert not asked
        for number, outcome in enumerate(outcomes):
            assert outcome == 100 + number
            assert len(asked) <= number + 4 * num_workers
    assert asked == list(range(40))


def fail(setting: int, case: int) -> int:
    raise ValueError(f"case {case}")


def process_id(_: None, __: int) -> int:
    return os.getpid()


def test_threads_are_of_this_process_and_processes_are_not() -> None:
    for are_threads in (True, False):
        with Workers(None, 2, are_threads=are_threads) as workers:
            workers.start()
            found = {*workers.map(process_id, range(4)), *workers.as_done(process_id, range(4))}
        assert (found == {os.getpid()}) == are_threads
        assert are_threads or os.getpid() not in found


@pytest.mark.parametrize("are_threads", [False, True])
def test_what_a_case_raises_is_raised_here(are_threads: bool) -> None:
    with Workers(0, 2, are_threads=are_threads) as workers, pytest.raises(ValueError, match="case 3"):
        list(workers.map(fail, [3, 4]))
