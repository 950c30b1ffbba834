"""Scores on sequences: cut out of one run, with intervals over sequences, regret, and the distance to the ceiling."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from tidesim.ceiling import Ceiling
from tidesim.planner.resampling import Interval, tail
from tidesim.planner.scoring import Sample, advantage, distance, judge, ratio_interval, regret, sample_of, score
from tidesim.scored import judgement_tables, tide_tables

S = 10**9  # ns


def ceiling_of(seconds: float, tokens: int, **changes: object) -> Ceiling:
    made = Ceiling(
        makespan_ns=round(seconds * S),
        generated_tokens=tokens,
        budgets=(1,),
        is_pooled=False,
        num_iterations=40,
        is_settled=True,
    )
    return replace(made, **changes)


def samples(least: int = 1, most: int = 12):
    pair = st.tuples(st.integers(1, 10**12), st.integers(0, 2000))
    some = st.lists(pair, min_size=least, max_size=most).filter(lambda pairs: any(tokens for _, tokens in pairs))
    return some.map(lambda pairs: Sample(*map(tuple, zip(*pairs, strict=True))))


# --- by hand ---


def test_throughput_is_of_totals_and_not_a_mean_of_rates():
    assert Sample((1 * S, 3 * S), (100, 100)).tok_per_s == 50.0


def test_two_sequences_have_an_interval_of_students_t():
    # 100 tokens each in 1 and 3 s: they move the logarithm by 1/2 - 1/4 and 1/2 - 3/4. The spread is
    # sqrt(2 * (1/16 + 1/16)) = 1/2, and Student's t for one degree of freedom 12.706.
    found = score(Sample((1 * S, 3 * S), (100, 100)))
    assert found.interval is not None
    assert found.interval.low == pytest.approx(50 * np.exp(-12.7062 / 2), rel=1e-4)
    assert found.interval.high == pytest.approx(50 * np.exp(12.7062 / 2), rel=1e-4)
    assert "wide, as there are 2 sequences only" in found.sentence


def test_one_sequence_has_no_interval():
    one = Sample((2 * S,), (50,))
    assert score(one).interval is None
    assert score(one).sentence == "25.00 tok/s on one sequence, so there is no interval"
    found = advantage(one, Sample((3 * S,), (50,)), "static")
    assert (found.gain, found.interval, found.is_told_apart) == (pytest.approx(0.5), None, None)
    assert found.sentence == "faster than static by 50.0 % on one sequence, so nobody knows if that is noise"


def test_who_is_faster_on_each_sequence_by_as_much_is_no_noise():
    theirs = Sample(tuple(S * k for k in (1, 7, 2, 30, 4, 11)), (10,) * 6)
    ours = Sample(tuple(round(time_ns / 1.25) for time_ns in theirs.times_ns), theirs.tokens)
    found = advantage(ours, theirs, "lru")
    assert found.gain == pytest.approx(0.25)
    assert found.is_told_apart is True
    assert found.sentence == "faster than lru by 25.0 %, 95 % interval +25.0 to +25.0 %: not noise"
    # Runs by themselves are spread too far to say so: they are compared sequence by sequence.
    assert score(ours).interval.high > score(theirs).tok_per_s > score(ours).interval.low


def test_who_is_faster_here_and_slower_there_cannot_be_told_apart():
    ours = Sample(tuple(S * k for k in (8, 12, 9, 11, 8, 13)), (10,) * 6)
    theirs = Sample(tuple(S * k for k in (10, 10, 11, 10, 10, 11)), (10,) * 6)
    found = advantage(ours, theirs, "tide")
    assert found.gain == pytest.approx(62 / 61 - 1)
    assert found.is_told_apart is False
    assert found.sentence.startswith("cannot be told apart from tide: +1.6 %, 95 % interval -")


def test_regret_is_against_the_fastest_of_the_family():
    plan = Sample((10 * S,), (100,))
    family = {"a": Sample((9 * S,), (100,)), "b": Sample((8 * S,), (100,)), "c": Sample((8 * S,), (100,))}
    found = regret(plan, family)
    assert (found.best, found.num_cases, found.regret) == ("b", 3, pytest.approx(0.2))
    assert found.sentence == (
        "20.0 % slower than the best of 3 choices tried on the same sequences, known only in hindsight: b, 12.50 tok/s"
    )
    assert regret(family["b"], {"b": family["b"]}).sentence.startswith("no regret: none of 1 choice tried")
    with pytest.raises(ValueError, match="hindsight"):
        regret(plan, {})


def test_the_distance_is_to_the_ceilings_throughput():
    found = distance(Sample((10 * S,), (100,)), ceiling_of(8, 100))
    assert found.distance == pytest.approx(0.2)
    assert found.sentence == (
        "20.0 % below the ceiling of 12.50 tok/s, which no policy beats with the same slots in each layer"
    )
    cut = distance(Sample((10 * S,), (100,)), ceiling_of(8, 100, is_settled=False, is_pooled=True))
    assert cut.sentence.endswith(
        "however slots are spread over the layers; stopped at its time limit after 40 iterations, so loose"
    )


@pytest.mark.parametrize(
    ("times_ns", "tokens"), [((), ()), ((1,), (1, 2)), ((0, 1), (1, 1)), ((1, 1), (0, 0)), ((1, 1), (-1, 5))]
)
def test_samples_that_say_nothing_are_refused(times_ns, tokens):
    with pytest.raises(ValueError, match="token"):
        Sample(times_ns, tokens)


def test_runs_of_other_sequences_are_not_compared():
    with pytest.raises(ValueError, match="same sequences"):
        advantage(Sample((1, 1), (1, 2)), Sample((1, 1), (2, 1)), "static")


# --- what always holds ---


@given(samples(least=2), st.integers(0, 2**32 - 1))
def test_an_interval_holds_the_score_and_is_the_same_for_the_same_seed(run, seed):
    found = score(run, num_resamples=300, seed=seed)
    slack = 1 + 1e-9
    assert found.interval.low / slack <= found.tok_per_s <= found.interval.high * slack
    assert found == score(run, num_resamples=300, seed=seed)


@given(samples(least=2), st.randoms())
def test_the_order_of_sequences_does_not_matter(run, random):
    pairs = list(zip(run.times_ns, run.tokens, strict=True))
    random.shuffle(pairs)
    shuffled, plain = (
        score(one, num_resamples=200).interval for one in (Sample(*map(tuple, zip(*pairs, strict=True))), run)
    )
    assert (shuffled.low, shuffled.high) == pytest.approx((plain.low, plain.high), rel=1e-9)


@given(samples(least=2), st.floats(0.1, 10))
def test_a_run_that_is_so_many_times_as_fast_throughout_gains_just_that(run, factor):
    slower = Sample(tuple(max(1, round(time_ns * factor * 1000)) for time_ns in run.times_ns), run.tokens)
    faster = Sample(tuple(time_ns * 1000 for time_ns in run.times_ns), run.tokens)
    found = advantage(faster, slower, "it", num_resamples=200)
    assert found.gain == pytest.approx(factor - 1, abs=1e-3 * factor)
    assert found.interval.high - found.interval.low <= 1e-2 * factor + 1e-9


@given(samples(), samples())
def test_nobody_regrets_being_the_best(one, other):
    best = max((one, other), key=lambda run: run.tok_per_s)
    assert regret(best, {"one": one, "other": other}).regret == 0
    assert regret(one, {"one": one, "other": other}).regret >= 0


def test_percentiles_are_those_of_scipy():
    rng = np.random.default_rng(5)
    tokens, times = rng.lognormal(4, 0.5, 12), rng.lognormal(1, 0.3, 12)
    ours = ratio_interval(tokens, times, 20_000)
    theirs = stats.bootstrap(
        (tokens, times),
        lambda above, below, axis: above.sum(axis) / below.sum(axis),
        n_resamples=20_000,
        paired=True,
        method="percentile",
        confidence_level=1 - 2 * tail(12),
        rng=np.random.default_rng(6),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


# --- as people read it ---


@pytest.fixture
def text():
    def read(table) -> str:
        console = Console(width=118, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return " ".join(captured.get().split())

    return read


def test_a_judgement_is_told_in_full(text):
    plan = Sample(tuple(S * k for k in (8, 9, 10, 11, 12)), (100,) * 5)
    rival = Sample(tuple(S * k for k in (9, 10, 11, 12, 14)), (100,) * 5)
    found = judge(plan, {"static": rival}, family={"every 2 steps": rival}, ceiling=ceiling_of(40, 500))
    document = json.loads(json.dumps(found.to_dict()))
    shown = text(judgement_tables(document))
    assert "throughput 10.00 tok/s, 95 % interval" in shown
    assert "static +12.0 %" in shown
    assert "not noise" in shown
    assert "no regret" in shown
    assert "20.0 % below the ceiling of 12.50 tok/s" in shown
    alone = judge(Sample((S,), (1,)), {"static": Sample((2 * S,), (1,))})
    shown = text(judgement_tables(alone.to_dict()))
    assert "static +100.0 % - nobody knows" in shown
    assert "ceiling" not in shown


def tide_document(**changes: object) -> dict[str, object]:
    band = {"low": 0.1, "high": 0.3, "level": 0.95}
    return {
        "policy": "tide",
        "interval": 3,
        "budget": 64,
        "fit": {"drift": 0.2, "drift_r_squared": 0.9, "misses": (0.1, 0.02, 0.5), "misses_r_squared": 0.8},
        "bands": {
            "drift": band,
            "misses": [band, band],
            "shares": [(3, 0.7), (4, 0.3)],
            "alike": [3, 4],
            "costs_more": 0.015,
            "num_sequences": 4,
            "num_resamples": 400,
            "caution": "only 4 sequences",
        },
        "assumptions": [{"name": "constant drift", "holds": False, "sentence": "drift is not constant."}],
    } | changes


def test_tides_programme_is_told_with_its_bands_and_what_fails(text):
    shown = text(tide_tables(tide_document()))
    assert "drift d = 0.2000 a step (95 % band 0.1000 to 0.3000); R squared 0.900" in shown
    assert "f(1) in 0.100 to 0.300, f(2) in 0.100 to 0.300" in shown
    assert "chosen on other sequences 3 (70 %), 4 (30 %); it cannot tell 3, 4 apart, which cost at most 1.5 %" in shown
    assert "replayed" not in shown
    assert "note only 4 sequences" in shown
    assert "constant drift FAILS; drift is not constant." in shown
    assert "band" not in text(tide_tables(tide_document(bands=None)))
    found = regret(Sample((4 * S,), (8,)), {"every 2 steps": Sample((2 * S,), (8,))})
    assert "when replayed 50.0 % slower" in text(tide_tables(tide_document(), found.to_dict()))


def test_samples_are_made_of_any_numbers():
    assert sample_of(np.array([1, 2]), np.array([3, 4])) == Sample((1, 2), (3, 4))
    assert Interval(1.0, 2.0).level == 0.95
