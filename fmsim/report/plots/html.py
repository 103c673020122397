"""A plot as one HTML page that opens offline."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from fmsim.errors import FmsimError
from fmsim.files import write_text


def write_page(figure: go.Figure, path: Path) -> None:
    """The page with plotly in it, whole or not at all; FmsimError where it cannot be written."""
    try:
        write_text(path, figure.to_html(include_plotlyjs=True))
    except OSError as error:
        raise FmsimError(
            f"{path}: the plot cannot be written ({error.strerror}); give another file"
        ) from None
