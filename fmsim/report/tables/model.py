"""Tables of `fmsim model`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fmsim.report.console import wide_console
from fmsim.units import GIB


def show_list(rows: list[dict[str, Any]]) -> None:
    """One line a preset."""
    table = Table(header_style="bold", pad_edge=False)
    for name in ("model", "family"):
        table.add_column(name)
    for name in ("layers", "paged", "selections", "B a token", "128K", "512K", "1M, GiB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            row["family"],
            *(str(row[key]) for key in ("layers", "paged_layers", "selections")),
            f"{row['bytes_per_token']:,.0f}",
            *(f"{size / GIB:.2f}" for size in row["kv_bytes"].values()),
        )
    wide_console(110).print(table)


def show(found: dict[str, Any]) -> None:
    """A model's layers by kind, and what fits each hardware preset."""
    console = wide_console(120)
    positions = found["max_positions"]
    console.print(f"[bold]{found['name']}[/bold]  {found['title']} ({found['family']})")
    console.print(f"source: {found['source']}", markup=False)
    console.print(
        f"weights {found['weight_bytes'] / 1e9:,.0f} GB; contexts up to"
        f" {f'{positions:,} tokens' if positions else 'a length that is not said'}"
    )
    _show_parts(console, found)
    table = Table("hardware", header_style="bold", pad_edge=False)
    for name in ("GPUs", "weights a GPU, GB", "left for KV, GB", "128K", "512K", "1M"):
        table.add_column(name, justify="right")
    for row in found["fits"]:
        table.add_row(
            row["hardware"],
            f"{row['gpus']}, {row['weights']}",
            f"{row['weight_bytes_per_gpu'] / 1e9:,.1f}",
            f"{row['kv_pool_bytes'] / 1e9:,.1f}" if row["kv_pool_bytes"] else "weights do not fit",
            *("-" if n is None else str(n) for n in row["requests"].values()),
        )
    console.print("requests with their whole cache on the GPUs (tensor parallel over all of them):")
    console.print(table)


def _show_parts(console: Any, found: dict[str, Any]) -> None:
    table = Table(header_style="bold", pad_edge=False)
    for name in ("layers", "kind", "tokens an entry", "entry, B", "key, B", "top-k"):
        table.add_column(name, justify="right" if name != "kind" else "left")
    for name in ("selection", "KV"):
        table.add_column(name)
    for name in ("window", "B a token"):
        table.add_column(name, justify="right")
    for part in found["parts"]:
        table.add_row(
            str(part["layers"]),
            part["kind"],
            *(
                str(part[key] or "-")
                for key in ("entry_tokens", "entry_bytes", "key_bytes", "topk")
            ),
            part["selection"],
            part["kv"] if part["kind"] != "window" else "-",
            str(part["window_tokens"] or "-"),
            f"{part['bytes_per_token']:,.1f}",
        )
    total = f"{found['bytes_per_token']:,.1f}"
    table.add_row(str(found["layers"]), "all", *[""] * 7, total, style="bold")
    console.print(table)
