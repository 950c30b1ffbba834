"""How sets of residents drift: the compiled walk says what asking the policy says."""

from dataclasses import replace

import numpy as np
import pytest
from erratic import Erratic
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim import windows
from tidesim.execution import Costs
from tidesim.policies import Shape, forwards_of, policy
from tidesim.replay import drift_of
from tidesim.residency import Residency
from tidesim.workload import ForwardKind

E, L = 12, 2


def workload_of(rng: np.random.Generator, num_forwards: int):
    """Blocks of a few steps in a few sequences, with prefill and commit forwards between them."""
    counts = np.zeros((num_forwards, L, E), np.int64)
    for forward in range(num_forwards):
        for layer in range(L):
            for _ in range(3):
                counts[forward, layer, rng.choice(E, TOY.top_k, replace=False)] += 1
    kinds = "".join(rng.choice(list("ddddddcp"), num_forwards))
    block, sequence = (np.cumsum(rng.random(num_forwards) < share).astype(np.int32) for share in (0.25, 0.1))
    steps = rng.integers(0, 4, num_forwards).tolist()
    return toy_workload(*counts, kinds=kinds, steps=steps, block=block, sequence=sequence)


def costs() -> Costs:
    return Costs(TOY, toy_hardware(), toy_execution(host_calls="layer"), 8)


def after_each_forward(workload, made, budgets):
    """Who is resident after each forward, bool [F, L, E], by asking."""
    residency = Residency(E, budgets, made.initial(Shape(E, budgets)), is_pooled=made.scope == "network")
    held = np.zeros(workload.counts.shape, np.bool_)
    for forward in forwards_of(workload):
        for layer, counts in enumerate(workload.counts[forward.index]):
            everybody = residency.everybody
            made.observe(forward, layer, counts, everybody)
            residency.apply(layer, made.refresh(forward, layer, counts, everybody))
            missed = np.flatnonzero((counts > 0) & ~everybody[layer]).tolist()
            residency.fetch(layer, made.serve(forward, layer, missed, counts, everybody).keep)
            for there, moves in made.ahead(forward, layer, counts, everybody):
                residency.apply(there, moves)
        held[forward.index] = residency.everybody
    return held


def by_hand(workload, held, num_lags):
    """(pairs, replaced, missed, late ns) for each sequence, written down as they are defined."""
    names, used = np.unique(workload.sequence), costs()
    num_pairs = np.zeros((len(names), num_lags), np.int64)
    replaced, missed = np.zeros((2, len(names), num_lags, L), np.int64)
    late_ns = np.zeros((len(names), L), np.int64)
    steps = np.flatnonzero(workload.kind == ForwardKind.DENOISE)
    for number, new in enumerate(steps):
        for lag in range(1, min(number, num_lags) + 1):
            old = steps[number - lag]
            if (workload.sequence[old], workload.block[old]) != (workload.sequence[new], workload.block[new]):
                break
            at = int(np.searchsorted(names, workload.sequence[new]))
            num_pairs[at, lag - 1] += 1
            replaced[at, lag - 1] += (held[new] & ~held[old]).sum(axis=1)
            absent = np.where(held[old], 0, workload.counts[new])
            missed[at, lag - 1] += (absent > 0).sum(axis=1)
            if lag == 1:
                pairs = absent.sum(axis=1)
                call_ns = used.host_call_ns(np.minimum(workload.tokens[new], pairs), pairs)
                late_ns[at] += used.host_expert_ns[absent].sum(axis=1) + call_ns
    return num_pairs, replaced, missed, late_ns


def made_of(name):
    return Erratic() if name == "erratic" else policy(name)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["tide", "tide-as-coded", "rlx", "lru", "all-host", "erratic"]),
    budget=st.integers(1, E),
    num_lags=st.integers(0, 5),
    window_cells=st.sampled_from([1, 100, 1 << 24]),
    dtype=st.sampled_from([np.int32, np.uint8]),
)
def test_sets_drift_as_asking_the_policy_says(seed, name, budget, num_lags, window_cells, dtype):
    workload, budgets = workload_of(np.random.default_rng(seed), 24), (0 if name == "all-host" else budget,) * L
    held = after_each_forward(workload, made_of(name), budgets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW_CELLS", window_cells)
        # Counts that are mapped from a file are narrower.
        narrow = replace(workload, counts=workload.counts.astype(dtype))
        drift = drift_of(narrow, made_of(name), budgets, costs(), num_lags)
    found = (drift.num_pairs, drift.replaced, drift.missed, drift.late_ns)
    for ours, theirs in zip(found, by_hand(workload, held, num_lags), strict=True):
        if num_lags or ours is not drift.late_ns:
            np.testing.assert_array_equal(ours, theirs)


def test_without_lags_nothing_drifts():
    drift = drift_of(workload_of(np.random.default_rng(0), 6), policy("tide"), (2, 2), costs(), 0)
    assert drift.num_pairs.size == 0
    assert not drift.late_ns.any()
