"""What an indexer's ranking keeps, and what policies keep at equal bytes: the tables of `fmsim
indexer eval`.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from fmsim.report.console import wide_console
from fmsim.units import gib

WIDTH = 112  # columns that the tables need
TITLES = {"golden_recall": "golden entries recalled", "mass_recall": "attention mass kept"}


def show(found: dict[str, Any]) -> None:
    """Print to standard output: a table a measure, what the threshold keeps, the policies."""
    console = wide_console(WIDTH)
    for key, title in TITLES.items():
        table = Table(title=f"{title}, by share of entries kept ({_extent(found)})")
        table.add_column("ranking")
        for share in found["kept_shares"]:
            table.add_column(f"{share:.0%}", justify="right")
        for name, recalls in found[key].items():
            table.add_row(name, *map(_estimate, recalls, found["half_width"][key][name]))
        console.print(table)
    row = found["threshold"]
    if row:
        console.print(
            f"lsa (max) at the recommended threshold {row['score']:.4f}: keeps"
            f" {row['kept_share']:.1%} of the entries, {row['golden_recall']:.3f} of the golden"
            f" ones, {row['mass_recall']:.3f} of the mass"
        )
    for name, rows in found.get("policies", {}).items():
        console.print(_policies(name, rows))
        reasons = {row["why"] for row in rows if "why" in row and "least_bytes" not in row}
        for why in sorted(reasons):
            console.print(Text(why, style="yellow"))


def _extent(found: dict[str, Any]) -> str:
    """How many windows, and what was known of each."""
    age = found["state_age"]
    state = "the state before it" if age == 0 else f"a state {age} window{'s' * (age > 1)} older"
    return f"{found['queries']} windows, window 0 left out; {state}"


def _estimate(value: float | None, half_width: float | None) -> str:
    """A figure and half of its 95% interval's width."""
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if half_width is None else f" ±{half_width:.3f}")


def _policies(name: str, rows: list[dict[str, Any]]) -> Table:
    """Policies at equal bytes on the GPU, of one trace."""
    table = Table(title=f"{name}: policies at equal bytes on the GPU, window 0 left out")
    table.add_column("budget")
    table.add_column("policy", no_wrap=True)
    for heading in ("entries", "mass kept", "golden kept", "beside lsa, filled", "window 0"):
        table.add_column(heading, justify="right")
    for row in rows:
        if "why" in row:
            needs = f"needs {gib(row['least_bytes'], 3)}" if "least_bytes" in row else "no run"
            table.add_row(row["budget"], row["policy"], "-", Text(needs, "yellow"))
            continue
        spread = {key: each["half_width"] for key, each in row["ci95"].items()}
        beside = row["versus_lsa"].get("mass_kept")
        table.add_row(
            row["budget"],
            row["policy"],
            f"{row['entries']:,}",
            _estimate(row.get("mass_kept"), spread.get("mass_kept")),
            _estimate(row.get("entry_recall"), spread.get("entry_recall")),
            "" if beside is None else _estimate(beside["difference"], beside["half_width"]),
            _estimate(row["first_window"].get("mass_kept"), None),
        )
    return table
