"""The two shapes that tables have wherever people see some."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table


def table_of(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table whose columns are aligned to the left, and then to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def facts_of(title: str, facts: Mapping[str, object]) -> Table:
    """What is known, a line each."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
