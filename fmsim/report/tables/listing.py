"""Lists of what there is: a row a thing, a column a property."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fmsim.report.grid import Field, Grid, View, show_parts


def show(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Print `names` of each row; on a narrow terminal the first ones."""
    fields = [Field(name, rank, "left") for rank, name in enumerate(names)]
    grid = Grid(fields)
    for row in rows:
        grid.add(*(str(row[name]) for name in names))
    show_parts([grid], View.of_terminal())
