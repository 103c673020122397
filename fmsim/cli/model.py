"""`fmsim model`: the models that a scenario can name, and what they keep."""

from __future__ import annotations

from typing import Annotated

import typer

from fmsim.cli.options import Json, echo_json

app = typer.Typer(help="List models, and see what one keeps.", no_args_is_help=True)


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """All presets: layers, those that page, bytes that a token adds, the whole cache in GiB."""
    from fmsim.experiments.models import listed
    from fmsim.report.tables import model

    rows = listed()
    if as_json:
        echo_json({"models": rows})
    else:
        model.show_list(rows)


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(help="a preset, a Hugging Face config.json, or a YAML file of layer specs"),
    ],
    as_json: Json = False,
) -> None:
    """What each kind of layer keeps, and how many requests fit each hardware preset.

    \b
    fmsim model show v3.2
    fmsim model show GLM-5.2/config.json --json
    """
    from fmsim.experiments.models import shown
    from fmsim.report.tables import model

    found = shown(name)
    if as_json:
        echo_json(found)
    else:
        model.show(found)
