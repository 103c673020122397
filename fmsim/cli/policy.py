"""`fmsim policy`: what policies there are, fmsim's own and installed plug-ins."""

from __future__ import annotations

from typing import Annotated

import typer

from fmsim.cli.options import Json, echo_json

app = typer.Typer(help="List policies and their parameters.", no_args_is_help=True)


@app.command("list")
def list_policies(as_json: Json = False) -> None:
    """All installed policies, one a line."""
    from fmsim.policies import registry
    from fmsim.report.tables import policy

    rows = [registry.info(name) for name in registry.names()]
    if as_json:
        echo_json({"policies": rows})
    else:
        policy.show_list(rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a policy's name, e.g. lsa, or path/file.py:Class")],
    as_json: Json = False,
) -> None:
    """One policy: what it does, its source, and every parameter with its default."""
    from fmsim.policies import registry
    from fmsim.report.tables import policy

    found = registry.info(name)
    if as_json:
        echo_json(found)
    else:
        policy.show(found)


@app.command()
def new(name: Annotated[str, typer.Argument(help="what the policy is to be called")]) -> None:
    """Write a plug-in package for a policy of your own, into the new folder fmsim-NAME.

    It holds the policy, a test that runs fmsim's conformance kit, and what installs it.
    """
    from fmsim.testing import new_plugin

    folder = new_plugin.write(name)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    typer.echo(f"{folder}: {files}; its README.md says what to do next")
