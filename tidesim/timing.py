"""Who times a run on paper: the compiled replay wherever it says the same as the event simulator."""

from functools import lru_cache
from typing import Unpack

import numpy as np

from tidesim import replay
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.paper_run import RunSettings
from tidesim.policies import Policy
from tidesim.result import RunResult
from tidesim.simulator import simulate
from tidesim.workload import Workload

_KEPT_WORKLOADS = 4  # read for replay and not forgotten yet


def timed(
    workload: Workload, model: MoEConfig, hardware: Hardware, policy: Policy, **settings: Unpack[RunSettings]
) -> RunResult:
    """One run; `settings` are those that `simulate` and `replay` share.

    A profile whose device, host and copies slow each other down is for the simulator. Raise what `simulate` raises.
    """
    if replay.is_contended(hardware):
        return simulate(workload, model, hardware, policy, **settings)
    return _replayer(workload).run(model, hardware, policy, **settings)


def timed_by_sequence(
    workload: Workload, model: MoEConfig, hardware: Hardware, policy: Policy, **settings: Unpack[RunSettings]
) -> tuple[RunResult, tuple[int, ...]]:
    """One run as `timed` has it, and the ns that each of its sequences takes, in the order of the workload.

    The run is cut where sequences end: who is resident stays so from one to the next, and the times add up to the
    makespan. In a batch, sequences that run together are one.
    """
    ends = [*(np.flatnonzero(np.diff(workload.sequence)) + 1).tolist(), workload.num_forwards]
    if replay.is_contended(hardware):
        # Nothing that comes later changes what was before, so a run that is stopped there takes as long as until there.
        result = simulate(workload, model, hardware, policy, **settings)
        before = (simulate(workload.first(end), model, hardware, policy, **settings) for end in ends[:-1])
        times_ns = (*(run.makespan_ns for run in before), result.makespan_ns)
    else:
        result, times_ns = _replayer(workload).run_with_ends(ends, model, hardware, policy, **settings)
    return result, tuple(np.diff(times_ns, prepend=0).tolist())


@lru_cache(maxsize=_KEPT_WORKLOADS)
def _replayer(workload: Workload) -> "replay.Replayer":
    """Workloads are compared by identity, so each is read once."""
    return replay.Replayer(workload)
