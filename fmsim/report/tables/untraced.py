"""A run without a trace as one table: what lies where, what fits, and the full cache's time."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fmsim.report.console import picture, wide_console
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import GIB

MIN_WIDTH = 110  # columns that the table needs
COLUMNS = (
    "on GPU\nGiB",
    "of\nfull",
    "host\nGiB",
    "requests\nfit",
    "GPU memory\nwall",
    "host or\nNVMe wall",
    "compute\nwall*",
    "decode\ntokens/s*",
    "step\nms*",
)


def render(report: dict[str, Any]) -> Group:
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
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["footprints"]:
        table.add_row(row["policy"], *_cells(row))
    notes = (
        "on GPU: what one GPU holds of one request at its end.  walls: requests at once that each"
        f" allows, compute at {about['tpot_slo_s'] * 1e3:g} ms a token.",
        f"-: hits, misses, mass kept, traffic, stalls and other policies' speeds need selections:"
        f" {about['absent']['reason']}.",
        "* simulated from kernel tables, not measured.",
    )
    untimed = about["absent"].get("untimed")
    told = [*notes, f"No speed of the full cache: {untimed}."] if untimed else notes
    return Group(*lines, table, *(Text(note, style="dim") for note in told))


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


def show(report: dict[str, Any]) -> None:
    """Print to standard output."""
    wide_console(MIN_WIDTH).print(render(report))


def svg(report: dict[str, Any], title: str) -> str:
    """The same as a picture."""
    return picture(render(report), MIN_WIDTH, title)
