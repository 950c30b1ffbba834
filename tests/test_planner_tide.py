"""TIDE's own programme: fits that find what was put in, and the interval that its formula asks for."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.execution import Costs
from tidesim.planner.tide_programme import (
    Lag,
    best_interval,
    fit_lags,
    lags_of,
    measure,
    tide_programme,
)
from tidesim.policies import policy

E = TOY.num_experts


def lags(drift: float, misses: tuple[float, float, float], num_lags: int = 20) -> list[Lag]:
    """Lags that follow the two forms exactly; fewer pairs of steps stand behind the longer ones."""
    start, growth, exponent = misses
    return [
        Lag(
            lag=lag,
            num_pairs=100 - lag,
            replaced=1 - (1 - drift) ** lag,
            missed=start + growth * lag**exponent,
        )
        for lag in range(1, num_lags + 1)
    ]


def costs(rows: int = 8) -> Costs:
    return Costs(TOY, toy_hardware(), toy_execution(), rows)


def row(*experts: int) -> list[list[int]]:
    """Counts [1, E] of a forward whose three rows route to these experts, two each."""
    return [[experts.count(expert) for expert in range(E)]]


# --- the fits ---


@settings(max_examples=25, deadline=None)
@given(drift=st.floats(0.001, 0.9))
def test_drift_is_found_again(drift):
    fit = fit_lags(lags(drift, (0.1, 0.02, 0.5)))
    assert fit.drift == pytest.approx(drift, rel=1e-4)
    assert fit.drift_r_squared == pytest.approx(1)
    assert fit.replaced(3) == pytest.approx(1 - (1 - drift) ** 3, rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(start=st.floats(0, 0.5), growth=st.floats(0.01, 0.2), exponent=st.floats(0.2, 1.5))
def test_growth_of_misses_is_found_again(start, growth, exponent):
    fit = fit_lags(lags(0.1, (start, growth, exponent)))
    assert fit.misses_r_squared > 0.9999
    assert fit.missed(5) == pytest.approx(start + growth * 5**exponent, rel=1e-2)


def test_a_set_that_never_fully_changes_shows_in_r_squared():
    # A fifth of the set changes at every step, the rest never does: no d describes that.
    core = [Lag(lag=lag, num_pairs=10, replaced=0.2, missed=0.3) for lag in range(1, 11)]
    fit = fit_lags(core)
    assert 0 < fit.drift < 0.2
    assert fit.drift_r_squared == 0.0
    assert fit.misses[1] == pytest.approx(0, abs=1e-6)
    assert fit.misses_r_squared == 1.0


def test_one_lag_is_enough_and_none_means_no_drift():
    one = fit_lags(lags(0.25, (0.1, 0.0, 1.0), num_lags=1))
    assert one.drift == pytest.approx(0.25, rel=1e-3)
    assert one.missed(1) == pytest.approx(0.1, rel=1e-3)
    assert (fit_lags([]).drift, fit_lags([]).missed(4)) == (0.0, 0.0)


# --- the minimum ---


def test_the_interval_is_where_the_sum_of_both_costs_is_least():
    assert best_interval([9, 4, 3, 2], [1, 2, 4, 9]) == 2
    assert best_interval([5, 4, 3], [1, 2, 3]) == 1  # of equals the shortest


def test_cheap_copies_ask_for_short_intervals_and_dear_ones_for_long():
    fit = fit_lags(lags(0.5, (0.0, 0.05, 1.0), num_lags=12))
    taus = np.arange(1, 12)
    replaced = np.array([fit.replaced(tau) for tau in taus])
    missed = np.array([fit.missed(tau) for tau in taus])
    chosen = [best_interval(list(copy_s / taus * replaced), list(missed)) for copy_s in (0.01, 0.2, 1.0, 10.0)]
    # The same sum with the d = 1/2 and f = tau / 20 that were put in.
    true = [min(taus, key=lambda tau: c / tau * (1 - 0.5**tau) + tau / 20) for c in (0.01, 0.2, 1.0, 10.0)]
    assert chosen == true
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (1, 11)


# --- from a trace ---


def lags_in(workload, num_lags: int) -> list[Lag]:
    samples = measure(workload, costs(), policy("tide", refresh_interval=1), 2, num_lags)
    return list(lags_of(samples.all_layers(np.ones((1, samples.num_sequences)))))


def test_lags_count_what_changed_and_what_an_old_set_misses():
    workload = toy_workload(row(3, 3, 3, 4, 4, 5), row(6, 6, 6, 0, 1, 2), row(4, 4, 4, 7, 7, 5))
    # Lag 1: {3, 4} -> {3, 6} replaces one of two and missed 6, 0, 1 and 2; {3, 6} -> {4, 6} replaces one and missed 4,
    # 7 and 5. Lag 2: {3, 4} -> {4, 6} replaces one and missed 7 and 5.
    assert lags_in(workload, 2) == [
        Lag(lag=1, num_pairs=2, replaced=2 / 4, missed=7 / 4),
        Lag(lag=2, num_pairs=1, replaced=1 / 2, missed=2 / 2),
    ]


def test_lags_stay_within_a_block():
    tables = [row(0, 0, 0, 1, 1, 1)] * 4
    workload = toy_workload(*tables, steps=[0, 1, 0, 1], block=np.array([1, 1, 2, 2], np.int32))
    assert [(lag.lag, lag.num_pairs) for lag in lags_in(workload, 3)] == [(1, 2)]


def test_prefill_and_commit_forwards_are_no_steps():
    workload = toy_workload(*[row(0, 0, 0, 1, 1, 1)] * 4, kinds="pddc", steps=[0, 0, 1, 2])
    assert [(lag.lag, lag.num_pairs) for lag in lags_in(workload, 1)] == [(1, 1)]


def test_the_programme_takes_its_costs_from_machine_and_execution():
    workload = toy_workload(row(3, 3, 3, 4, 4, 5), row(6, 6, 6, 0, 1, 2), row(4, 4, 4, 7, 7, 5))
    programme = tide_programme(workload, costs(), policy("tide", refresh_interval=1), 2)
    assert (programme.policy, programme.budget, programme.num_steps) == ("tide", 2, 3)
    assert programme.copy_s == pytest.approx(310e-9)
    # One step late, expert 6 is missed with three rows and 0, 1 and 2 with one each; then 4 with three rows, 7 with two
    # and 5 with one. A call takes 50, work 500, and n rows 10 + 100 n each way.
    each = [50 + 500 + 2 * (10 + 100 * rows) for rows in (3, 1, 1, 1, 3, 2, 1)]
    assert programme.host_s == pytest.approx(sum(each) / 7 * 1e-9)
    assert len(programme.copy_costs_s) == len(programme.host_costs_s) == 2
    assert programme.copy_costs_s[0] == pytest.approx(310e-9 * 2 * 3 * programme.fit.replaced(1))
    assert programme.host_costs_s[1] == pytest.approx(programme.host_s * 2 * 3 * programme.fit.missed(2))
    assert json.dumps(programme.to_dict())


def test_blocks_of_one_step_leave_one_interval():
    workload = toy_workload(row(0, 0, 0, 1, 1, 1))
    programme = tide_programme(workload, costs(), policy("tide", refresh_interval=1), 2)
    assert (programme.interval, programme.num_steps, programme.lags) == (1, 1, ())
    assert (programme.bands, programme.assumptions) == (None, ())


def test_without_a_slot_there_is_nothing_to_refresh():
    with pytest.raises(ValueError, match=r"budget\(=0\)"):
        tide_programme(toy_workload(row(0, 1)), costs(), policy("tide", refresh_interval=1), 0)


def sequences(*sequence_of_forward: int) -> np.ndarray:
    return np.array(sequence_of_forward, np.int32)


def drifting(num_sequences: int):
    """Sequences of 12 steps whose wanted experts drift, each at its own pace."""
    rng, tables = np.random.default_rng(3), []
    for _ in range(num_sequences):
        taste = rng.random(E)
        for _ in range(12):
            taste = taste + rng.normal(0, 0.15, E)
            hottest = np.argsort(-taste)[:4]
            tables.append(row(*np.repeat(hottest, [2, 2, 1, 1]).tolist()))
    steps = list(range(12)) * num_sequences
    return toy_workload(*tables, steps=steps, sequence=sequences(*np.repeat(np.arange(num_sequences), 12)))


def test_a_programme_of_one_sequence_has_no_bands():
    programme = tide_programme(drifting(1), costs(), policy("tide-as-coded"), 2)
    assert programme.bands is None
    assert [assumption.holds for assumption in programme.assumptions] == [None]


def test_bands_hold_the_fit_and_are_the_same_for_the_same_seed():
    workload = drifting(6)
    first, again, other = (
        tide_programme(workload, costs(), policy("tide-as-coded"), 2, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.bands is not None
    assert first.bands != other.bands
    assert first.fit.drift in first.bands.drift
    assert all(first.fit.missed(lag) in band for lag, band in enumerate(first.bands.misses, start=1))
    assert first.interval in [interval for interval, _ in first.bands.shares]
    assert sum(share for _, share in first.bands.shares) == pytest.approx(1)
    assert first.bands.costs_more >= 0


def test_few_sequences_are_owned_up_to():
    few = tide_programme(drifting(3), costs(), policy("tide-as-coded"), 2).bands
    assert few is not None
    assert few.caution.startswith("only 3 sequences")
    more = tide_programme(drifting(5), costs(), policy("tide-as-coded"), 2).bands
    assert more is not None
    assert more.caution == ""


def test_copies_of_one_sequence_leave_no_doubt_about_it():
    one = drifting(1)
    rows = np.tile(np.arange(12), 5)
    # A set that goes by counts alone forgets the sequence before after one step.
    changes = {"steps": rows.tolist(), "sequence": sequences(*np.repeat(np.arange(5), 12))}
    bands = tide_programme(toy_workload(*one.counts[rows], **changes), costs(), policy("tide-as-coded"), 2).bands
    assert bands is not None
    assert bands.drift.low == pytest.approx(bands.drift.high, rel=1e-6)
    assert len(bands.alike) == 1
