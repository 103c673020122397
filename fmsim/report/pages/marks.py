"""How a policy is marked in every chart of a page, and the chart that leads each page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmsim.report.charts.chart import Chart, Dash, Kind, Series
from fmsim.report.charts.look import FULL_COLOR
from fmsim.report.charts.scale import ChartAxis
from fmsim.units import GIB

LEAST_RADIUS, MOST_RADIUS = 4.0, 10.0  # pixels
KINDS: Mapping[str, Kind] = {"exact": "disc", "lossy": "diamond", "bound": "triangle"}
DASHES: Mapping[str, Dash] = {"exact": "solid", "lossy": "dash", "bound": "dot"}


def percent(value: float) -> str:
    """0.125 is 12.5%, and 0.5 is 50%."""
    return f"{100 * value:.3g}%"


def short(value: float) -> str:
    """Three digits, or whole thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Mark:
    """One policy's colour, shape and line."""

    name: str
    color: int
    kind: Kind
    dash: Dash
    hollow: bool = False  # the second of one colour


class Marks:
    """A mark for each policy, the same in all charts of a page.

    `kinds` says of each name whether it is exact, lossy or a bound; `full` names what all is
    compared with.
    """

    def __init__(self, kinds: Mapping[str, str], full: Sequence[str] = ("full",)) -> None:
        colored = [name for name, kind in kinds.items() if name not in full and kind != "bound"]
        places = {name: number for number, name in enumerate(colored)}
        self._marks = {}
        for name, kind in kinds.items():
            place = places.get(name)
            again = place is not None and place >= FULL_COLOR
            color = FULL_COLOR if place is None else place % FULL_COLOR
            shape = "square" if name in full else KINDS[kind]
            dash = "dash dot" if again else DASHES[kind]
            self._marks[name] = Mark(name, color, shape, dash, again)

    def __getitem__(self, name: str) -> Mark:
        return self._marks[name]


@dataclass(frozen=True)
class Spot:
    """One policy at one size: what it keeps, the bytes it takes on the GPU, and how many requests
    fit: None where that is not known.
    """

    name: str
    gpu_bytes: float
    quality: float
    fits: int | None
    tip: str


def quality_against_bytes(
    spots: Sequence[Spot],
    marks: Marks,
    quality: str,
    per: str = "one request",
    joined: bool = True,
) -> Chart:
    """The chart that leads a page. Larger marks are of more requests that fit; points of one policy
    may be joined.
    """
    most = max((spot.fits or 0 for spot in spots), default=0)
    series = []
    for name in dict.fromkeys(spot.name for spot in spots):
        own = sorted((spot for spot in spots if spot.name == name), key=lambda one: one.gpu_bytes)
        mark = marks[name]
        names = [""] * (len(own) - 1) + [name]
        series.append(
            Series(
                name,
                [spot.gpu_bytes / GIB for spot in own],
                [spot.quality for spot in own],
                mark.color,
                mark.kind,
                mark.dash,
                curve=joined and len(own) > 1,
                points=True,
                radii=[_radius(spot.fits, most) for spot in own],
                names=names,
                tips=[spot.tip for spot in own],
                labelled=False,
                hollow=mark.hollow,
            )
        )
    best = max(spots, key=lambda spot: spot.quality) if spots else None
    says = "" if best is None else f"{len(spots)} points; the highest is {best.tip}"
    size = "; the larger a mark, the more requests fit" if most else ""
    return Chart(
        "quality",
        f"{quality[0].upper()}{quality[1:]} against GPU memory{size}",
        says,
        ChartAxis(f"all that {per} takes on the GPU, GiB (logarithmic)", short, log=True),
        ChartAxis(quality, percent, high=_top(spots)),
        series,
        height=350,
    )


def _top(spots: Sequence[Spot]) -> float | None:
    """A share ends a little above 1."""
    return 1.04 if spots and max(spot.quality for spot in spots) > 0.9 else None


def _radius(fits: int | None, most: int) -> float:
    if not most or fits is None:
        return 6.5
    return LEAST_RADIUS + (MOST_RADIUS - LEAST_RADIUS) * math.sqrt(fits / most)


def kind_of(row: Mapping[str, Any]) -> str:
    """Of a row that stands alone, as a sweep's: a bound is known by its name."""
    if str(row["policy"]).split(" ")[0].split(":")[0] in ("belady", "oracle"):
        return "bound"
    return "exact" if row.get("exact") else "lossy"
