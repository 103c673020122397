"""What stands below a table of one run about its estimates: how sure they are, and of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmsim.experiments.results.folder import by_budget

PLUS_MINUS = "±: half of a 95% interval, from a bootstrap over the trace's windows."


MOST_BY_LAYER = 6  # policies, those that keep most; the JSON has each layer's share of all


def half_width(row: Mapping[str, Any], figure: str) -> float | None:
    """Of a row's 95% interval; None where it is not known, as in a measured row."""
    found: float | None = row.get("ci95", {}).get(figure, {}).get("half_width")
    return found


def notes(report: dict[str, Any]) -> list[str]:
    """Lines on intervals, the steady state, the margin of the best lossy policy, and the layer map;
    from the report's JSON object.
    """
    about = report["scenario"]
    return [*_windows(about["trace"]), *_margin(report), *_layers(about)]


def _windows(trace: dict[str, Any]) -> list[str]:
    first, last = trace["steady_steps"]
    left_out = "no step is left out: the trace is shorter than three windows."
    if first:
        rest = trace["steps"] - last
        left_out = (
            f"left out are windows 0 and 1, which share one state, so nothing is recalled between"
            f" them{f', and the {rest} steps after the last whole window' if rest else ''}."
        )
    return [
        f"{PLUS_MINUS} There are {trace['windows']}, of {trace['window_steps']} steps; nothing is"
        " said of other traces: docs/leaderboard.md ranks policies on five of three kinds of text.",
        f"set overlap, PCIe, stall: of the steady state, steps {first} to {last - 1}; {left_out}",
    ]


def _margin(report: dict[str, Any]) -> list[str]:
    """How far the best of the lossy policies is ahead of the next, as a paired difference; at each
    of the scenario's budgets.
    """
    about = report["scenario"]
    groups = by_budget(about, [row["policy"] for row in report["policies"]])
    found = [(budget, _ahead(report, labels)) for budget, labels in groups.items()]
    return [
        f"most mass kept by a lossy policy{f' at {budget}' if budget else ''}: {text} (paired: the"
        " same windows of both)."
        for budget, text in found
        if text
    ]


def _ahead(report: dict[str, Any], labels: Sequence[str]) -> str:
    """Which of the lossy policies among `labels` keeps most, and by how much; or nothing."""
    about = report["scenario"]
    rivals = [
        row
        for row in report["policies"]
        if row["policy"] in labels
        and row["mass_kept"] is not None
        and not about["details"][row["policy"]]["exact"]
        and about["runs"][row["policy"]]["evidence"] != "future"
    ]
    rivals.sort(key=lambda row: row["mass_kept"], reverse=True)
    if len(rivals) < 2:
        return ""
    best, second = (row["policy"] for row in rivals[:2])
    for row in report.get("differences", []):
        if row["figure"] == "mass_kept" and {row["policy"], row["other"]} == {best, second}:
            spread = row["half_width"]
            sure = "" if spread is None else f" ±{100 * spread:.1f}"
            points = f"{100 * abs(row['difference']):.1f}{sure}"
            return f"{best}, {points} points more than {second}"
    return ""


def _layers(about: dict[str, Any]) -> list[str]:
    """What it does to the figures that few layers of a trace drive many of the model."""
    driven = about["layer_map"]
    layers = about["trace"]["csa_layers"]
    if len(driven) <= layers:
        return []
    lossy = [
        (label, details["mass_by_layer"])
        for label, details in about["details"].items()
        if not details["exact"] and None not in details["mass_by_layer"]
    ]
    lossy.sort(key=lambda pair: sum(pair[1]), reverse=True)
    shares = [
        f"{label} {' / '.join(f'{100 * share:.0f}' for share in by_layer)}%"
        for label, by_layer in lossy[:MOST_BY_LAYER]
    ]
    lines = [
        f"layer map: {layers} layers of the trace drive {len(driven)}, so layers count several"
        f" times, and a set that all layers share serves {layers} different ones; more would keep"
        " less."
    ]
    if shares and layers > 1:
        each = ", ".join(map(str, range(layers)))
        lines.append(f"mass kept if one layer drove all ({each}): {'; '.join(shares)}.")
    return lines
