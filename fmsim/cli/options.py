"""Options that several commands have, and what they all do at their end."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fmsim.errors import ExitCode, shown


def one_thread_a_process() -> None:
    """For commands that give each policy a process: threads of their matrix products would only be
    in each other's way, and take twice the CPU time. numpy looks when it is loaded, so this comes
    first.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def finite(value: float | None) -> float | None:
    """Refuse NaN and infinity, which typer's bounds let pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _trust(given: bool) -> bool:
    """Workers inherit it, as they inherit the environment."""
    if given:
        os.environ["FMSIM_VERIFY"] = "0"
    return given


def _log(given: bool) -> bool:
    """Show fmsim's log, in lines with the milliseconds since the start."""
    if given:
        import logging

        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(relativeCreated)8.0f ms  %(message)s"))
        logger = logging.getLogger("fmsim")
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
    return given


def _carried(given: Path) -> Path:
    """The trace that fmsim carries under this name, or else the path itself."""
    from fmsim.scenario import shipped

    return shipped.trace(given) or given


TraceFile = Annotated[
    Path,
    typer.Argument(
        callback=_carried, help="a trace (.safetensors), or the name of one that fmsim carries"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Wide = Annotated[bool, typer.Option("--wide", help="every column, however narrow the terminal")]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns", help="only these, commas between; a heading 'mass kept' is mass-kept"
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        callback=_trust,
        help="trust traces: leave out the check of their digest and values",
    ),
]
PolicyTimeout = Annotated[
    float,
    typer.Option(min=0.001, callback=finite, help="seconds after which a policy's run is given up"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar")]
Csv = Annotated[bool, typer.Option("--csv", help="print the rows as CSV")]
Lines = Annotated[
    bool, typer.Option("--jsonl", help="print the rows as JSON lines, for experiment trackers")
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_log,
        help="say on standard error what is done, and how long it takes",
    ),
]
TIMEOUT_S = 3600.0
MOST_SEED = 2**32 - 1  # that every generator takes


def parse_tokens(option: str, text: str) -> int:
    """A number of tokens; 512K is 512 * 1024. FmsimError names the option."""
    from fmsim.errors import FmsimError, shown

    found = _count(text)
    if found is None:
        raise FmsimError(
            f"{option} {shown(text)}: give a number of tokens, such as 512K, 1M or 100000"
        )
    return found


def tokens(text: str) -> int:
    """The same as typer's parser of an option."""
    found = _count(str(text))
    if found is None:
        raise typer.BadParameter(f"{text!r} is no number of tokens; write 8192, 32K or 1M")
    return found


def _count(text: str) -> int | None:
    from fmsim.sim.serving.spec import MOST_TOKENS

    units = {"K": 2**10, "M": 2**20}
    plain = text.strip().replace("_", "").replace(",", "")
    scale = units.get(plain[-1:].upper(), 1)
    number = plain[:-1] if scale > 1 else plain
    try:
        found = round(float(number) * scale)
    except (ValueError, OverflowError):  # the latter for infinity
        return None
    return found if 1 <= found <= MOST_TOKENS else None


def echo_json(found: Any) -> None:
    """Print one JSON value."""
    from fmsim.files import strict_json

    typer.echo(strict_json.dump(found))


def echo_csv(rows: Sequence[dict[str, Any]]) -> None:
    """Print flat rows as CSV."""
    from fmsim.experiments.results.rows import csv_text

    typer.echo(csv_text(rows), nl=False)


def print_found(
    found: Any,
    rows: Sequence[dict[str, Any]],
    parts: Callable[[], Sequence[Any]],
    *,
    as_json: bool,
    as_csv: bool,
    wide: bool,
    columns: str | None,
) -> None:
    """Print what a command found, in the way that was asked for: as JSON, its `rows` as CSV, or
    the texts and tables of `parts`.
    """
    if as_json:
        echo_json(found)
    elif as_csv:
        from fmsim.experiments.results.rows import flat

        echo_csv([flat(row) for row in rows])
    else:
        from fmsim.report.grid import ALL, UnknownColumn, View, show_parts

        try:
            show_parts(parts(), View.of_terminal(wide, columns))
        except UnknownColumn:
            show_parts(parts(), ALL)  # it may have taken hours
            raise


def write_page(path: Path, text: str, option: str) -> None:
    """Write a page whole, or not at all; FmsimError names `option` where it cannot be written."""
    from fmsim.errors import FmsimError
    from fmsim.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise FmsimError(
            f"{option} {path}: cannot be written ({error.strerror}); choose another place"
        ) from None


def end_with_failures(failed: Sequence[dict[str, Any]]) -> None:
    """Name the policies that failed on standard error, and leave with exit code 1 where any did."""
    for failure in failed:
        typer.echo(f"fmsim: {shown(failure['error'])}", err=True)
    if failed:
        raise typer.Exit(ExitCode.FAILED)
