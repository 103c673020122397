"""Charts as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fmsim.report.charts.chart import AnyChart, Bars, Chart, Heat, Series
from fmsim.report.charts.labels import Box, Point, placed, spread, text_width
from fmsim.report.charts.look import CSS, DASHES, shape
from fmsim.report.charts.scale import Scale, scale

WIDE, NARROW = 800, 400  # pixels across: on a screen, and on a phone
FONT = 12
MOST_POINTS = 320  # of a curve; of more, means of neighbours


def svg(chart: AnyChart, width: int = WIDE, alone: bool = False) -> str:
    """A chart, `width` pixels across; `alone` as a file of its own."""
    if isinstance(chart, Chart):
        body, height = _xy(chart, width)
    elif isinstance(chart, Bars):
        body, height = _bars(chart, width)
    else:
        body, height = _heat(chart, width)
    style = f"<style>{CSS}</style>" if alone else ""
    size = f' width="{width}" height="{height}"' if alone else ""
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f'{size} role="group" aria-label="{escape(chart.title)}: {escape(chart.says)}">{style}'
        f'<rect class="paper" width="{width}" height="{height}"/>{body}</svg>'
    )


def _xy(chart: Chart, width: int) -> tuple[str, int]:
    narrow = width < 600
    font = FONT
    height = round(chart.height * (0.95 if narrow else 1))
    ends = [one.name for one in chart.series if one.curve and one.labelled and len(one.x)]
    right = 16.0
    if ends:
        right = min(max(text_width(name, font) for name in ends) + 22, width * 0.42)
    y_values = [value for one in chart.series for value in one.y]
    x_values = [value for one in chart.series for value in one.x]
    top, bottom = 30, height - (62 if narrow else 50)
    y = scale(chart.y, y_values, bottom, top)
    y_marks = y.marks(7)
    left = max([text_width(chart.y.text(mark), font) for mark in y_marks], default=20) + 14
    x = scale(chart.x, x_values, left, width - right)
    inside = Box(left, top - 8, width - 2, bottom)
    parts = [_frame(chart, x, y, y_marks, left, width - right, bottom, narrow)]
    parts += [_curve(one, x, y) for one in chart.series if one.curve and len(one.x)]
    names, taken = _end_names(chart, x, y, font, top, bottom)
    parts += [names, _points(chart.series, x, y, font, inside, taken)]
    return "".join(parts), height


def _frame(
    chart: Chart,
    x: Scale,
    y: Scale,
    y_marks: Sequence[float],
    left: float,
    right: float,
    bottom: float,
    narrow: bool,
) -> str:
    found = [f'<text x="2" y="14">{escape(chart.y.title)}</text>']
    for mark in y_marks:
        at = y(mark)
        found.append(
            f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">'
            f"{escape(chart.y.text(mark))}</text>"
        )
    last = -math.inf
    for mark in x.marks(5 if narrow else 10):
        at, text = x(mark), chart.x.text(mark)
        half = text_width(text, FONT) / 2
        found.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}"'
            f' y2="{bottom + 5:.1f}"/>'
        )
        if at - half > last + 6:
            last = at + half
            found.append(
                f'<text x="{at:.1f}" y="{bottom + 19:.1f}" text-anchor="middle">'
                f"{escape(text)}</text>"
            )
    for number, line in enumerate(_wrapped(chart.x.title, right - left)):
        found.append(
            f'<text x="{(left + right) / 2:.1f}" y="{bottom + 37 + 13 * number:.1f}"'
            f' text-anchor="middle">{escape(line)}</text>'
        )
    return "".join(found)


def _wrapped(text: str, width: float) -> list[str]:
    """In lines that fit, at most two."""
    if text_width(text, FONT) <= width * 1.1:
        return [text]
    words = text.split()
    first = ""
    while words and text_width(f"{first} {words[0]}", FONT) <= width * 1.1:
        first = f"{first} {words.pop(0)}".strip()
    return [line for line in (first, " ".join(words)) if line][:2]


def _curve(one: Series, x: Scale, y: Scale) -> str:
    values = _thinned(list(zip(one.x, one.y)))
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in values)
    dash = f' stroke-dasharray="{DASHES[one.dash]}"' if DASHES[one.dash] else ""
    first, last = one.y[0], one.y[-1]
    tip = f"{one.name}: {y.axis.text(first)} at {x.axis.text(one.x[0])}, "
    tip += f"{y.axis.text(last)} at {x.axis.text(one.x[-1])}"
    return (
        f'<g class="item s{one.color}" tabindex="0" role="img" aria-label="{escape(tip)}">'
        f'<polyline class="curve" points="{path}"{dash}/></g>'
    )


def _thinned(values: list[tuple[float, float]]) -> list[tuple[float, float]]:
    each = math.ceil(len(values) / MOST_POINTS)
    if each <= 1:
        return values
    groups = [values[first : first + each] for first in range(0, len(values), each)]
    return [(sum(a for a, _ in g) / len(g), sum(b for _, b in g) / len(g)) for g in groups]


def _end_names(
    chart: Chart, x: Scale, y: Scale, font: int, top: float, bottom: float
) -> tuple[str, list[Box]]:
    """Each curve's name at its right end, spread where several end at one height; and where they
    stand.
    """
    named = [one for one in chart.series if one.curve and one.labelled and len(one.x)]
    heights = spread([y(one.y[-1]) for one in named], 1.2 * font, top, bottom)
    found, boxes = [], []
    for one, at in zip(named, heights):
        width = text_width(one.name, font)
        boxes.append(Box(x.end + 6, at - 0.6 * font, x.end + 12 + width, at + 0.6 * font))
        end_x, end_y = x(one.x[-1]), y(one.y[-1])
        found.append(
            f'<g class="s{one.color}"><line class="lead" x1="{end_x + 2:.1f}" y1="{end_y:.1f}"'
            f' x2="{x.end + 9:.1f}" y2="{at:.1f}"/><text class="name" x="{x.end + 12:.1f}"'
            f' y="{at + 4:.1f}">{escape(one.name)}</text></g>'
        )
    return "".join(found), boxes


def _points(
    series: Sequence[Series], x: Scale, y: Scale, font: int, inside: Box, taken: Sequence[Box]
) -> str:
    spots: list[tuple[Series, Point, str]] = []
    for one in series:
        if not (one.points or one.radii or one.names):
            continue
        for number, (a, b) in enumerate(zip(one.x, one.y)):
            radius = one.radii[number] if one.radii else 4.0
            name = one.names[number] if one.names else ""
            tip = one.tips[number] if one.tips else f"{one.name}: {y.axis.text(b)}"
            spots.append((one, Point(x(a), y(b), radius, name), tip))
    named = [spot for spot in spots if spot[1].text]
    labels = placed([point for _, point, _ in named], font, inside, taken)
    found = []
    for (one, point, _), label in zip(named, labels):
        if label is None:
            continue
        lead = (
            f'<line class="lead" x1="{point.x:.1f}" y1="{point.y:.1f}" x2="{label.x:.1f}"'
            f' y2="{label.y:.1f}"/>'
            if label.leads
            else ""
        )
        found.append(
            f'<g class="s{one.color}">{lead}<text class="name" x="{label.x:.1f}"'
            f' y="{label.y + 4:.1f}" text-anchor="{label.anchor}">{escape(point.text)}</text></g>'
        )
    for one, point, tip in sorted(spots, key=lambda spot: -spot[1].radius):
        look = "hollow" if one.hollow else "mark"
        mark = shape(one.kind, point.x, point.y, point.radius, look)
        found.append(
            f'<g class="item s{one.color}" tabindex="0" role="img" aria-label="{escape(tip)}">'
            f"{mark}</g>"
        )
    return "".join(found)


def _bars(chart: Bars, width: int) -> tuple[str, int]:
    narrow = width < 600
    key = 24 if chart.key else 4
    left = 8.0
    if chart.labelled:
        longest = max((text_width(name, FONT) for name in chart.names), default=40)
        left = min(longest, width * 0.44) + 10
    behind = max((text_width(text, FONT) for text in chart.texts), default=0)
    right = width - behind - 14
    top, bottom = key, key + chart.row * len(chart.names)
    x = scale(chart.x, [0.0, *_ends(chart)], left, right)
    x = Scale(chart.x, 0.0, x.high, left, right)
    found = [_key(chart, left if not narrow else 2)]
    for mark in x.marks(4 if narrow else 8):
        at = x(mark)
        found.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom + 4}"/>'
            f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{escape(chart.x.text(mark))}</text>"
        )
    thick = chart.row * 0.62
    for row, (name, parts) in enumerate(zip(chart.names, chart.parts)):
        middle = top + chart.row * (row + 0.5)
        if chart.labelled:
            found.append(
                f'<text class="axis" x="{left - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">'
                f"{escape(_cut(name, left - 8))}</text>"
            )
        end = 0.0
        for part in parts:
            start = end if part.start is None else part.start
            end = start + part.value
            length = max(x(end) - x(start), 0.6)
            found.append(
                f'<g class="item s{part.color}" tabindex="0" role="img"'
                f' aria-label="{escape(part.tip)}"><rect class="bar" x="{x(start):.1f}"'
                f' y="{middle - thick / 2:.1f}" width="{length:.1f}" height="{thick:.1f}"/></g>'
            )
        if chart.texts:
            found.append(
                f'<text x="{x(end) + 6:.1f}" y="{middle + 4:.1f}">{escape(chart.texts[row])}</text>'
            )
    found.append(
        f'<text x="{(left + right) / 2:.1f}" y="{bottom + 38}" text-anchor="middle">'
        f"{escape(chart.x.title)}</text>"
    )
    return "".join(found), bottom + 48


def _ends(chart: Bars) -> list[float]:
    found = []
    for parts in chart.parts:
        end = 0.0
        for part in parts:
            end = (end if part.start is None else part.start) + part.value
        found.append(end)
    return found


def _cut(text: str, width: float) -> str:
    most = max(3, int(width / (0.53 * FONT)))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _key(chart: Bars, left: float) -> str:
    found, at = [], left
    for name, color in chart.key:
        found.append(
            f'<g class="s{color}"><rect class="bar" x="{at:.1f}" y="3" width="12" height="12"/>'
            f'</g><text x="{at + 16:.1f}" y="13">{escape(name)}</text>'
        )
        at += text_width(name, FONT) + 34
    return "".join(found)


def _heat(chart: Heat, width: int) -> tuple[str, int]:
    longest = max((text_width(name, FONT) for name in chart.names), default=40)
    left = min(longest, width * 0.44) + 10
    columns, row, top = max(1, len(chart.columns)), 30, 6
    cell = (width - left - 6) / columns
    most = max((value for values in chart.values for value in values), default=0.0) or 1.0
    found = []
    for number, (name, values) in enumerate(zip(chart.names, chart.values)):
        middle = top + row * (number + 0.5)
        found.append(
            f'<text class="axis" x="{left - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">'
            f"{escape(_cut(name, left - 8))}</text>"
        )
        for column, value in enumerate(values):
            share = max(0.0, value / most)
            x = left + cell * column
            text = f"{value:.1f}"
            tip = f"{name}, {chart.column_title} {chart.columns[column]}: {text} {chart.unit}"
            shown = text if text_width(text, FONT) < cell - 4 else ""
            dark = "dark" if share > 0.55 else "axis"
            found.append(
                f'<g class="item" tabindex="0" role="img" aria-label="{escape(tip.strip())}">'
                f'<rect class="cell" x="{x:.1f}" y="{middle - row / 2:.1f}" width="{cell:.1f}"'
                f' height="{row}" style="fill: rgba(var(--heat), {0.06 + 0.94 * share:.2f})"/>'
                f'<text class="{dark}" x="{x + cell / 2:.1f}" y="{middle + 4:.1f}"'
                f' text-anchor="middle">{shown}</text></g>'
            )
    bottom = top + row * len(chart.names)
    every = max(1, math.ceil(columns * 22 / max(1, width - left)))
    for column in range(0, columns, every):
        found.append(
            f'<text x="{left + cell * (column + 0.5):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{escape(str(chart.columns[column]))}</text>"
        )
    found.append(
        f'<text x="{left + cell * columns / 2:.1f}" y="{bottom + 34}" text-anchor="middle">'
        f"{escape(chart.column_title)}</text>"
    )
    return "".join(found), bottom + 44
