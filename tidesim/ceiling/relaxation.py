"""What a run must take at least, in parts that add up: the numbers behind `time_ceiling`.

Letters: F forwards, L MoE layers, E experts.

Each expert that is routed to is on the device or on the host, and its part of the time there is one number that does
not depend on which other experts are beside it. Where the time model is not a sum (the roofline of a grouped kernel,
launches that kernels hide, calls that many experts share), a linear bound from below stands in for it.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from tidesim.execution import Costs
from tidesim.windows import forget, spans
from tidesim.workload import Workload

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_WINDOW_CELLS = 1 << 22  # that are relaxed at once: it takes a dozen arrays of floats
_KEPT_BYTES = 1 << 30  # of the parts of a run; those beyond are reckoned anew each time


class Relaxed(Protocol):
    """A run as sums, a part of its forwards after another; see `Relaxation` for what is not explained here.

    Parameters
    ----------
    shape : F, L, E. spans : the forwards of each part.
    """

    dense: Floats
    device_fixed: Floats
    host_fixed: Floats
    promote: float
    evict: float
    is_parallel: bool
    is_background: bool

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def spans(self) -> list[slice]: ...

    def part(self, number: int) -> tuple[Floats, Floats]:
        """`Relaxation.device` and `host` of the forwards of a part."""


@dataclass(frozen=True, slots=True, eq=False)
class Relaxation:
    """A run as sums, all in ns; `time_ceiling` says what is bounded by them.

    A layer with the experts S on the device takes D = device_fixed + the sum of `device` over S, H = host_fixed + the
    sum of `host` over the others, and max(D, H) if `is_parallel`, else D + H.

    Parameters
    ----------
    dense : [F], all of a forward but its routed experts.
    device, host : [F, L, E], of each expert on either side; 0 where it has no rows.
    device_fixed, host_fixed : [F, L], what either side takes besides.
    promote, evict : one copy to a slot, and one out of it.
    is_parallel : whether the host works beside the device.
    is_background : whether copies run beside everything else, one after another. Else nothing runs beside them.
    """

    dense: Floats
    device: Floats
    host: Floats
    device_fixed: Floats
    host_fixed: Floats
    promote: float
    evict: float
    is_parallel: bool
    is_background: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """F, L, E."""
        F, L, E = self.host.shape
        return F, L, E

    @property
    def spans(self) -> list[slice]:
        """It is one part."""
        return [slice(0, len(self.host))]

    def part(self, number: int) -> tuple[Floats, Floats]:
        """`device` and `host`."""
        return self.device, self.host

    @classmethod
    def of(cls, workload: Workload, costs: Costs) -> Self:
        """The sums for `workload`, each of them at most what the run takes."""
        execution, counts = costs.execution, workload.counts
        is_parallel, is_background = execution.host == "parallel", execution.copies == "background"
        device, alone, overhead_ns = _device(counts, costs)
        host, call = _host(workload, costs)
        fixed = (np.full(call.shape, float(overhead_ns)), call)
        device, device_fixed, host, host_fixed = _share_fixed(counts > 0, device, alone, host, fixed, is_parallel)
        return cls(
            dense=_dense(workload, costs),
            device=device,
            host=host,
            device_fixed=device_fixed,
            host_fixed=host_fixed,
            promote=float(costs.promote_ns),
            # Background write-back has a lane of its own that nobody need wait for.
            evict=0.0 if is_background else float(costs.evict_ns),
            is_parallel=is_parallel,
            is_background=is_background,
        )


class RelaxedRun:
    """The relaxation of a run of any length; see `Relaxed`. What concerns single experts is kept while there is room.

    No sum of a relaxation reaches from one forward to another, so each part is relaxed by itself.
    """

    def __init__(self, workload: Workload, costs: Costs) -> None:
        self._workload, self._costs = workload, costs
        self._kept: dict[int, tuple[Floats, Floats]] = {}
        self._latest: tuple[int, tuple[Floats, Floats]] | None = None
        F, L, E = workload.counts.shape
        self.shape, self.spans = (F, L, E), spans(workload.counts.shape, _WINDOW_CELLS)
        self.device_fixed, self.host_fixed = np.empty((F, L)), np.empty((F, L))
        room = _KEPT_BYTES
        for number, span in enumerate(self.spans):
            relaxation = self._relax(span)
            self.device_fixed[span], self.host_fixed[span] = relaxation.device_fixed, relaxation.host_fixed
            room -= relaxation.device.nbytes + relaxation.host.nbytes
            if room >= 0:
                self._kept[number] = relaxation.part(0)
        self.dense = _dense(workload, costs)
        self.promote, self.evict = relaxation.promote, relaxation.evict
        self.is_parallel, self.is_background = relaxation.is_parallel, relaxation.is_background

    def part(self, number: int) -> tuple[Floats, Floats]:
        """See `Relaxed`."""
        if number in self._kept:
            return self._kept[number]
        if self._latest is None or self._latest[0] != number:
            self._latest = None  # its memory is free before the next is reckoned
            self._latest = number, self._relax(self.spans[number]).part(0)
        return self._latest[1]

    def _relax(self, span: slice) -> Relaxation:
        workload = self._workload
        names = ("counts", "tokens", "context_tokens", "attended_pairs", "logit_tokens")
        relaxation = Relaxation.of(
            replace(workload, **{name: getattr(workload, name)[span] for name in names}), self._costs
        )
        forget(workload.counts)
        return relaxation


def _dense(workload: Workload, costs: Costs) -> Floats:
    """Everything but the routed experts, [F]: known to the nanosecond."""
    rows = (workload.tokens, workload.context_tokens, workload.attended_pairs)
    entry, layers = sum(costs.entry_ns(*rows)), workload.num_layers * sum(costs.layer_ns(*rows))
    return np.asarray(entry + layers + sum(costs.head_ns(workload.tokens, workload.logit_tokens)), np.float64)


def _device(counts: npt.NDArray[np.int32], costs: Costs) -> tuple[Floats, Floats, int]:
    """Each expert's part of the resident experts' time, its time where it runs alone, and what all of them share."""
    is_active = counts > 0
    loop = costs.loop_ns[counts].astype(np.float64)
    alone = costs.fetched_ns[counts].astype(np.float64)
    if costs.execution.kernels == "grouped":
        overhead_ns = costs.grouped_overhead_ns
        return (loop if costs.has_expert_curve else _grouped(counts, costs)), alone, overhead_ns
    launch = np.where(is_active, float(costs.expert_launch_ns), 0.0)
    if not costs.execution.is_async:
        return loop + launch, alone, 0
    return _larger(loop, launch), alone, 0


def _grouped(counts: npt.NDArray[np.int32], costs: Costs) -> Floats:
    """The larger side of the grouped kernel's roofline."""
    model, device = costs.model, costs.hardware.device
    weights_ns = 1e9 * model.expert_bytes / device.experts_bytes_per_s
    row_ns = 2e9 * model.expert_params / device.grouped_flops_per_s
    # The kernel's time is rounded to a nanosecond: half of one off each expert's is enough for any number of them.
    by_bytes = np.where(counts > 0, max(0.0, weights_ns - 0.5), 0.0)
    return _larger(by_bytes, np.maximum(row_ns * counts - 0.5, 0.0))


def _larger(one: Floats, other: Floats) -> Floats:
    """Of two bounds from below [F, L, E], in each layer the one with the larger sum over all experts."""
    is_one = one.sum(axis=2) >= other.sum(axis=2)
    return np.where(is_one[:, :, None], one, other)


def _host(workload: Workload, costs: Costs) -> tuple[Floats, Floats]:
    """Each expert's part of the host's time [F, L, E], and the part of its call that any miss brings [F, L].

    The call's time is concave in the missed pairs, so it is never below the chord from one pair to all of them.
    """
    pairs = workload.counts.sum(axis=2, dtype=np.int64)
    rows = np.minimum(workload.tokens[:, None], pairs)
    one = costs.host_call_ns(1, 1).astype(np.float64)
    slope = (costs.host_call_ns(rows, pairs) - one) / np.maximum(pairs - 1, 1)
    host = costs.host_expert_ns[workload.counts] + slope[:, :, None] * workload.counts
    # Its ends and the call itself are rounded to a nanosecond, half of one each way.
    return host, one - slope - np.where(slope > 0, 1.0, 0.0)


def _share_fixed(
    is_active: Mask,
    device: Floats,
    alone: Floats,
    host: Floats,
    fixed: tuple[Floats, Floats],
    is_parallel: bool,
) -> tuple[Floats, Floats, Floats, Floats]:
    """What a side takes once, whatever its experts: charged to the layer where that is safe, else to the experts.

    Let a layer have n experts with rows. If one of them is on a side, that side's fixed part is due, so an n-th of it
    for each expert there is never too much. Charged in full it is more, but it must then hold for a side without
    experts too. With parallel sides and any weight w, max(D, H) >= w D + (1 - w) H. Without experts on the device the
    layer takes H >= w (fixed) + (1 - w) H if H >= fixed, H being that of all experts. With experts on the device but no
    resident, all of those were fetched and run alone, and what each takes more than in a group may not make up for the
    fixed part: that can be so for few of them only, and then H, that of the others, must be at least what those few
    take in a group. The same with the sides changed holds for the host. In serial the argument fails.
    """
    device_once, host_once = fixed
    is_safe = is_parallel & _is_always_due(is_active, device, alone - device, host, device_once, host_once)
    device, device_fixed = _spread(device, device_once, is_safe, is_active)
    # An expert that was fetched may run alone, without the others' kernel.
    device = np.minimum(device, alone)
    is_safe = is_parallel & (device_fixed + device.sum(axis=2) >= host_once)
    host, host_fixed = _spread(host, host_once, is_safe, is_active)
    return device, device_fixed, host, host_fixed


def _is_always_due(
    is_active: Mask, device: Floats, extra: Floats, host: Floats, device_once: Floats, host_once: Floats
) -> Mask:
    """Whether a layer always takes at least what it would if the device's fixed part were due, [F, L].

    `extra` is what an expert takes more where it runs alone. Of experts whose extra does not make up for the fixed part
    there are most if they are those with the least extra. At worst those few are the slowest of all on the host, which
    it is then spared, and the slowest on the device.
    """
    num_active = is_active.sum(axis=2)
    least_extra = np.cumsum(np.sort(np.where(is_active, extra, np.inf), axis=2), axis=2)
    few = (least_extra < device_once[:, :, None]).sum(axis=2)
    spared, taken = (_largest(side, few) for side in (host, device))
    is_due: Mask = (few < num_active) & (host_once + host.sum(axis=2) - spared >= device_once + taken)
    return is_due


def _largest(values: Floats, num: npt.NDArray[np.int64]) -> Floats:
    """The sum of the `num` [F, L] largest of `values` [F, L, E]."""
    sums = np.cumsum(np.sort(values, axis=2)[:, :, ::-1], axis=2)
    last = np.take_along_axis(sums, np.maximum(num - 1, 0)[:, :, None], axis=2)[:, :, 0]
    largest: Floats = np.where(num > 0, last, 0.0)
    return largest


def _spread(each: Floats, once: Floats, is_safe: Mask, is_active: Mask) -> tuple[Floats, Floats]:
    """(each expert's part, the layer's part): what is not safe to charge to the layer goes to its active experts."""
    share = np.where(is_safe, 0.0, once) / np.maximum(is_active.sum(axis=2), 1)
    return each + share[:, :, None] * is_active, np.where(is_safe, once, 0.0)
