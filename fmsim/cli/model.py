"""`fmsim model`: the models that a scenario can name, and what they keep."""

from __future__ import annotations

from typing import Annotated

import typer

from fmsim.cli.options import Columns, Csv, Json, Wide, print_found

app = typer.Typer(help="List models, and see what one keeps.", no_args_is_help=True)


@app.command("list")
def list_models(
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
) -> None:
    """All presets: layers, those that page, bytes that a token adds, the whole cache in GiB."""
    from fmsim.experiments.models import listed
    from fmsim.report.tables import model

    rows = listed()
    print_found(
        {"models": rows},
        rows,
        lambda: model.listed(rows),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(help="a preset, a Hugging Face config.json, or a YAML file of layer specs"),
    ],
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
) -> None:
    """What each kind of layer keeps, and how many requests fit each hardware preset.

    \b
    fmsim model show v3.2
    fmsim model show GLM-5.2/config.json --json
    """
    from fmsim.experiments.models import shown
    from fmsim.report.tables import model

    found = shown(name)
    print_found(
        found,
        found["parts"],
        lambda: model.parts(found),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )
