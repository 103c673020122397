"""Options that several commands have, and what they all do at their end."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
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


Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Wide = Annotated[bool, typer.Option("--wide", help="every column, however narrow the terminal")]
Columns = Annotated[
    str | None,
    typer.Option("--columns", help="only these, by their headings: mass-kept,stall"),
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


def echo_json(found: Any) -> None:
    """Print one JSON value."""
    from fmsim.files import strict_json

    typer.echo(strict_json.dump(found))


def echo_csv(rows: Sequence[dict[str, Any]]) -> None:
    """Print flat rows as CSV."""
    from fmsim.experiments.rows import csv_text

    typer.echo(csv_text(rows), nl=False)


def end_with_failures(failed: Sequence[dict[str, Any]]) -> None:
    """Name the policies that failed on standard error, and leave with exit code 1 where any did."""
    for failure in failed:
        typer.echo(f"fmsim: {shown(failure['error'])}", err=True)
    if failed:
        raise typer.Exit(ExitCode.FAILED)
