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


@lru_cache(maxsize=_KEPT_WORKLOADS)
def _replayer(workload: Workload) -> "replay.Replayer":
    """Workloads are compared by identity, so each is read once."""
    return replay.Replayer(workload)
