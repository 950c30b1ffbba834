"""A machine as figures: how fast its memories, chips and links are, and where each figure comes from.

A profile is a YAML file that describes one device (an accelerator) and its host. Each figure stands in it as
`{value: 25.2, kind: rule, source: "..."}`, in the unit that its key names. `FIGURE_KEYS` describes every figure once:
checks and conversion are driven from it. A calibrated profile also has curves, the rate of one expert by its rows,
written `{rows: [1, 4, 16], gflops: [3.1, 11.8, 24], kind: calibrated, source: "..."}` (`CURVE_KEYS`), and a section
`contention` where device, host and copies share one memory.

From here on, everything is in bytes, seconds, bytes/s and FLOP/s. A profile says what the machine can do; how the
software uses it is the business of `tidesim.execution`.
"""

from tidesim.hardware.keys import CURVE_KEYS, FIGURE_KEYS, KINDS, CurveFigure, Figure
from tidesim.hardware.machine import BUSY, Busy, Contention, Curve, Device, Hardware, Host, Link, Links, load_hardware

__all__ = [
    "BUSY",
    "CURVE_KEYS",
    "FIGURE_KEYS",
    "KINDS",
    "Busy",
    "Contention",
    "Curve",
    "CurveFigure",
    "Device",
    "Figure",
    "Hardware",
    "Host",
    "Link",
    "Links",
    "load_hardware",
]
