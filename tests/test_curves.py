"""Curves over the budget say what a replay at each budget counts."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.errors import InputError
from tidesim.policies import policy
from tidesim.replay import Replayer, lru_curve, tide_as_coded_curves, tide_curves
from tidesim.shipped import find_shipped
from tidesim.trace import Trace

COUNTS = ("hits", "misses", "promotions", "drops")


@st.composite
def workloads(draw: st.DrawFn):
    """One layer of 2 to 130 experts, with forwards of all kinds whose tokens prefer some experts for a while."""
    num_experts = draw(st.sampled_from([2, 3, 8, 90, 130]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_forwards, num_rows = draw(st.integers(1, 25)), draw(st.sampled_from([1, 4, num_experts]))
    drift = np.cumsum(rng.normal(0, draw(st.sampled_from([0.02, 0.3])), (num_forwards, 1, num_experts)), axis=0)
    scores = rng.random(num_experts) + drift + rng.random((num_forwards, num_rows, num_experts))
    picks = np.argsort(-scores, axis=-1)[..., :2]
    counts = (picks[..., None] == np.arange(num_experts)).sum(axis=(1, 2))
    kinds, steps = rng.choice(list("ddddddcp"), num_forwards), rng.integers(0, 6, num_forwards).tolist()
    return toy_workload(*counts[:, None], kinds="".join(kinds), steps=steps, first_block=draw(st.booleans()))


def holds(curve, workload, model, made, copies) -> None:
    """Whether a replay at each budget counts what the curve says where it is exact; the others are not all."""
    assert curve.is_exact[:, 1].all()
    replayer = Replayer(workload)
    kwargs = {"execution": toy_execution(copies=copies), "is_memory_checked": False}
    for budget in range(1, model.num_experts + 1):
        if curve.is_exact[:, budget].all():
            result = replayer.run(model, toy_hardware(), made(), budget=budget, **kwargs)
            told = {name: int(getattr(curve, name)[:, budget].sum()) for name in COUNTS}
            assert told == {name: getattr(result, name) for name in COUNTS}, budget
            assert result.evictions == result.promotions
            assert curve.hit_rate[budget] == pytest.approx(result.hit_rate)
        else:
            assert np.isnan(curve.hit_rate[budget])


@settings(deadline=None, max_examples=25)
@given(workloads())
def test_lru_is_told_at_every_budget(workload) -> None:
    curve, model = lru_curve(workload), replace(TOY, num_experts=workload.num_experts)
    assert curve.is_exact.all()
    assert (curve.hits + curve.misses == workload.counts.sum()).all()
    assert (curve.promotions[:, 0] == 0).all()
    assert (curve.drops[:, 0] == np.count_nonzero(workload.counts)).all()
    holds(curve, workload, model, partial(policy, "lru"), "blocking")


@settings(deadline=None, max_examples=25)
@given(workloads(), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from(["blocking", "background"]))
def test_tide_is_told_at_every_budget_and_interval(workload, intervals, copies) -> None:
    model = replace(TOY, num_experts=workload.num_experts)
    curves = tide_curves(workload, intervals, is_background=copies == "background")
    for interval, curve in zip(intervals, curves, strict=True):
        assert curve.is_exact.all()
        holds(curve, workload, model, partial(policy, "tide", refresh_interval=interval), copies)


@settings(deadline=None, max_examples=25)
@given(workloads(), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from(["blocking", "background"]))
def test_tide_as_coded_is_told_where_it_does_not_hang_on_the_order_of_a_set(workload, intervals, copies) -> None:
    model, fewest = replace(TOY, num_experts=workload.num_experts), np.count_nonzero(workload.counts, axis=2).min()
    curves = tide_as_coded_curves(workload, intervals, is_background=copies == "background")
    for interval, curve in zip(intervals, curves, strict=True):
        assert curve.is_exact[:, : fewest + 1].all()
        assert curve.is_exact[:, 77:].all()
        holds(curve, workload, model, partial(policy, "tide-as-coded", refresh_interval=interval), copies)


def test_a_curve_by_hand() -> None:
    # Stacks, most recent first: 0123; 3102, 1 and 3 were at depths 1 and 3; 3012, 0 and 3 were at 2 and 0.
    curve = lru_curve(toy_workload([[0, 1, 0, 1]], [[1, 0, 0, 1]]))
    assert curve.hits.tolist() == [[0, 1, 2, 3, 4]]
    # 3 is promoted at budgets 1 to 3, then 0 at 2. At 1 there is no place for 1 and 0 beside 3.
    assert curve.promotions.tolist() == [[0, 1, 2, 1, 0]]
    assert curve.drops.tolist() == [[4, 2, 0, 0, 0]]
    assert curve.hit_rate.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.to_dict() == {
        "policy": "lru",
        "refresh_interval": None,
        "hits": [0, 1, 2, 3, 4],
        "misses": [4, 3, 2, 1, 0],
        "promotions": [0, 1, 2, 1, 0],
        "drops": [4, 2, 0, 0, 0],
        "hit_rate": [0, 0.25, 0.5, 0.75, 1],
    }


def test_what_is_not_known_is_none() -> None:
    # 2 and 3 are active. At a budget of 3 one of them takes the slot of 0 or 1, whichever comes first in a set.
    (curve,) = tide_as_coded_curves(toy_workload([[0, 0, 1, 1]]), [1], is_background=False)
    assert curve.is_exact.tolist() == [[True, True, True, False, True]]
    told = curve.to_dict()
    assert (told["hits"], told["promotions"]) == ([0, 1, 2, None, 2], [0, 1, 2, None, 0])
    assert told["hit_rate"] == [0, 0.5, 1, None, 1]


def test_a_long_run_may_come_in_parts() -> None:
    with Trace.open(find_shipped("traces", "llada2-tiny", ".h5")) as trace:
        whole = lru_curve(trace.workload("block", [0, 1, 2]))
        parts = lru_curve(trace.workload("block", [sequence]) for sequence in range(3))
    assert all((getattr(whole, name) == getattr(parts, name)).all() for name in COUNTS)
    with pytest.raises(ValueError, match="must have a part at least"):
        lru_curve([])


def test_counts_and_intervals_are_checked_as_for_a_replay() -> None:
    with pytest.raises(InputError, match="do not fit its tokens"):
        lru_curve(toy_workload([[3, 0, 0, 0, 0, 0, 0, 0]]))
    workload = toy_workload([[3, 3, 0, 0, 0, 0, 0, 0]])
    assert tide_curves(workload, [], is_background=True) == ()
    for curves in (tide_curves, tide_as_coded_curves):
        with pytest.raises(InputError, match="must be a whole number >= 1"):
            curves(workload, [2, 0], is_background=True)


@pytest.mark.slow
def test_shipped_routing_is_told_at_every_budget() -> None:
    with Trace.open(find_shipped("traces", "llada2.0-mini-synthetic", ".h5")) as trace:
        workload = trace.workload("block", [0, 1])
    model = replace(TOY, **{name: getattr(workload, name) for name in ("num_layers", "num_experts", "top_k")})
    holds(lru_curve(workload), workload, model, partial(policy, "lru"), "background")
    for told, name in ((tide_curves, "tide"), (tide_as_coded_curves, "tide-as-coded")):
        for curve in told(workload, [1, 4, 16], is_background=True):
            made = partial(policy, name, refresh_interval=curve.refresh_interval)
            holds(curve, workload, model, made, "background")
