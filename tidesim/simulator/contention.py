"""One memory that device, host and copies share, so that whoever is busy slows the others."""

from collections.abc import Generator
from typing import Any

import simpy

from tidesim.hardware import BUSY, Busy, Contention

# Shares are kept to a millionth, so that the work that is left is a whole number and every end is exact.
_FULL = 10**6

_WHO: dict[str, Busy] = {"device": "device", "host": "host", "h2d": "copies", "d2h": "copies"}


class SharedMemory:
    """Who is busy at the moment, and how fast they are beside each other.

    Parameters
    ----------
    contention : the share of its speed that each keeps beside another; None if nobody slows anybody.
    """

    def __init__(self, env: simpy.Environment, contention: Contention | None) -> None:
        self._env = env
        self._shares: dict[tuple[Busy, Busy], int] = {}
        if contention is not None:
            pairs = [(who, beside) for who in BUSY for beside in BUSY if who != beside]
            self._shares = {pair: round(contention.share(*pair) * _FULL) for pair in pairs}
        self._is_contended = any(share < _FULL for share in self._shares.values())
        self._num_busy: dict[Busy, int] = dict.fromkeys(BUSY, 0)
        self._changed = env.event()

    def work(self, resource: str, duration_ns: int) -> Generator[simpy.Event, Any, None]:
        """Work of `resource` that takes `duration_ns` alone: it lasts until all of it is done beside the others."""
        if not self._is_contended:
            yield self._env.timeout(duration_ns)
            return
        who = _WHO[resource]
        self._change(who, +1)
        left = duration_ns * _FULL**2
        while left > 0:
            speed, start_ns = self._speed(who), int(self._env.now)
            yield self._env.timeout(-(-left // speed)) | self._changed
            left -= speed * (int(self._env.now) - start_ns)
        self._change(who, -1)

    def _change(self, who: Busy, by: int) -> None:
        """Somebody begins or ends: everybody who works looks up how fast they are from now on."""
        self._num_busy[who] += by
        changed, self._changed = self._changed, self._env.event()
        changed.succeed()

    def _speed(self, who: Busy) -> int:
        """Work done in a nanosecond, in millionths of millionths: there are two others to be slowed by."""
        speed = 1
        for beside in BUSY:
            if beside != who:
                speed *= self._shares[who, beside] if self._num_busy[beside] else _FULL
        return speed
