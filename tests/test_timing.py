"""What each sequence of a run takes: the times of prefixes, on whatever times a run."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import cases, make_policy
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim import windows
from tidesim.hardware import Contention
from tidesim.policies import policy
from tidesim.simulator import simulate
from tidesim.timing import timed, timed_by_sequence


def split(workload, ends):
    """The workload with sequences that end where they are told."""
    sequence = np.searchsorted(np.array(ends), np.arange(workload.num_forwards), side="right")
    return replace(workload, sequence=sequence.astype(np.int32))


@settings(deadline=None, max_examples=30)
@given(cases(), st.data(), st.sampled_from([1, 40, 1 << 24]))
def test_times_are_those_of_runs_that_stop_there(case, data, window_cells):
    workload, model, machine, (name, params), budgets, used = case
    F = workload.num_forwards
    ends = sorted({F, *data.draw(st.lists(st.integers(1, F), max_size=3))})
    workload = split(workload, ends)
    kwargs = {"budget": budgets, "execution": used, "is_memory_checked": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW_CELLS", window_cells)
        result, times_ns = timed_by_sequence(workload, model, machine, make_policy(name, params), **kwargs)
    assert result == timed(workload, model, machine, make_policy(name, params), **kwargs)
    assert sum(times_ns) == result.makespan_ns
    stopped = [simulate(workload.first(end), model, machine, make_policy(name, params), **kwargs) for end in ends]
    assert np.cumsum(times_ns).tolist() == [run.makespan_ns for run in stopped]


def test_where_device_host_and_copies_slow_each_other_the_simulator_is_asked():
    busy = dict.fromkeys(Contention.__dataclass_fields__, 1.0) | {"host_beside_copies": 0.5}
    rows = [[3, 3, 0, 0, 0, 0, 0, 0]], [[0, 0, 3, 3, 0, 0, 0, 0]], [[2, 2, 1, 1, 0, 0, 0, 0]]
    workload = replace(toy_workload(*rows), sequence=np.array([4, 4, 7], np.int32))
    machine = replace(toy_hardware(), contention=Contention(**busy))
    kwargs = {"budget": 2, "execution": toy_execution(copies="background", host="parallel"), "is_memory_checked": False}
    result, times_ns = timed_by_sequence(workload, TOY, machine, policy("tide"), **kwargs)
    first = simulate(workload.first(2), TOY, machine, policy("tide"), **kwargs)
    assert result == simulate(workload, TOY, machine, policy("tide"), **kwargs)
    assert times_ns == (first.makespan_ns, result.makespan_ns - first.makespan_ns)
