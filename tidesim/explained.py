"""Why a run takes as long as it does, as tables that every command which explains can print.

They are made of the plain data that `to_dict` gives, as it stands in a command's JSON as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from tidesim.critical_path import ON_PATH
from tidesim.tables import facts_of, table_of

Document = Mapping[str, Any]


def critical_path_tables(document: Document) -> RenderableType:
    """`CriticalPath.to_dict`: what the run waited for by resource and by work, and its longest stretches."""
    return Group(
        facts_of("Critical path", _found_on(document)), _resources(document), _works(document), _stretches(document)
    )


def shadow_price_table(rows: Sequence[Document]) -> RenderableType:
    """`ShadowPrice.to_dict` of each: what would be gained by what, the most first."""
    before = rows[0]["before_tok_per_s"] if rows else 0.0
    title = f"What more would give, against {before:.2f} tok/s on the machine as it is"
    table = table_of(title, left=("what",), right=("tok/s", "gain"))
    table.add_column("changed in the profile", overflow="fold")
    for row in rows:
        slots = f" ({row['num_slots']} experts more)" if row["num_slots"] else ""
        changed = f"{', '.join(row['figures'])} x {row['factor']:.3g}"
        table.add_row(row["name"] + slots, f"{row['after_tok_per_s']:.2f}", f"{100 * row['gain']:+.1f} %", changed)
    return table


def near_optimal_table(rows: Sequence[Document], best_tok_per_s: float, within: float = 0.02) -> RenderableType:
    """`Candidate.to_dict` of each, the simplest first: what is nearly as fast as the fastest."""
    moves = {"never": "nobody moves", "refresh": "refreshes", "fetch": "fetches misses"}
    title = f"Within {100 * within:g} % of the fastest ({best_tok_per_s:.2f} tok/s), the simplest first"
    table = table_of(
        title, left=("choice", "experts move", "layers"), right=("parameters", "experts", "tok/s", "slower by")
    )
    for row in rows:
        layers = "all the same" if row["is_uniform"] else "uneven"
        slower = 1 - row["tok_per_s"] / best_tok_per_s
        cells = (str(row["num_params"]), str(sum(row["budget"])), f"{row['tok_per_s']:.2f}", f"{100 * slower:.1f} %")
        table.add_row(row["description"], moves[row["moving"]], layers, *cells)
    return table


def _found_on(document: Document) -> dict[str, str]:
    sequences = f"{document['num_sequences']} sequence{'s' * (document['num_sequences'] != 1)}"
    num_forwards, all_forwards = document["num_forwards"], document["all_forwards"]
    part = f"all {all_forwards}" if num_forwards == all_forwards else f"the first {num_forwards} of {all_forwards}"
    facts = {
        "found on": f"{part} forwards ({sequences}), "
        f"which take {document['makespan_s']:.3f} s; {document['num_tasks']} tasks",
        "at best": "the run with the same decisions if that resource took no time at all",
    }
    if document["is_contended"]:
        facts["note"] = "device, host and copies slow each other here; at best, nobody is slowed"
    return facts


def _resources(document: Document) -> Table:
    table = table_of("What the run waits for", left=("resource",), right=("on the path", "share", "at best"))
    table.add_column("saving", justify="right")
    table.add_column("what it is")
    for row in document["resources"]:
        saved = row["slack_s"] / document["makespan_s"]
        cells = (_time(row["path_s"]), _share(row["share"]), _time(row["bound_s"]), _share(saved))
        table.add_row(row["resource"], *cells, ON_PATH[row["resource"]])
    return table


def _works(document: Document) -> Table:
    table = table_of("Work on the path", left=("work", "resource"), right=("on the path", "share", "tasks"))
    for row in document["works"]:
        cells = (_time(row["path_s"]), _share(row["share"]), str(row["num_tasks"]))
        table.add_row(row["work"], row["resource"], *cells)
    return table


def _stretches(document: Document) -> Table:
    table = table_of("Longest stretches of one resource", left=("from", "to", "resource"), right=("time", "tasks"))
    for row in document["stretches"]:
        ends = (_place(row, "first"), _place(row, "last"))
        table.add_row(*ends, row["resource"], _time(row["path_s"]), str(row["num_tasks"]))
    return table


def _place(row: Document, end: str) -> str:
    layer = row[f"{end}_layer"]
    where = "" if layer is None else f", layer {layer}"
    return f"forward {row[f'{end}_forward']}{where}: {row[f'{end}_work']}"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"
