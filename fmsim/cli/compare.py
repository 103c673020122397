"""`fmsim compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from fmsim.cli.options import Columns, Csv, Json, Quiet, Verbose, Wide, echo_csv, echo_json
from fmsim.cli.progress import bar


def compare(
    one: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="a folder of `fmsim run --out`, a scenario, or a policy",
            show_default=False,
        ),
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="another of the same kind")],
    scenario: Annotated[
        str, typer.Option(help="what two policies run on: a scenario's name or file")
    ] = "128k",
    override: Annotated[list[str], typer.Option("--set", "-s", help="key=value, for both")] = [],
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What changed between two results, two scenarios or two policies, by how much, and whether
    that is beyond its error.

    \b
    fmsim compare before/ after/
    fmsim compare 32k 128k
    fmsim compare lru lsa
    fmsim compare lru:budget=10% lsa:budget=10% --scenario 500k
    """
    from fmsim.experiments import compare as comparing

    with bar("reading", quiet=quiet) as show:
        found = comparing.compare(
            one,
            other,
            scenario,
            override,
            show,
        )
    if as_json:
        echo_json(found)
    elif as_csv:
        echo_csv(found["rows"])
    else:
        from fmsim.report.grid import View
        from fmsim.report.tables import comparison

        comparison.show(found, View.of_terminal(wide, columns))
