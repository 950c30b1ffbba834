"""Cases on several processes: in order, and only a few ahead of who takes the outcomes."""

from collections.abc import Iterator

import pytest

from tidesim.workers import Workers


def add(setting: int, case: int) -> int:
    return setting + case


@pytest.mark.parametrize("num_workers", [1, 2])
def test_outcomes_come_in_order_and_cases_are_not_begun_far_ahead(num_workers: int) -> None:
    asked = []

    def cases() -> Iterator[int]:
        for case in range(40):
            asked.append(case)
            yield case

    with Workers(100, num_workers) as workers:
        outcomes = workers.map(add, cases())
        assert not asked
        for number, outcome in enumerate(outcomes):
            assert outcome == 100 + number
            assert len(asked) <= number + 4 * num_workers
    assert asked == list(range(40))


def fail(setting: int, case: int) -> int:
    raise ValueError(f"case {case}")


def test_what_a_case_raises_is_raised_here() -> None:
    with Workers(0, 2) as workers, pytest.raises(ValueError, match="case 3"):
        list(workers.map(fail, [3, 4]))
