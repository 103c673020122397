"""The table and the page of `fmsim trace stats`."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from rich.table import Table

from fmsim.errors import FmsimError
from fmsim.report.console import wide_console

# heading; path of the figure in a row; whether it is a share
COLUMNS = (
    ("union of 4", ("union", "4"), False),
    ("of 16", ("union", "16"), False),
    ("of 64 steps", ("union", "64"), False),
    ("same as step before", ("step_overlap",), True),
    ("as layer before", ("layer_overlap",), True),
    ("reuse p50", ("reuse_steps", "p50"), False),
    ("p90, steps", ("reuse_steps", "p90"), False),
    ("first uses", ("first_uses",), True),
    ("lru 1x", ("misses", "lru", "1"), True),
    ("2x", ("misses", "lru", "2"), True),
    ("4x", ("misses", "lru", "4"), True),
    ("belady 1x", ("misses", "belady", "1"), True),
    ("2x", ("misses", "belady", "2"), True),
    ("4x", ("misses", "belady", "4"), True),
)
NOTES = (
    "Unions count distinct entries of a window, in multiples of top-k. Reuse is in steps since the"
    " entry was last selected. The last six columns are the share of selections that a cache of 1,"
    " 2 and 4 top-k misses; belady sees the future, so no policy does better."
)


def show(name: str, found: dict[str, Any]) -> None:
    """The table on standard output."""
    console = wide_console(150)
    console.print(_head(name, found), markup=False)
    table = Table("layer", header_style="bold", pad_edge=False)
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for label, cells in _cells(found):
        table.add_row(label, *cells)
    console.print(table)
    console.print(NOTES, markup=False)


def _head(name: str, found: dict[str, Any]) -> str:
    return (
        f"{name}: {found['model']} ({found['source']}), {found['steps']} steps after"
        f" {found['prompt_tokens']:,} tokens, {len(found['layers'])} layers, top-{found['topk']} of"
        f" entries of {found['entry_tokens']} tokens"
    )


def _cells(found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """A label and its figures as text, of every layer and then of all."""
    rows = [(str(row["layer"]), row) for row in found["layers"]]
    rows.append(("mean", found["all"]))
    return [(label, [_text(row, path, share) for _, path, share in COLUMNS]) for label, row in rows]


def _text(row: dict[str, Any], path: tuple[str, ...], share: bool) -> str:
    value: Any = row
    for key in path:
        value = value[key]
    if value is None:
        return "-"
    return f"{value:.1%}" if share else f"{value:,.2f}".rstrip("0").rstrip(".")


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#27303f;max-width:1200px;margin:2em auto}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:4px 9px;text-align:right;border-bottom:1px solid #e1e6ee}"
    "tr:last-child{font-weight:600}p{color:#64718a;max-width:90ch}"
)


def write_page(path: Path, name: str, found: dict[str, Any]) -> None:
    """The same as one HTML page that needs nothing else; a share's cell is shaded by its size."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text, _, _ in COLUMNS)
    body = []
    for label, cells in _cells(found):
        shaded = "".join(f"<td{_shade(cell)}>{html.escape(cell)}</td>" for cell in cells)
        body.append(f"<tr><td>{html.escape(label)}</td>{shaded}</tr>")
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(name)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(name)}</h1><p>{html.escape(_head(name, found))}</p>"
        f"<table><tr><th>layer</th>{head}</tr>{''.join(body)}</table>"
        f"<p>{html.escape(NOTES)}</p></body></html>\n"
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FmsimError(
            f"--html {path}: cannot be written ({error.strerror}); choose another place"
        ) from None


def _shade(cell: str) -> str:
    if not cell.endswith("%"):
        return ""
    depth = float(cell[:-1]) / 100
    return f' style="background:rgba(59,111,212,{0.45 * depth:.2f})"'
