"""Rows of a sweep as one table: what was varied, then what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from fmsim.report.console import NO_MASS, estimate_text, wide_console
from fmsim.report.tables.estimates import PLUS_MINUS
from fmsim.units import MIB

FIGURES = {  # heading -> text of a row's figure; * = simulated
    "on GPU MiB": lambda row: f"{row['gpu_bytes'] / MIB:.1f}",
    "of full": lambda row: f"{row['gpu_ratio']:.1%}",
    "golden kept": lambda row: _estimate(row, "entry_recall"),
    "mass kept": lambda row: _estimate(row, "mass_kept"),
    "tokens/s*": lambda row: f"{row['decode_tokens_per_s']:.1f}",
    "p99 ms*": lambda row: f"{row['step_s_p99'] * 1e3:.2f}",
    "PCIe MiB/step": lambda row: f"{row['h2d_bytes_per_step'] / MIB:.2f}",
    "stall*": lambda row: f"{row['stall_ratio']:.1%}",
    "requests fit*": lambda row: str(row["max_requests"]),
    "tokens/s then*": lambda row: f"{row['at_max_requests_decode_tokens_per_s']:,.0f}",
}
SERVING_FIGURES = {  # of a scenario with a workload
    "mass kept": lambda row: _estimate(row, "mass_kept"),
    "held*": lambda row: str(row["held"]),
    "tokens/s*": lambda row: f"{row['tokens_per_s']:,.0f}",
    "TTFT p95 s*": lambda row: f"{row['ttft_s_p95']:.2f}",
    "TPOT p95 ms*": lambda row: f"{row['tpot_s_p95'] * 1e3:.2f}",
    "good/s*": lambda row: f"{row['goodput_per_s']:.3f}",
    "in SLO*": lambda row: f"{row['slo_share']:.0%}",
    "stall*": lambda row: f"{row['stall_share']:.1%}",
    "done": lambda row: str(row["requests_finished"]),
    "bound by*": lambda row: row["bound"],
}


def show(rows: list[dict[str, Any]], note: str) -> None:
    """Print to standard output."""
    varied = list(dict.fromkeys(name for row in rows for name in row if name.startswith("set.")))
    table = Table(header_style="bold", pad_edge=False)
    for name in ["policy", *(name.removeprefix("set.") for name in varied)]:
        table.add_column(name, no_wrap=True)
    figures = SERVING_FIGURES if any("held" in row for row in rows) else FIGURES
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        known = [
            row["policy"],
            *(str(row.get(name) if row.get(name) is not None else "-") for name in varied),
        ]
        table.add_row(*known, *_cells(row, figures))
    console = wide_console(wide_console(1000).measure(table).maximum)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(Text(f"{row['policy']}: {row['error']}", style="yellow"))
    if any(row.get("mass_kept", 0) is None for row in rows):
        console.print(Text(NO_MASS, style="dim"))
    console.print(Text(f"{note}.  * simulated, not measured.  {PLUS_MINUS}", style="dim"))


def _cells(
    row: dict[str, Any], figures: dict[str, Callable[[dict[str, Any]], str]]
) -> list[str | Text]:
    if "error" in row:
        return [Text("no run", "yellow"), *("" for _ in list(figures)[1:])]
    return [_cell(row, text) for text in figures.values()]


def _estimate(row: dict[str, Any], name: str) -> str:
    return estimate_text(row[name], row.get(f"ci95_{name}_half_width"))


def _cell(row: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> str:
    """A figure; "-" where a run has none, as the times of requests that were all refused."""
    try:
        return text(row)
    except (KeyError, TypeError, ValueError):
        return "-"
