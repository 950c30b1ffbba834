"""Decisions so simple that a compiled replay makes them itself: thousands of times faster than it could ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError

# Denoising steps of a block, the same for all layers or some for each: as reported, and as people may say it.
Steps = tuple[int, ...] | tuple[tuple[int, ...], ...]
AnySteps = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """On which denoising steps of a block, counted from 0, each layer is refreshed.

    Parameters
    ----------
    refresh_interval : τ >= 1: on each step whose number is a multiple of it. One number or one per layer.
    refresh_steps : in place of an interval, the very steps, ascending: one tuple for all layers or one per layer. After
        the last of them nothing is refreshed until the next block; with none at all, never.
    first_block : whether a sequence's first decoded block is refreshed on each step.

    Raise InputError for anything else.
    """

    refresh_interval: int | tuple[int, ...] | None = None
    refresh_steps: tuple[tuple[int, ...], ...] | None = None
    first_block: bool = False

    def __post_init__(self) -> None:
        interval, steps = self.refresh_interval, self.refresh_steps
        if (interval is None) == (steps is None):
            raise InputError("a schedule has either refresh_interval or refresh_steps; leave one of them out.")
        numbers = interval if isinstance(interval, tuple) else (1 if interval is None else interval,)
        if not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise InputError(f"refresh_interval(={interval}) must be a whole number >= 1, or one per layer.")
        if not all(map(_is_ascending, steps or ())):
            raise InputError(f"refresh_steps(={steps!r:.60}) must be whole numbers >= 0, ascending, each once.")

    @classmethod
    def of(
        cls,
        refresh_interval: int | Sequence[int] | None,
        refresh_steps: AnySteps | None,
        *,
        first_block: bool = False,
    ) -> Self:
        """The schedule of an interval or of steps in sequences of any kind; of every step where neither is given.

        Steps for all layers may stand for themselves. Raise InputError as the class does.
        """
        interval = tuple(refresh_interval) if isinstance(refresh_interval, Sequence) else refresh_interval
        rows = None if refresh_steps is None else _rows(refresh_steps)
        return cls(1 if interval is None and rows is None else interval, rows, first_block)

    @property
    def stated_steps(self) -> Steps | None:
        """The steps for the record: just one tuple if all layers have the same."""
        rows = self.refresh_steps
        return rows if rows is None or len(set(rows)) > 1 else rows[0]

    def check(self, num_layers: int) -> None:
        """Raise InputError if it is for another number of layers."""
        interval, rows = self.refresh_interval, self.refresh_steps
        if isinstance(interval, tuple) and len(interval) != num_layers:
            raise InputError(
                f"refresh_interval has {len(interval)} numbers; give one, or one for each of the {num_layers} MoE "
                "layers."
            )
        if rows is not None and len(rows) not in (1, num_layers):
            raise InputError(
                f"refresh_steps has {len(rows)} lists; give one, or one for each of the {num_layers} MoE layers."
            )

    def is_due(self, layer: int, step: int) -> bool:
        """Whether `layer` is refreshed on a block's `step`, in any block but one that is refreshed on each."""
        if self.refresh_steps is not None:
            return step in self.refresh_steps[layer if len(self.refresh_steps) > 1 else 0]
        interval = self.refresh_interval
        assert interval is not None
        return step % (interval[layer] if isinstance(interval, tuple) else interval) == 0

    def table(self, num_layers: int, num_steps: int) -> npt.NDArray[np.bool_]:
        """What `is_due` says of every layer and the first steps of a block, [L, num_steps]."""
        is_common = not isinstance(self.refresh_interval, tuple) and len(self.refresh_steps or ((),)) == 1
        layers, steps = range(1 if is_common else num_layers), range(num_steps)
        rows = [[self.is_due(layer, step) for step in steps] for layer in layers]
        return np.repeat(np.array(rows, np.bool_).reshape(-1, num_steps), num_layers // len(rows), axis=0)


def _is_ascending(steps: tuple[int, ...]) -> bool:
    is_whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    return is_whole and all(low < high for low, high in pairwise((-1, *steps)))


def _rows(steps: AnySteps) -> tuple[tuple[int, ...], ...]:
    """A tuple for each list of steps. Raise InputError if they are neither a list of steps nor of such lists."""
    is_list = isinstance(steps, Sequence)
    rows = [tuple(row) for row in steps if isinstance(row, list | tuple)] if is_list else []
    if not is_list or len(rows) not in (0, len(steps)):
        raise InputError(f"refresh_steps(={steps!r:.60}) must be a list of denoising steps, or such a list per layer.")
    return tuple(rows) or (tuple(step for step in steps if not isinstance(step, list | tuple)),)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a policy decides after its first placement, told in a word. Misses run on the host unless it says otherwise.

    Parameters
    ----------
    name : "never": nothing moves. "top-counts": a refresh wants the experts with most tokens of its forward, victims in
        the order of a CPython set; see `tide.tide_as_coded`. "hottest-for-coldest": a refresh swaps the absent expert
        with most tokens so far for the resident one with fewest, as long as that is strictly better; see `tide.tide`.
        "least-recent": every miss is fetched and kept in the place of the least recently used one; see
        `caches.mixtral_offloading`. "most-recent": every miss is fetched, and stays if it is among the most recent; see
        `caches.lru`.
    schedule : when there is a refresh.
    """

    name: Literal["never", "top-counts", "hottest-for-coldest", "least-recent", "most-recent"]
    schedule: Schedule = Schedule(refresh_steps=((),))
