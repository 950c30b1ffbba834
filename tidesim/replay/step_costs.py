"""What each MoE layer takes at each step of a block, by the step at which its residents were chosen."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidesim.policies.rules import Schedule

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class StepCosts:
    """Times in ns, int64 [L, S, S], each summed over all blocks that get as far as its step.

    Both are asked for as [layer, last, step]: `last` is 0 if the residents come from an earlier block, and else one
    more than the step of the last refresh before this one, so that last <= step. What runs between the last step of a
    block and the next block counts with that step.

    Parameters
    ----------
    keep_ns : a step without a refresh.
    refresh_ns : a step with one, its copies included.
    """

    keep_ns: Ints
    refresh_ns: Ints

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.keep_ns)

    @property
    def num_steps(self) -> int:
        """S, steps of the longest block."""
        return len(self.keep_ns[0])

    def time_ns(self, schedule: Schedule) -> Ints:
        """All steps of all blocks under `schedule`, of each layer: int64 [L]."""
        layers, due = np.arange(self.num_layers), schedule.table(self.num_layers, self.num_steps)
        last, total_ns = np.zeros_like(layers), np.zeros(self.num_layers, np.int64)
        for step in range(self.num_steps):
            keep_ns, refresh_ns = self.keep_ns[layers, last, step], self.refresh_ns[layers, last, step]
            total_ns += np.where(due[:, step], refresh_ns, keep_ns)
            last = np.where(due[:, step], step + 1, last)
        return total_ns
