"""What tidesim's own policy expects is learnt and remembered as it says; worked out by hand."""

from itertools import accumulate
from math import log

import numpy as np
import pytest
from gain_cases import COMMIT, DENOISE, PREFILL, costs_of, info, sequences_of
from toy import toy_workload

from tidesim.errors import InputError
from tidesim.policies import Shape, policy
from tidesim.policies.foresight import FADE, NUM_FEATURES, Foresight, situation, uses_to_come
from tidesim.policies.foresight_kernel import new_memory, see

ALL_AHEAD = 1 + FADE + FADE**2 + FADE**3  # used in each of the next forwards


def test_uses_to_come_fade_by_how_soon_they_are_and_end_with_the_sequence() -> None:
    workload = sequences_of([[1, 0], [0, 2], [0, 1], [3, 1], [0, 1], [1, 1]], [[1, 1], [1, 0]])
    expected = [
        [FADE**2, 1 + FADE + FADE**2 + FADE**3],
        [FADE + FADE**3, 1 + FADE + FADE**2 + FADE**3],
        [1 + FADE**2, 1 + FADE + FADE**2],
        [FADE, 1 + FADE],
        [1, 1],
        [0, 0],  # the next sequence says nothing about this one
        [1, 0],
        [0, 0],
    ]
    assert np.array(list(uses_to_come(workload)))[:, 0] == pytest.approx(np.array(expected))


def test_a_forward_is_of_one_situation() -> None:
    assert [situation(info(kind=kind, step=9)) for kind in (PREFILL, COMMIT)] == [0, 1]
    steps = (0, 1, 2, 3, 4, 7, 8, 30)
    assert [situation(info(step=step)) for step in steps] == [2, 3, 4, 4, 5, 5, 6, 6]


def test_features_follow_a_change_of_block_and_of_sequence() -> None:
    memory = tuple(new_memory(np.array([[0.25]]), np.array([[0.5]]), np.zeros((1, NUM_FEATURES))))
    places = [(0, 1), (0, 1), (0, 2), (1, 2)]  # sequence and block
    seen = []
    for (sequence, block), count in zip(places, (1, 0, 2, 1), strict=True):
        features = np.zeros((NUM_FEATURES, 1))
        see(memory, 0, sequence, block, 16, np.array([count], np.int32), features)
        seen.append(features[:, 0])
    # 16 rows count double. One row is log 3, two are log 5; each turn halves what was before.
    much = list(accumulate((log(3), 0, log(5), log(3)), lambda before, now: (before + now) / 2, initial=0.0))[1:]
    assert np.array(seen) == pytest.approx(
        np.array(
            [
                [1, 1, log(3), 0.5, 0.2, 0.05, much[0], 1 / 1, 1 / 1, 0.25, 0.5],
                [1, 0, 0, 0.25, 0.16, 0.0475, much[1], 1 / 2, 1 / 2, 0.25, 0.5],
                [1, 1, log(5), 0.625, 0.328, 0.095125, much[2], 1 / 1, 2 / 3, 0.25, 0.5],
                [1, 1, log(3), 0.8125, 0.4624, 0.05, much[3], 1 / 1, 1 / 1, 0.25, 0.5],
            ]
        )
    )


@pytest.mark.parametrize(
    ("rule", "used_now", "not_now"),
    [("again iff used now", ALL_AHEAD, 0), ("again iff not used now", FADE + FADE**3, 1 + FADE**2)],
)
def test_what_the_corpus_always_does_is_expected(rng, rule: str, used_now: float, not_now: float) -> None:
    sequences = []
    for _ in range(30):
        used = rng.permutation([2, 2, 2, 0, 0, 0])
        sequences.append([2 - used if step % 2 and "not" in rule else used for step in range(10)])
    foresight = Foresight(sequences_of(*sequences))
    foresight.begin(Shape(6, (2,)))
    assert np.array_equal(foresight.of(0), foresight.at_start[0])
    now = np.array([0, 2, 0, 2, 2, 0], np.int32)
    for step in range(4):  # later ones go together with some whose sequence ends soon
        counts = 2 - now if step % 2 and "not" in rule else now
        foresight.observe(info(step, sequence=99, step=step), 0, counts, np.zeros((1, 6), np.bool_))
        assert foresight.of(0) == pytest.approx(np.where(counts > 0, used_now, not_now), abs=0.1)


def test_a_situation_that_the_corpus_never_shows_goes_by_all_others_together(rng) -> None:
    # Every forward of this corpus is the first step of a block, so all of it is what any other situation goes by.
    tables = rng.permuted(np.tile([2, 2, 2, 0, 0, 0], (40, 1)), axis=1)
    corpus = sequences_of(tables, steps=[0] * 40)
    expected = {}
    for kind, step in ((DENOISE, 0), (DENOISE, 5), (COMMIT, 0), (PREFILL, 0)):
        foresight = Foresight(corpus)
        foresight.begin(Shape(6, (2,)))
        foresight.observe(info(kind=kind, step=step), 0, tables[0].astype(np.int32), np.zeros((1, 6), np.bool_))
        expected[kind, step] = foresight.of(0).copy()
    seen = expected.pop((DENOISE, 0))
    assert seen.max() > 0.1
    for unseen in expected.values():
        assert unseen == pytest.approx(seen, rel=1e-3)


def test_the_rows_of_the_last_use_are_remembered_until_the_run_ends() -> None:
    foresight = Foresight(sequences_of([[1, 1, 1]]))
    for _ in range(2):
        foresight.begin(Shape(3, (1,)))
        assert foresight.rows.tolist() == [[1, 1, 1]]
        for index, row in enumerate(([5, 0, 2], [0, 0, 3])):
            foresight.observe(info(index), 0, np.array(row, np.int32), np.zeros((1, 3), np.bool_))
        assert foresight.rows.tolist() == [[5, 1, 3]]


def test_nobody_is_expected_less_than_never_or_more_than_always(rng) -> None:
    tables = rng.integers(0, 2, (12, 6))
    foresight = Foresight(sequences_of(tables))
    foresight.begin(Shape(6, (2,)))
    for index, row in enumerate(tables):
        foresight.observe(info(index, step=index), 0, (9 * row).astype(np.int32), np.zeros((1, 6), np.bool_))
        assert (foresight.of(0) >= 0).all()
        assert (foresight.of(0) <= ALL_AHEAD + 1e-12).all()


def test_a_corpus_of_nothing_or_of_another_shape_is_refused() -> None:
    corpus = sequences_of([[1, 0, 1]])
    with pytest.raises(InputError, match="the corpus holds no forward; give at least one sequence"):
        Foresight(toy_workload([[1, 1]], counts=np.zeros((0, 1, 2), np.int32)))
    with pytest.raises(InputError, match=r"the corpus counts \[1, 3\] experts \[L, E\]; the run has \[2, 3\]"):
        Foresight(corpus).begin(Shape(3, (1, 1)))
    with pytest.raises(InputError, match=r"\[1, 3\] experts \[L, E\]; the run has \[1, 8\]"):
        policy("gain", corpus=corpus).initial(Shape(8, (1,), costs_of()))
