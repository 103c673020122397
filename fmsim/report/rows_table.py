"""Rows of a sweep as one table: what was varied, then what came of it."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from fmsim.report.console import wide_console

MIB = 2**20
FIGURES = {  # heading -> text of a row's figure; * = simulated
    "of full": lambda row: f"{row['kv_hbm_ratio']:.1%}",
    "golden kept": lambda row: f"{row['entry_recall']:.1%}",
    "mass kept": lambda row: f"{row['mass_kept']:.1%}",
    "tokens/s*": lambda row: f"{row['decode_tokens_per_s']:.1f}",
    "p99 ms*": lambda row: f"{row['step_s_p99'] * 1e3:.2f}",
    "PCIe MiB": lambda row: f"{row['h2d_bytes'] / MIB:.1f}",
    "stall*": lambda row: f"{row['stall_ratio']:.1%}",
    "requests fit*": lambda row: str(row["max_requests"]),
}


def show(rows: list[dict[str, Any]], note: str) -> None:
    """Print to standard output."""
    varied = list(dict.fromkeys(name for row in rows for name in row if name.startswith("set.")))
    table = Table(header_style="bold", pad_edge=False)
    for name in ["policy", *(name.removeprefix("set.") for name in varied)]:
        table.add_column(name, no_wrap=True)
    for heading in FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        known = [row["policy"], *(str(row.get(name) if row.get(name) is not None else "-") for name in varied)]
        table.add_row(*known, *_cells(row))
    console = wide_console(wide_console(1000).measure(table).maximum)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(Text(f"{row['policy']}: {row['error']}", style="yellow"))
    console.print(Text(f"{note}.  * simulated, not measured", style="dim"))


def _cells(row: dict[str, Any]) -> list[str | Text]:
    if "error" in row:
        return [Text("no run", "yellow"), *("" for _ in list(FIGURES)[1:])]
    return [text(row) for text in FIGURES.values()]
