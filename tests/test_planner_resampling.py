"""Intervals over sequences: how far out their percentiles lie, and how often they hold what they should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidesim.planner.resampling import Interval, caution, draw, intervals_of, tail


def test_fewer_sequences_need_percentiles_further_out():
    tails = [tail(num_sequences) for num_sequences in (2, 3, 4, 8, 16, 10_000)]
    assert tails == sorted(tails)
    assert tails[-1] == pytest.approx(0.025, rel=1e-3)
    # 4 sequences: Student's t for 3 degrees is 3.182, times sqrt(4 / 3); so far out lies 0.012 % of a normal curve.
    assert tail(4) == pytest.approx(0.000119, rel=0.02)
    with pytest.raises(ValueError, match=r"num_sequences\(=1\)"):
        tail(1)


def test_an_interval_of_two_sequences_is_all_that_resamples_show():
    (interval,) = intervals_of(np.array([[3.0], [1.0], [2.0]]), 2)
    assert (interval.low, interval.high) == pytest.approx((1.0, 3.0))


def test_an_interval_knows_what_it_holds():
    assert 0.5 in Interval(0.5, 1.0)
    assert 1.1 not in Interval(0.5, 1.0)


@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_every_resample_has_as_many_sequences(num_sequences, seed):
    times = draw(num_sequences, 30, seed)
    assert times.shape == (30, num_sequences)
    assert (times.sum(axis=1) == num_sequences).all()
    np.testing.assert_array_equal(times, draw(num_sequences, 30, seed))


@pytest.mark.parametrize(("num_sequences", "least"), [(4, 0.80), (8, 0.90)])
def test_what_was_put_in_is_covered_as_often_as_the_module_says(num_sequences, least):
    rng, num_covered = np.random.default_rng(0), 0
    for seed in range(200):
        tokens = rng.lognormal(4.5, 0.5, num_sequences)
        seconds = tokens / 20 * rng.lognormal(-0.02, 0.2, num_sequences)  # a mean of 1
        times = draw(num_sequences, 1000, seed)
        (interval,) = intervals_of(((times @ tokens) / (times @ seconds))[:, None], num_sequences)
        num_covered += 20.0 in interval
    assert num_covered / 200 >= least


def test_few_sequences_call_for_caution():
    assert "no interval" in caution(1)
    assert "only 4 sequences" in caution(4)
    assert caution(5) == ""
