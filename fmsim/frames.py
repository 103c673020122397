"""Rows as a table for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Row = dict[str, Any]


def frame(rows: Sequence[Row]) -> Any:
    """A pandas DataFrame of the rows where pandas is installed, else the rows themselves."""
    try:
        import pandas
    except ModuleNotFoundError:
        return list(rows)
    return pandas.DataFrame(rows)


def html_table(caption: str, headings: Mapping[str, str], rows: Sequence[Row]) -> str:
    """An HTML table: the columns of `headings`, by key, with what stands above each.

    Everything in it is escaped.
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in headings.values())
    lines = ["".join(f"<td>{escape(_text(row.get(key)))}</td>" for key in headings) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
