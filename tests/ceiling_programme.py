"""The relaxation behind `time_ceiling` as one linear programme, solved exactly; for small runs.

Letters: F forwards, L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import linprog

from tidesim.ceiling.relaxation import Relaxation

Ints = npt.NDArray[np.int64]


class Programme:
    """Rows `<=` and costs of the programme, gathered piece by piece.

    Each kind of variable is an array of column numbers, -1 where it does not exist: `resident` (in a slot before the
    forward), `enters` (copied to stay), `fetched` (copied just for this once), `on_device`, `dropped`, all [F, L, E],
    and `layer` [F, L], the time of the routed experts. Shares between 0 and 1, but for the times.
    """

    def __init__(self, relaxation: Relaxation, budgets: Sequence[int], is_pooled: bool) -> None:
        # The solver's tolerances are absolute: time is counted in what all experts of a layer take on the host.
        self.unit = float(np.mean(relaxation.host.sum(axis=2)))
        times = ("dense", "device", "host", "device_fixed", "host_fixed", "promote", "evict")
        scaled = {name: getattr(relaxation, name) / self.unit for name in times}
        self.relaxation = relaxation = replace(relaxation, **scaled)
        self.num_columns = self.num_rows = 0
        self.row: list[Ints] = []
        self.column: list[Ints] = []
        self.value: list[npt.NDArray[np.float64]] = []
        self.limits: list[npt.NDArray[np.float64]] = []
        shape = relaxation.host.shape
        is_active, everywhere = relaxation.host > 0, np.ones(shape, np.bool_)
        is_last = np.arange(shape[0])[:, None, None] == shape[0] - 1
        self.resident = self.columns(everywhere)
        self.enters = self.columns(~is_last & (is_active | relaxation.is_background | relaxation.is_parallel))
        self.fetched, self.on_device = self.columns(is_active), self.columns(is_active)
        self.dropped = self.columns(~is_last & everywhere & (relaxation.evict > 0))
        self.layer = self.columns(np.ones(shape[:2], np.bool_))
        self.residency()
        self.slots(budgets, is_pooled)
        self.times()
        if relaxation.is_background:
            self.link()

    def columns(self, exists: npt.NDArray[np.bool_]) -> Ints:
        """New variables, one for each place that is True."""
        numbers = np.where(exists, self.num_columns + np.cumsum(exists).reshape(exists.shape) - 1, -1)
        self.num_columns += int(exists.sum())
        return numbers

    def limit(self, terms: Sequence[tuple[Ints, object]], limits: npt.ArrayLike, chosen: object = slice(None)) -> None:
        """Rows: the sum over `terms` (columns [rows, any], factors that fit them) is at most `limits` [rows]."""
        limits = np.asarray(limits, np.float64)[chosen]
        for columns, factor in terms:
            columns, factors = columns[chosen], np.broadcast_to(factor, columns.shape)[chosen]
            rows = np.broadcast_to(np.arange(len(limits))[:, None], columns.shape)
            exists = (columns >= 0) & (factors != 0)
            self.row.append(self.num_rows + rows[exists])
            self.column.append(columns[exists])
            self.value.append(factors[exists].astype(np.float64))
        self.limits.append(limits)
        self.num_rows += len(limits)

    def residency(self) -> None:
        """Who is resident was so before or entered; the device computes whom it has; leaving is noticed."""
        each = (-1, 1)
        resident, enters, fetched = (a.reshape(each) for a in (self.resident, self.enters, self.fetched))
        on_device = self.on_device.reshape(each)
        size = len(resident)
        self.limit([(resident, 1), (enters, 1), (fetched, 1)], np.ones(size))
        self.limit([(on_device, 1), (resident, -1), (enters, -1), (fetched, -1)], np.zeros(size), on_device[:, 0] >= 0)
        after, before, entered = (a.reshape(each) for a in (self.resident[1:], self.resident[:-1], self.enters[:-1]))
        self.limit([(after, 1), (before, -1), (entered, -1)], np.zeros(len(after)))
        if self.relaxation.evict:
            dropped = self.dropped[:-1].reshape(each)
            self.limit([(before, 1), (entered, 1), (after, -1), (dropped, -1)], np.zeros(len(after)))

    def slots(self, budgets: Sequence[int], is_pooled: bool) -> None:
        """No more residents than slots, in each layer or in all together."""
        F, L, E = self.resident.shape
        if is_pooled:
            self.limit([(self.resident.reshape(F, L * E), 1)], np.full(F, sum(budgets)))
        else:
            self.limit([(self.resident.reshape(F * L, E), 1)], np.tile(budgets, F))

    def times(self) -> None:
        """A layer takes as long as each of its sides, or as both together; the device's has blocking copies in it."""
        relaxation = self.relaxation
        F, L, E = relaxation.host.shape
        columns, layer = self.on_device.reshape(F * L, E), self.layer.reshape(-1, 1)
        device, host = relaxation.device.reshape(F * L, E), relaxation.host.reshape(F * L, E)
        device_fixed = relaxation.device_fixed.ravel()
        all_on_host = relaxation.host_fixed.ravel() + host.sum(axis=1)
        if relaxation.is_parallel:
            copied = [] if relaxation.is_background else [self.enters, self.fetched]
            copies = [(each.reshape(F * L, E), relaxation.promote) for each in copied]
            self.limit([(columns, device), *copies, (layer, -1)], -device_fixed)
            self.limit([(columns, -host), (layer, -1)], -all_on_host)
        else:
            self.limit([(columns, device - host), (layer, -1)], -device_fixed - all_on_host)

    def link(self) -> None:
        """The copies of a forward fit into it."""
        F = len(self.layer)
        enters, fetched = self.enters.reshape(F, -1), self.fetched.reshape(F, -1)
        promote = self.relaxation.promote
        self.limit([(enters, promote), (fetched, promote), (self.layer, -1)], self.relaxation.dense)

    def solve(self) -> float:
        """The smallest makespan, in ns."""
        relaxation = self.relaxation
        objective = np.zeros(self.num_columns)
        objective[self.layer] = 1.0
        if not relaxation.is_background:
            for columns in () if relaxation.is_parallel else (self.enters, self.fetched):
                objective[columns[columns >= 0]] = relaxation.promote
            objective[self.dropped[self.dropped >= 0]] = relaxation.evict
        upper = np.ones(self.num_columns)
        upper[self.layer] = np.inf
        place = (np.concatenate(self.row), np.concatenate(self.column))
        rows = sparse.csr_matrix((np.concatenate(self.value), place), (self.num_rows, self.num_columns))
        solved = linprog(
            objective,
            A_ub=rows,
            b_ub=np.concatenate(self.limits),
            bounds=np.column_stack([np.zeros(self.num_columns), upper]),
            method="highs",
        )
        assert solved.status == 0, solved.message
        return float(solved.fun + relaxation.dense.sum()) * self.unit
