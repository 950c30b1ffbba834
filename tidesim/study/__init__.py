"""Many cases at once: a grid over traces, models, machines, executions, policies, budgets, intervals and batch sizes.

A `Study` is read from a YAML file; `run_study` runs what is left of it, on processes of this machine or on a Dask
cluster, into a folder that can be read at any time (`read_results`) and that a stopped sweep goes on in. Results are
pandas tables with the columns `COLUMNS`, a row for each case with everything that decided it; `best`, `pareto` and
`sensitivity` answer the usual questions.
"""

from tidesim.study.case import Case, Machine, Rules, TraceSource
from tidesim.study.columns import COLUMNS, STATUSES, Column
from tidesim.study.grid import Study
from tidesim.study.questions import best, pareto, sensitivity, summary
from tidesim.study.reading import KEYS
from tidesim.study.running import run_study
from tidesim.study.store import read_results

__all__ = [
    "COLUMNS",
    "KEYS",
    "STATUSES",
    "Case",
    "Column",
    "Machine",
    "Rules",
    "Study",
    "TraceSource",
    "best",
    "pareto",
    "read_results",
    "run_study",
    "sensitivity",
    "summary",
]
