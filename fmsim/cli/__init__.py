"""The `fmsim` command: mounts the sub-commands and turns user errors into one line."""

import importlib
import sys

import typer

from fmsim import __version__
from fmsim.cli.eval import evaluate
from fmsim.cli.exec import exec_
from fmsim.cli.plan import plan
from fmsim.cli.report import report
from fmsim.cli.run import run
from fmsim.cli.sweep import sweep
from fmsim.cli.tune import tune
from fmsim.cli.validate import validate
from fmsim.errors import FmsimError

app = typer.Typer(
    name="fmsim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Which KV pages should stay in GPU memory, and what does that choice cost and save?\n\n"
        "\b\nfmsim run scenarios/500k.yaml   replay a trace under every policy\n"
        "fmsim exec --policy lru         decode with a real model under a policy\n"
        "fmsim plan scenarios/serve.yaml   how many requests a server holds, and what binds\n"
        "fmsim policy show lsa           a policy's parameters and its source"
    ),
)

app.command()(run)
app.command("exec")(exec_)
app.command("eval")(evaluate)
app.command()(plan)
app.command()(sweep)
app.command()(tune)
app.command()(report)
app.command()(validate)

# Modules below fmsim.cli, each with an `app`; what they need beyond typer they import when a
# command runs.
SUB_APPS = ("model", "policy", "trace", "indexer", "hw")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        typer.echo(f"fmsim {__version__}")
        raise typer.Exit()


def _mount() -> None:
    for name in SUB_APPS:
        try:
            module = importlib.import_module(f"fmsim.cli.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fmsim.cli.{name}":
                raise
            continue
        app.add_typer(module.app, name=name)


def main() -> None:
    """Entry point of the console script; exit code 2 and one line for a user's mistake."""
    _mount()
    try:
        app()
    except FmsimError as error:
        print(f"fmsim: {error}", file=sys.stderr)
        sys.exit(2)
