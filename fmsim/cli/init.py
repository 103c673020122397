"""`fmsim init` and `fmsim schema`: a scenario of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmsim.cli.options import echo_json


def init(
    file: Annotated[Path, typer.Argument(help="scenario to write (.yaml)")] = Path("scenario.yaml"),
    model: Annotated[
        str, typer.Option(help="a preset (`fmsim model list`), a config.json or layer specs")
    ] = "v4-flash",
    hardware: Annotated[
        str, typer.Option(help="a preset (`fmsim hw list`) or a file of `fmsim hw calibrate`")
    ] = "h100",
    context: Annotated[
        str, typer.Option("--context", "-c", help="tokens of a prompt, e.g. 512K or 100000")
    ] = "512K",
    batch: Annotated[int, typer.Option(min=1, help="requests side by side")] = 1,
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,
) -> None:
    """Write a scenario for your model, GPU and context, with a comment at every key.

    \b
    fmsim init
    fmsim init mine.yaml --model glm-5.2 --hardware h200 --context 128K && fmsim run mine.yaml
    """
    from fmsim.cli.options import parse_tokens
    from fmsim.experiments.scenarios import Wish, write

    wish = Wish(model, hardware, parse_tokens("--context", context), batch)
    trace = write(file, wish, force)
    typer.echo(f"{file}: replays {trace}; next: fmsim run {file}")


def schema() -> None:
    """Print the JSON schema of scenario files, by which editors check and complete them.

    \b
    fmsim schema > fmsim.schema.json
    # yaml-language-server: $schema=fmsim.schema.json   (a scenario's first line)
    """
    from fmsim.scenario import schema

    echo_json(schema.of_scenarios())
