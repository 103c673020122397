"""Accuracy against footprint, of `fmsim eval`."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from fmsim.units import GIB, MIB

SHARES = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]  # marked on the axis


def footprint_figure(report: dict[str, Any]) -> go.Figure:
    """Average score against bytes on the GPU, a line a policy, a point a length."""
    figure = go.Figure()
    for number, policy in enumerate(dict.fromkeys(row["policy"] for row in report["averages"])):
        rows = [row for row in report["averages"] if row["policy"] == policy]
        figure.add_scatter(
            x=[row["gpu_ratio"] for row in rows],
            y=[100 * row["score"] for row in rows],
            name=policy,
            mode="lines+markers+text",
            text=[f"{row['tokens'] // 1024}K" for row in rows],
            textposition="top center",
            marker={"size": 9},
            line={"color": f"hsl({number * 47 % 360}, 60%, 45%)", "dash": "dot"},
            customdata=[[row["gpu_bytes"] / GIB, row["h2d_bytes_per_step"] / MIB] for row in rows],
            hovertemplate=(
                "%{y:.1f} of 100 at %{x:.1%} of the full cache's, %{customdata[0]:.3f} GiB, PCIe"
                " %{customdata[1]:.2f} MiB a step"
            ),
        )
    figure.update_xaxes(
        type="log",
        tickvals=SHARES,
        ticktext=[f"{100 * share:.3g}%" for share in SHARES],
        title="bytes that a request takes on the GPU, of the full cache's",
    )
    figure.update_yaxes(range=[0, 105], title="score, mean over tasks")
    figure.update_layout(
        title=f"Accuracy against footprint: {report['about']['model']}", template="plotly_white"
    )
    return figure
