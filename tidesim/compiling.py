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


# A wrapper for callers in C takes time to compile, and there are none.
_PLAIN: dict[str, bool] = {"nogil": True, "no_cfunc_wrapper": True, **_UNCOUNTED}


def compiled(function: Function) -> Function:
    """`function` as machine code that is kept on disk, runs without the GIL, and allocates nothing."""
    made: Function = njit(cache=True, **_PLAIN)(function)
    return made


def inlined(function: Function) -> Function:
    """`function` as a part of the compiled ones that call it: for what is small, and for the innermost loops."""
    made: Function = njit(inline="always")(function)
    return made


def joined(function: Function) -> Function:
    """`function` for compiled ones alone: compiled by itself, and only its machine code becomes a part of theirs.

    For all that is larger than a few lines: `inlined` puts its text into theirs, and then compiling takes the longer
    the more there is in one function, while this leaves loops that run often slower by half.
    """
    made: Function = njit(forceinline=True, no_cpython_wrapper=True, **_PLAIN)(function)
    return made
