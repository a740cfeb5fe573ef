"""A run's log: one row an event, JSONL on disk, lists in memory.

    history = History(workdir / "metrics.jsonl", tags={"dataset": "cifar10"})
    history.add(step=1250, epoch=1.0, split="validation", loss=1.31, accuracy=0.53)
    epochs, losses = history.series("validation", "loss")

A row is {"step", "epoch", "split", "loss", "accuracy", "learning_rate", "images_per_second"} and
the tags; what an event does not have is null.  Each row is in the file when `add` returns, unless
that cannot be written: then it is with the next row that can, or `flush` raises.  A log that
was removed meanwhile is written again from its first row.

With `table=workdir / "metrics.csv"` the same rows are kept as a table too, for spreadsheets:

    history.to_csv("some/table.csv")  # or once, for a script
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pathlib
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from cifarflow.errors import DataError, WorkdirError
from cifarflow.files import replacing
from cifarflow.untrusted import open_file, reading, refuse_constant

Row = dict[str, Any]

# A row has 200 characters; ten a step of the longest recipe would not be a million.
_MOST_ROWS = 1_000_000
_ROW_LIMIT = 10_000
_NUMBERS = ("epoch", "loss", "accuracy", "learning_rate", "images_per_second")
# Those that every row has, in the order of a table.
_COLUMNS = ("step", "epoch", "split", *_NUMBERS[1:])


class History:
    """The rows of one run.

    Args:
      path: a JSONL file that each row is appended to; None keeps the rows in memory only.
      tags: keys and values written into every row.
      prepare: called before the file is written, such as `Workdir.ensure`; the WorkdirError that it
        may raise is as if the file could not be.
      table: a CSV file that is kept to the same rows, beside path; where it is something else, as
        after a crash, the next row writes it anew.

    Attributes:
      rows: all rows so far, oldest first.
      listeners: functions called with every new row, such as a TensorBoard writer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        tags: Mapping[str, Any] | None = None,
        prepare: Callable[[], object] = lambda: None,
        table: str | os.PathLike[str] | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self.listeners: list[Callable[[Row], None]] = []
        self._path = pathlib.Path(path) if path is not None else None
        self._tags = dict(tags or {})
        self._prepare = prepare
        self._unwritten: list[Row] = []
        self._is_told = False
        self._table = pathlib.Path(table) if table is not None else None
        # What the table has: bytes, rows and columns.
        self._tabled: tuple[int, int, list[str]] = (0, 0, [])

    def add(
        self,
        *,
        step: int,
        epoch: float,
        split: str,
        loss: float,
        accuracy: float,
        learning_rate: float | None = None,
        images_per_second: float | None = None,
    ) -> None:
        """Adds one row.

        Args:
          step: steps done.
          epoch: the same in epochs.
          split: "train", "validation" or "test".
          loss: mean over the examples since the last row of the split, regularisation included.
          accuracy: likewise, 0..1.
          learning_rate: that the schedule has reached: of the next step.
          images_per_second: training only, since the last row.

        Warns:
          If the file cannot be written, once until it can again.
        """
        row = {
            "step": step,
            "epoch": round(epoch, 4),
            "split": split,
            "loss": _finite(loss),
            "accuracy": _finite(accuracy),
            "learning_rate": _finite(learning_rate),
            "images_per_second": images_per_second and round(images_per_second, 1),
            **self._tags,
        }
        self.rows.append(row)
        if self._path is not None:
            self._unwritten.append(row)
            try:
                self.flush()
            except WorkdirError as error:
                # A full disk may have room again; training need not end for it.
                if not self._is_told:
                    self._is_told = True
                    # With the step, since Python shows the same text once only.
                    warnings.warn(
                        f"{error}; trying again with each row after that of step {step}",
                        stacklevel=2,
                    )
        for listener in self.listeners:
            listener(row)

    def flush(self) -> None:
        """Writes the rows that could not be written before, and all if the file was removed.

        Raises:
          WorkdirError: if they still cannot.
        """
        if self._path is None or not self.rows:
            return
        self._prepare()
        if self._unwritten or not os.path.exists(self._path):
            try:
                # Unbuffered: what was written is known when it fails.
                with self._path.open("ab", buffering=0) as file:
                    end = file.seek(0, os.SEEK_END)
                    # Where nothing is, those that were written before are gone.
                    rows = self._unwritten if end else self.rows
                    _append(file, "".join(json.dumps(row) + "\n" for row in rows).encode(), end)
            except OSError as error:
                raise WorkdirError(
                    f"cannot write log {str(self._path)!r}: {error.strerror}"
                ) from error
            self._unwritten = []
        self._write_table()
        self._is_told = False

    def _write_table(self) -> None:
        """Brings the table to the rows, by as little as is needed.

        Raises:
          WorkdirError: if it cannot be written.
        """
        if self._table is None:
            return
        size, count, columns = self._tabled
        try:
            is_ours = size > 0 and os.path.getsize(self._table) == size
        except OSError:
            is_ours = False
        if is_ours and count == len(self.rows):
            return
        if is_ours and _columns_of(self.rows[count:], columns) == columns:
            try:
                with self._table.open("ab", buffering=0) as file:
                    data = _lines_of(self.rows[count:], columns)
                    _append(file, data, size)
            except OSError as error:
                raise WorkdirError(
                    f"cannot write log {str(self._table)!r}: {error.strerror}"
                ) from error
            self._tabled = (size + len(data), len(self.rows), columns)
        else:
            # A file that is not as this left it, or a column more.
            columns, size = _write_table(self._table, self.rows)
            self._tabled = (size, len(self.rows), columns)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows as a table: CSV, UTF-8, a heading, a line a row, whole or not at all.

        Columns are those of every row, then all that some row has besides, as the tags.  What a row
        does not have is empty.  Texts that a spreadsheet would take for a formula begin with an
        apostrophe.

        Args:
          path: where to; a file that is there is replaced.

        Raises:
          WorkdirError: if it cannot be written.
        """
        _write_table(pathlib.Path(path), self.rows)

    def unwritten(self) -> list[Row]:
        """The newest rows, as many as could not be written yet."""
        return list(self._unwritten)

    def sync(self) -> None:
        """Writes as `flush`, and what was written survives a power cut.

        Raises:
          WorkdirError: if it cannot be.
        """
        self.flush()
        if self._path is None or not self.rows:
            return
        try:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise WorkdirError(f"cannot write log {str(self._path)!r}: {error.strerror}") from error

    def series(self, split: str, key: str) -> tuple[list[float], list[float]]:
        """The values of one key over the epochs.

        Args:
          split: "train", "validation" or "test".
          key: "loss", "accuracy", "learning_rate" or "images_per_second".

        Returns:
          Epochs and values, of the same length; rows without a value are left out.
        """
        rows = [row for row in self.rows if row["split"] == split and row.get(key) is not None]
        return [row["epoch"] for row in rows], [row[key] for row in rows]

    def rewind(
        self, step: int, *, most: int | None = None, unwritten: Iterable[Mapping[str, Any]] = ()
    ) -> int:
        """Drops the rows after `step`, on disk too: a resumed run writes them again.

        Args:
          step: steps done.
          most: how many rows there were, where some of that very step may have come later.
          unwritten: what `unwritten` gave then, whose rows are added if the file lacks them.

        Returns:
          How many rows are lost; of a log in memory none.

        Raises:
          ValueError: if one of `unwritten` is no row.
          WorkdirError: if the file cannot be written.
        """
        added = [_read_row(json.dumps(row)) for row in unwritten]
        self.rows = [row for row in self.rows[:most] if row["step"] <= step]
        if most is not None and len(self.rows) < most:
            self.rows += [row for row in added if row not in self.rows]
        self._unwritten = []
        if self._path is None:
            return 0
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        with replacing(self._path, what="log") as file:
            file.write(text.encode())
        self._tabled = (0, 0, [])
        if self.rows or (self._table is not None and self._table.exists()):
            self._write_table()
        return max(0, (most or 0) - len(self.rows))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tags: Mapping[str, Any] | None = None,
        prepare: Callable[[], object] = lambda: None,
        table: str | os.PathLike[str] | None = None,
    ) -> History:
        """Reads a log back; a last line cut short by a crash is dropped.

        Args:
          path: the file, which later rows are appended to.
          tags: of later rows.
          prepare: called before the file is written.
          table: kept to the same rows from the next one on.

        Raises:
          DataError: if the file cannot be read, or another line is not a row.
        """
        history = cls(path, tags=tags, prepare=prepare, table=table)
        name = repr(str(path))
        with (
            reading(name, failing="is not a readable log of a run"),
            open_file(pathlib.Path(path)) as file,
            io.TextIOWrapper(file, encoding="utf-8") as lines,
        ):
            number = 0
            # Never more of a line than a row can have: the file may be one endless line.
            while line := lines.readline(_ROW_LIMIT):
                number += 1
                if number > _MOST_ROWS:
                    raise DataError(f"{name} has more than {_MOST_ROWS} lines")
                is_whole = line.endswith("\n")
                line = line.rstrip("\n")
                try:
                    if line:
                        history.rows.append(_read_row(line))
                except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
                    if not is_whole and not lines.read(1):
                        break
                    raise DataError(
                        f"line {number} of {name} is not a row of a run's log: {line[:60]!r}"
                    ) from None
        return history


def _read_row(line: str) -> Row:
    """Reads one row; in any other line something goes wrong."""
    row = {"split": "", "epoch": 0.0, **json.loads(line, parse_constant=refuse_constant)}
    numbers = [row["epoch"], *(row[key] for key in _NUMBERS if row.get(key) is not None)]
    if type(row["step"]) is not int or type(row["split"]) is not str:
        raise ValueError
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError
    # Of what others may have added no list or object, and no number that JSON has no words for.
    if any(isinstance(value, (dict, list)) for value in row.values()):
        raise ValueError
    if not all(math.isfinite(v) for v in row.values() if isinstance(v, (int, float))):
        raise ValueError
    return row


def _append(file: io.FileIO, data: bytes, end: int) -> None:
    """Writes at the end of a file; if not all of it can be, nothing is, and the error comes."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        # Half a row would spoil the one after it.
        with suppress(OSError):
            file.truncate(end)
        raise


def _write_table(path: pathlib.Path, rows: Sequence[Row]) -> tuple[list[str], int]:
    """Writes a whole table; returns its columns and its bytes."""
    columns = _columns_of(rows, _COLUMNS)
    data = _lines_of([{name: name for name in columns}], columns) + _lines_of(rows, columns)
    with replacing(path, what="log") as file:
        file.write(data)
    return columns, len(data)


def _columns_of(rows: Iterable[Row], known: Iterable[str]) -> list[str]:
    """The columns of a table of such rows: those known, then others as they come."""
    return list(dict.fromkeys([*known, *(name for row in rows for name in row)]))


def _lines_of(rows: Iterable[Row], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([table_cell(row.get(name)) for name in columns] for row in rows)
    # A text from a file may hold half of a character, which JSON has a way to write.
    return text.getvalue().encode(errors="replace")


def table_cell(value: Any) -> str:
    """A value as a cell of a CSV file, in which no spreadsheet takes a text for a formula."""
    if isinstance(value, str):
        # Spaces before a formula do not keep it from being one, nor do signs of full width.
        first = unicodedata.normalize("NFKC", value.lstrip()[:1])
        is_formula = first in tuple("=+-@") or value[:1] in tuple("\t\r\n")
        # Older versions of Python leave this one unquoted, where it would end the row.
        value = value.replace("\r", "\n")
        return f"'{value}" if is_formula else value
    return "" if value is None else json.dumps(value)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None
