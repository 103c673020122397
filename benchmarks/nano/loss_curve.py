"""Draw a training's losses from its log: ``python benchmarks/nano/loss_curve.py LOG.jsonl OUT.svg
--run "2026-11-28 18:03"``.

LOG holds the rows of `fmsim.nano.training.train`; rows of several runs are told apart by "run".
Text loss and answer loss over the tokens seen, a line between stages. Plain SVG, no library.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 320, 60, 60, 20, 45
COLOURS = {"text": "#1f77b4", "answer": "#d62728"}
LARGEST = {"text": 4.0, "answer": 1.5}  # of each axis; what lies above is cut off


def points(rows: list[dict], runs: list[str]) -> tuple[list[dict], list[float]]:
    """Losses with the tokens (millions) seen when each was logged, and where stages end."""
    found, ends, before = [], [], 0
    for run in runs:
        own = [row for row in rows if row.get("run") == run]
        for number in sorted({row["ended"] for row in own if "ended" in row}):
            ended = [row for row in own if row.get("ended") == number]
            logged = [row for row in own if row.get("stage") == number]
            total, steps = sum(row["tokens"] for row in ended), sum(row["steps"] for row in ended)
            for row in logged:
                seen = before + total * min(1.0, row["step"] / steps)
                found.append({"seen": seen / 1e6} | {name: row[name] for name in COLOURS})
            before += total
            ends.append(before / 1e6)
    return found, ends


def drawing(found: list[dict], ends: list[float], title: str) -> str:
    """The SVG's text."""
    last = max(ends)
    across = lambda seen: LEFT + (WIDTH - LEFT - RIGHT) * seen / last
    down = lambda name, value: (
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.0, value / LARGEST[name])
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for end in ends:
        x = across(end)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#ccc"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="end">{end:.0f}</text>'
        )
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">million tokens; lines: ends'
        " of stages</text>"
    )
    for name, x, anchor in (("text", LEFT - 8, "end"), ("answer", WIDTH - RIGHT + 8, "start")):
        colour = COLOURS[name]
        for step in range(5):
            value = LARGEST[name] * step / 4
            parts.append(
                f'<text x="{x}" y="{down(name, value) + 4:.1f}" text-anchor="{anchor}"'
                f' fill="{colour}">{value:.2f}</text>'
            )
        line = " ".join(f"{across(p['seen']):.1f},{down(name, p[name]):.1f}" for p in found)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        parts.append(
            f'<text x="{x}" y="{TOP - 6}" text-anchor="{anchor}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", nargs="+", required=True, help="of the log's rows, in order")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.log.read_text().splitlines()]
    found, ends = points(rows, args.run)
    args.out.write_text(drawing(found, ends, f"Losses of nano's training, {', '.join(args.run)}"))


if __name__ == "__main__":
    main()
