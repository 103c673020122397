"""A run without a trace as one table: what lies where, what fits, and the full cache's time."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.grid import ALL, Field, Grid, View, picture, show_parts
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import GIB

FIELDS = (
    Field("policy", 0, "left"),
    Field("on GPU\nGiB", 2),
    Field("of\nfull", 6),
    Field("host\nGiB", 7),
    Field("requests\nfit", 1),
    Field("GPU memory\nwall", 3),
    Field("host or\nNVMe wall", 3),
    Field("compute\nwall*", 4),
    Field("decode\ntokens/s*", 5),
    Field("step\nms*", 8),
)


def parts(report: dict[str, Any]) -> list[Text | Grid]:
    """The head, the table and its notes, from the report's JSON object."""
    about = report["scenario"]
    model = about["model"]
    lines = [
        Text(
            f"model     {model['name']}: {model['paged_layers']} of {model['layers']} layers have"
            f" KV that pages; requests of {about['context_tokens']:,} + {about['output_tokens']:,}"
            " tokens"
        ),
        Text(f"hardware  {hardware_line(about['hardware'])}; batch {about['batch']}"),
    ]
    grid = Grid(FIELDS)
    for row in report["footprints"]:
        grid.add(row["policy"], *_cells(row))
    notes = (
        "on GPU: what one GPU holds of one request at its end.  walls: requests at once that each"
        f" allows, compute at {about['tpot_slo_s'] * 1e3:g} ms a token.",
        f"-: hits, misses, mass kept, traffic, stalls and other policies' speeds need selections:"
        f" {about['absent']['reason']}.",
        "* simulated from kernel tables, not measured.",
    )
    untimed = about["absent"].get("untimed")
    told = [*notes, f"No speed of the full cache: {untimed}."] if untimed else notes
    return [*lines, grid, *(Text(note, style="dim") for note in told)]


def _cells(row: dict[str, Any]) -> list[str]:
    walls = row["walls"]
    speed = row.get("decode_tokens_per_s")
    return [
        f"{row['gpu_bytes'] / GIB:.3f}",
        f"{row['gpu_ratio']:.1%}",
        f"{row['host_bytes'] / GIB:.3f}" if row["host_bytes"] else "-",
        str(row["max_requests"]),
        str(walls["GPU memory"]),
        str(walls.get("host memory", walls.get("NVMe", "-"))),
        str(walls.get("compute", "-")),
        "-" if speed is None else f"{speed:,.1f}",
        "-" if speed is None else f"{row['step_s'] * 1e3:.2f}",
    ]


def show(report: dict[str, Any], view: View = ALL) -> None:
    """Print to standard output."""
    show_parts(parts(report), view)


def svg(report: dict[str, Any], title: str) -> str:
    """The same as a picture."""
    return picture(parts(report), title)
