"""What a trace was recorded from, and how its attention is spread: `fmsim trace info`."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid


def parts(name: str, found: dict[str, Any]) -> list[Text | Grid]:
    """The header in words, then shares by layer."""
    head = Text.assemble((name, "bold"), f"  {found['bytes'] / 1e6:.1f} MB")
    about = [Text(f"{key:>16}  {value}") for key, value in found["about"].items()]
    names = list(found["layers"][0])
    ranked = [Field(_heading(one), rank) for rank, one in enumerate(names, 1)]
    grid = Grid([Field("layer", 0, "left"), *ranked])
    for number, row in enumerate(found["layers"]):
        grid.add(str(number), *("-" if one is None else f"{one:.1%}" for one in row.values()))
    return [head, *about, grid]


def _heading(name: str) -> str:
    """In two lines, about equally long."""
    words = name.split("_")
    half = (len(words) + 1) // 2
    return "\n".join(filter(None, (" ".join(words[:half]), " ".join(words[half:]))))
