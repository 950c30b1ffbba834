"""What every backend that computes on this machine's own cores has in common: workers, slots, and the kernels.

The device is the calling thread and its cores. It computes as soon as it is asked to, so whatever was begun on it
before is done, and points in time are those of the machine's clock.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tidesim.engine import kernel
from tidesim.engine.backend import Batch
from tidesim.engine.cores import Cores
from tidesim.engine.host_weights import addresses, expert_numel, plain_memory
from tidesim.engine.kernel import ExpertWeights
from tidesim.engine.model import NetworkConfig
from tidesim.engine.slots import Place
from tidesim.engine.times import Span

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_PR_SET_TIMERSLACK = 29  # of Linux's prctl: by default a sleep may last 50 us longer than asked for


def sleep_precisely() -> None:
    """Have the sleeps of this thread end within microseconds of their time, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def sleep_until(end_ns: int) -> None:
    """Sleep until the machine's clock shows `end_ns`; not at all if it is past that."""
    left_ns = end_ns - perf_counter_ns()
    if left_ns > 0:
        time.sleep(left_ns / 1e9)


class Worker:
    """A thread that does one thing after another, and knows how long it was busy.

    Parameters
    ----------
    spans : a list that is told what it did, or None.
    """

    def __init__(self, resource: str, spans: list[Span] | None = None) -> None:
        self.busy_ns = 0
        self._resource, self._spans = resource, spans
        self._free_ns = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=resource, initializer=sleep_precisely)

    def submit(self, name: str, layer: int, work: Callable[[], None], least_s: float = 0.0) -> Future[None]:
        """Do `work` once all that was submitted before is done; it then takes at least `least_s`."""
        return self._pool.submit(self._do, name, layer, work, perf_counter_ns(), round(least_s * 1e9))

    def _do(self, name: str, layer: int, work: Callable[[], None], submitted_ns: int, least_ns: int) -> None:
        # Counted from when the work could begin, not from when this thread woke up: else every wait would hand its
        # lateness on to all that follow.
        start_ns = max(submitted_ns, self._free_ns)
        due_ns = start_ns + least_ns
        # Whether tensors are in inference mode is a matter of each thread.
        with torch.inference_mode():
            work()
        end_ns = self._free_ns = max(due_ns, perf_counter_ns())
        sleep_until(due_ns)
        self.busy_ns += end_ns - start_ns
        if self._spans is not None:
            self._spans.append(Span(self._resource, name, start_ns, end_ns, layer))

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._pool.shutdown()


class CpuBackend:
    """The part of `offload.Backend` that emulated and disk-backed machines share.

    Parameters
    ----------
    dtype : what experts are stored in.
    device_cores : who computes on the device.
    device_factor : how many times as long as on this machine computing on the device takes, >= 1.
    is_detailed : keep what the workers did in `spans`, for a timeline.
    """

    activation_bytes = 4
    is_async = False

    def __init__(
        self,
        config: NetworkConfig,
        dtype: torch.dtype,
        device_cores: Cores,
        device_factor: float = 1.0,
        is_detailed: bool = False,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.spans: list[Span] | None = [] if is_detailed else None
        self.workers = {name: Worker(name, self.spans) for name in ("host", "h2d")}
        self.outputs: Floats = np.empty((0, config.hidden_size), np.float32)
        self.device_cores, self._device_factor = device_cores, device_factor
        self.like = kernel.stored_like(dtype)
        kernel.compile_experts(dtype)
        self.slabs: list[Tensor] = []
        self._slots_at: list[ExpertWeights] = []
        self._since_ns = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return expert_numel(self.config) * self.dtype.itemsize

    # --- slots ---

    def open_slots(self, slabs: Sequence[int]) -> None:
        """See `offload.Backend`."""
        self.slabs = [plain_memory((num_slots, expert_numel(self.config)), self.dtype) for num_slots in slabs]
        self._slots_at = [addresses(slab, self.config) for slab in self.slabs]

    def copy(self, places: Sequence[Place], is_free: bool = False) -> list[Future[None]]:
        """See `offload.Backend`. Nothing is ever under way on the device when a copy begins."""
        return [self.copy_one(*place) for place in places]

    def copy_one(self, layer: int, expert: int, slab: int, slot: int) -> Future[None]:
        """Begin to copy one expert; its arrival."""
        raise NotImplementedError

    def has_arrived(self, arrival: Future[None]) -> bool:
        """See `offload.Backend`."""
        return arrival.done()

    def wait_for(self, arrival: Future[None]) -> None:
        """See `offload.Backend`."""
        arrival.result()

    # --- computing ---

    def ids_on_host(self, x: Tensor, expert_ids: Tensor) -> tuple[Ints, int]:
        """See `offload.Backend`."""
        self.slow_down(self._since_ns, self._device_factor)
        return expert_ids.numpy(), self.stamp()

    def make_room(self, batch: Batch) -> None:
        """Have `outputs` hold a row for each pair of `batch`; called on the device's thread."""
        num_pairs = len(batch.pairs.tokens)
        if len(self.outputs) < num_pairs:
            self.outputs = np.empty((num_pairs, self.config.hidden_size), np.float32)

    def run_residents(self, slab: int, batch: Batch) -> None:
        """See `offload.Backend`."""
        self.make_room(batch)
        used = batch.used_slots
        if len(used):
            self._run_on_device(batch, used, self._slots_at[slab].of(used))

    def run_fetched(self, batch: Batch, places: Sequence[Place]) -> None:
        """See `offload.Backend`."""
        for _, expert, slab, slot in places:
            at = self._slots_at[slab].of(np.array([slot]))
            self._run_on_device(batch, np.array([batch.num_slots + expert]), at)

    def _run_on_device(self, batch: Batch, keys: Ints, at: ExpertWeights) -> None:
        start_ns = perf_counter_ns()
        self.run_experts(self.device_cores, batch.x.numpy(), batch, keys, at, self.outputs)
        self.slow_down(start_ns, self._device_factor)

    def run_experts(self, cores: Cores, x: Floats, batch: Batch, keys: Ints, at: ExpertWeights, out: Floats) -> None:
        """Have `cores` run the experts that stand under `keys` in the batch and lie `at` these addresses."""
        cores.run_experts(x, batch.pairs, keys, at, self.like, self.config.moe_intermediate_size, out)

    def slow_down(self, start_ns: int, factor: float) -> None:
        """Sleep until what began at `start_ns` has taken `factor` times as long as it did."""
        if factor > 1:
            sleep_until(start_ns + round(factor * (perf_counter_ns() - start_ns)))

    def combine(self, batch: Batch, weights: Tensor) -> Tensor:
        """See `offload.Backend`."""
        return torch.from_numpy(kernel.combine(self.outputs, batch.pairs.places, weights.numpy()))

    # --- time ---

    def stamp(self) -> int:
        """See `offload.Backend`."""
        self._since_ns = perf_counter_ns()
        return self._since_ns

    def elapsed_ns(self, stamps: Sequence[int]) -> list[int]:
        """See `offload.Backend`."""
        return [end - start for start, end in pairwise(stamps)]

    def busy_ns(self) -> dict[str, int]:
        """See `offload.Backend`."""
        return {name: worker.busy_ns for name, worker in self.workers.items()}

    def close(self) -> None:
        """See `offload.Backend`."""
        for worker in self.workers.values():
            worker.close()
