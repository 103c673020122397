"""The memory indexer's recall against the share of entries kept."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

TITLES = {"golden_recall": "golden entries recalled", "mass_recall": "attention mass kept"}
DASHES = {"lsa": "solid", "oracle": "dash"}


def recall_figure(found: dict[str, Any]) -> go.Figure:
    """Two panels of `fmsim.indexer.eval.evaluate`'s result, a line a ranking."""
    figure = make_subplots(cols=2, subplot_titles=list(TITLES.values()), shared_yaxes=True)
    for column, key in enumerate(TITLES, start=1):
        for number, (name, recalls) in enumerate(found[key].items()):
            line = {
                "color": f"hsl({number * 47 % 360}, 60%, 45%)",
                "dash": DASHES.get(name.split(" ")[0], "dot"),
            }
            figure.add_scatter(
                x=found["kept_shares"],
                y=recalls,
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line=line,
                row=1,
                col=column,
            )
    figure.update_xaxes(
        type="log",
        tickformat=".0%",
        title="share of visible entries kept",
        tickvals=found["kept_shares"],
    )
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    figure.update_layout(
        title=f"What a ranking keeps of the next window ({found['queries']} windows)",
        template="plotly_white",
    )
    return figure
