"""What people see: tables and progress bars."""

from tidesim.console.grids import profile_tables, sweep_tables, validation_tables
from tidesim.console.printing import TextStream, note, progress, show, steps
from tidesim.console.runs import (
    comparison_tables,
    plan_tables,
    recording_table,
    result_tables,
    statistics_tables,
    trace_table,
)

__all__ = [
    "TextStream",
    "comparison_tables",
    "note",
    "plan_tables",
    "profile_tables",
    "progress",
    "recording_table",
    "result_tables",
    "show",
    "statistics_tables",
    "steps",
    "sweep_tables",
    "trace_table",
    "validation_tables",
]
