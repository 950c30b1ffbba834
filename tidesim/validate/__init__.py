"""Predicted meets measured: choices run on this machine, and simulated on the same routing with its own profile."""

from tidesim.validate.agreement import Row, Validation
from tidesim.validate.checked_profile import calibrated_profile, step_error
from tidesim.validate.grid import Case, default_grid, grid, read_grid
from tidesim.validate.measuring import ForcedSource, PromptSource, predict, validate

__all__ = [
    "Case",
    "ForcedSource",
    "PromptSource",
    "Row",
    "Validation",
    "calibrated_profile",
    "default_grid",
    "grid",
    "predict",
    "read_grid",
    "step_error",
    "validate",
]
