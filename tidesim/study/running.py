"""Running a study: what is left of it, on processes of this machine or on a Dask cluster."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tidesim.errors import InputError
from tidesim.study.case import Case, Routing
from tidesim.study.cluster import rows_on_cluster
from tidesim.study.columns import Row
from tidesim.study.grid import Study
from tidesim.study.scoring import infeasible, prepared, score
from tidesim.study.sharing import SharedCounts, load_shared
from tidesim.study.store import Store
from tidesim.workers import Progress, Workers

if TYPE_CHECKING:
    import pandas as pd


def run_study(
    study: Study,
    out: str | Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> "pd.DataFrame":
    """Run the cases of `study` that have no row in the folder `out` yet, and give all rows in the order of the grid.

    A case that does not fit, or goes wrong, has a row that says so; those that went wrong are run again next time. The
    rows do not depend on who ran them, so a sweep that was stopped may go on with other workers. `out` can be read
    meanwhile, see `read_results`.

    Parameters
    ----------
    workers : see `Workers`; on this machine.
    scheduler : address of a Dask scheduler, such as "tcp://10.0.0.1:8786", whose workers run the cases instead.
    progress : called with how many cases are done, and how many were left to do.

    Raise InputError if `out` holds another study or cannot be written, or the cluster cannot be used.
    """
    if scheduler is not None and workers is not None:
        raise ValueError(f"workers(={workers}) are for this machine; the scheduler {scheduler} has its own.")
    with Store(Path(out), study) as store:
        left = _by_routing([case for case in study.cases if case.key not in store])
        if progress is not None:
            progress(0, len(left))
        if scheduler is None:
            rows = _rows_here(left, study.figures, store.out / "counts", workers)
        else:
            rows = rows_on_cluster(scheduler, left, study.figures)
        for done, row in enumerate(rows, start=1):
            store.append(row)
            if progress is not None:
                progress(done, len(left))
        return store.frame()


def _by_routing(cases: Sequence[Case]) -> list[Case]:
    """The cases, those that share a workload beside each other."""
    found: dict[Routing, list[Case]] = {}
    for case in cases:
        found.setdefault(case.routing, []).append(case)
    return [case for together in found.values() for case in together]


def _rows_here(cases: Sequence[Case], figures: Sequence[str], folder: Path, workers: int | None) -> Iterator[Row]:
    """Rows as cases are done, by processes that share the counts."""
    routings = {case.key: case.routing for case in cases}
    waiting = Counter(routings.values())
    with SharedCounts(folder) as shared, Workers(tuple(figures), workers) as pool:
        if cases:
            pool.start()
            # What the rows are written with in the end takes a while to import; here this process would only wait.
            import_module("pandas")
        try:
            for row in pool.as_done(_score, prepared(cases, shared.put)):
                routing = routings[str(row["case"])]
                waiting[routing] -= 1
                if not waiting[routing]:
                    shared.drop(routing)
                yield row
        except BrokenProcessPool:
            raise InputError(
                "a worker process ended before its case did: killed, or out of memory. The same command goes on where "
                "it was; fewer --workers need less memory."
            ) from None


def _score(figures: Sequence[str], order: tuple[Case, Path | None, str]) -> Row:
    case, folder, refusal = order
    return infeasible(case, figures, refusal) if folder is None else score(case, load_shared(folder), figures)
