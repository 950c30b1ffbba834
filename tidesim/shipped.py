"""Find files by path, or by name among the profiles, traces and models that come with tidesim."""

import difflib
from pathlib import Path

from tidesim.errors import InputError

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(kind: str) -> Path:
    """Folder of the shipped files of one `kind`: "hardware_profiles", "traces" or "models".

    An installed package holds all three; in a source checkout the first two stand beside the package.
    """
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def shipped_names(kind: str) -> list[str]:
    """Sorted names of the shipped files (or model folders) of one `kind`, with their suffix."""
    return sorted(path.name for path in shipped_folder(kind).iterdir() if not path.name.startswith((".", "_")))


def find_shipped(kind: str, name: str, suffix: str = "", error: type[InputError] = InputError) -> Path:
    """Path of `name`: as a path if it exists, else among the shipped files, with or without `suffix`.

    Raise `error` if there is neither, naming the nearest shipped names.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    folder, names = shipped_folder(kind), shipped_names(kind)
    for candidate in (name, name + suffix):
        if candidate in names:
            return folder / candidate
    near = difflib.get_close_matches(name.removesuffix(suffix), [item.removesuffix(suffix) for item in names], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"shipped are {', '.join(names)}."
    what = kind.replace("_", " ").removesuffix("s")
    raise error(f"no {what} {name!r}: no such path, and none of that name is shipped; {hint}")
