"""`fmsim policy`: what policies there are, fmsim's own and installed plug-ins."""

from __future__ import annotations

from typing import Annotated

import typer

from fmsim.cli.options import Columns, Csv, Json, Wide, print_found

app = typer.Typer(help="List policies and their parameters.", no_args_is_help=True)


@app.command("list")
def list_policies(
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
) -> None:
    """All installed policies, one a line."""
    from fmsim.policies import registry
    from fmsim.report.tables import listing

    rows = [registry.info(name) for name in registry.names()]
    names = ("name", "action", "evidence", "decision_scope")
    print_found(
        {"policies": rows},
        [{name: row[name] for name in (*names, "summary", "module")} for row in rows],
        lambda: listing.parts(rows, names, "summary"),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a policy's name, e.g. lsa, or path/file.py:Class")],
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
) -> None:
    """One policy: what it does, its source, and every parameter with its default."""
    from fmsim.policies import registry
    from fmsim.report.tables import policy

    found = registry.info(name)
    print_found(
        found,
        found["parameters"],
        lambda: policy.parts(found),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


@app.command()
def new(name: Annotated[str, typer.Argument(help="what the policy is to be called")]) -> None:
    """Write a plug-in package for a policy of your own, into the new folder fmsim-NAME.

    It holds the policy, a test that runs fmsim's conformance kit, and what installs it.
    """
    from fmsim.testing import new_plugin

    folder = new_plugin.write(name)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    typer.echo(f"{folder}: {files}; its README.md says what to do next")
