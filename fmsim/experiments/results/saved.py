"""What commands wrote, as flat rows: for a notebook, a table or an experiment tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmsim.errors import FmsimError, shown
from fmsim.experiments.results.folder import REPORT_NAME, evaluated
from fmsim.experiments.results.rows import Row, flat, read_rows
from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, read_json

HEAD = ("name", "fmsim", "batch", "schema_version")  # of a report's head, in every row


def rows_of(source: Path) -> list[Row]:
    """A row a run: of a folder that `fmsim run --out` or `fmsim eval --out` wrote, or of the rows
    of `fmsim sweep` or `fmsim tune`.

    Every value is a number, a text, true or false, or None.
    """
    if source.suffix in (".jsonl", ".parquet"):
        return [_plain(flat(row)) for row in read_rows(source)]
    answers = evaluated(source)
    if answers is not None:
        about = {
            "model": answers["about"]["model"],
            "bytes_of": answers["about"]["plan"]["model"],
        }
        return [_plain(about | flat(cell)) for cell in answers["cells"]]
    path = source / REPORT_NAME
    try:
        report = read_json(path, MOST_BYTES_OF_RESULTS)
        about = report["scenario"]
        head = {name: about[name] for name in HEAD if name in about}
        head |= {"model": about["model"]["name"], "hardware": about["hardware"]["name"]}
        head["trace"] = Path(about["trace"]["file"]).name
        rows = [flat(row, leave=("over_time",)) for row in report["policies"]]
    except FileNotFoundError:
        raise FmsimError(
            f"{shown(source)}: give a folder of `fmsim run --out` or `fmsim eval --out`, or rows"
            " (.jsonl, .parquet) of `fmsim sweep` or `fmsim tune`"
        ) from None
    except (KeyError, TypeError) as error:
        raise FmsimError(f"{shown(path)}: not a report of fmsim ({error})") from None
    return [_plain(head | row) for row in rows]


def _plain(row: Row) -> Row:
    """Without what no table has a cell for, such as lists."""
    kinds = (str, int, float, bool, type(None))
    return {name: value for name, value in row.items() if isinstance(value, kinds)}


def frame_of(rows: list[Row]) -> Any:
    """A pandas DataFrame. Raises FmsimError, naming the extra, where pandas is missing."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise FmsimError("a DataFrame needs pandas: pip install 'fmsim[pandas]'") from None
    return pandas.DataFrame(rows)
