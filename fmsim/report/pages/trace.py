"""The page of `fmsim trace stats`: how a trace's selections repeat."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmsim import __version__
from fmsim.report.charts.chart import AnyChart, Chart, Heat, Series
from fmsim.report.charts.scale import ChartAxis
from fmsim.report.pages.layout import Page, Section, Table
from fmsim.report.pages.marks import percent
from fmsim.report.tables import trace_stats as table

POLICIES = (("belady", 7, "triangle", "dot"), ("lru", 1, "disc", "solid"))


def page(found: Mapping[str, Any]) -> Page:
    """The page of what `fmsim trace stats` found."""
    every = found["all"]
    kept = 1 - every["misses"]["lru"]["2"]
    rows = table.rows(dict(found))
    return Page(
        name=Path(found["trace"]).name or "trace",
        question=(
            f"How often does {found['model']} select again what it selected before, after"
            f" {found['prompt_tokens']:,} tokens?"
        ),
        answer=(
            f"{every['step_overlap']:.0%} of a step's entries were selected by the step before;"
            f" lru with room for 2 x top-k holds {kept:.0%} of all that is selected, and no policy"
            f" that size more than {1 - every['misses']['belady']['2']:.0%}."
        ),
        chart=_hits(found),
        chart_text=(
            "Up is better, left is cheaper: the share of selections that a cache of 1, 2 and 4"
            " top-k holds. belady sees the future, so no policy does better."
        ),
        table=Table(
            ["layer", *(heading for heading, *_ in table.COLUMNS)],
            [("", [[label, *table.cells(row)] for label, row in rows])],
            [table.NOTES],
        ),
        facts={"trace": table.head(dict(found))},
        footer=f"Made by fmsim {__version__} from {Path(found['trace']).name}.",
        table_kind="counted",
        sections=[_layers(found)],
    )


def _hits(found: Mapping[str, Any]) -> AnyChart:
    series = []
    for name, color, kind, dash in POLICIES:
        misses = found["all"]["misses"][name]
        x = [int(multiple) for multiple in misses]
        y = [1 - value for value in misses.values()]
        tips = [f"{name}, {a} x top-k: {b:.1%} held" for a, b in zip(x, y)]
        series.append(Series(name, x, y, color, kind, dash, points=True, tips=tips))  # type: ignore[arg-type]
    return Chart(
        "hits",
        "Selections held against the size of the cache",
        f"of lru and belady, the mean of {len(found['layers'])} layers",
        ChartAxis("room on the GPU, in multiples of top-k (logarithmic)", log=True, at=(1, 2, 4)),
        ChartAxis("selections held", percent, high=1.0),
        series,
        height=340,
    )


def _layers(found: Mapping[str, Any]) -> Section:
    layers = found["layers"]
    names = ["step before", *(f"lru {n}x" for n in layers[0]["misses"]["lru"])]
    values = [[100 * row["step_overlap"] for row in layers]]
    for multiple in layers[0]["misses"]["lru"]:
        values.append([100 * (1 - row["misses"]["lru"][multiple]) for row in layers])
    heat = Heat(
        "layers",
        "Selections seen before, by layer, %",
        f"{len(layers)} layers",
        names,
        [str(row["layer"]) for row in layers],
        "layer",
        values,
        "%",
    )
    text = "Of each layer's selections: the share that the step before selected too, and what lru"
    return Section(
        "layers", "Layers", "By layer", "counted", f"{text} of 1, 2 and 4 top-k holds.", [heat]
    )
