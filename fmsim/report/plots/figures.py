"""The page's figures, in plotly: each from a run's results, or from its curves."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fmsim.experiments.results import Results
from fmsim.units import GIB

BOUNDS = ("belady", "oracle")  # they see the future
PALETTE = (
    "#3b6fd4",
    "#d8572a",
    "#2a9d8f",
    "#8e5ea2",
    "#c9a227",
    "#c2487a",
    "#5f8d4e",
    "#1f9ac2",
    "#8c6d46",
)
FULL_COLOR, BOUND_COLORS = "#8a94a6", {"belady": "#1f2937", "oracle": "#556377"}
SEQUENCE = (
    "#bcd0f2",
    "#7ea6e6",
    "#3b6fd4",
    "#1c3f85",
)  # pages of 1, 4, 16, 64 entries: the darker, the larger
HEAT = [[0, "#f4f7fc"], [0.25, "#bcd0f2"], [0.6, "#5d8bdc"], [1, "#1c3f85"]]
COMPUTE_COLOR, MISS_COLOR, RECALL_COLOR = "#9db8e8", "#d8572a", "#c9a227"
AROUND = ("top center", "bottom center", "middle right", "middle left")
SMOOTH_STEPS = 16
FONT = "Inter, 'Segoe UI', system-ui, -apple-system, 'Helvetica Neue', Arial, sans-serif"


class Style:
    """One colour a policy, the same in all figures; bounds are dotted, lossy policies dashed."""

    def __init__(self, results: Results) -> None:
        self.results = results
        free = iter(PALETTE * (1 + len(results.rows) // len(PALETTE)))
        self.colors = {
            label: self._fixed(ledger.policy) or next(free)
            for label, ledger in results.ledgers.items()
        }

    def _fixed(self, policy: str) -> str | None:
        return FULL_COLOR if policy == "full" else BOUND_COLORS.get(policy)

    def is_bound(self, label: str) -> bool:
        return self.results.ledgers[label].policy in BOUNDS

    def line(self, label: str, width: float = 2) -> dict[str, Any]:
        dash = "dot" if self.is_bound(label) else "solid" if self.results.exact(label) else "dash"
        return {"color": self.colors[label], "width": width, "dash": dash}

    def marker(self, label: str, size: int = 9) -> dict[str, Any]:
        return {
            "color": self.colors[label],
            "size": size,
            "symbol": "circle" if self.results.exact(label) else "diamond",
        }


def trade_off(results: Results, style: Style) -> go.Figure:
    """Accuracy where the rows have it, else attention mass kept, or hits where the trace has no
    masses, against the footprint of one request.
    """
    if all("accuracy" in row for row in results.rows):
        title = "accuracy"
        scores = [row["accuracy"] for row in results.rows]
    elif all(row["mass_kept"] is not None for row in results.rows):
        title = "attention mass kept"
        scores = [row["mass_kept"] for row in results.rows]
    else:
        title = "selected entries resident"
        scores = [row["hit_rate"] for row in results.rows]
    figure = go.Figure()
    taken: dict[tuple[float, float], int] = {}  # labels at about the same place go around it
    for row, score in zip(results.rows, scores, strict=True):
        label, exact = row["policy"], results.exact(row["policy"])
        place = (round(np.log10(row["gpu_bytes"]), 1), round(score, 1))
        taken[place] = taken.get(place, -1) + 1
        figure.add_scatter(
            x=[row["gpu_bytes"] / GIB],
            y=[score],
            mode="markers+text",
            text=[label],
            name=label,
            textposition=AROUND[taken[place] % len(AROUND)],
            marker=style.marker(label, 14) | {"line": {"color": "white", "width": 1.5}},
            textfont={"color": style.colors[label], "size": 13},
            customdata=[
                [
                    row["gpu_ratio"],
                    row["decode_tokens_per_s"],
                    row["stall_ratio"],
                    "exact" if exact else "lossy",
                ]
            ],
            hovertemplate=(
                f"<b>%{{text}}</b>, %{{customdata[3]}}<br>{title} %{{y:.1%}}<br>%{{x:.3f}} GiB,"
                " %{customdata[0]:.1%} of full<br>%{customdata[1]:.1f} tokens/s*, stalled"
                " %{customdata[2]:.1%}*<extra></extra>"
            ),
        )
    figure.update_xaxes(
        title="all that one request takes on the GPU, GiB (logarithmic)",
        **_log([row["gpu_bytes"] / GIB for row in results.rows]),
    )
    figure.update_yaxes(title=title, tickformat=".0%")
    return _finish(figure, 470, legend=False)


def over_time(results: Results, style: Style) -> go.Figure:
    """What is kept by step, in the paper's accounting, and the share of selected entries that were
    resident when their step began.
    """
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for label, ledger in results.ledgers.items():
        steps = np.arange(ledger.n_steps)
        shown = {
            "x": steps,
            "name": label,
            "legendgroup": label,
            "line": style.line(label),
            "mode": "lines",
        }
        gib = results.timelines[label].kv_bytes / GIB
        figure.add_scatter(
            **shown, y=gib, hovertemplate=f"{label}: %{{y:.4f}} GiB<extra></extra>", row=1, col=1
        )
        rate = _smooth(ledger.hit.sum(axis=1)) / np.maximum(
            _smooth(ledger.accessed.sum(axis=1)), 1e-9
        )
        figure.add_scatter(
            **shown,
            y=rate,
            showlegend=False,
            hovertemplate=f"{label}: %{{y:.1%}}<extra></extra>",
            row=2,
            col=1,
        )
    every = np.concatenate([timeline.kv_bytes for timeline in results.timelines.values()]) / GIB
    figure.update_yaxes(title="KV kept, GiB", **_log([every.min(), every.max()]), row=1, col=1)
    figure.update_yaxes(
        title=f"resident when needed<br>(mean of {SMOOTH_STEPS} steps)",
        tickformat=".0%",
        row=2,
        col=1,
    )
    figure.update_xaxes(title="decode step", row=2, col=1)
    figure.update_layout(hovermode="x unified")
    return _finish(figure, 620)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the last SMOOTH_STEPS values, or over what there is."""
    total = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - SMOOTH_STEPS, 0)
    return (total[end] - total[start]) / (end - start)


def misses_over_budget(results: Results, style: Style, curves: dict[str, Any]) -> go.Figure:
    """LRU at every budget, belady below it; darker for larger pages; and where the run's own exact
    policies stand.
    """
    figure = go.Figure()
    for color, (granularity, lru) in zip(SEQUENCE, curves["misses"]["lru"].items()):
        belady = curves["misses"]["belady"][granularity]
        page = "single entries" if granularity == "1" else f"pages of {granularity}"
        for name, curve, dash, mode in (
            ("lru", lru, "solid", "lines"),
            ("belady", belady, "dot", "lines+markers"),
        ):
            figure.add_scatter(
                x=_share(curve["x"], curves),
                y=curve["y"],
                name=f"{name}, {page}",
                mode=mode,
                marker={"size": 5},
                line={"color": color, "width": 2.2, "dash": dash},
                legendgroup=granularity,
                hovertemplate=f"{name}, {page}: %{{y:.1%}} missed at %{{x:.1%}}<extra></extra>",
            )
    for label, ledger in results.ledgers.items():
        if ledger.on_miss == "fetch" and ledger.policy != "full":
            missed = 1 - ledger.hit.sum() / max(1, ledger.accessed.sum())
            _own_point(figure, style, label, _share([ledger.budget_entries], curves), missed)
    _budget_axis(figure)
    figure.update_yaxes(title="selected entries missed", tickformat=".0%", rangemode="tozero")
    return _finish(figure, 520)


def lost_mass_over_budget(results: Results, style: Style, curves: dict[str, Any]) -> go.Figure:
    """Each lossy policy, replayed at several budgets; the larger marker is the run's own."""
    figure = go.Figure()
    for label, curve in curves["lost_mass"].items():
        figure.add_scatter(
            x=_share(curve["x"], curves),
            y=curve["y"],
            name=label,
            mode="lines+markers",
            marker=style.marker(label, 6),
            line=style.line(label),
            hovertemplate=f"{label}: %{{y:.1%}} lost at %{{x:.1%}}<extra></extra>",
        )
        ledger = results.ledgers[label]
        row = next(row for row in results.rows if row["policy"] == label)
        _own_point(
            figure,
            style,
            label,
            _share([ledger.budget_entries], curves),
            1 - row["mass_kept"],
        )
    _budget_axis(figure)
    figure.update_yaxes(title="attention mass lost", tickformat=".0%", rangemode="tozero")
    return _finish(figure, 470)


def over_granularity(results: Results, style: Style, curves: dict[str, Any]) -> go.Figure:
    """Each policy at its own budget, with other page sizes."""
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=(
            "selected entries missed (fetched, so stalls)",
            "attention mass lost (masked)",
        ),
    )
    for label, curve in curves["granularity"].items():
        fetches = results.ledgers[label].on_miss == "fetch"
        figure.add_scatter(
            x=[str(int(x)) for x in curve["x"]],
            y=curve["y"],
            name=label,
            mode="lines+markers",
            marker=style.marker(label, 8),
            line=style.line(label),
            hovertemplate=f"{label}, pages of %{{x}}: %{{y:.1%}}<extra></extra>",
            row=1,
            col=1 if fetches else 2,
        )
    figure.update_xaxes(title="entries in a page", type="category")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return _finish(figure, 430)


def regret(results: Results, style: Style, curves: dict[str, Any]) -> go.Figure:
    """Own figure less the bound's, by trace layer, in percentage points: misses above, lost mass
    below.
    """
    kinds = {
        kind: {
            k: v for k, v in curves["regret"].items() if v["kind"] == kind and not style.is_bound(k)
        }
        for kind in ("misses", "lost_mass")
    }
    kinds = {kind: found for kind, found in kinds.items() if found}
    titles = {
        "misses": "entries missed, above belady's",
        "lost_mass": "attention mass lost, above the oracle's",
    }
    figure = make_subplots(
        rows=max(1, len(kinds)),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.16,
        subplot_titles=[titles[kind] for kind in kinds],
        row_heights=[len(found) for found in kinds.values()] or None,
    )
    for place, (_kind, found) in enumerate(kinds.items(), 1):
        points = np.array([np.subtract(one["own"], one["bound"]) for one in found.values()]) * 100
        figure.add_heatmap(
            z=points,
            x=[str(layer) for layer in range(points.shape[1])],
            y=list(found),
            xgap=2,
            ygap=2,
            colorscale=HEAT,
            zmin=0,
            zmax=max(points.max(), 1e-9),
            showscale=False,
            text=points.round(1),
            texttemplate="%{text:.1f}" if points.shape[1] <= 32 else None,
            hovertemplate="%{y}, layer %{x}: %{z:.2f} points<extra></extra>",
            row=place,
            col=1,
        )
    figure.update_xaxes(title="CSA layer of the trace", row=len(kinds), col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return _finish(figure, 190 + 42 * sum(map(len, kinds.values())), legend=False)


def what_bound(results: Results, style: Style) -> go.Figure:
    """Where the time of a mean step went, and how many requests fit."""
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.6, 0.4],
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=("mean decode step, ms", "requests that fit one GPU"),
    )
    labels = list(results.ledgers)
    times = [results.timelines[label] for label in labels]
    stall, late = (
        np.array([getattr(time, name).mean() for time in times]) * 1e3
        for name in ("stall_s", "recall_wait_s")
    )
    compute = np.array([time.step_s.mean() for time in times]) * 1e3 - stall - late
    for name, value, color in (
        ("compute", compute, COMPUTE_COLOR),
        ("misses", stall, MISS_COLOR),
        ("late recall", late, RECALL_COLOR),
    ):
        figure.add_bar(
            y=labels,
            x=value,
            orientation="h",
            name=name,
            marker_color=color,
            hovertemplate=f"%{{y}}: {name} %{{x:.3f}} ms<extra></extra>",
            row=1,
            col=1,
        )
    bound = [results.about["details"][label]["max_requests_bound"] for label in labels]
    fits = [row["max_requests"] for row in results.rows]
    figure.add_bar(
        y=labels,
        x=fits,
        orientation="h",
        showlegend=False,
        marker_color="#c7d0de",
        text=[f"{n:,} · {b}" for n, b in zip(fits, bound)],
        textposition="auto",
        hovertemplate="%{y}: %{text} binds<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_layout(barmode="stack", bargap=0.3)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return _finish(figure, 150 + 34 * len(labels))


def _share(entries: list[float], curves: dict[str, Any]) -> list[float]:
    return [n / curves["prompt_entries"] for n in entries]


def _own_point(figure: go.Figure, style: Style, label: str, x: list[float], y: float) -> None:
    figure.add_scatter(
        x=x,
        y=[y],
        mode="markers+text",
        text=[label],
        textposition="top right",
        name=f"{label}, this run",
        showlegend=False,
        marker=style.marker(label, 12) | {"line": {"color": "white", "width": 1.5}},
        textfont={"color": style.colors[label]},
        hovertemplate=f"{label}, this run: %{{y:.1%}} at %{{x:.1%}}<extra></extra>",
    )


def _budget_axis(figure: go.Figure) -> None:
    ticks = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    text = [f"{tick:.1%}" if tick < 0.01 else f"{tick:.0%}" for tick in ticks]
    figure.update_xaxes(
        title="budget, share of the prompt's entries (logarithmic)",
        type="log",
        tickvals=ticks,
        ticktext=text,
    )


def _log(values: list[float]) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5 of each decade, and a margin around `values`."""
    low, high = np.log10(max(min(values), 1e-9)), np.log10(max(values))
    ticks = [
        digit * 10.0**decade
        for decade in range(int(np.floor(low)) - 1, int(np.ceil(high)) + 1)
        for digit in (1, 2, 5)
    ]
    return {
        "type": "log",
        "range": [low - 0.15, high + 0.15],
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def _finish(figure: go.Figure, height: int, legend: bool = True) -> go.Figure:
    """The look that all figures share."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        showlegend=legend,
        font={"family": FONT, "size": 13, "color": "#27303f"},
        margin={"l": 70, "r": 24, "t": 34, "b": 56},
        hoverlabel={"font": {"family": FONT}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "v", "x": 1.01, "y": 1},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#c3ccd9", "activecolor": "#3b6fd4"},
    )
    figure.update_xaxes(gridcolor="#e8ecf2", linecolor="#c7d0de", zeroline=False)
    figure.update_yaxes(gridcolor="#e8ecf2", linecolor="#c7d0de", zeroline=False)
    return figure
