"""What is asked of an accelerator: streams, events, pinned memory, and work that is begun again with one call."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]


class DeviceCalls:
    """All calls to the device, so that everything else can be tried on a machine without one."""

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

    def new_event(self) -> Any:
        """An event to be recorded; it notes the time when it happens."""
        return torch.Event(device=self.device, enable_timing=True)

    def record(self, stream: Any, event: Any = None) -> Any:
        """An event behind all that is queued on `stream`: `event`, or (None) a new one."""
        event = self.new_event() if event is None else event
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """Have `stream` do nothing more until `event` has happened."""
        stream.wait_event(event)

    def finish(self, stream: Any) -> None:
        """Wait until all that is queued on `stream` is done."""
        stream.synchronize()

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

    def new_graphs(self) -> "Graphs":
        """A maker of graphs that share memory for what they compute in between."""
        return Graphs(self)


class Graphs:
    """Makes work that one call to the device begins again, where the device has such calls (CUDA and ROCm have).

    A graph holds addresses and numbers as they were when it was captured, and reads and writes the same memory each
    time. Those of one maker share memory for what only they need, so they run one after another on one stream.
    """

    def __init__(self, calls: DeviceCalls) -> None:
        self._calls = calls
        module: Any = torch.get_device_module(calls.device)
        self._make_graph = getattr(module, "CUDAGraph", None)
        if self._make_graph is not None:
            self._stream = calls.new_stream()
            self._pool = module.graph_pool_handle()

    def run(self, work: Work) -> Work:
        """Do `work` now; returns what does it again: its graph, or `work` itself on a device that has none."""
        if self._make_graph is None:
            work()
            return work
        calls, current = self._calls, self._calls.current_stream()
        calls.wait(self._stream, calls.record(current))
        with calls.on(self._stream):
            # Done before it is captured: libraries load kernels and ask for memory at a first call, which no graph can.
            work()
            graph = self._make_graph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        calls.wait(current, calls.record(self._stream))
        replay: Work = graph.replay
        return replay


class Events:
    """Events that are used again and again: making one takes longer than recording it."""

    def __init__(self, calls: DeviceCalls) -> None:
        self._calls = calls
        self._free: list[Any] = []

    def record(self, stream: Any) -> Any:
        """An event behind all that is queued on `stream`."""
        return self._calls.record(stream, self._free.pop() if self._free else None)

    def give_back(self, events: Iterable[Any]) -> None:
        """These have happened, and nobody will ask for them again."""
        self._free.extend(events)
