"""`fmsim scenario`: the scenarios that fmsim carries."""

from __future__ import annotations

from typing import Annotated

import typer

from fmsim.cli.options import Columns, Csv, Json, Wide, echo_json, print_found

app = typer.Typer(help="List the scenarios that fmsim carries, and see one.", no_args_is_help=True)


@app.command("list")
def list_scenarios(
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
) -> None:
    """All that can be run by name, in any folder: fmsim run 500k."""
    from fmsim.experiments import scenarios
    from fmsim.report.tables import listing

    rows = scenarios.listed()
    print_found(
        {"scenarios": rows},
        rows,
        lambda: listing.parts(rows, ("name", "model", "hardware", "trace"), "description"),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a name of `fmsim scenario list`")],
    as_json: Json = False,
) -> None:
    """Print a scenario, to keep and change: fmsim scenario show 500k > mine.yaml."""
    from fmsim.experiments import scenarios

    text = scenarios.text_of(name)
    if as_json:
        from fmsim.files import strict_yaml

        echo_json(strict_yaml.load(text, name))
    else:
        typer.echo(text, nl=False)
