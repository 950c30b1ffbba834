"""A run played stretch by stretch, so that the routing and the moves of one stretch at a time are in memory."""

from collections.abc import Iterable
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.replay.clock import D2H, H2D, IS_FULL, NEWEST, OLDEST, RING, Clock, play, stop
from tidesim.replay.prices import Fixed, Prices
from tidesim.replay.routing import Routing
from tidesim.replay.rules import Ruled
from tidesim.replay.script import Script

_MORE = 16  # times as much room for copies under way, where there was too little


class Stretch(NamedTuple):
    """Some forwards of a run, one after another: what they take, the moves in them, and where their times go."""

    routing: Routing
    prices: Prices
    script: Script
    spent: npt.NDArray[np.int64]


def play_all(stretches: Iterable[Stretch], fixed: Fixed, ruled: Ruled, clock: Clock) -> tuple[Clock, int]:
    """Play one stretch after another; what is found out, and the makespan."""
    now_ns = 0
    for stretch in stretches:
        while True:
            # As it was before, in case that there is too little room.
            after, ruled_after = deepcopy(clock), deepcopy(ruled)
            routing, prices, script, spent = stretch
            then_ns = int(play(routing, prices, fixed, script, ruled_after, after, spent, now_ns))
            if not after.links[:, IS_FULL].any():
                break
            clock = _with_more_room(clock)
        clock, ruled, now_ns = after, ruled_after, then_ns
    stop(fixed, clock, now_ns)
    return clock, now_ns


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
