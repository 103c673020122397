"""Rows of a sweep as one table: what was varied, then what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.text import Text

from fmsim.report.console import NO_MASS, estimate_text
from fmsim.report.grid import Field, Grid
from fmsim.report.tables.estimates import PLUS_MINUS
from fmsim.units import MIB

FIGURES = {  # heading -> text of a row's figure, and its rank; * = simulated
    "on GPU\nMiB": (lambda row: f"{row['gpu_bytes'] / MIB:.1f}", 4),
    "of\nfull": (lambda row: f"{row['gpu_ratio']:.1%}", 5),
    "golden\nkept": (lambda row: _estimate(row, "entry_recall"), 9),
    "mass\nkept": (lambda row: _estimate(row, "mass_kept"), 2),
    "tokens/s*": (lambda row: f"{row['decode_tokens_per_s']:.1f}", 6),
    "p99\nms*": (lambda row: f"{row['step_s_p99'] * 1e3:.2f}", 10),
    "PCIe\nMiB/step": (lambda row: f"{row['h2d_bytes_per_step'] / MIB:.2f}", 8),
    "stall*": (lambda row: f"{row['stall_ratio']:.1%}", 7),
    "requests\nfit*": (lambda row: str(row["max_requests"]), 3),
    "tokens/s\nthen*": (lambda row: f"{row['at_max_requests_decode_tokens_per_s']:,.0f}", 5),
}
SERVING_FIGURES = {  # of a scenario with a workload
    "mass\nkept": (lambda row: _estimate(row, "mass_kept"), 3),
    "held*": (lambda row: str(row["held"]), 2),
    "tokens/s*": (lambda row: f"{row['tokens_per_s']:,.0f}", 2),
    "TTFT p95\ns*": (lambda row: f"{row['ttft_s_p95']:.2f}", 4),
    "TPOT p95\nms*": (lambda row: f"{row['tpot_s_p95'] * 1e3:.2f}", 5),
    "good/s*": (lambda row: f"{row['goodput_per_s']:.3f}", 6),
    "in\nSLO*": (lambda row: f"{row['slo_share']:.0%}", 4),
    "stall*": (lambda row: f"{row['stall_share']:.1%}", 7),
    "done": (lambda row: str(row["requests_finished"]), 8),
    "bound by*": (lambda row: row["bound"], 6),
}


def parts(rows: list[dict[str, Any]], note: str) -> list[Text | Grid]:
    """The table, what went wrong, and a note on what the rows are."""
    told: list[Text | Grid] = [table(rows)]
    told += [
        Text(f"{row['policy']}: {row['error']}", style="yellow") for row in rows if "error" in row
    ]
    if any(row.get("mass_kept", 0) is None for row in rows):
        told.append(Text(NO_MASS, style="dim"))
    told.append(Text(f"{note}.  * simulated, not measured.  {PLUS_MINUS}", style="dim"))
    return told


def table(rows: list[dict[str, Any]]) -> Grid:
    """What was varied, then what came of it."""
    varied = list(dict.fromkeys(name for row in rows for name in row if name.startswith("set.")))
    figures = SERVING_FIGURES if any("held" in row for row in rows) else FIGURES
    grid = Grid(
        [
            Field("policy", 0, "left"),
            *(Field(_setting(name), 1, "left") for name in varied),
            *(Field(heading, rank) for heading, (_, rank) in figures.items()),
        ]
    )
    texts = [text for text, _ in figures.values()]
    for row in rows:
        grid.add(
            row["policy"],
            *(str(row.get(name) if row.get(name) is not None else "-") for name in varied),
            *_cells(row, texts),
        )
    return grid


def _setting(name: str) -> str:
    """A varied key as a heading, a part a line."""
    return name.removeprefix("set.").replace(".", ".\n")


def _cells(row: dict[str, Any], texts: list[Callable[[dict[str, Any]], str]]) -> list[str | Text]:
    if "error" in row:
        return [Text("no run", "yellow"), *("" for _ in texts[1:])]
    return [_cell(row, text) for text in texts]


def _estimate(row: dict[str, Any], name: str) -> str:
    return estimate_text(row[name], row.get(f"ci95_{name}_half_width"))


def _cell(row: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> str:
    """A figure; "-" where a run has none, as the times of requests that were all refused."""
    try:
        return text(row)
    except (KeyError, TypeError, ValueError):
        return "-"
