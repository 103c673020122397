"""What every page has: the question, its answer in a sentence, one chart, the table; then the
rest. One file that needs no other, and no network.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template

from fmsim.report.charts.chart import AnyChart
from fmsim.report.charts.draw import NARROW, WIDE, svg
from fmsim.report.charts.look import CSS

KINDS = {
    "": "",
    "counted": "counted in the replay",
    "simulated": "simulated, not measured",
    "measured": "measured",
}


@dataclass(frozen=True)
class Table:
    """Rows of texts. `groups` are headings with the rows below each. What stands in `bold`, as
    (group, row in it, column), is the best.
    """

    headings: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]]
    notes: Sequence[str] = ()
    kind_at: int | None = None  # the column that says exact, lossy or bound
    bold: frozenset[tuple[int, int, int]] = frozenset()


@dataclass(frozen=True)
class Section:
    """One further chart or several, and what to see in them."""

    id: str
    short: str
    title: str
    kind: str
    text: str
    charts: Sequence[AnyChart] = ()
    missing: str = ""  # why there is none


@dataclass(frozen=True)
class Page:
    """All of a page."""

    name: str
    question: str
    answer: str
    chart: AnyChart
    chart_text: str
    table: Table
    facts: Mapping[str, str]
    footer: str
    table_kind: str = ""
    sections: Sequence[Section] = field(default=())

    @property
    def charts(self) -> list[AnyChart]:
        return [self.chart, *(chart for section in self.sections for chart in section.charts)]


def render(page: Page) -> str:
    """The page's text."""
    template = Template((files("fmsim.report.pages") / "page.html").read_text(encoding="utf-8"))
    links = [("table", "Table"), *((one.id, one.short) for one in page.sections)]
    return template.substitute(
        name=html.escape(page.name),
        question=html.escape(page.question),
        answer=html.escape(page.answer),
        chart_css=CSS,
        links="".join(f'<a href="#{id_}">{html.escape(text)}</a>' for id_, text in links),
        chart=figure(page.chart),
        chart_text=html.escape(page.chart_text),
        table=_table(page),
        facts="".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in page.facts.items()
        ),
        sections="\n".join(map(_section, page.sections)),
        footer=html.escape(page.footer),
    )


def figures(page: Page) -> dict[str, str]:
    """By name the SVG file of each chart."""
    return {chart.id: svg(chart, WIDE, alone=True) for chart in page.charts}


def figure(chart: AnyChart) -> str:
    """A chart for a screen and for a phone, of which the browser shows one; what is pointed at is
    told below, beside what saves it.
    """
    name = html.escape(chart.title)
    return (
        f'<figure id="chart-{html.escape(chart.id)}" data-name="{html.escape(chart.id)}">'
        f'<figcaption>{name}</figcaption><div class="wide">{svg(chart, WIDE)}</div>'
        f'<div class="narrow">{svg(chart, NARROW)}</div>'
        '<div class="under"><p class="tip" aria-hidden="true"></p>'
        f'<button type="button" data-as="svg" aria-label="Save {name} as SVG">SVG</button>'
        f'<button type="button" data-as="png" aria-label="Save {name} as PNG">PNG</button>'
        "</div></figure>"
    )


def _section(section: Section) -> str:
    badge = _badge(section.kind)
    words = f"<p>{html.escape(section.text)}</p>" if section.text else ""
    body = "".join(map(figure, section.charts))
    if section.missing:
        body = f'<p class="missing">{html.escape(section.missing)}</p>'
    title = html.escape(section.title)
    return f'<section id="{section.id}">{badge}<h2>{title}</h2>{words}{body}</section>'


def _badge(kind: str) -> str:
    return f'<span class="kind {kind}">{KINDS[kind]}</span>' if kind else ""


def _table(page: Page) -> str:
    table = page.table
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.headings)
    body = []
    for group, (heading, rows) in enumerate(table.groups):
        if heading:
            width = len(table.headings)
            body.append(
                f'<tr class="group"><th colspan="{width}" scope="rowgroup">'
                f"{html.escape(heading)}</th></tr>"
            )
        body += [_row(table, row, (group, number)) for number, row in enumerate(rows)]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    told = (
        f"<details><summary>What the columns are</summary><ul>{notes}</ul></details>"
        if notes
        else ""
    )
    return (
        f'<section id="table">{_badge(page.table_kind)}<h2>All figures</h2>'
        '<div class="scroll" tabindex="0" role="region" aria-label="All figures"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{told}</section>"
    )


def _row(table: Table, row: Sequence[str], at: tuple[int, int]) -> str:
    cells = [f'<th scope="row">{html.escape(row[0])}</th>']
    for place, text in enumerate(row[1:], 1):
        shown = html.escape(text.strip())
        if (*at, place) in table.bold:
            shown = f"<b>{shown}</b>"
        kind = f' class="{html.escape(text)}"' if place == table.kind_at else ""
        cells.append(f"<td{kind}>{shown}</td>")
    return f"<tr>{''.join(cells)}</tr>"
