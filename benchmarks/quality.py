"""README's chart: attention mass kept against the GPU bytes of a request, and what then fits.

    python benchmarks/quality.py    # half a minute: writes the result file and the picture

The scenario is scenarios/500k.yaml with more budgets and fewer policies. Mass kept is replayed; the
number of requests follows from bytes and a preset's memory. `benchmarks/answers.py` runs it too.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from fmsim.files import write_text

ROOT = Path(__file__).parents[1]
FILE = "benchmarks/results/quality.json"
PICTURE = "docs/img/quality.svg"
SCENARIO = "scenarios/500k.yaml"
SHARES = (0.05, 0.08, 0.125, 0.18, 0.25, 0.4, 0.6)
LABELS = {  # by the scenario's label: (what the chart says, colour, dashes, marker)
    "lru": ("lru, loads what it misses", "#000000", "", "square"),
    "foresight": ("foresight", "#0072b2", "", "circle"),
    "lru held": ("lru held", "#d55e00", "7 3", "triangle"),
    "h2o": ("h2o", "#009e73", "2 3", "diamond"),
    "recency": ("newest tokens only", "#7a5195", "8 3 2 3", "cross"),
}
COUNTED = "lru held"  # whose requests the figures above the plot count

Result = Mapping[str, Any]


def measured() -> dict[str, Any]:
    """A row a policy and budget: bytes, mass kept with its error, requests that fit."""
    from fmsim.experiments.run import run_scenario
    from fmsim.scenario import ScenarioFile

    budgets = ", ".join(f"{100 * share:g}% gpu" for share in SHARES)
    file = ScenarioFile(str(ROOT / SCENARIO), [f"budgets=[{budgets}]"], ["full", *LABELS])
    report = run_scenario(file)
    about = report.scenario
    rows = [
        {
            "policy": about["runs"][run.label]["entry"],
            "budget": about["runs"][run.label]["budget"],
            "gpu_bytes": run.row["gpu_bytes"],
            "gpu_ratio": run.row["gpu_ratio"],
            "mass_kept": run.row["mass_kept"],
            "half_width": run.row["ci95"]["mass_kept"]["half_width"],
            "max_requests": run.row["max_requests"],
        }
        for run in report.runs
        if about["runs"][run.label]["entry"] in {"full", *LABELS}
    ]
    return {
        "command": "python benchmarks/quality.py",
        "scenario": SCENARIO,
        "model": about["model"]["name"],
        "hardware": about["hardware"]["title"],
        "n_gpus": about["hardware"]["deployment"]["n_gpus"],
        "prompt_tokens": about["trace"]["prompt_tokens"],
        "rows": rows,
    }


WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 176, 84, 56  # of the plot within the picture
LOW, HIGH = 0.045, 1.0  # shares on the axis, which is logarithmic
TICKS = (0.05, 0.08, 0.125, 0.25, 0.4, 0.6, 1.0)


def x_of(share: float) -> float:
    part = math.log(share / LOW) / math.log(HIGH / LOW)
    return LEFT + part * (WIDTH - LEFT - RIGHT)


def y_of(mass: float) -> float:
    return TOP + (1 - mass) * (HEIGHT - TOP - BOTTOM)


def picture(result: Result) -> str:
    """The chart as SVG: a line a policy, labelled at its end; above, the requests that fit."""
    rows = result["rows"]
    [full] = [row for row in rows if row["policy"] == "full"]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(title(result))}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 24, title(result), size=15, weight="bold"),
        text(
            LEFT,
            44,
            f"{result['model']} on {result['n_gpus']} x {result['hardware']},"
            f" {result['prompt_tokens']:,} tokens. Bold: requests that fit ({COUNTED}).",
        ),
        *axes(rows, full),
    ]
    ends: list[tuple[float, float, str, str]] = []
    for policy, (label, colour, dashes, marker) in LABELS.items():
        found = [row for row in rows if row["policy"] == policy]
        if not found:
            continue
        points = [(x_of(row["gpu_ratio"]), y_of(row["mass_kept"])) for row in found]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"'
            f' stroke-dasharray="{dashes}"/>'
        )
        lines += [shape(marker, x, y, colour) for x, y in points]
        ends.append((*points[-1], label, colour))
    lines.append(shape("star", x_of(1.0), y_of(1.0), "#000000"))
    ends.append((x_of(1.0), y_of(1.0), "full cache", "#000000"))
    lines += labels(ends)
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def title(result: Result) -> str:
    """What the chart shows, in a sentence: the best that a mask keeps at an eighth."""
    rows = result["rows"]
    [full] = [row for row in rows if row["policy"] == "full"]
    small = [row for row in rows if row["budget"] == "12.5% gpu"]
    best = max(small, key=lambda row: row["mass_kept"])
    times = best["max_requests"] / full["max_requests"]
    return (
        f"With 1/8 of the bytes: {times:.1f} x the requests,"
        f" {best['mass_kept']:.0%} of the attention ({best['policy']})"
    )


def axes(rows: list[dict[str, Any]], full: Mapping[str, Any]) -> list[str]:
    """Grid, ticks and their labels; above the plot the requests that fit."""
    end = WIDTH - RIGHT
    lines = []
    for mass in (0, 0.25, 0.5, 0.75, 1):
        y = y_of(mass)
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(text(LEFT - 8, y + 4, f"{mass:.0%}", anchor="end"))
    for share in TICKS:
        x = x_of(share)
        bottom = HEIGHT - BOTTOM
        lines.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#eeeeee"/>')
        lines.append(text(x, bottom + 18, f"{100 * share:g}%", anchor="middle"))
        counted = full if share == 1 else row_at(rows, COUNTED, share)
        if counted:
            most = f"{counted['max_requests']}"
            lines.append(text(x, TOP - 10, most, anchor="middle", weight="bold"))
    size = full["gpu_bytes"] / 2**30
    lines.append(
        text(
            (LEFT + end) / 2,
            HEIGHT - 14,
            f"GPU bytes of a request, share of the full cache's {size:.2f} GiB",
            anchor="middle",
        )
    )
    lines.append(
        f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)"'
        ' text-anchor="middle" fill="#222222">attention mass kept</text>'
    )
    return lines


def row_at(rows: list[dict[str, Any]], policy: str, share: float) -> dict[str, Any] | None:
    budget = f"{100 * share:g}% gpu"
    found = (row for row in rows if (row["policy"], row["budget"]) == (policy, budget))
    return next(found, None)


def labels(ends: list[tuple[float, float, str, str]]) -> list[str]:
    """Names right of the plot, at the height of their lines, apart from each other."""
    lines = []
    x = WIDTH - RIGHT + 12
    last = -math.inf
    for start, y, label, colour in sorted(ends, key=lambda end: (end[1], -end[0])):
        at = max(y, last + 16)
        last = at
        lines.append(
            f'<line x1="{start + 6:.1f}" y1="{y:.1f}" x2="{x - 4}" y2="{at:.1f}"'
            f' stroke="{colour}" stroke-width="0.7" stroke-dasharray="1 2"/>'
        )
        lines.append(text(x, at + 4, label, colour=colour))
    return lines


def text(
    x: float,
    y: float,
    said: str,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
    colour: str = "#222222",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
        f' font-weight="{weight}" fill="{colour}">{escape(said)}</text>'
    )


def shape(marker: str, x: float, y: float, colour: str) -> str:
    """A marker that is told from the others without its colour."""
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
    }
    if marker in corners:
        path = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners[marker])
        return f'<polygon points="{path}" fill="{colour}"/>'
    if marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    arms = [(5, 5), (5, -5)] + ([(7, 0), (0, 7)] if marker == "star" else [])
    return "".join(
        f'<line x1="{x - a:.1f}" y1="{y - b:.1f}" x2="{x + a:.1f}" y2="{y + b:.1f}"'
        f' stroke="{colour}" stroke-width="2"/>'
        for a, b in arms
    )


def main() -> None:
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = measured() | {"date": date}
    write_text(ROOT / FILE, json.dumps(result, indent=1) + "\n")
    write_text(ROOT / PICTURE, picture(result))


if __name__ == "__main__":
    main()
