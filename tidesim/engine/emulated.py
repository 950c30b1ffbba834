"""A device for machines that have none: device, host and link are separate workers with memories of their own.

All arithmetic and every copied byte are real. The device is the calling thread and its cores, the host is a worker
with cores of its own, and the link is a worker that copies whole experts from host memory into slots, one after
another. The link is paced to a profile: a copy takes at least latency + bytes / bandwidth of that profile, and as
long as this machine's memory needs where that is more. Device and host can be slowed by a factor.

Without a paced link and without factors, times are the machine's own.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from tidesim.engine.backend import Batch
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_backend import CpuBackend, Floats, Ints, sleep_until
from tidesim.engine.host_weights import HostWeights, MappedWeights
from tidesim.engine.model import NetworkConfig
from tidesim.errors import InputError
from tidesim.hardware import Hardware, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast an emulated machine may be.

    Parameters
    ----------
    weights, rows_out, rows_back : the links that expert weights and rows of tokens travel on; None: as fast as memory.
    device_factor, host_factor : how many times as long as on this machine computing takes there, >= 1.

    Raise InputError for a factor below 1.
    """

    weights: Link | None = None
    rows_out: Link | None = None
    rows_back: Link | None = None
    device_factor: float = 1.0
    host_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("device_factor", "host_factor"):
            if not getattr(self, name) >= 1:
                raise InputError(f"{name}(={getattr(self, name)}) must be >= 1: computing cannot be faster than it is.")

    @classmethod
    def of(cls, hardware: Hardware) -> "Pace":
        """The pinned links of a profile. Raise InputError if it has none (unified memory)."""
        if hardware.links is None:
            raise InputError(f"{hardware.name} has unified memory, hence no link to pace; take another profile.")
        links = hardware.links
        return cls(weights=links.h2d_pinned, rows_out=links.d2h_pinned, rows_back=links.h2d_pinned)


class EmulatedBackend(CpuBackend):
    """See the module. Implements `offload.Backend`; further parameters are those of `CpuBackend`.

    Parameters
    ----------
    weights : the experts in host memory.
    host_cores : who computes missed experts.
    """

    def __init__(
        self,
        config: NetworkConfig,
        weights: HostWeights | MappedWeights,
        device_cores: Cores,
        host_cores: Cores,
        pace: Pace | None = None,
        is_detailed: bool = False,
    ) -> None:
        self._pace = pace or Pace()
        super().__init__(config, weights.dtype, device_cores, self._pace.device_factor, is_detailed)
        self._weights, self._host_cores = weights, host_cores
        self._host_rows, self._host_outputs = self.outputs, self.outputs

    def copy_one(self, layer: int, expert: int, slab: int, slot: int) -> Future[None]:
        """See `CpuBackend`."""
        link, target = self._pace.weights, self.slabs[slab][slot]
        least_s = 0.0 if link is None else link.copy_s(self.expert_bytes)
        return self.workers["h2d"].submit(
            f"promote {expert}", layer, lambda: self._weights.copy_to(layer, expert, target), least_s
        )

    def start_missed(self, layer: int, batch: Batch, experts: Ints) -> Future[None]:
        """See `offload.Backend`."""
        self.make_room(batch)
        return self.workers["host"].submit("experts", layer, lambda: self._run_missed(layer, batch, experts))

    def finish_missed(self, started: Future[None]) -> None:
        """See `offload.Backend`."""
        started.result()

    def _run_missed(self, layer: int, batch: Batch, experts: Ints) -> None:
        """Rows out, experts on the host, results back; on the host's own thread."""
        x, pairs, mine = batch.x.numpy(), batch.pairs, batch.pairs_of(experts)
        start_ns = perf_counter_ns()
        rows = np.unique(pairs.tokens[mine])
        host_rows = self._room("_host_rows", len(x))
        host_rows[rows] = x[rows]
        _travel(self._pace.rows_out, start_ns, len(rows) * x.shape[1] * self.activation_bytes)
        start_ns = perf_counter_ns()
        outputs = self._room("_host_outputs", len(pairs.tokens))
        at = self._weights.at[layer].of(experts)
        self.run_experts(self._host_cores, host_rows, batch, batch.num_slots + experts, at, outputs)
        self.slow_down(start_ns, self._pace.host_factor)
        start_ns = perf_counter_ns()
        self.outputs[mine] = outputs[mine]
        num_pairs = len(pairs.tokens[mine])
        _travel(self._pace.rows_back, start_ns, num_pairs * x.shape[1] * self.activation_bytes)

    def _room(self, name: str, num_rows: int) -> Floats:
        """The host's buffer `name` with so many rows at least; it is kept from forward to forward."""
        if len(getattr(self, name)) < num_rows:
            setattr(self, name, np.empty((num_rows, self.config.hidden_size), np.float32))
        buffer: Floats = getattr(self, name)
        return buffer


def _travel(link: Link | None, start_ns: int, num_bytes: int) -> None:
    """Rows that set out at `start_ns` arrive no earlier than `link` lets them."""
    if link is not None:
        sleep_until(start_ns + round(link.copy_s(num_bytes) * 1e9))
