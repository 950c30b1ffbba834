"""Any device that `torch.accelerator` reports: streams, events, and copies from pinned host memory.

Promotions queue up on a stream beside the one that computes. Resident experts run as one grouped product per matrix,
and so do fetched ones whose copies are under way at once.
A call to the device takes the host longer than most kernels run, so there are few: copies that are begun together wait
for one event, indices travel in one piece, and memory and events are used again from layer to layer.

Results equal those of the CPU kernels to rounding only: the device multiplies in bf16 with an order of sums of its own.
Text may still depend on placement in the last bits of a near tie: an expert on the host sums in another order than the
same expert on the device.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
from tidesim.engine.device_calls import DeviceCalls, Events
from tidesim.engine.host_weights import HostWeights, expert_numel
from tidesim.engine.model import NetworkConfig
from tidesim.engine.slots import Place
from tidesim.engine.times import Span

Ints = npt.NDArray[np.int64]


class _Layout(NamedTuple):
    """A batch on the device: the token of each pair [P], places [P], and where each slot's rows end [B]; all int32."""

    tokens: Tensor
    places: Tensor
    ends: Tensor


class _Slab(NamedTuple):
    """A slab of B slots: each of them, and the matrices of all, gate_up [B, D, 2 I] and down [B, I, D]."""

    slots: tuple[Tensor, ...]
    gate_up: Tensor
    down: Tensor


class _Arrival:
    """A copy, and the event of its end for as long as it may be under way."""

    __slots__ = ("event",)

    def __init__(self, event: Any) -> None:
        self.event = event


class _Copies(NamedTuple):
    """Copies that were begun together: the event of their start, and their arrivals."""

    start: Any
    arrivals: list[_Arrival]


class _Missed(NamedTuple):
    """Work under way on the host, and which pairs it is about."""

    done: Future[None]
    runs: list[slice]


class AcceleratorBackend:
    """See the module. Implements `offload.Backend`; what computes is the stream that is current when it is made.

    Parameters
    ----------
    weights : the experts in pinned host memory.
    host_cores : who computes missed experts.
    calls : the device.
    is_detailed : keep what the host did in `spans`, for a timeline; copies are the device's own and not seen.
    """

    is_async = True

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
        self._stream, self._copy_stream = calls.current_stream(), calls.new_stream()
        self._events = Events(calls)
        self._under_way: deque[_Copies] = deque()
        self._copies_ns = 0
        self._pinned: dict[str, Tensor] = {}
        self._on_device: dict[str, Tensor] = {}
        self.slabs: list[Tensor] = []
        self._slabs: list[_Slab] = []
        self._may_miss = True
        self._layout: _Layout | None = None
        self._num_groups = 0  # of fetched experts in this layer

    # --- slots and copies ---

    def open_slots(self, slabs: Sequence[int]) -> None:
        """See `offload.Backend`."""
        D, width = self._config.hidden_size, self._config.moe_intermediate_size
        shapes = [(num_slots, expert_numel(self._config)) for num_slots in slabs]
        self.slabs = [torch.empty(shape, dtype=self._weights.dtype, device=self._calls.device) for shape in shapes]
        self._may_miss = sum(slabs[:-1]) < sum(map(len, self._weights.layers))
        self._slabs = [
            _Slab(
                slab.unbind(),
                slab[:, : 2 * width * D].view(-1, 2 * width, D).transpose(1, 2),
                slab[:, 2 * width * D :].view(-1, D, width).transpose(1, 2),
            )
            for slab in self.slabs
        ]

    def copy(self, places: Sequence[Place], is_free: bool = False) -> list[_Arrival]:
        """See `offload.Backend`. An arrival is an event of the copy stream."""
        self._look_at_copies()
        if not places:
            return []
        calls, events, stream, pieces = self._calls, self._events, self._copy_stream, self._weights.pieces
        if not is_free:
            begun = events.record(self._stream)
            calls.wait(stream, begun)
            events.give_back([begun])  # the copy stream waits for what the event stood for when it was told to
        copies = _Copies(events.record(stream), [])
        with calls.on(stream):
            for layer, expert, slab, slot in places:
                self._slabs[slab].slots[slot].copy_(pieces[layer][expert], non_blocking=True)
                copies.arrivals.append(_Arrival(events.record(stream)))
        self._under_way.append(copies)
        return copies.arrivals

    def has_arrived(self, arrival: _Arrival) -> bool:
        """See `offload.Backend`."""
        return arrival.event is None or bool(arrival.event.query())

    def wait_for(self, arrival: _Arrival) -> None:
        """See `offload.Backend`. The device waits, not the calling thread."""
        if arrival.event is not None:
            self._calls.wait(self._stream, arrival.event)

    def _look_at_copies(self) -> None:
        """Take note of copies that are done, and their events back."""
        while self._under_way and self.has_arrived(self._under_way[0].arrivals[-1]):
            start, arrivals = self._under_way.popleft()
            self._copies_ns += round(self._calls.elapsed_ms(start, arrivals[-1].event) * 1e6)
            self._events.give_back([start, *(arrival.event for arrival in arrivals)])
            for arrival in arrivals:
                arrival.event = None

    # --- computing ---

    def ids_on_host(self, x: Tensor, expert_ids: Tensor) -> tuple[Ints, Any]:
        """See `offload.Backend`. Where an expert may be missed, the rows follow: all of them, as picking some takes
        longer, and while this thread has nothing else to do."""
        known, self._layout, self._num_groups = self.stamp(), None, 0
        if self._may_miss:
            self._room(self._pinned, "x", tuple(x.shape), torch.float32).copy_(x.float(), non_blocking=True)
        self._calls.finish(self._stream)
        ids: Ints = expert_ids.cpu().numpy()
        return ids, known

    def run_residents(self, slab: int, batch: Batch) -> None:
        """See `offload.Backend`."""
        tokens, _, ends = self._lay_out(batch)
        if batch.num_hits:
            _, gate_up, down = self._slabs[slab]
            run_grouped(batch.x, tokens[: batch.num_hits], gate_up, down, ends, self._on_device["outputs"])

    def run_fetched(self, batch: Batch, places: Sequence[Place]) -> None:
        """See `offload.Backend`. Those of one slab run together."""
        self._lay_out(batch)
        for slab in sorted({place.slab for place in places}):
            group = sorted((place.slot, place.expert) for place in places if place.slab == slab)
            rows = self._fetched_rows(batch, np.array(group, np.int64), len(self.slabs[slab]))
            _, gate_up, down = self._slabs[slab]
            product = expert_products(batch.x.index_select(0, rows.tokens), gate_up, down, rows.ends)
            self._on_device["outputs"].index_copy_(0, rows.places, product.float())

    def _fetched_rows(self, batch: Batch, group: Ints, num_slots: int) -> _Layout:
        """Where the pairs of a group of fetched experts, rows (slot, expert) by slot, stand; on the device.

        Each group of a layer has pinned memory of its own, as the one before it may still be on its way.
        """
        first, keys, num_pairs = batch.pairs.first, batch.num_slots + group[:, 1], len(batch.pairs.tokens)
        begins, ends = first[keys], first[keys + 1]
        places = np.concatenate([np.arange(*run) for run in zip(begins.tolist(), ends.tolist(), strict=True)])
        n, name = len(places), f"group {self._num_groups}"
        self._num_groups += 1
        numbers = self._room(self._pinned, name, (2 * num_pairs + num_slots,), torch.long)[: 2 * n + num_slots]
        per_slot = np.bincount(group[:, 0], weights=ends - begins, minlength=num_slots)
        np.concatenate((places, batch.pairs.tokens[places], np.cumsum(per_slot)), out=numbers.numpy(), casting="unsafe")
        there = numbers.to(self._calls.device, non_blocking=True)
        at, tokens, slot_ends = torch.split(there, [n, n, num_slots])
        return _Layout(tokens, at, slot_ends.int())

    def _lay_out(self, batch: Batch) -> _Layout:
        """The batch's indices on the device, and room for its outputs; made once for each layer."""
        if self._layout is None:
            pairs, num_slots, num_pairs = batch.pairs, batch.num_slots, len(batch.pairs.tokens)
            numbers = self._room(self._pinned, "numbers", (2 * num_pairs + num_slots,), torch.int32)
            parts = (pairs.tokens, pairs.places.ravel(), pairs.first[1 : num_slots + 1])
            np.concatenate(parts, out=numbers.numpy(), casting="same_kind")
            there = self._room(self._on_device, "numbers", tuple(numbers.shape), torch.int32)
            there.copy_(numbers, non_blocking=True)
            self._room(self._on_device, "outputs", (num_pairs, self._config.hidden_size), torch.float32)
            self._layout = _Layout(*torch.split(there, [num_pairs, num_pairs, num_slots]))
        return self._layout

    def start_missed(self, layer: int, batch: Batch, experts: Ints) -> _Missed:
        """See `offload.Backend`. The rows are on the host already. Results go to memory that is kept, as new memory is
        handed over page by page."""
        self._lay_out(batch)
        T, P, D = len(batch.x), len(batch.pairs.tokens), self._config.hidden_size
        x = self._room(self._pinned, "x", (T, D), torch.float32)
        outputs = self._room(self._pinned, "outputs", (P, D), torch.float32)

        def run() -> None:
            at, width, keys = self._weights.at[layer].of(experts), self._config.moe_intermediate_size, batch.num_slots
            arrays = (x.numpy(), batch.pairs, keys + experts, at, self._like, width, outputs.numpy())
            self._host_cores.run_experts(*arrays)

        return _Missed(self._host.submit("experts", layer, run), batch.runs_of(experts))

    def finish_missed(self, started: _Missed) -> None:
        """See `offload.Backend`."""
        started.done.result()
        for pairs in started.runs:
            self._on_device["outputs"][pairs].copy_(self._pinned["outputs"][pairs], non_blocking=True)

    def _room(self, rooms: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that is kept from layer to layer; whatever it was used for before is done when the host knows the next
        layer's ids."""
        if name not in rooms or len(rooms[name]) < shape[0]:
            is_pinned = rooms is self._pinned
            made = (
                self._calls.pinned(shape, dtype)
                if is_pinned
                else torch.empty(shape, dtype=dtype, device=self._calls.device)
            )
            rooms[name] = made
        return rooms[name][: shape[0]]

    def combine(self, batch: Batch, weights: Tensor) -> Tensor:
        """See `offload.Backend`."""
        picked = self._on_device["outputs"].index_select(0, self._lay_out(batch).places)  # [P, D]
        return torch.bmm(weights[:, None], picked.view(*weights.shape, -1))[:, 0]

    # --- time ---

    def stamp(self) -> Any:
        """See `offload.Backend`: an event of the stream that computes."""
        return self._events.record(self._stream)

    def elapsed_ns(self, stamps: Sequence[Any]) -> list[int]:
        """See `offload.Backend`."""
        stamps[-1].synchronize()
        elapsed_ns = [round(self._calls.elapsed_ms(start, end) * 1e6) for start, end in pairwise(stamps)]
        self._events.give_back(stamps)
        return elapsed_ns

    def busy_ns(self) -> dict[str, int]:
        """See `offload.Backend`. Copies count once all that were begun together are done."""
        self._look_at_copies()
        return {"host": self._host.busy_ns, "h2d": self._copies_ns}

    def close(self) -> None:
        """See `offload.Backend`."""
        self._host.close()
        self._calls.finish(self._copy_stream)
        self.slabs, self._slabs, self._pinned, self._on_device = [], [], {}, {}


def run_grouped(x: Tensor, tokens: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor, out: Tensor) -> None:
    """Experts in slots on rows of x [T, D]: those of `tokens` [n], sorted by slot, of which slot i has the last at
    ends[i] - 1. Results go into the first n rows of `out` [P, D] float32; gate_up [B, D, 2 I], down [B, I, D].
    """
    out[: len(tokens)].copy_(expert_products(x.index_select(0, tokens), gate_up, down, ends))


def expert_products(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    """Experts in slots on rows [n, D] that are sorted by slot, see `run_grouped`; [n, D]."""
    gate, up = grouped_product(rows, gate_up, ends).chunk(2, dim=-1)  # [n, I] each
    return grouped_product(functional.silu(gate) * up, down, ends)


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
