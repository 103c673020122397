"""How selections repeat: the table of `fmsim trace stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid

MEAN = "mean"  # of all layers
# heading; path of the figure in a row; whether it is a share; rank of its column
COLUMNS = (
    ("union\nof 4", ("union", "4"), False, 5),
    ("union\nof 16", ("union", "16"), False, 6),
    ("union of\n64 steps", ("union", "64"), False, 3),
    ("same as\nstep before", ("step_overlap",), True, 1),
    ("as layer\nbefore", ("layer_overlap",), True, 4),
    ("reuse p50\nsteps", ("reuse_steps", "p50"), False, 8),
    ("reuse p90\nsteps", ("reuse_steps", "p90"), False, 9),
    ("first\nuses", ("first_uses",), True, 7),
    ("lru misses\n1x", ("misses", "lru", "1"), True, 5),
    ("lru misses\n2x", ("misses", "lru", "2"), True, 2),
    ("lru misses\n4x", ("misses", "lru", "4"), True, 4),
    ("belady\n1x", ("misses", "belady", "1"), True, 6),
    ("belady\n2x", ("misses", "belady", "2"), True, 3),
    ("belady\n4x", ("misses", "belady", "4"), True, 6),
)
NOTES = (
    "Unions count distinct entries of a window, in multiples of top-k. Reuse is in steps since the"
    " entry was last selected. lru, belady: the share of selections that a cache of 1, 2 and 4"
    " top-k misses; belady sees the future, so no policy does better."
)


def parts(found: dict[str, Any]) -> list[Text | Grid]:
    """A row a layer, then their mean."""
    grid = Grid([Field("layer", 0, "left"), *(Field(one[0], one[3]) for one in COLUMNS)])
    for label, row in rows(found):
        if label == MEAN:
            grid.part()
        grid.add(label, *cells(row))
    return [Text(head(found)), grid, Text(NOTES, "dim")]


def head(found: dict[str, Any]) -> str:
    """What the figures are of."""
    return (
        f"{Path(found['trace']).name}: {found['model']} ({found['source']}), {found['steps']} steps"
        f" after {found['prompt_tokens']:,} tokens, {len(found['layers'])} layers,"
        f" top-{found['topk']} of entries of {found['entry_tokens']} tokens"
    )


def rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A label and its figures, of every layer and then of all."""
    layers = [(str(row["layer"]), row) for row in found["layers"]]
    return [*layers, (MEAN, found["all"])]


def cells(row: dict[str, Any]) -> list[str]:
    """Figures as text, a column each."""
    return [_text(row, path, share) for _, path, share, _ in COLUMNS]


def _text(row: dict[str, Any], path: tuple[str, ...], share: bool) -> str:
    value: Any = row
    for key in path:
        value = value[key]
    if value is None:
        return "-"
    return f"{value:.1%}" if share else f"{value:,.2f}".rstrip("0").rstrip(".")
