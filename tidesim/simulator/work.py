"""What there is to do: jobs for the actors, and what the routed experts of a forward cost."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simpy

from tidesim.execution import Costs


class Job(NamedTuple):
    """One piece of work for another actor: when all of `needs` have happened, take so long, then say `done`."""

    name: str
    duration_ns: int
    needs: list[simpy.Event]
    done: simpy.Event
    forward: int
    layer: int


class Work(NamedTuple):
    """What the routed experts of one layer have to do in one forward, given who is resident and who the host runs."""

    hits: int
    misses: int
    kernel_ns: int
    launch_ns: int
    host_ns: int


class Routed:
    """Where the router sent the rows of one forward, and what each expert takes for its rows; arrays are [L, E]."""

    def __init__(self, counts: npt.NDArray[np.int32], num_rows: int, costs: Costs) -> None:
        self.counts = counts
        self._num_rows = num_rows
        self._costs = costs
        self._num_pairs: list[int] = counts.sum(axis=1).tolist()
        self._is_active = (counts > 0).astype(np.int64)
        self._loop_ns = costs.loop_ns[counts]
        self._host_ns = costs.host_expert_ns[counts]

    def missed(self, layer: int, is_resident: npt.NDArray[np.bool_]) -> list[int]:
        """Experts of `layer` that have rows and are not resident, ascending."""
        missed: list[int] = np.flatnonzero((self.counts[layer] > 0) & ~is_resident).tolist()
        return missed

    def split(self, layer: int, is_resident: npt.NDArray[np.bool_], on_host: Sequence[int]) -> Work:
        """The work of `layer`: hits for the device, the missed experts `on_host` for the host."""
        hits = int(self.counts[layer] @ is_resident)
        num_active = int(self._is_active[layer] @ is_resident)
        kernel_ns, launch_ns = self._costs.experts_ns(int(self._loop_ns[layer] @ is_resident), num_active, hits)
        host_ns = 0
        if on_host:
            num_pairs = int(self.counts[layer, on_host].sum())
            host_ns = int(self._host_ns[layer, on_host].sum())
            # A row with several missed experts travels once.
            host_ns += int(self._costs.host_call_ns(min(self._num_rows, num_pairs), num_pairs))
        return Work(hits, self._num_pairs[layer] - hits, kernel_ns, launch_ns, host_ns)

    def alone(self, layer: int, expert: int) -> tuple[int, int]:
        """Kernels of one expert run alone on the device, and the launch time that they do not hide."""
        kernel_ns, launch_ns = self._costs.alone_ns(self._loop_ns[layer, expert])
        return int(kernel_ns), int(launch_ns)
