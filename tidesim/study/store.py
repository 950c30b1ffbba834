"""The folder of a sweep: a log that survives whatever happens, and tables that can be read at any time.

    study.json                     which study this is: a fingerprint of all its cases, and what it varies
    rows.jsonl                     one row a line, in the order of completion; written as cases are done
    results.csv, results.parquet   the rows so far in the order of the grid; replaced as a whole now and then

A line of the log is whole when it ends. What a killed process left of its last one is cut off, and that case is run
again, as one that failed is; of two rows of a case the later one holds. A lock on the log keeps a second sweep from the
same folder; the system frees it however a process ends.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tidesim.errors import InputError
from tidesim.result import tool_version
from tidesim.study.columns import STATUSES, Row, frame
from tidesim.study.grid import Study

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import pandas as pd

STUDY, LOG, CSV, PARQUET = "study.json", "rows.jsonl", "results.csv", "results.parquet"
FORMAT = "tidesim-study"
# Tables are written anew after so many seconds, or later if that would take more than a twentieth of the time.
_LEAST_S, _PATIENCE = 5.0, 20


class Store:
    """The rows of a study in a folder; use it in a `with` statement, which writes the tables at its end.

    Raise InputError if the folder holds another study, or files that are no sweep's, if another process is writing to
    it, or its log is damaged.
    """

    def __init__(self, out: Path, study: Study) -> None:
        self.out, self.study = out, study
        self._rows: dict[str, Row] = {}
        self._written_at = self._patience_s = 0.0

    def __enter__(self) -> Self:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            _check_folder(self.out, self.study)
            with ExitStack() as stack:
                self._log = stack.enter_context(_opened_log(self.out))
                self._read_log()
                if not (self.out / STUDY).exists():
                    _replace(self.out / STUDY, lambda path: path.write_text(_document(self.study), encoding="utf-8"))
                stack.pop_all()
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written ({error.strerror}); name another --out.") from None
        self._written_at = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.write_tables()
        finally:
            self._log.close()

    def __contains__(self, key: str) -> bool:
        """Whether a case is done; one that failed is not, as that may have been for lack of memory."""
        return key in self._rows and self._rows[key]["status"] != "failed"

    def append(self, row: Row) -> None:
        """Keep a row. Raise InputError if it cannot be written; the rows before stay, and the sweep can go on later."""
        with _writing(self.out / LOG):
            left = memoryview(json.dumps(row).encode() + b"\n")
            while left:
                left = left[self._log.write(left) :]
        self._rows[str(row["case"])] = row
        if time.monotonic() - self._written_at > max(_LEAST_S, self._patience_s):
            self.write_tables()

    def frame(self) -> "pd.DataFrame":
        """The rows so far, in the order of the grid."""
        done = (self._rows.get(case.key) for case in self.study.cases)
        return frame((row for row in done if row is not None), self.study.figures)

    def write_tables(self) -> None:
        """Replace both tables by the rows so far. A reader finds the old one or the new one, never a part."""
        began = time.monotonic()
        table = self.frame()
        with _writing(self.out / CSV):
            os.fsync(self._log.fileno())
            _replace(self.out / CSV, lambda path: table.to_csv(path, index=False, lineterminator="\n"))
        with _writing(self.out / PARQUET):
            _replace(self.out / PARQUET, lambda path: table.to_parquet(path, index=False))
        self._written_at = time.monotonic()
        self._patience_s = _PATIENCE * (self._written_at - began)

    def _read_log(self) -> None:
        """Read the rows of whole lines and cut off what is behind them."""
        self._log.seek(0)
        held = self._log.read()
        end = held.rfind(b"\n") + 1
        self._log.truncate(end)
        keys = {case.key for case in self.study.cases}
        for number, line in enumerate(held[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
                if row["case"] not in keys or row["status"] not in STATUSES:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{self.out / LOG}: line {number} is no row of this study; remove the line, and its case is run "
                    "again."
                ) from None
            self._rows[row["case"]] = row


def read_results(out: str | Path) -> "pd.DataFrame":
    """The rows of a sweep so far, in the order of its grid, with the columns `tidesim.study.COLUMNS`.

    `out` is the folder of the sweep, which may be running. Raise InputError if no results are there.
    """
    import pandas as pd

    path = Path(out) / PARQUET
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as the results of a sweep ({error}).") from None


def _opened_log(out: Path) -> FileIO:
    """The log, locked, created if it is not there."""
    # Without a buffer: what could not be written must not be written later, behind what the next process wrote.
    log = (out / LOG).open("a+b", buffering=0)
    if sys.platform != "win32":
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            raise InputError(f"{out}: another sweep is writing there; wait, or name another --out.") from None
    return log


def _check_folder(out: Path, study: Study) -> None:
    """Refuse a folder with anything but rows of this very study."""
    if not (out / STUDY).exists():
        found = [name for name in (LOG, CSV, PARQUET) if (out / name).exists() and (out / name).stat().st_size]
        if found:
            raise InputError(f"{out}: holds {', '.join(found)} but no {STUDY}, so no sweep; name another --out.")
        return
    try:
        there = json.loads((out / STUDY).read_text(encoding="utf-8"))
        is_ours, fingerprint, axes = there["format"] == FORMAT, there["fingerprint"], dict(there["axes"])
    except (ValueError, KeyError, TypeError):
        is_ours, fingerprint, axes = False, "", {}
    if not is_ours:
        raise InputError(f"{out / STUDY}: is not the record of a sweep; name another --out.")
    if fingerprint != study.fingerprint:
        raise InputError(
            f"{out}: holds another study ({_difference(axes, study)}); name another --out, or remove that folder to "
            "begin anew."
        )


def _difference(there: dict[str, Any], study: Study) -> str:
    """The first settings in which a study differs from the one whose record is `there`."""
    here = study.axes()
    named = [f"{name}: {_short(there.get(name))} there, {_short(here[name])} here" for name in here]
    differing = [said for name, said in zip(here, named, strict=True) if there.get(name) != here[name]]
    return "; ".join(differing[:3]) or "the same settings in another order or combination"


def _short(values: object) -> str:
    text = ", ".join(map(str, values)) if isinstance(values, list) else "nothing"
    return text if len(text) <= 60 else f"{text[:60]}..."


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what cannot be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); mend that, and the same command goes on."
        ) from None


def _document(study: Study) -> str:
    about = {"format": FORMAT, "tidesim": tool_version(), "num_cases": len(study.cases)}
    return json.dumps({**about, "fingerprint": study.fingerprint, "axes": study.axes()}, indent=1)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path` and put it in its place at once."""
    beside = path.with_name(f"{path.name}.part")
    write(beside)
    os.replace(beside, path)
