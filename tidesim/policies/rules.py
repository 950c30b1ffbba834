"""Decisions so simple that a compiled replay makes them itself: thousands of times faster than it could ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


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
    refresh_interval : τ of a refresh, one number or one per layer.
    first_block : whether a sequence's first decoded block is refreshed on each denoising step.
    """

    name: Literal["never", "top-counts", "hottest-for-coldest", "least-recent", "most-recent"]
    refresh_interval: int | tuple[int, ...] = 1
    first_block: bool = False

    @classmethod
    def refreshing(
        cls,
        name: Literal["top-counts", "hottest-for-coldest"],
        refresh_interval: int | Sequence[int],
        *,
        first_block: bool = False,
    ) -> "Rule":
        """A rule with refreshes, whose interval may be any sequence."""
        interval = tuple(refresh_interval) if isinstance(refresh_interval, Sequence) else refresh_interval
        return cls(name, interval, first_block)
