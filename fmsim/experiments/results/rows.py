"""A file of result rows that is written one row at a time: JSON lines, or Parquet where its name
ends so.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fmsim.errors import FmsimError, shown
from fmsim.files import replacing, strict_json, write_text
from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, check_regular, read_bytes, reason
from fmsim.files.place_lock import Taken, place_lock

Row = dict[str, Any]  # flat: no value is a mapping
SCHEMA_VERSION = 3  # of a row; 1 had none

MOST_ROWS = 1_000_000
STARTS = (b'{"schema_version": ',)  # of every row that was written here


class _Row(BaseModel):
    """What every row has."""

    model_config = ConfigDict(extra="allow")

    schema_version: int = 1
    key: str = Field(min_length=1, max_length=64)
    policy: str = ""
    scenario: str = ""


class RowFile:
    """What is in the file when it is opened, and what is put there since: one row a key.

    A kill at any moment loses at most the row being written. The file is one sweep's alone while it
    is open.
    """

    def __init__(self, path: str | Path, option: str = "--out") -> None:
        """`option` is the one that named the file.

        Raises FmsimError for a file that holds something else, that another command writes, or a
        place that cannot be written.
        """
        self.path = Path(path)
        self._named = f"{option} {shown(path)}"
        self._parquet = self.path.suffix == ".parquet"
        try:
            self._lock = contextlib.ExitStack()
            self._lock.enter_context(place_lock(self.path))
            try:
                self.rows: list[Row] = self._read_parquet() if self._parquet else self._read_lines()
            except BaseException:
                self.close()
                raise
        except Taken as taken:
            raise FmsimError(f"{self._named}: another command writes this file; {taken}") from None
        except OSError as error:
            raise FmsimError(
                f"{self._named}: cannot be used ({reason(error)}); choose another file"
            ) from None
        for number, row in enumerate(self.rows, 1):
            version = row.get("schema_version", 1)
            if version != SCHEMA_VERSION:
                raise FmsimError(
                    f"{self._named}: row {number} has schema {version}, but this fmsim writes"
                    f" {SCHEMA_VERSION}; give another file"
                )
        self._places = {row["key"]: place for place, row in enumerate(self.rows)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write the file."""
        self._lock.close()

    def put(self, row: Row) -> None:
        """Write one row, in the place of the one with its key if there is one; it is on disk when
        this returns.

        Raises FmsimError where it cannot be written.
        """
        row = {"schema_version": SCHEMA_VERSION} | row
        place = self._places.setdefault(row["key"], len(self.rows))
        replaces = place < len(self.rows)
        self.rows[place : place + 1] = [row]
        try:
            if self._parquet:
                self._write_parquet()
            elif replaces:
                write_text(self.path, "".join(f"{strict_json.dump(one)}\n" for one in self.rows))
            else:
                self._write_line(row)
        except OSError as error:
            raise FmsimError(
                f"{self._named}: cannot be written ({reason(error)}); the rows before are kept:"
                " free the place, and give the same command again"
            ) from None

    def _write_line(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(strict_json.dump(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_lines(self) -> list[Row]:
        """The whole lines; a last one cut off by a kill is dropped, from the file as well."""
        if not self.path.exists():
            return []
        text = read_bytes(self.path, MOST_BYTES_OF_RESULTS)
        whole = text[: text.rfind(b"\n") + 1]
        rows = [self._row(number, line) for number, line in enumerate(whole.split(b"\n")[:-1], 1)]
        cut = text[len(whole) :]
        if cut and not any(cut.startswith(start) or start.startswith(cut) for start in STARTS):
            self._refuse(len(rows) + 1)
        if cut:
            os.truncate(self.path, len(whole))
        return rows

    def _row(self, number: int, line: bytes) -> Row:
        where = f"{self.path}, line {number}"
        try:
            row: Row = strict_json.parse(line.decode(), where)
            strict_json.check(_Row, row, where)
        except (FmsimError, UnicodeDecodeError):
            self._refuse(number)
        return row

    def _refuse(self, number: int) -> None:
        raise FmsimError(
            f"{shown(self.path)}, line {number}: not a row of results; give another file with"
            " --out, or mend the line"
        )

    def _read_parquet(self) -> list[Row]:
        parquet = _parquet(self.path)
        if not self.path.exists():
            return []
        import pyarrow

        try:
            check_regular(self.path, MOST_BYTES_OF_RESULTS)
            about = parquet.read_metadata(self.path)
            inflated = sum(
                about.row_group(group).total_byte_size for group in range(about.num_row_groups)
            )
            if about.num_rows > MOST_ROWS or inflated > MOST_BYTES_OF_RESULTS:
                raise ValueError(f"{about.num_rows:,} rows of {inflated:,} bytes are too many")
            found = [
                {name: value for name, value in row.items() if value is not None}
                for row in parquet.read_table(self.path).to_pylist()
            ]
            for row in found:
                strict_json.check(_Row, row, "row")
            return found
        except (ValueError, TypeError, FmsimError, OSError, pyarrow.ArrowException) as error:
            raise FmsimError(
                f"{shown(self.path)}: not a Parquet file of results ({shown(error)}); give another"
                " file with --out"
            ) from None

    def _write_parquet(self) -> None:
        """Parquet cannot grow, so the file is written anew and takes the old one's place."""
        with replacing(self.path) as beside:
            _parquet(self.path).write_table(_table(self.rows), beside)


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV: the columns of all, in the order in which they first come; empty where a row has
    none.
    """
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The rows that a sweep or a search wrote. Raises FmsimError where there are none."""
    if not path.is_file():
        raise FmsimError(f"{shown(path)}: no such file")
    with RowFile(path) as file:
        rows = file.rows
    if not rows:
        raise FmsimError(f"{shown(path)}: holds no rows")
    return rows


def plain(value: Any) -> Any:
    """A number of numpy as Python's own, and what else there is as it is."""
    return value.item() if isinstance(value, np.generic) else value


def json_lines(rows: Sequence[Row]) -> str:
    """A row a line, as an experiment tracker takes them: numbers, texts, true and false alone."""
    kinds = (str, int, float)
    every = ({name: plain(one) for name, one in row.items()} for row in rows)
    lines = ({name: one for name, one in row.items() if isinstance(one, kinds)} for row in every)
    return "".join(f"{strict_json.dump(line)}\n" for line in lines)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A file of rows that is not gone on with: Parquet or JSON lines (.jsonl) where its name ends
    so, else CSV.

    Raises OSError, and FmsimError where Parquet's library is missing.
    """
    if path.suffix == ".jsonl":
        write_text(path, json_lines(rows))
        return
    if path.suffix != ".parquet":
        write_text(path, csv_text(rows))
        return
    with replacing(path) as beside:
        _parquet(path).write_table(_table(rows), beside)


def _table(rows: Sequence[Row]) -> Any:
    import pyarrow

    columns = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: [row.get(name) for row in rows] for name in columns})


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise FmsimError(
            f"{path}: Parquet needs pyarrow; pip install 'fmsim[parquet]', or name a file of"
            " another kind"
        ) from None
    return pyarrow.parquet


def flat(row: Row, leave: Sequence[str] = ()) -> Row:
    """A report's row without what it must leave, and with one column for each figure of a group:
    `step_s_p99`.
    """
    found: Row = {}
    for name, value in row.items():
        if name in leave:
            continue
        if isinstance(value, dict):
            found |= {f"{name}_{part}": inner for part, inner in flat(value).items()}
        else:
            found[name] = value
    return found
