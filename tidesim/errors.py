"""The errors a caller of tidesim would catch.

Everything tidesim raises on purpose derives from `TidesimError`. What the user can mend (a file, a flag, a
name) is an `InputError`; the command line turns it into one line and exit code 2.
"""

import difflib
from collections.abc import Iterable


class TidesimError(Exception):
    """Base class of every error that tidesim raises on purpose."""


class InputError(TidesimError, ValueError):
    """What the user gave cannot be used; the message says the value, the rule and the way out."""


class ProfileError(InputError):
    """A hardware profile does not describe a machine: a key is missing, unknown, mistyped or out of range."""


class TraceError(InputError):
    """A trace file is damaged, incomplete in a way that matters, or of another format or version."""


class ModelError(InputError):
    """A model folder cannot be used: no such model, no weights, a missing tensor, an unknown architecture."""


class BudgetError(InputError):
    """An expert budget exceeds the number of experts, or the memory of the device or the host."""


class PlanError(InputError):
    """No plan satisfies what was asked for, or a plan does not fit the model or machine it is used on."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The way out of an unknown `name`: the nearest of those that are `known`, or all of them if none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}."
