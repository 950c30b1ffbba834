"""How anything is printed: tables to stdout, notes and progress to stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Document = Mapping[str, Any]

_WIDTH = 118  # where stdout is a file or a pipe, so that tables are the same wherever they are made


def show(document: Document, tables: Callable[[Document], RenderableType], as_json: bool) -> None:
    """Print a result: as one JSON object, or as what `tables` makes of it."""
    if as_json:
        print(json.dumps(document))
        return
    width = None if sys.stdout.isatty() else _WIDTH
    Console(width=width, highlight=False, soft_wrap=False).print(tables(document))


def note(text: str) -> None:
    """Print a line that is no result."""
    print(text, file=sys.stderr)


class TextStream:
    """Prints answers as they grow: called with a prompt's number and its answer so far, it prints what is new."""

    def __init__(self) -> None:
        self._number, self._said = 0, ""

    def __call__(self, number: int, text: str) -> None:
        """Print what `text` adds to what was printed of this answer."""
        if number != self._number:
            print(f"\n{'-' * 40}")
            self._number, self._said = number, ""
        # A token may change how the one before it is spelt; what stands on the screen stays.
        print(text[len(self._said) :], end="", flush=True)
        self._said = text


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function that says how many of how many are done: a bar on a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


@contextmanager
def steps(title: str) -> Iterator[Callable[[str, float], None]]:
    """A function that says which step comes next and which share is behind: a bar on a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[step]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=1.0, step="")

        def advance(step: str, share: float) -> None:
            bar.update(task, completed=share, step=step)

        yield advance
