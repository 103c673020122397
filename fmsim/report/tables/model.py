"""Tables of `fmsim model`."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid
from fmsim.units import GIB

LIST_FIELDS = (
    Field("model", 0, "left"),
    Field("family", 5, "left"),
    Field("layers", 4),
    Field("paged", 3),
    Field("selections", 6),
    Field("B a token", 1),
    Field("128K\nGiB", 2),
    Field("512K\nGiB", 2),
    Field("1M\nGiB", 2),
)
PART_FIELDS = (
    Field("layers", 0),
    Field("kind", 0, "left"),
    Field("tokens\nan entry", 3),
    Field("entry\nB", 2),
    Field("key\nB", 5),
    Field("top-k", 2),
    Field("selection", 4, "left"),
    Field("KV", 6, "left"),
    Field("window", 5),
    Field("B a token", 1),
)
FIT_FIELDS = (
    Field("hardware", 0, "left"),
    Field("GPUs", 2),
    Field("weights\na GPU, GiB", 4),
    Field("left for\nKV, GiB", 3),
    Field("128K", 1),
    Field("512K", 1),
    Field("1M", 1),
)


def listed(rows: list[dict[str, Any]]) -> list[Grid]:
    """One line a preset."""
    grid = Grid(LIST_FIELDS)
    for row in rows:
        grid.add(
            row["name"],
            row["family"],
            *(str(row[key]) for key in ("layers", "paged_layers", "selections")),
            f"{row['bytes_per_token']:,.0f}",
            *(f"{size / GIB:.2f}" for size in row["kv_bytes"].values()),
        )
    return [grid]


def parts(found: dict[str, Any]) -> list[Text | Grid]:
    """A model's layers by kind, and what fits each hardware preset."""
    positions = found["max_positions"]
    grid = Grid(FIT_FIELDS)
    for row in found["fits"]:
        pool = row["kv_pool_bytes"]
        grid.add(
            row["hardware"],
            f"{row['gpus']}, {row['weights']}",
            f"{row['weight_bytes_per_gpu'] / GIB:,.1f}",
            f"{pool / GIB:,.1f}" if pool else "weights do not fit",
            *("-" if n is None else f"{n:,}" for n in row["requests"].values()),
        )
    return [
        Text.assemble((found["name"], "bold"), f"  {found['title']} ({found['family']})"),
        Text(f"source: {found['source']}"),
        Text(
            f"weights {found['weight_bytes'] / GIB:,.0f} GiB; contexts up to"
            f" {f'{positions:,} tokens' if positions else 'a length that is not said'}"
        ),
        _layers(found),
        Text("requests with their whole cache on the GPUs (tensor parallel over all of them):"),
        grid,
    ]


def _layers(found: dict[str, Any]) -> Grid:
    grid = Grid(PART_FIELDS)
    for part in found["parts"]:
        figures = ("entry_tokens", "entry_bytes", "key_bytes", "topk")
        grid.add(
            str(part["layers"]),
            part["kind"],
            *(str(part[key] or "-") for key in figures),
            part["selection"],
            part["kv"] if part["kind"] != "window" else "-",
            str(part["window_tokens"] or "-"),
            f"{part['bytes_per_token']:,.1f}",
        )
    total = Text(f"{found['bytes_per_token']:,.1f}", "bold")
    grid.add(Text(str(found["layers"]), "bold"), Text("all", "bold"), *[""] * 7, total)
    return grid
