"""Tables of `fmsim policy`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_list(rows: list[dict[str, Any]]) -> None:
    """A row a policy. The sentence on what it keeps takes lines of its own where it must."""
    table = Table(header_style="bold", pad_edge=False)
    for name in ("policy", "action", "evidence", "decides per"):
        table.add_column(name.replace(" ", "\n"), no_wrap=True)
    table.add_column("what it keeps")
    for row in rows:
        table.add_row(
            *(row[key] for key in ("name", "action", "evidence", "decision_scope", "summary"))
        )
    _console().print(table)


def show(found: dict[str, Any]) -> None:
    """What it does, and its parameters."""
    table = Table(header_style="bold", pad_edge=False)
    for name in ("parameter", "type", "default"):
        table.add_column(name, overflow="fold")
    table.add_column("meaning")
    for row in found["parameters"]:
        table.add_row(*(row[key] for key in ("name", "type", "default", "description")))
    console = _console()
    console.print(f"[bold]{found['name']}[/bold]  {found['module']}")
    console.print(
        f"action {found['action']}, evidence {found['evidence']}, decides per"
        f" {found['decision_scope']}\n"
    )
    console.print(found["doc"] + "\n", markup=False)
    console.print(table)


def _console() -> Console:
    """The terminal; a pipe is taken to be 120 columns wide."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=120, highlight=False)
