"""A run played stretch by stretch, so that the routing and the moves of one stretch at a time are in memory.

Compiled code plays a stretch as if the run began with it. So between two of them everything that the clock knows of
the past and of the future is moved by what the stretch took. All times are whole numbers, so nothing is lost by that.
"""

from collections.abc import Iterable
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.replay.clock import BUSY, D2H, FREE, H2D, IS_FULL, NEWEST, OLDEST, RING, Clock, play
from tidesim.replay.prices import Fixed, Prices
from tidesim.replay.routing import Routing
from tidesim.replay.rules import Ruled
from tidesim.replay.script import Script

_MORE = 16  # times as much room for copies under way, where there was too little


class Stretch(NamedTuple):
    """Some forwards of a run, one after another, with what they take and the moves in them."""

    routing: Routing
    prices: Prices
    script: Script


def play_all(stretches: Iterable[Stretch], fixed: Fixed, ruled: Ruled, clock: Clock) -> tuple[Clock, int]:
    """Play one stretch after another; what is found out, and the makespan."""
    makespan_ns = passed_ns = 0
    for stretch in stretches:
        clock = _moved_on(clock, fixed, passed_ns)
        # Stamps are numbers of layers of forwards, which begin anew.
        ruled.mark[:] = 0
        while True:
            after, ruled_after = deepcopy(clock), deepcopy(ruled)
            passed_ns = int(play(stretch.routing, stretch.prices, fixed, stretch.script, ruled_after, after))
            if not after.links[:, IS_FULL].any():
                break
            clock = _with_more_room(clock)
        clock, ruled = after, ruled_after
        makespan_ns += passed_ns
    return clock, makespan_ns


def _moved_on(clock: Clock, fixed: Fixed, passed_ns: int) -> Clock:
    """The clock of a stretch that took so long, as the next stretch finds it."""
    moved = deepcopy(clock)
    for link, duration_ns in ((H2D, fixed.promote), (D2H, fixed.evict)):
        # The links were not busy with what lies behind the end, as if that were the end of the run.
        begins = moved.links[link, RING + _under_way(moved, link)]
        moved.links[link, BUSY] += np.maximum(0, begins + duration_ns - np.maximum(begins, passed_ns)).sum()
    moved.links[:, FREE] -= passed_ns
    moved.links[:, RING:] -= passed_ns
    for times in (moved.until, moved.layer_until, moved.scratch_until):
        times -= passed_ns
    return moved


def _with_more_room(clock: Clock) -> Clock:
    """The same with more room for copies under way."""
    room = _MORE * (clock.links.shape[1] - RING)
    links = np.zeros((len(clock.links), RING + room), np.int64)
    links[:, :RING] = clock.links[:, :RING]
    larger = clock._replace(links=links)
    for link in (H2D, D2H):
        links[link, RING + _under_way(larger, link)] = clock.links[link, RING + _under_way(clock, link)]
    return larger


def _under_way(clock: Clock, link: int) -> npt.NDArray[np.int64]:
    """Places in the ring of the copies of `link` that are not known to be over."""
    room = clock.links.shape[1] - RING
    places: npt.NDArray[np.int64] = np.arange(clock.links[link, OLDEST], clock.links[link, NEWEST]) & (room - 1)
    return places
