"""The compiled replay says what the simulator says, to the nanosecond."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import cases, make_policy, run_case

from tidesim.replay import Replayer, replay


def replay_case(case, **changes):
    workload, model, machine, (name, params), budgets, used = case
    return replay(
        workload,
        model,
        changes.get("machine", machine),
        make_policy(name, params),
        budget=budgets,
        execution=used,
        is_memory_checked=False,
    )


@settings(deadline=None, max_examples=400)
@given(cases())
def test_every_policy_under_every_execution_is_replayed_as_it_is_simulated(case):
    assert replay_case(case) == run_case(case)
