"""The same cases on a Dask cluster. The only module that knows Dask, and it imports it when it is needed.

Workers need tidesim and no file: the counts travel with an order to hold them. This process does not scatter them, as
what was scattered is lost with the worker that has it, while an order is given to another one. Only this process writes
rows, one for each case however often a case was begun, so a worker that dies costs time and nothing else.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tidesim.errors import InputError
from tidesim.result import tool_version
from tidesim.study.case import Case, Routing
from tidesim.study.columns import Row
from tidesim.study.scoring import Known, failed, infeasible, make_known, prepared, score

# Cases that the scheduler has at a time: enough for any cluster, and never a million.
_UNDER_WAY = 1000
_PATIENCE_S = 20


def rows_on_cluster(address: str, cases: Sequence[Case], figures: Sequence[str]) -> Iterator[Row]:
    """Rows as cases are done; those that share a workload stand beside each other in `cases`.

    Raise InputError if there is no scheduler at `address`, it has no worker, or its workers cannot run tidesim.
    """
    if not cases:
        return
    with _connected(address) as client:
        from distributed import as_completed

        def hold(routing: Routing) -> Any:
            return client.submit(_hold, make_known(routing), pure=False)

        running: dict[Any, Case] = {}
        finished = as_completed(loop=client.loop)
        for case, known, refusal in prepared(cases, hold):
            if known is None:
                yield infeasible(case, figures, refusal)
                continue
            future = client.submit(_score, case, known, tuple(figures), tool_version(), pure=False)
            running[future] = case
            finished.add(future)
            if len(running) >= _UNDER_WAY:
                done = next(finished)
                yield _row(done, running.pop(done), figures, address)
        for done in finished:
            yield _row(done, running.pop(done), figures, address)


def _hold(known: Known) -> Known:
    """On a worker: be where the counts are."""
    return known


def _score(case: Case, known: Known, figures: Sequence[str], version: str) -> Row:
    """On a worker: run the case, if it would be run alike where `version` of tidesim asks."""
    if tool_version() != version:
        raise InputError(f"{socket.gethostname()} has tidesim {tool_version()}, and the study is run by {version}")
    return score(case, known, figures)


def _row(future: Any, case: Case, figures: Sequence[str], address: str) -> Row:
    """The row of a case that is done, or given up because every worker that tried it died."""
    from distributed import KilledWorker

    # A row that was lost with its worker is on its way again, and this waits for it.
    error = future.exception()
    if error is None:
        row: Row = future.result()
        return row
    if future.cancelled():
        raise InputError(f"{address}: the scheduler has forgotten a case; the same command goes on where it was.")
    if isinstance(error, KilledWorker):
        return failed(case, figures, error)
    raise InputError(
        f"{address}: a worker cannot run cases ({type(error).__name__}: {error}); give all workers the tidesim that "
        "this command has, and it goes on where it was."
    )


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of the scheduler at `address`, which has a worker at least."""
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise InputError(
            f"--scheduler {address} needs Dask; install it with: pip install 'tidesim[cluster]'."
        ) from None
    with ExitStack() as stack:
        # Counts are large on purpose, and sent once.
        stack.enter_context(dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}))
        try:
            client = stack.enter_context(Client(address, timeout=_PATIENCE_S, set_as_default=False))
        except (OSError, ValueError) as error:
            raise InputError(f"no Dask scheduler at {address!r} ({error}); start one with: dask scheduler.") from None
        try:
            client.wait_for_workers(1, timeout=_PATIENCE_S)
        except TimeoutError:
            raise InputError(
                f"the Dask scheduler at {address} has no worker; start one with: dask worker {address}."
            ) from None
        yield client
