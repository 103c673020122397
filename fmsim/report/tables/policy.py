"""A policy and its parameters: the table of `fmsim policy show`."""

from __future__ import annotations

import re
from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid

FIELDS = (
    Field("parameter", 0, "left"),
    Field("default", 1, "left", 10),
    Field("meaning", 0, "left", 24),
    Field("type", 2, "left", 12),
)


def parts(found: dict[str, Any]) -> list[Text | Grid]:
    """What it does, and its parameters."""
    grid = Grid(FIELDS)
    for row in found["parameters"]:
        grid.add(row["name"], row["default"], row["description"], row["type"])
    about = (
        f"action {found['action']}, evidence {found['evidence']}, decides per"
        f" {found['decision_scope']}\n"
    )
    head = Text.assemble((found["name"], "bold"), f"  {found['module']}")
    return [head, Text(about), Text(f"{_reflowed(found['doc'])}\n"), grid]


def _reflowed(doc: str) -> str:
    """Each paragraph in one line, to be wrapped as wide as the terminal is; lists and code stay."""
    paragraphs = doc.split("\n\n")
    plain = [not re.search(r"^(\s|[-*>|])", text, re.MULTILINE) for text in paragraphs]
    return "\n\n".join(
        " ".join(text.split()) if flows else text for text, flows in zip(paragraphs, plain)
    )
