"""The accuracy table from answers of benchmarks/accuracy.sh: where its figures ship, and how they
are shown.

    python benchmarks/accuracy.py results/* --command "OUT=results benchmarks/accuracy.sh tokens" \
        --device "1 x NVIDIA H200" --date "2026-11-29 02:15"

Answers of several folders are put together, if their plans are alike. It writes
benchmarks/results/accuracy.json, and what `fmsim run` shows as answers kept. Then
`python benchmarks/answers.py --update --tables` renders pages and pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import quality
import shares

from fmsim.experiments import measured_answers
from fmsim.experiments.accuracy import policy_of, summary
from fmsim.files import write_text
from fmsim.policies import registry
from fmsim.report.console import spread_text

ROOT = Path(__file__).parents[1]
FILE = "benchmarks/results/accuracy.json"
KEPT = "fmsim/experiments/accuracy/answers_kept.json"
PICTURE = "docs/img/answers.svg"
HELD = "cadence=64,on_miss=mask"
LABELS = {  # a spec without its budget: what tables and the chart say of it
    "full": "full",
    "recency": "recency",
    "h2o": "h2o",
    "snapkv": "snapkv",
    f"lru:{HELD},prompt_history=true": "lru held, seeded",
    "lsa": "lsa",
    "foresight": "foresight",
    "oracle": "oracle",
    "lru": "lru, exact",
    "lsa:on_miss=fallback": "lsa, fallback",
    "foresight:on_miss=fallback": "foresight, fallback",
    "native": "native",
}
CHARTED = {  # by label: colour, dashes, marker
    "foresight": ("#0072b2", "", "circle"),
    "lsa": ("#56b4e9", "6 3", "circle"),
    "lru held, seeded": ("#d55e00", "7 3", "triangle"),
    "h2o": ("#009e73", "2 3", "diamond"),
    "recency": ("#7a5195", "8 3 2 3", "cross"),
    "lru, exact": ("#000000", "", "square"),
}

Result = Mapping[str, Any]
Row = dict[str, Any]


def collected(folders: Sequence[Path]) -> tuple[Row, list[Row]]:
    """(what was asked of which model, answers) of answers.jsonl in `folders`."""
    heads, found = [], []
    for folder in folders:
        with (folder / "answers.jsonl").open() as lines:
            heads.append(json.loads(next(lines)))
            # a kill may cut the last
            found += [json.loads(line) for line in lines if line.endswith("\n")]
    if any(head != heads[0] for head in heads):
        raise SystemExit("the folders hold answers of several plans, models or texts")
    plan = heads[0]["plan"]
    return plan | {"geometry": plan["model"]} | heads[0]["about"], found


def shipped(about: Row, lines: Sequence[Row]) -> tuple[Row, Row]:
    """What accuracy.json holds, and what fmsim ships, from answers."""
    report = summary(lines)
    keep = ("averages", "answers_kept", "mass_as_guide", "refused", "paired", "signals")
    cells = [
        {key: cell[key] for key in ("tokens", "task", "policy", "samples", "score", "score_ci95")}
        for cell in report["cells"]
    ]
    result = {"about": about} | {key: report[key] for key in keep} | {"cells": cells}
    result["shares"] = shares.chosen(lines)
    rows = []
    for row in report["answers_kept"]:
        if row["kept"] is None:
            continue
        known = measured_answers.identity(
            policy_of(row["policy"], about["budget"], about["checkpoint"])
        )
        ships = ("tokens", "kept", "contexts", "questions", "full_score", "score", "gpu_bytes")
        rows.append(
            known
            | {key: row[key] for key in (*ships, "gpu_ratio", "mass_kept")}
            | {"half_width": 0.0 if row["policy"] == "full" else row["kept_ci95"]["half_width"]}
            | {"alike": row["kept_ci95"]["alike"]}
        )
    source = {
        "command": about["command"],
        "date": about["date"],
        "device": about["device"],
        "geometry": about["geometry"],
        "model": {"name": about["model"], "sha256": about["sha256"]},
        "families": about["tasks"],
    }
    return result, {"about": source, "rows": rows}


def named(spec: str) -> tuple[str, str]:
    """A policy as a report calls it: (label, budget); no budget for the full cache."""
    params = registry.split(spec)[1]
    budget = str(params.pop("budget", ""))
    given = spec.removesuffix(f"budget={budget}").rstrip(",:") if budget else spec
    return LABELS.get(given, given), budget


def lengths(result: Result) -> list[int]:
    return sorted({row["tokens"] for row in result["averages"]})


def tables(result: Result) -> str:
    """A table a length: what each policy answers at its budget, and what that takes."""
    return "\n\n".join(_of_length(result, tokens) for tokens in lengths(result))


def _of_length(result: Result, tokens: int) -> str:
    scores = {row["policy"]: row for row in result["averages"] if row["tokens"] == tokens}
    kept = {row["policy"]: row for row in result["answers_kept"] if row["tokens"] == tokens}
    contexts = max(row["contexts"] for row in kept.values())
    lines = [
        f"{tokens:,} tokens, at most {contexts} contexts:",
        "",
        "| policy | budget | contexts | GPU MiB | of full | requests fit | score | answers kept |"
        " mass kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(LABELS.values())
    known = sorted(scores, key=lambda spec: (_share(spec), order.index(named(spec)[0])))
    for spec in known:
        label, budget = named(spec)
        row, other = scores[spec], kept[spec]
        cells = [
            label,
            budget or "-",
            f"{other['contexts']}",
            f"{row['gpu_bytes'] / 2**20:.1f}",
            f"{row['gpu_ratio']:.1%}",
            f"{row['max_requests']:.0f}",
            _points(row["score"], row["score_ci95"]),
            _points(other["kept"], None if row["policy"] == "full" else other["kept_ci95"]),
            f"{row['mass_kept']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    cannot = sorted(
        " at ".join(named(row["policy"])) for row in result["refused"] if row["tokens"] == tokens
    )
    if cannot:
        told = f"Not to be had: {', '.join(cannot)}."
        lines += ["", textwrap.fill(told, 100, break_on_hyphens=False)]
    return "\n".join(lines)


def _share(spec: str) -> float:
    budget = named(spec)[1]
    return float(budget.partition("%")[0]) if budget else math.inf


def _points(value: float | None, interval: Row | None) -> str:
    """The full cache keeps its own answers for sure: no interval."""
    return "-" if value is None else f"{100 * value:.1f}{spread_text(interval)}"


def families(result: Result) -> str:
    """What the full cache answers of each family, a column a length."""
    found = {
        (cell["task"], cell["tokens"]): cell for cell in result["cells"] if cell["policy"] == "full"
    }
    known = lengths(result)
    lines = [
        f"| family | {' | '.join(f'{tokens:,}' for tokens in known)} |",
        f"|---|{'---|' * len(known)}",
    ]
    for task in dict.fromkeys(task for task, _ in found):
        cells = [
            _points(cell["score"], cell["score_ci95"])
            if (cell := found.get((task, tokens)))
            else "-"
            for tokens in known
        ]
        lines.append(f"| `{task}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def guide(result: Result) -> str:
    """How well the mass kept foretells the answers kept."""
    found = result["mass_as_guide"]
    rows = [("all lengths", found["all"])]
    rows += [(f"{int(tokens):,}", row) for tokens, row in found["by_length"].items()]
    lines = ["| tokens | points | rank correlation |", "|---|---|---|"]
    for label, row in rows:
        value = row["rank_correlation"]
        lines.append(f"| {label} | {row['points']} | {'-' if value is None else f'{value:.2f}'} |")
    return "\n".join(lines)


WIDTH, HEIGHT = quality.WIDTH, quality.HEIGHT
LEFT, RIGHT, TOP, BOTTOM = quality.LEFT, quality.RIGHT, quality.TOP, quality.BOTTOM
BELOW = "recency"  # it would press all others together: said in words
APART = 4.0  # points of the picture between policies at one budget, so that their bars are seen
OfScore = Callable[[float], float]


def picture(result: Result) -> str:
    """Score against bytes on the GPU at the longest length as SVG, with 95% intervals."""
    tokens = lengths(result)[-1]
    rows = [row for row in result["averages"] if row["tokens"] == tokens]
    [full] = [row for row in rows if row["policy"] == "full"]
    by_label: dict[str, list[Row]] = {label: [] for label in CHARTED}
    for row in sorted(rows, key=lambda row: float(row["gpu_ratio"])):
        by_label.get(named(row["policy"])[0], []).append(row)
    below = by_label.pop(BELOW)
    shown = [row for found in by_label.values() for row in found] + [full]
    least = math.floor(10 * min(row["score_ci95"]["low"] or row["score"] for row in shown)) / 10
    most = math.ceil(20 * max(row["score_ci95"]["high"] or row["score"] for row in shown)) / 20

    def y_of(score: float) -> float:
        return TOP + (most - score) / (most - least) * (HEIGHT - TOP - BOTTOM)

    asked = sorted({row["contexts"] for row in result["answers_kept"] if row["tokens"] == tokens})
    contexts = " to ".join(map(str, dict.fromkeys((asked[0], asked[-1]))))
    title = f"What is still answered after {tokens:,} tokens, at equal bytes on the GPU"
    about = result["about"]
    told = (
        f"{len(about['tasks'])} kinds of question about {contexts} contexts, asked of nano; bytes"
        f" are {about['geometry']}'s. Bars: 95% intervals."
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        quality.text(LEFT, 24, title, size=15, weight="bold"),
        quality.text(LEFT, 44, told),
        *_axes(full, y_of, least, most),
    ]
    if below:
        low, high = (100 * pick(row["score"] for row in below) for pick in (min, max))
        said = f"newest tokens only ({BELOW}): {low:.0f} to {high:.0f}, below this picture"
        lines.append(quality.text(LEFT + 8, HEIGHT - BOTTOM - 8, said, colour=CHARTED[BELOW][0]))
    ends = []
    for place, (label, found) in enumerate(by_label.items()):
        colour, dashes, marker = CHARTED[label]
        aside = APART * (place - (len(by_label) - 1) / 2)
        points = [(quality.x_of(row["gpu_ratio"]) + aside, y_of(row["score"])) for row in found]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"'
            f' stroke-dasharray="{dashes}"/>'
        )
        for row, (x, y) in zip(found, points, strict=True):
            lines.append(_bar(row, x, y_of, colour))
            lines.append(quality.shape(marker, x, y, colour))
        ends += [(*points[-1], label, colour)] if points else []
    x, y = quality.x_of(1.0), y_of(full["score"])
    lines.append(_bar(full, x, y_of, "#000000"))
    lines.append(quality.shape("star", x, y, "#000000"))
    ends.append((x, y, "full cache", "#000000"))
    return "\n".join([*lines, *quality.labels(ends), "</svg>"]) + "\n"


def _bar(row: Row, x: float, y_of: OfScore, colour: str) -> str:
    low, high = (row["score_ci95"][end] for end in ("low", "high"))
    if low is None:
        return ""
    return (
        f'<line x1="{x:.1f}" y1="{y_of(low):.1f}" x2="{x:.1f}"'
        f' y2="{y_of(high):.1f}" stroke="{colour}" stroke-width="1"/>'
    )


def _axes(full: Row, y_of: OfScore, least: float, most: float) -> list[str]:
    end, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    lines = []
    for score in range(round(100 * least), round(100 * most) + 1, 5):
        y = y_of(score / 100)
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(quality.text(LEFT - 8, y + 4, f"{score}", anchor="end"))
    for share in quality.TICKS:
        x = quality.x_of(share)
        lines.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#eeeeee"/>')
        lines.append(quality.text(x, bottom + 18, f"{100 * share:g}%", anchor="middle"))
    size = full["gpu_bytes"] / 2**30
    said = f"GPU bytes of a request, share of the full cache's {size:.2f} GiB"
    lines.append(quality.text((LEFT + end) / 2, HEIGHT - 14, said, anchor="middle"))
    lines.append(
        f'<text transform="translate(18 {(TOP + bottom) / 2:.0f}) rotate(-90)"'
        f' text-anchor="middle" fill="#222222">score of 100, from {100 * least:.0f} on</text>'
    )
    return lines


def write(folders: Sequence[Path], about: Row) -> None:
    head, lines = collected(folders)
    result, ships = shipped(head | about, lines)
    for path, content in ((FILE, result), (KEPT, ships)):
        write_text(ROOT / path, json.dumps(_rounded(content), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Floats with five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(one) for one in value]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="with answers.jsonl of fmsim eval")
    parser.add_argument("--command", required=True)
    parser.add_argument("--device", required=True, help='such as "1 x NVIDIA H200"')
    parser.add_argument("--date", required=True)
    args = parser.parse_args()
    about = {"command": args.command, "device": args.device, "date": args.date}
    write(args.folders, about)


if __name__ == "__main__":
    main()
