"""Measure the machine that this runs on: `calibrate` makes a hardware profile of it, at the sizes of a model.

Every figure is the median of samples that alternate with others, of work on memory that no cache holds, at the sizes
that an engine would really use, and done by the engine's own code. What a figure is good for is in its source: how it
was measured and how far apart the samples were.
"""

from tidesim.engine.calibrate.measured import CopyFit, Measured, fit_copies
from tidesim.engine.calibrate.profile import Progress, Settings, calibrate, check_step

__all__ = ["CopyFit", "Measured", "Progress", "Settings", "calibrate", "check_step", "fit_copies"]
