"""A plot as one HTML page that opens offline."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from fmsim.errors import FmsimError


def write_page(figure: go.Figure, path: Path) -> None:
    """The page with plotly in it, whole or not at all; FmsimError where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise FmsimError(
            f"{path}: the plot cannot be written ({error.strerror}); give another file"
        ) from None
