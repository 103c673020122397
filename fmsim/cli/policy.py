"""`fmsim policy`: what policies there are, fmsim's own and installed plug-ins."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="List policies and their parameters.", no_args_is_help=True)


@app.command("list")
def list_policies() -> None:
    """All installed policies, one a line."""
    from rich.table import Table

    from fmsim.policies import registry
    from fmsim.report.console import wide_console

    table = Table(
        "policy",
        "action",
        "evidence",
        "decides per",
        "what it keeps",
        header_style="bold",
        pad_edge=False,
    )
    for name in registry.names():
        info = registry.info(name)
        table.add_row(
            name, info["action"], info["evidence"], info["decision_scope"], info["summary"]
        )
    wide_console(120).print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a policy's name, e.g. lsa, or path/file.py:Class")],
) -> None:
    """One policy: what it does, its source, and every parameter with its default."""
    from rich.table import Table

    from fmsim.policies import registry
    from fmsim.report.console import wide_console

    info = registry.info(name)
    table = Table("parameter", "type", "default", "meaning", header_style="bold", pad_edge=False)
    for parameter in info["parameters"]:
        table.add_row(*(parameter[key] for key in ("name", "type", "default", "description")))
    console = wide_console(120)
    console.print(f"[bold]{info['name']}[/bold]  {info['module']}")
    console.print(
        f"action {info['action']}, evidence {info['evidence']}, decides per"
        f" {info['decision_scope']}\n"
    )
    console.print(info["doc"] + "\n", markup=False)
    console.print(table)


@app.command()
def new(name: Annotated[str, typer.Argument(help="what the policy is to be called")]) -> None:
    """Write a plug-in package for a policy of your own, into the new folder fmsim-NAME.

    It holds the policy, a test that runs fmsim's conformance kit, and what installs it.
    """
    from fmsim.testing import new_plugin

    folder = new_plugin.write(name)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    typer.echo(f"{folder}: {files}; its README.md says what to do next")
