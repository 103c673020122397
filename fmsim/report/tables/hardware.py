"""What is said of a server above every table."""

from __future__ import annotations

from typing import Any

from fmsim.report.grid import Field, Grid
from fmsim.units import GIB


def listed(rows: list[dict[str, Any]]) -> list[Grid]:
    """One line a preset. Memory is in GiB, in which the makers' names count."""
    grid = Grid(
        [
            Field("preset", 0, "left"),
            Field("title", 1, "left"),
            Field("GPUs", 2),
            Field("memory\nGiB", 2),
            Field("memory\nGB/s", 3),
            Field("link\nGB/s", 4),
        ]
    )
    for row in rows:
        grid.add(
            row["name"],
            row["title"],
            str(row["gpus"]),
            f"{row['memory_bytes'] / GIB:,.1f}",
            f"{row['memory_bytes_per_s'] / 1e9:,.0f}",
            f"{row['link_bytes_per_s'] / 1e9:,.0f}",
        )
    return [grid]


def hardware_line(hardware: dict[str, Any]) -> str:
    """Its GPU, how the model lies on it, and what is left for KV; a pool that nobody measured is
    called a guess.
    """
    placed = hardware["deployment"]
    title = placed if isinstance(placed, str) else placed["title"]
    weights = hardware["weight_bytes_per_gpu"] / GIB
    pool = hardware["kv_pool"]
    left = "no room for KV"
    if pool is not None:
        guess = " (a guess)" if pool["guess"] else ""
        left = f"{pool['bytes_per_gpu'] / GIB:.1f} GiB for KV{guess}"
    line = f"{hardware['title']}, {title}; on each GPU {weights:.1f} GiB of weights, {left}"
    if "kv_parts" in hardware:
        line += f"; KV heads on {hardware['kv_parts']} GPUs, bytes are of one"
    scaled = hardware.get("kernels_stand_in")
    return line if scaled is None else f"{line}; {scaled}"
