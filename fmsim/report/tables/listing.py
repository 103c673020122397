"""Lists of what there is: a row a thing, a column a property."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fmsim.report.grid import Field, Grid

WRAPS = 24  # columns that a sentence takes at least


def parts(
    rows: Sequence[dict[str, Any]], names: Sequence[str], sentence: str | None = None
) -> list[Grid]:
    """`names` of each row; on a narrow terminal the first ones. A `sentence` stands behind them,
    on several lines where it must.
    """
    fields = [Field(name.replace("_", "\n"), 2 * rank, "left") for rank, name in enumerate(names)]
    if sentence is not None:
        names = [*names, sentence]
        fields.append(Field(sentence, 1, "left", WRAPS))
    grid = Grid(fields)
    for row in rows:
        grid.add(*(str(row[name]) for name in names))
    return [grid]
