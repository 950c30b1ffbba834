"""The CPU in place of an accelerator, for tests of everything but the calls to the device."""

import time
from contextlib import nullcontext
from typing import Any

import torch

from tidesim.engine.accelerator import DeviceCalls


class Event:
    """Happens at once, as everything does on a device that computes when it is asked to."""

    def __init__(self) -> None:
        self.at_ns = time.perf_counter_ns()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.query()


class StandIn(DeviceCalls):
    """The CPU in place of an accelerator: everything but the calls to the device is the real thing."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def new_stream(self) -> Any:
        return nullcontext()

    def current_stream(self) -> Any:
        return nullcontext()

    def record(self, stream: Any) -> Event:
        return Event()

    def wait(self, stream: Any, event: Event) -> None:
        event.synchronize()

    def elapsed_ms(self, start: Event, end: Event) -> float:
        return (end.at_ns - start.at_ns) / 1e6

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def memory_bytes(self) -> int:
        return 3 * 2**30
