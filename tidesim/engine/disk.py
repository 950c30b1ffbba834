"""Experts beyond memory: a budget of them in RAM, the others on a drive, from where they are read on demand.

RAM is the budgeted tier here, and this machine's cores are the device. A promotion is one direct read into a slot; a
missed expert is read into a small ring, computed and dropped. While some are computed the next ones are being read.
"""

from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import torch

from tidesim.engine.backend import Batch
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_backend import CpuBackend, Ints
from tidesim.engine.drive import Drive
from tidesim.engine.host_weights import addresses, expert_numel, plain_memory
from tidesim.engine.model import NetworkConfig

RING = 8  # missed experts that are in memory at once: one half is read while the other is computed


class DiskBackend(CpuBackend):
    """See the module. Implements `offload.Backend`; further parameters are those of `CpuBackend`.

    Parameters
    ----------
    drive : where the experts are; the caller closes it.
    """

    def __init__(self, config: NetworkConfig, drive: Drive, device_cores: Cores, is_detailed: bool = False) -> None:
        super().__init__(config, drive.dtype, device_cores, is_detailed=is_detailed)
        self._drive = drive
        self._ring = plain_memory((RING, expert_numel(config)), drive.dtype)
        self._ring_at = addresses(self._ring, config)

    def copy_one(self, layer: int, expert: int, slab: int, slot: int) -> Future[None]:
        """See `CpuBackend`."""
        target = as_bytes(self.slabs[slab][slot])
        return self.workers["h2d"].submit(
            f"promote {expert}", layer, lambda: self._drive.read_expert(layer, expert, target)
        )

    def start_missed(self, layer: int, batch: Batch, experts: Ints) -> Future[None]:
        """See `offload.Backend`. The cores are the device's own: the caller waits for the end before it uses them."""
        self.make_room(batch)
        return self.workers["host"].submit("experts", layer, lambda: self._run_missed(layer, batch, experts))

    def finish_missed(self, started: Future[None]) -> None:
        """See `offload.Backend`."""
        started.result()

    def _run_missed(self, layer: int, batch: Batch, experts: Ints) -> None:
        x, half = batch.x.numpy(), RING // 2
        parts = [experts[start : start + half] for start in range(0, len(experts), half)]
        reading = self._start_reads(layer, parts[0], 0)
        for number, part in enumerate(parts):
            arrived, first = reading, number % 2 * half
            if number + 1 < len(parts):
                reading = self._start_reads(layer, parts[number + 1], (number + 1) % 2 * half)
            for read in arrived:
                read.result()
            at = self._ring_at.of(first + np.arange(len(part)))
            self.run_experts(self.device_cores, x, batch, batch.num_slots + part, at, self.outputs)

    def _start_reads(self, layer: int, experts: Ints, first: int) -> list[Future[None]]:
        """Begin to read experts into the ring, from place `first` on."""
        places = enumerate(experts, first)
        return [
            read
            for place, expert in places
            for read in self._drive.start_read(layer, int(expert), as_bytes(self._ring[place]))
        ]


def as_bytes(piece: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The memory of one expert."""
    memory: npt.NDArray[np.uint8] = piece.view(torch.uint8).numpy()
    return memory
