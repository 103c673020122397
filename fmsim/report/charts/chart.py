"""What a chart shows: points and curves over two axes, bars, or a grid of shaded cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fmsim.report.charts.scale import ChartAxis

Kind = Literal["disc", "diamond", "triangle", "square"]
Dash = Literal["solid", "dash", "dot", "dash dot"]


@dataclass(frozen=True)
class Series:
    """One policy's points, a curve through them, or both.

    `names` stand beside points; `name` at a curve's end. `tips` say of each point what a reader
    with a pointer, a keyboard or a screen reader is told.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    kind: Kind = "disc"
    dash: Dash = "solid"
    curve: bool = True
    points: bool = False
    radii: Sequence[float] = ()  # pixels
    names: Sequence[str] = ()
    tips: Sequence[str] = ()
    labelled: bool = True  # a curve's name at its end
    hollow: bool = False


@dataclass(frozen=True)
class Chart:
    """Points and curves. `says` is the chart in a sentence, for who cannot see it."""

    id: str
    title: str
    says: str
    x: ChartAxis
    y: ChartAxis
    series: Sequence[Series]
    height: int = 400


@dataclass(frozen=True)
class Part:
    """One stretch of a bar."""

    value: float
    color: int
    tip: str
    start: float | None = None  # where it begins; by default at the end of the one before


@dataclass(frozen=True)
class Bars:
    """Lying bars, a name and its stretches each; `text` stands behind a bar."""

    id: str
    title: str
    says: str
    x: ChartAxis
    names: Sequence[str]
    parts: Sequence[Sequence[Part]]
    texts: Sequence[str] = ()
    key: Sequence[tuple[str, int]] = ()  # what the colours are
    row: int = 26  # pixels
    labelled: bool = True


@dataclass(frozen=True)
class Heat:
    """Cells, a row a name and a column a heading, the darker the larger."""

    id: str
    title: str
    says: str
    names: Sequence[str]
    columns: Sequence[str]
    column_title: str
    values: Sequence[Sequence[float]]
    unit: str = ""
    texts: Sequence[Sequence[str]] = field(default=())


AnyChart = Chart | Bars | Heat
