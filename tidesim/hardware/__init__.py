"""A machine as figures: how fast its memories, chips and links are, and where each figure comes from.

A profile is a YAML file that describes one device (an accelerator) and its host. Each figure stands in it as
`{value: 25.2, kind: rule, source: "..."}`, in the unit that its key names. `FIGURE_KEYS` describes every figure once:
checks and conversion are driven from it. From here on, everything is in bytes, seconds, bytes/s and FLOP/s.
A profile says what the machine can do; how the software uses it is the business of `tidesim.execution`.
"""

from tidesim.hardware.keys import FIGURE_KEYS, KINDS, Figure
from tidesim.hardware.machine import Device, Hardware, Host, Link, Links, load_hardware

__all__ = ["FIGURE_KEYS", "KINDS", "Device", "Figure", "Hardware", "Host", "Link", "Links", "load_hardware"]
