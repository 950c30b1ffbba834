"""The compiled replay: the time model of `tidesim.simulator` as a recurrence, thousands of times faster.

A queue that serves first come first served needs no events: what comes next starts when it is ready and the queue is
free, whichever is later. So a run is one walk over its forwards with a few numbers, and it is compiled. Which experts
move does not depend on the clock, so decisions are made first, by the policy itself or, for the simplest ones, by
compiled code that decides the same, and timed then. The results are those of `simulate` to the nanosecond.

One thing is beyond it: device, host and copies that slow each other down while they run. Profiles that say so
(`contention`) are refused with a pointer to the simulator.

What a policy hits and moves, without times, can be had for all budgets at once where residents are nested: see
`curves`.

The first run on a machine compiles, for 16 s on two cores (`compile_s` of tests/benchmarks/replay_speed.py); what was
compiled is kept on disk.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidesim.replay.curves import Curve, lru_curve, tide_as_coded_curves, tide_curves
    from tidesim.replay.drift import drift_of
    from tidesim.replay.replaying import Replayer, compile_now, is_compiled, is_contended, replay

__all__ = [
    "Curve",
    "Replayer",
    "compile_now",
    "drift_of",
    "is_compiled",
    "is_contended",
    "lru_curve",
    "replay",
    "tide_as_coded_curves",
    "tide_curves",
]

_HOMES = dict.fromkeys(("Curve", "lru_curve", "tide_as_coded_curves", "tide_curves"), "curves") | {"drift_of": "drift"}


def __getattr__(name: str) -> Any:
    # Importing numba takes longer than most commands, so only who replays waits for it.
    if name in __all__:
        return getattr(import_module(f"tidesim.replay.{_HOMES.get(name, 'replaying')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
