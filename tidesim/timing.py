"""Who times a run on paper: the compiled replay wherever it says the same as the event simulator."""

from functools import lru_cache
from typing import Unpack

import numpy as np
import numpy.typing as npt

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
    workload: Workload,
    model: MoEConfig,
    hardware: Hardware,
    policy: Policy,
    *,
    spent: npt.NDArray[np.int64] | None = None,
    **settings: Unpack[RunSettings],
) -> RunResult:
    """One run; `settings` are those that `simulate` and `replay` share, `spent` is as there.

    A profile whose device, host and copies slow each other down is for the simulator. Raise what `simulate` raises.
    """
    if replay.is_contended(hardware):
        return simulate(workload, model, hardware, policy, spent=spent, **settings)
    return _replayer(workload).run(model, hardware, policy, spent=spent, **settings)


def timed_by_sequence(
    workload: Workload, model: MoEConfig, hardware: Hardware, policy: Policy, **settings: Unpack[RunSettings]
) -> tuple[RunResult, tuple[int, ...]]:
    """One run as `timed` has it, and the ns that each of its sequences takes, in the order of the workload.

    Who is resident stays so from one sequence to the next, and the times add up to the makespan. In a batch, sequences
    that run together are one.
    """
    spent = np.zeros((workload.num_forwards, workload.num_layers + 1), np.int64)
    result = timed(workload, model, hardware, policy, spent=spent, **settings)
    return result, by_sequence(workload, spent)


def by_sequence(workload: Workload, spent: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """`spent`, of `timed`, added up over each sequence in the order of the workload, ns."""
    begins = np.flatnonzero(np.diff(workload.sequence, prepend=-1))
    return tuple(np.add.reduceat(spent.sum(axis=1), begins).tolist())


@lru_cache(maxsize=_KEPT_WORKLOADS)
def _replayer(workload: Workload) -> "replay.Replayer":
    """Workloads are compared by identity, so each is read once."""
    return replay.Replayer(workload)
