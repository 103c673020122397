"""The page of `fmsim indexer eval`: what a ranking keeps of the next window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmsim import __version__
from fmsim.report.charts.chart import Chart, Series
from fmsim.report.charts.look import FULL_COLOR
from fmsim.report.charts.scale import ChartAxis
from fmsim.report.grid import Grid
from fmsim.report.pages.layout import Page, Section, Table
from fmsim.report.pages.marks import percent
from fmsim.report.tables import indexer as table


def page(found: Mapping[str, Any], name: str) -> Page:
    """The page of what `fmsim indexer eval` found."""
    shares = found["kept_shares"]
    place = min(range(len(shares)), key=lambda one: abs(shares[one] - 0.1))
    recall = {ranking: values[place] for ranking, values in found["golden_recall"].items()}
    rivals = {one: value for one, value in recall.items() if "oracle" not in one and value}
    best = max(rivals, key=lambda one: rivals[one], default="")
    grids = [part for part in table.parts(dict(found)) if isinstance(part, Grid)]
    cells = [[str(cell).strip() for cell in row] for row in grids[0].rows if row is not None]
    return Page(
        name=name,
        question="How much of what the next window needs does the memory indexer's ranking keep?",
        answer=(
            f"With {shares[place]:.0%} of the entries kept, {best} recalls {rivals[best]:.1%} of"
            f" the golden ones, in {found['queries']} windows."
            if best
            else f"{found['queries']} windows were ranked."
        ),
        chart=_chart(found, "golden_recall", "golden-recall"),
        chart_text="Up is better, left is cheaper. The oracle knows the window: a bound.",
        table=Table([one.heading for one in grids[0].fields], [("golden entries recalled", cells)]),
        facts={"windows": f"{found['queries']}", "state": f"{found['state_age']} windows old"},
        footer=f"Made by fmsim {__version__}.",
        table_kind="counted",
        sections=[
            Section(
                "mass",
                "Mass",
                "Attention mass kept",
                "counted",
                "The same by the attention mass on the entries that are kept.",
                [_chart(found, "mass_recall", "mass-recall")],
            )
        ],
    )


def _chart(found: Mapping[str, Any], key: str, id_: str) -> Chart:
    title = table.TITLES[key]
    series = []
    for number, (name, values) in enumerate(found[key].items()):
        known = [(x, y) for x, y in zip(found["kept_shares"], values) if y is not None]
        bound = name.startswith("oracle")
        series.append(
            Series(
                name,
                [x for x, _ in known],
                [y for _, y in known],
                FULL_COLOR if bound else number % FULL_COLOR,
                "triangle" if bound else "diamond",
                "dot" if bound else "solid",
                points=True,
            )
        )
    x = ChartAxis("share of visible entries kept (logarithmic)", percent, log=True)
    y = ChartAxis(title, percent, low=0, high=1.02)
    heading = f"{title[0].upper()}{title[1:]} against the share of entries kept"
    return Chart(id_, heading, f"{len(series)} rankings", x, y, series, height=420)
