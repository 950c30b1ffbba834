"""The CPU in place of an accelerator, for tests of everything but the calls to the device."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tidesim.engine.device_calls import DeviceCalls, Work


class Event:
    """Happens at once, as everything does on a device that computes when it is asked to."""

    def __init__(self) -> None:
        self.at_ns = time.perf_counter_ns()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.query()


class StandIn(DeviceCalls):
    """The CPU in place of an accelerator: everything but the calls to the device is the real thing.

    Parameters
    ----------
    has_graphs : whether work can be captured.
    """

    def __init__(self, has_graphs: bool = True) -> None:
        self.device, self._has_graphs = torch.device("cpu"), has_graphs

    def new_stream(self) -> Any:
        return nullcontext()

    def current_stream(self) -> Any:
        return nullcontext()

    def new_event(self) -> Event:
        return Event()

    def record(self, stream: Any, event: Any = None) -> Event:
        event = event or self.new_event()
        event.at_ns = time.perf_counter_ns()
        return event

    def wait(self, stream: Any, event: Event) -> None:
        event.synchronize()

    def finish(self, stream: Any) -> None:
        pass

    def elapsed_ms(self, start: Event, end: Event) -> float:
        return (end.at_ns - start.at_ns) / 1e6

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def memory_bytes(self) -> int:
        return 3 * 2**30

    def new_graphs(self) -> Any:
        return RecordedGraphs() if self._has_graphs else super().new_graphs()


class RecordedGraphs:
    """Graphs as lists of operations with the very tensors and numbers that they had when they were captured."""

    def run(self, work: Work) -> Work:
        recorder = Recorder()
        with recorder:
            work()
        return recorder.replay


class Recorder(TorchDispatchMode):
    """Notes operations while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do them again; what an operation made then lies where it lay."""
        for function, args, kwargs, result in self.calls:
            for before, now in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)
