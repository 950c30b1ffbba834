"""What an engine asks of a machine: memories, copies and computations, of one kind of device each.

Letters: T tokens of a forward, K top-k, B slots of a slab, D hidden size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tidesim.engine.kernel import Pairs
from tidesim.engine.slots import Place
from tidesim.engine.times import Span
from tidesim.errors import InputError
from tidesim.execution import Execution

Ints = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """The rows of one layer in one forward, and which of their pairs the device has the experts for.

    Parameters
    ----------
    x : [T, D], on the device.
    pairs : sorted by slot and then, from B on, by the id of the missed expert.
    num_slots : B of the layer's slab. num_hits : pairs whose expert is resident; they come first.
    """

    x: Tensor
    pairs: Pairs
    num_slots: int
    num_hits: int

    @property
    def used_slots(self) -> Ints:
        """Slots whose expert has rows, ascending."""
        return np.flatnonzero(self.pairs.counts[: self.num_slots])

    @property
    def missed(self) -> Ints:
        """Experts that have rows and no slot, ascending ids."""
        return np.flatnonzero(self.pairs.counts[self.num_slots :])

    @property
    def num_misses(self) -> int:
        """Pairs whose expert is not resident."""
        return len(self.pairs.tokens) - self.num_hits

    def pairs_of(self, experts: Ints) -> slice | Ints:
        """Where the pairs of `experts`, all or some of `missed`, stand."""
        first, keys = self.pairs.first, self.num_slots + experts
        if int((first[keys + 1] - first[keys]).sum()) == self.num_misses:
            return slice(self.num_hits, len(self.pairs.tokens))
        return np.concatenate([np.arange(first[key], first[key + 1]) for key in keys])

    def runs_of(self, experts: Ints) -> list[slice]:
        """The same as few slices, for ascending `experts`."""
        first, keys = self.pairs.first, self.num_slots + experts
        begins, ends = first[keys], first[keys + 1]
        gaps = np.flatnonzero(begins[1:] > ends[:-1])
        starts, stops = begins[np.concatenate(([0], gaps + 1))], ends[np.concatenate((gaps, [len(keys) - 1]))]
        return [slice(*pair) for pair in zip(starts.tolist(), stops.tolist(), strict=True)]


class Backend(Protocol):
    """Memories, copies and computations of one machine. Experts are copied in the order in which that is asked for.

    Attributes
    ----------
    spans : what its workers did, if it was asked to keep that.
    is_async : whether what is begun on the device is not waited for, so that the calling thread goes on beside it.
    """

    spans: list[Span] | None
    is_async: bool

    def open_slots(self, slabs: Sequence[int]) -> None:
        """Set up slabs of so many empty slots each."""

    def copy(self, places: Sequence[Place], is_free: bool = False) -> Sequence[Any]:
        """Begin to copy experts into their slots, one after another, behind all copies begun before; their arrivals.

        What was begun on the device before may still use the slots, and the copies wait for that; unless the slots are
        free: nothing uses them that was begun since `ids_on_host`.
        """

    def has_arrived(self, arrival: Any) -> bool:
        """Whether a copy is done."""

    def wait_for(self, arrival: Any) -> None:
        """Have the device do nothing more until a copy is done. Raise what the copy raised."""

    def ids_on_host(self, x: Tensor, expert_ids: Tensor) -> tuple[Ints, Any]:
        """The choices [T, K] of a forward for its rows x [T, D], on the host, and the stamp of when the device had made
        them; waits for that, and for all before."""

    def run_residents(self, slab: int, batch: Batch) -> None:
        """Run the experts in `batch.used_slots` of a slab on their pairs, all at once."""

    def run_fetched(self, batch: Batch, places: Sequence[Place]) -> None:
        """Run on the device experts that `batch` holds as missed and that now lie in slots."""

    def start_missed(self, layer: int, batch: Batch, experts: Ints) -> Any:
        """Begin to run `experts`, all or some of `batch.missed`, away from the device."""

    def finish_missed(self, started: Any) -> None:
        """Wait until they have run and their results are on the device."""

    def combine(self, batch: Batch, weights: Tensor) -> Tensor:
        """Weighted sum [T, D] float32 of each token's K outputs, in the order of its choices."""

    def stamp(self) -> Any:
        """A point in time of the device."""

    def elapsed_ns(self, stamps: Sequence[Any]) -> list[int]:
        """Nanoseconds from each stamp to the next, once the device has passed the last one.

        The stamps may be used for other points in time after that.
        """

    def busy_ns(self) -> dict[str, int]:
        """How long "host" and "h2d" have been at work since the slots were opened."""

    def close(self) -> None:
        """Wait for pending copies, and give back threads and memory."""


def check_execution(execution: Execution) -> None:
    """Raise InputError with every setting of `execution` that the engine cannot follow."""
    fixed = {
        "logits": "block",
        "kernels": "grouped",
        "host_calls": "layer",
        "write_back": False,
        "copies_per_expert": 1,
        "is_pinned": True,
    }
    wrong = [
        f"{name}={getattr(execution, name)!r}" for name, value in fixed.items() if getattr(execution, name) != value
    ]
    if wrong:
        raise InputError(
            f"the engine cannot run execution {execution.name!r}, which has {', '.join(wrong)}; "
            "plan for one that it runs: overlapped, engine, emulated or disk."
        )
