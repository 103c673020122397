"""A file of result rows that grows by one row at a time: JSON lines, or Parquet where its name ends
so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fmsim.errors import FmsimError
from fmsim.files import replacing

Row = dict[str, Any]  # flat: no value is a mapping
SCHEMA_VERSION = 2  # of a row; 1 had none


class RowFile:
    """What is in the file when it is opened, and what is appended.

    A kill at any moment loses at most the row being written.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises FmsimError for a file that holds something else, or a place that cannot be
        written.
        """
        self.path = Path(path)
        self._parquet = self.path.suffix == ".parquet"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.rows: list[Row] = self._read_parquet() if self._parquet else self._read_lines()
        except OSError as error:
            raise FmsimError(
                f"--out {self.path}: cannot be used ({error.strerror or error}); choose another"
                " file"
            ) from None
        for number, row in enumerate(self.rows, 1):
            version = row.get("schema_version", 1)
            if version != SCHEMA_VERSION:
                raise FmsimError(
                    f"--out {self.path}: row {number} has schema {version}, but this fmsim writes"
                    f" {SCHEMA_VERSION}; give another file"
                )

    def append(self, row: Row) -> None:
        """Write one row; it is on disk when this returns."""
        row = {"schema_version": SCHEMA_VERSION} | row
        self.rows.append(row)
        if self._parquet:
            self._write_parquet()
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_lines(self) -> list[Row]:
        """The whole lines; a last one cut off by a kill is dropped, from the file as well."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        rows = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise FmsimError(
                    f"{self.path}, line {number}: not a row of results; give another file with"
                    " --out, or mend the line"
                )
            rows.append(row)
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        return rows

    def _read_parquet(self) -> list[Row]:
        parquet = self._library()
        if not self.path.exists():
            return []
        try:
            return [
                {name: value for name, value in row.items() if value is not None}
                for row in parquet.read_table(self.path).to_pylist()
            ]
        except ValueError as error:  # pyarrow's errors are ValueErrors
            raise FmsimError(
                f"{self.path}: not a Parquet file of results ({error}); give another file with"
                " --out"
            ) from None

    def _write_parquet(self) -> None:
        """Parquet cannot grow, so the file is written anew and takes the old one's place."""
        import pyarrow

        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = pyarrow.table({name: [row.get(name) for row in self.rows] for name in columns})
        with replacing(self.path) as beside:
            self._library().write_table(table, beside)

    def _library(self) -> Any:
        try:
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise FmsimError(
                f"--out {self.path}: Parquet needs pyarrow; pip install 'fmsim[parquet]', or name a"
                " .jsonl file"
            ) from None
        return pyarrow.parquet
