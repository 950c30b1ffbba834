"""What TIDE's programme can be sure of: curves as scipy finds them, bands, and what it takes for granted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from tidesim.planner.curves import asymptotic_drift, fit_drift, fit_misses, missed_after, replaced_after
from tidesim.planner.tide_assumptions import (
    assumptions_of,
    constant_drift,
    one_budget,
    one_drift,
    one_interval,
    runs_of,
)
from tidesim.planner.tide_bands import most_chosen, shares_of
from tidesim.planner.tide_samples import Curves, Points, Samples

LAGS = np.arange(1.0, 13.0)
WEIGHT = 100.0 - LAGS


# --- the curves ---


def noisy(seed: int, size: float = 0.01):
    return np.random.default_rng(seed).normal(0, size, len(LAGS))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.6))
def test_drift_and_its_plain_band_are_those_of_scipy(seed, drift):
    replaced = np.clip(replaced_after(drift, LAGS) + noisy(seed), 0, 1)
    ours = float(fit_drift(LAGS, replaced[None], WEIGHT[None])[0])
    theirs, covariance = curve_fit(
        lambda lag, d: 1 - (1 - d) ** lag, LAGS, replaced, p0=[drift], sigma=WEIGHT**-0.5, bounds=(0, 1), xtol=1e-14
    )
    assert ours == pytest.approx(theirs[0], rel=1e-5)
    low, high = asymptotic_drift(ours, LAGS, replaced, WEIGHT, 0.95)
    if low > 0 and high < 1:
        # 2.201 is Student's t for 11 degrees of freedom.
        assert (high - low) / 2 == pytest.approx(2.201 * np.sqrt(covariance[0, 0]), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.5), st.floats(0.01, 0.2), st.floats(0.2, 1.5), st.floats(0, 0.02))
def test_no_curve_that_scipy_finds_misses_the_points_by_less(seed, start, growth, exponent, size):
    missed = np.abs(missed_after([start, growth, exponent], LAGS) + noisy(seed, size))

    def left(misses):
        return float(np.sum(WEIGHT * (missed_after(misses, LAGS) - missed) ** 2))

    ours = fit_misses(LAGS, missed[None], WEIGHT[None])[0]
    theirs, _ = curve_fit(
        lambda lag, a, b, c: a + b * lag**c,
        LAGS,
        missed,
        p0=[start, growth, exponent],
        sigma=WEIGHT**-0.5,
        bounds=([0, 0, 0], [np.inf, np.inf, 2]),
        max_nfev=2000,
    )
    assert left(ours) <= left(theirs) * (1 + 1e-6) + 1e-12


def test_one_lag_has_no_plain_band():
    assert asymptotic_drift(0.2, LAGS[:1], np.array([0.2]), WEIGHT[:1], 0.95) is None


# --- intervals that cannot be told apart ---


def test_shares_are_ranked_and_the_fewest_make_up_the_level():
    chosen = [4] * 12 + [3] * 6 + [5] * 1 + [2] * 1
    assert shares_of(chosen) == ((4, 0.6), (3, 0.3), (2, 0.05), (5, 0.05))
    assert most_chosen(shares_of(chosen), 0.95) == (2, 3, 4)
    assert most_chosen(shares_of(chosen), 0.9) == (3, 4)
    assert most_chosen(shares_of(chosen), 1.0) == (2, 3, 4, 5)


# --- the programme's samples ---


def samples_of(replaced, missed, num_pairs=None, late_ns=None, budget=10) -> Samples:
    """Of arrays [S, A, L], with a pair of steps for each lag unless it is said otherwise."""
    replaced, missed = np.array(replaced), np.array(missed)
    S, A, L = replaced.shape
    return Samples(
        num_pairs=np.ones((S, A), np.int64) if num_pairs is None else np.array(num_pairs),
        replaced=replaced,
        missed=missed,
        late_ns=np.zeros((S, L), np.int64) if late_ns is None else np.array(late_ns),
        budget=budget,
    )


def test_points_are_means_over_pairs_and_slots():
    samples = samples_of(
        [[[2, 4], [5, 5]], [[0, 1], [0, 0]]],
        [[[3, 3], [6, 8]], [[2, 2], [0, 0]]],
        num_pairs=[[2, 1], [1, 0]],
        late_ns=[[60, 40], [20, 0]],
    )
    both, doubled = samples.all_layers(np.array([[1.0, 1.0], [2.0, 0.0]]))[1][:, 0].tolist()
    assert both == pytest.approx((2 + 4 + 1) / (3 * 20))
    assert doubled == pytest.approx(6 / (2 * 20))
    points = samples.each_layer(np.array([[1.0, 1.0]]))
    assert points.num_pairs.tolist() == [[3, 1], [3, 1]]
    assert points.replaced.tolist() == pytest.approx(np.array([[2 / 30, 5 / 10], [5 / 30, 5 / 10]]))
    assert points.missed.tolist() == pytest.approx(np.array([[5 / 30, 6 / 10], [5 / 30, 8 / 10]]))
    # 80 ns for the 5 experts that the first layer misses one step late.
    assert points.host_s.tolist() == pytest.approx([16e-9, 8e-9])


def test_a_lag_that_a_resample_lacks_counts_for_nothing():
    samples = samples_of([[[2], [4]], [[3], [0]]], [[[1], [2]], [[1], [0]]], num_pairs=[[1, 1], [1, 0]])
    curves = Curves.of(samples.all_layers(np.array([[0.0, 2.0]])))
    assert curves.drift.tolist() == pytest.approx([0.3])


# --- what it takes for granted ---


def points_of(replaced, missed=None, num_pairs=None) -> Points:
    replaced = np.atleast_2d(np.array(replaced, np.float64))
    return Points(
        num_pairs=np.ones_like(replaced) if num_pairs is None else np.atleast_2d(np.array(num_pairs, np.float64)),
        replaced=replaced,
        missed=np.zeros_like(replaced) if missed is None else np.atleast_2d(np.array(missed, np.float64)),
        host_s=np.ones(len(replaced)),
    )


def test_runs_are_counted_and_expected():
    assert runs_of(np.array([1, 1, 1, -1, -1, -1])) == (2, 4.0)
    assert runs_of(np.array([1, -1, 1, -1])) == (4, 3.0)
    assert runs_of(np.array([1, 1])) == (1, 1.0)


def test_drift_that_slows_down_is_not_constant():
    # Half of the set goes in one step and nobody else in the second: 1 - sqrt(1 / 2) a step.
    slowing = points_of([0.5, 0.5])
    drawn = points_of([[0.49, 0.5], [0.5, 0.5], [0.51, 0.5]])
    found = constant_drift(slowing, 0.4, drawn, 6)
    assert found.holds is False
    assert found.figures["later"] == pytest.approx(1 - 0.5**0.5)
    # The curve for d = 0.4 goes through 0.4 and 0.64.
    assert found.figures["largest_residual"] == pytest.approx(0.14)
    assert found.sentence.startswith("drift is not constant: a set loses 50.00 % in its first step and 29.29 % a step")


def test_drift_that_is_constant_within_noise_may_be_so():
    drawn = points_of([[0.1, 0.18], [0.1, 0.20], [0.1, 0.19]])
    assert constant_drift(points_of([0.1, 0.19]), 0.1, drawn, 6).holds is True


def test_lags_with_few_pairs_do_not_decide():
    rare = points_of([0.1, 0.19, 0.1], num_pairs=[10, 5, 4])
    assert constant_drift(rare, 0.1, None, 1).figures["later_lag"] == 2


def test_layers_differ_if_their_spread_exceeds_what_sequences_alone_would_give():
    layers = points_of([[0.1], [0.3]])
    together = points_of([[0.1], [0.3], [0.2], [0.4], [0.05], [0.25]])  # 3 resamples, which move both layers alike
    found = one_drift(layers, together)
    assert (found.holds, found.figures["spread"]) == (False, pytest.approx(0.1))
    assert found.figures["noise"] == pytest.approx(0, abs=1e-9)
    apart = points_of([[0.1], [0.3], [0.3], [0.1]])
    assert one_drift(layers, apart).holds is True
    assert one_drift(layers, None).holds is None


def test_one_budget_goes_by_what_is_missed_at_the_chosen_interval():
    layers = points_of([[0, 0], [0, 0]], missed=[[0.1, 0.2], [0.1, 0.6]])
    assert one_budget(layers, None, 1).figures["spread"] == 0
    assert one_budget(layers, None, 2).figures["most"] == 0.6
    assert one_budget(layers, None, 2).sentence == (
        "a set 2 steps old misses 20 % of the slots' number in layer 0 and 60 % in layer 1."
    )


def test_one_interval_costs_what_layers_would_save_by_their_own():
    # Without any drift copies are free, so that a layer goes by its misses: one wants any interval, one the shortest.
    flat, rising = [0.2, 0.2, 0.2], [0.1, 0.2, 0.3]
    free = one_interval(points_of(np.zeros((2, 3)), missed=[flat, rising]), 0.0, 1, 4)
    assert (free.holds, free.figures["loss"]) == (True, 0.0)
    # All of a set goes at each step: copies cost 2 s / tau a step and slot, and misses rise by 0, or by 3 s a step.
    layers = points_of(np.ones((2, 3)), missed=[[0, 0, 0], [3, 6, 9]])
    dear = one_interval(layers, 2.0, 1, 4)
    # 4 steps: 8 / tau for one, 8 / tau + 12 tau for the other; apart 8 / 3 + 20, together 28 with tau = 1.
    assert dear.figures == {"shortest": 1, "longest": 3, "loss": pytest.approx(28 / (8 / 3 + 20) - 1)}
    assert dear.holds is False


def test_one_layer_has_nobody_to_differ_from():
    samples = samples_of([[[2], [4]], [[3], [5]]], [[[1], [2]], [[1], [2]]])
    points = samples.all_layers(np.ones((1, 2)))
    made = assumptions_of(samples, None, points, Curves.of(points), 1.0, 3)
    assert [assumption.name for assumption in made] == ["constant drift"]
