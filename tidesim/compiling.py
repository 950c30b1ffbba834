"""How what is walked millions of times is compiled: the replay, and policies that are asked at many budgets."""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from numba import njit
from numba.core.cpu import CPUTargetOptions

# A whole number in compiled code, Python's or NumPy's: there they are one.
Whole: TypeAlias = Any
Function = TypeVar("Function", bound=Callable[..., Any])

# Compiled code counts references to arrays, with an atomic operation for each that is handed on. Between moves that
# take some ns these are most of the work. Nothing here allocates, so nothing needs counting; where numba has no such
# switch any more, the results are the same and only later.
_UNCOUNTED: dict[str, bool] = {"_nrt": False} if hasattr(CPUTargetOptions, "_nrt") else {}


def compiled(function: Function) -> Function:
    """`function` as machine code that is kept on disk, runs without the GIL, and allocates nothing."""
    made: Function = njit(cache=True, nogil=True, **_UNCOUNTED)(function)
    return made


def inlined(function: Function) -> Function:
    """`function` as a part of the compiled ones that call it."""
    made: Function = njit(inline="always")(function)
    return made
