"""Any device that `torch.accelerator` reports: streams, events, and copies from pinned host memory.

Two streams run beside the one that computes: promotions queue up on one, rows of tokens travel to the host on the
other. Resident experts run as one grouped product per matrix. All calls to the device go through `DeviceCalls`, so
the rest can be tried on a machine without one.

Results equal those of the CPU kernels to rounding only: the device multiplies in bf16 with an order of sums of its own.
Text may still depend on placement in the last bits of a near tie: an expert on the host sums in another order than the
same expert on the device.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from tidesim.engine import kernel
from tidesim.engine.backend import Batch
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_backend import Worker
from tidesim.engine.host_weights import HostWeights, expert_numel
from tidesim.engine.model import NetworkConfig
from tidesim.engine.times import Span

Ints = npt.NDArray[np.int64]


class DeviceCalls:
    """What is asked of the accelerator: streams, events, pinned memory, and how much memory it has."""

    def __init__(self) -> None:
        device = torch.accelerator.current_accelerator()
        assert device is not None
        self.device = torch.device(device.type, torch.accelerator.current_device_index())

    def new_stream(self) -> Any:
        """A queue of device work that runs beside others."""
        return torch.Stream(device=self.device)

    def current_stream(self) -> Any:
        """The queue that work goes to by default."""
        return torch.accelerator.current_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which work goes to `stream`."""
        context: AbstractContextManager[Any] = stream
        return context

    def record(self, stream: Any) -> Any:
        """An event behind all that is queued on `stream`; it notes the time when it happens."""
        event = torch.Event(device=self.device, enable_timing=True)
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """Have `stream` do nothing more until `event` has happened."""
        stream.wait_event(event)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""
        return float(start.elapsed_time(end))

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Page-locked host memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def memory_bytes(self) -> int:
        """The memory of the device."""
        module: Any = torch.get_device_module(self.device)
        return int(module.get_device_properties(self.device).total_memory)


class _Layout(NamedTuple):
    """A batch on the device: tokens of the hits [num_hits], places [T, K], and where each slot's rows end [B]."""

    tokens: Tensor
    places: Tensor
    ends: Tensor


class _Missed(NamedTuple):
    """Work under way on the host, where its results will be, and which pairs of the batch they belong to."""

    done: Future[None]
    back: Tensor
    pairs: slice | Ints


class AcceleratorBackend:
    """See the module. Implements `offload.Backend`.

    Parameters
    ----------
    weights : the experts in pinned host memory.
    host_cores : who computes missed experts.
    calls : the device.
    is_detailed : keep what the host did in `spans`, for a timeline; copies are the device's own and not seen.
    """

    def __init__(
        self,
        config: NetworkConfig,
        weights: HostWeights,
        host_cores: Cores,
        calls: DeviceCalls,
        is_detailed: bool = False,
    ) -> None:
        self._config, self._weights, self._host_cores, self._calls = config, weights, host_cores, calls
        self._like = kernel.stored_like(weights.dtype)
        kernel.compile_experts(weights.dtype)
        self.spans: list[Span] | None = [] if is_detailed else None
        self._host = Worker("host", self.spans)
        self._copy_stream, self._rows_stream = calls.new_stream(), calls.new_stream()
        self._copies: list[tuple[Any, Any]] = []
        self._copies_ns = 0
        self._buffers: dict[str, Tensor] = {}
        self.slabs: list[Tensor] = []
        self._layout: _Layout | None = None
        self._outputs = torch.empty(0)

    # --- slots and copies ---

    def open_slots(self, slabs: Sequence[int]) -> None:
        """See `offload.Backend`."""
        numel = expert_numel(self._config)
        shapes = [(num_slots, numel) for num_slots in slabs]
        self.slabs = [torch.empty(shape, dtype=self._weights.dtype, device=self._calls.device) for shape in shapes]

    def copy(self, layer: int, expert: int, slab: int, slot: int) -> Any:
        """See `offload.Backend`. An arrival is an event of the copy stream."""
        calls = self._calls
        calls.wait(self._copy_stream, calls.record(calls.current_stream()))
        with calls.on(self._copy_stream):
            start = calls.record(self._copy_stream)
            self.slabs[slab][slot].copy_(self._weights.layers[layer][expert], non_blocking=True)
            arrival = calls.record(self._copy_stream)
        self._copies.append((start, arrival))
        return arrival

    def has_arrived(self, arrival: Any) -> bool:
        """See `offload.Backend`."""
        return bool(arrival.query())

    def wait_for(self, arrival: Any) -> None:
        """See `offload.Backend`. The device waits, not the calling thread."""
        self._calls.wait(self._calls.current_stream(), arrival)

    # --- computing ---

    def ids_on_host(self, expert_ids: Tensor) -> Ints:
        """See `offload.Backend`."""
        self._layout = None
        ids: Ints = expert_ids.cpu().numpy()
        return ids

    def run_residents(self, slab: int, batch: Batch) -> None:
        """See `offload.Backend`."""
        layout = self._lay_out(batch)
        if batch.num_hits:
            rows = batch.x.index_select(0, layout.tokens)  # [num_hits, D]
            self._outputs[: batch.num_hits] = self._run(rows, self.slabs[slab], layout.ends)

    def run_fetched(self, batch: Batch, expert: int, slab: int, slot: int) -> None:
        """See `offload.Backend`."""
        self._lay_out(batch)
        begin, end = batch.pairs.first[batch.num_slots + expert : batch.num_slots + expert + 2].tolist()
        tokens = torch.from_numpy(batch.pairs.tokens[begin:end]).to(self._calls.device, non_blocking=True)
        ends = torch.full((1,), end - begin, dtype=torch.int32, device=self._calls.device)
        alone = self.slabs[slab][slot : slot + 1]
        self._outputs[begin:end] = self._run(batch.x.index_select(0, tokens), alone, ends)

    def _run(self, rows: Tensor, slab: Tensor, ends: Tensor) -> Tensor:
        """Outputs [n, D] of rows [n, D] that are sorted by slot; the rows of slot i end at ends[i]."""
        D, width = self._config.hidden_size, self._config.moe_intermediate_size
        gate_up = slab[:, : 2 * width * D].view(-1, 2 * width, D).transpose(1, 2)  # [B, D, 2 I]
        down = slab[:, 2 * width * D :].view(-1, D, width).transpose(1, 2)  # [B, I, D]
        gate, up = grouped_product(rows, gate_up, ends).chunk(2, dim=-1)  # [n, I] each
        return grouped_product(functional.silu(gate) * up, down, ends)

    def _lay_out(self, batch: Batch) -> _Layout:
        """The batch's indices on the device, and room for its outputs; made once for each layer."""
        if self._layout is None:
            device, pairs = self._calls.device, batch.pairs
            num_pairs = len(pairs.tokens)
            if len(self._outputs) < num_pairs:
                self._outputs = batch.x.new_empty((num_pairs, batch.x.shape[1]))
            ends = torch.from_numpy(pairs.first[1 : batch.num_slots + 1].astype(np.int32))
            parts = (torch.from_numpy(pairs.tokens[: batch.num_hits]), torch.from_numpy(pairs.places), ends)
            self._layout = _Layout(*(part.to(device, non_blocking=True) for part in parts))
        return self._layout

    def start_missed(self, layer: int, batch: Batch, experts: Ints) -> _Missed:
        """See `offload.Backend`. Rows travel on a stream of their own, so that the device goes on meanwhile."""
        calls, mine = self._calls, batch.pairs_of(experts)
        self._lay_out(batch)
        tokens = batch.pairs.tokens[mine]
        rows = np.unique(tokens)
        sent = self._buffer("sent", len(rows), batch.x)
        calls.wait(self._rows_stream, calls.record(calls.current_stream()))
        with calls.on(self._rows_stream):
            index = torch.from_numpy(rows).to(calls.device, non_blocking=True)
            sent.copy_(batch.x.index_select(0, index), non_blocking=True)
            there = calls.record(self._rows_stream)
        back = self._buffer("back", len(tokens), batch.x)

        def run() -> None:
            there.synchronize()
            x = np.empty((len(batch.x), batch.x.shape[1]), np.float32)
            x[rows] = sent.float().numpy()
            outputs = np.empty((len(batch.pairs.tokens), x.shape[1]), np.float32)
            at, width = self._weights.at[layer].of(experts), self._config.moe_intermediate_size
            self._host_cores.run_experts(x, batch.pairs, batch.num_slots + experts, at, self._like, width, outputs)
            back.copy_(torch.from_numpy(outputs[mine]))

        return _Missed(self._host.submit("experts", layer, run), back, mine)

    def finish_missed(self, started: _Missed) -> None:
        """See `offload.Backend`."""
        started.done.result()
        if isinstance(started.pairs, slice):
            self._outputs[started.pairs].copy_(started.back, non_blocking=True)
        else:
            index = torch.from_numpy(started.pairs).to(self._calls.device, non_blocking=True)
            self._outputs.index_copy_(0, index, started.back.to(self._calls.device, non_blocking=True))

    def _buffer(self, name: str, num_rows: int, like: Tensor) -> Tensor:
        """Pinned memory for so many rows; it is kept, and free again once the device has asked for the next layer."""
        if name not in self._buffers or len(self._buffers[name]) < num_rows:
            self._buffers[name] = self._calls.pinned((num_rows, like.shape[1]), like.dtype)
        return self._buffers[name][:num_rows]

    def combine(self, batch: Batch, weights: Tensor) -> Tensor:
        """See `offload.Backend`."""
        places = self._lay_out(batch).places
        picked = self._outputs.index_select(0, places.flatten()).view(*places.shape, -1).float()  # [T, K, D]
        return (picked * weights[:, :, None]).sum(1)

    # --- time ---

    def stamp(self) -> Any:
        """See `offload.Backend`: an event of the stream that computes."""
        return self._calls.record(self._calls.current_stream())

    def elapsed_ns(self, stamps: Sequence[Any]) -> list[int]:
        """See `offload.Backend`."""
        stamps[-1].synchronize()
        return [round(self._calls.elapsed_ms(start, end) * 1e6) for start, end in pairwise(stamps)]

    def busy_ns(self) -> dict[str, int]:
        """See `offload.Backend`."""
        under_way = []
        for start, arrival in self._copies:
            if arrival.query():
                self._copies_ns += round(self._calls.elapsed_ms(start, arrival) * 1e6)
            else:
                under_way.append((start, arrival))
        self._copies = under_way
        return {"host": self._host.busy_ns, "h2d": self._copies_ns}

    def close(self) -> None:
        """See `offload.Backend`."""
        self._host.close()
        self._calls.record(self._copy_stream).synchronize()
        self.slabs, self._buffers = [], {}


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [n, in] times matrices [B, in, out], row by row with the matrix of its group; group i ends at ends[i].

    Without `torch.nn.functional.grouped_mm` (before PyTorch 2.10) the groups are multiplied one by one.
    """
    product: Callable[..., Tensor] | None = getattr(functional, "grouped_mm", None)
    if product is not None:
        return product(rows, matrices, offs=ends)
    out = rows.new_empty((len(rows), matrices.shape[2]))
    for number, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        torch.mm(rows[begin:end], matrices[number], out=out[begin:end])
    return out
