"""One run as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import html
from collections.abc import Callable
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

import plotly.offline

from fmsim.experiments.results import Results
from fmsim.report.console import share_text
from fmsim.report.plots import figures
from fmsim.report.plots.figures import BOUNDS, Style
from fmsim.report.tables import decode as table
from fmsim.report.tables import estimates
from fmsim.units import gib

KINDS = {"counted": "counted in the replay", "simulated": "simulated, not measured"}
KNOWN = {  # fields of a row that the table shows, or that name it
    "policy",
    "gpu_bytes",
    "gpu_ratio",
    "kv_hbm_bytes",
    "kv_hbm_ratio",
    "entry_recall",
    "entry_recall_per_step",
    "mass_kept",
    "answers_kept",
    "set_overlap",
    "decode_tokens_per_s",
    "step_s",
    "h2d_bytes",
    "h2d_bytes_per_step",
    "stall_ratio",
    "max_requests",
    "at_max_requests",
}


class Section(NamedTuple):
    """Its name in the page's head, a heading, what to see in its figure, and how that is drawn:
    from results, style and maybe curves.
    """

    id: str
    short: str
    title: str
    kind: str
    text: str
    draw: Callable[..., Any]
    needs_curves: bool = False


SECTIONS = (
    Section(
        "trade-off",
        "Trade-off",
        "What is kept against what it takes",
        "counted",
        "Up is better, left is cheaper. Circles are exact: they lose nothing, and pay in stalls."
        " Diamonds are lossy. belady and oracle see the future: bounds, not policies to deploy.",
        figures.trade_off,
    ),
    Section(
        "time",
        "Over time",
        "Entries kept and hit rate over time",
        "counted",
        "KV of one request in the paper's accounting, and the share of the entries selected in a"
        " step that were resident when it began. Lossy policies are dashed, bounds dotted.",
        figures.over_time,
    ),
    Section(
        "misses",
        "Misses",
        "Misses over budget",
        "counted",
        "LRU at every budget, from one pass by stack distance; below it belady, which no policy"
        " that loads on demand can beat. The darker the line, the larger the page. A line begins"
        " where a step's own pages just fit. Marked are this run's policies that fetch.",
        figures.misses_over_budget,
        True,
    ),
    Section(
        "lost-mass",
        "Lost mass",
        "Lost attention mass over budget",
        "counted",
        "Each lossy policy replayed at several budgets, all else as in the run. Attention mass on"
        " selected entries that were not attended to; lost mass is not yet a lost answer. The"
        " oracle is the bound of what is chosen once a window.",
        figures.lost_mass_over_budget,
        True,
    ),
    Section(
        "granularity",
        "Page size",
        "Over granularity",
        "counted",
        "Every policy at its own budget in bytes, with pages of 1 to 64 entries: a page is kept and"
        " moved whole.",
        figures.over_granularity,
        True,
    ),
    Section(
        "regret",
        "Regret",
        "Regret by layer",
        "counted",
        "How far each policy is from its bound at the same budget, scope and page size, in"
        " percentage points. Dark layers are where a better choice would pay. A policy that decides"
        " more often than the oracle may go below its bound.",
        figures.regret,
        True,
    ),
    Section(
        "bound",
        "What bound it",
        "What bound the run",
        "simulated",
        "Left: where the time of a step goes. Right: how often the request fits one GPU, and which"
        " memory ends it.",
        figures.what_bound,
    ),
)


def render(results: Results, curves: dict[str, Any] | None, why_no_curves: str = "") -> str:
    """The page's text. Without `curves` their sections say `why_no_curves`."""
    style = Style(results)
    about = results.about
    page = Template((files("fmsim.report") / "page.html").read_text(encoding="utf-8"))
    sections = [_section("table", "All policies", "", "", _table(results))]
    for section in SECTIONS:
        if section.id == "lost-mass" and not table.has_mass(about):
            body = _missing(table.NO_MASS)
        elif section.needs_curves and curves is None:
            body = _missing(why_no_curves)
        else:
            body = _draw(section, results, style, curves)
        sections.append(_section(section.id, section.title, section.kind, section.text, body))
    return page.substitute(
        title=html.escape(about["name"]),
        description=html.escape(about["description"]),
        plotly=plotly.offline.get_plotlyjs(),
        links="".join(
            f'<a href="#{id_}">{title}</a>'
            for id_, title in [("table", "Table"), *((s.id, s.short) for s in SECTIONS)]
        ),
        facts=_facts(about),
        cards=_cards(results),
        sections="\n".join(sections),
        footer=html.escape(
            f"Made by fmsim {about['fmsim']} from {about['file']}. Kernel times:"
            f" {about['hardware']['kernel_source']}."
        ),
    )


def _section(id_: str, title: str, kind: str, text: str, body: str) -> str:
    badge = f'<span class="kind {kind}">{KINDS[kind]}</span>' if kind else ""
    words = f"<p>{text}</p>" if text else ""
    return f'<section id="{id_}">{badge}<h2>{title}</h2>{words}{body}</section>'


def _draw(section: Section, results: Results, style: Style, curves: dict[str, Any] | None) -> str:
    figure = (
        section.draw(results, style, curves)
        if section.needs_curves
        else section.draw(results, style)
    )
    config = {
        "displaylogo": False,
        "responsive": True,
        "modeBarButtonsToRemove": ["select2d", "lasso2d"],
    }
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"plot-{section.id}", config=config
    )
    return html


def _missing(why: str) -> str:
    return f'<p class="missing">{html.escape(why)}</p>'


def _facts(about: dict[str, Any]) -> str:
    """The table's head, as names and values."""
    lines = [str(line) for line in table.head(about)[1:]]
    pairs = [(line[:10].strip(), line[10:]) for line in lines]
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in pairs
    )


def _cards(results: Results) -> str:
    """The answer in three figures: the whole cache, the smallest exact policy, and the lossy one
    that keeps most mass.
    """
    rows = [
        row
        for row in results.rows
        if results.ledgers[row["policy"]].policy not in (*BOUNDS, "full")
    ]
    exact = [row for row in rows if results.exact(row["policy"])]
    lossy = [row for row in rows if not results.exact(row["policy"])]
    cards = [("Full cache of one request", gib(results.about["full_gpu_bytes"], 3), "")]
    if exact:
        best = min(exact, key=lambda row: row["gpu_bytes"])
        note = (
            f"{best['policy']}, {best['decode_tokens_per_s']:.1f} tokens/s*,"
            f" {best['stall_ratio']:.1%} of the time stalled*"
        )
        cards.append(("Smallest that loses nothing", f"{best['gpu_ratio']:.1%} of full", note))
    if lossy:
        best = max(lossy, key=lambda row: row["mass_kept"] or 0.0)
        note = (
            f"{best['policy']}, with {best['gpu_ratio']:.1%} of the full cache's bytes,"
            f" {best['decode_tokens_per_s']:.1f} tokens/s*"
        )
        cards.append(("Most mass kept by a lossy one", share_text(best["mass_kept"]), note))
    card = '<div class="card"><span>{}</span><strong>{}</strong><small>{}</small></div>'
    return "".join(card.format(*map(html.escape, texts)) for texts in cards)


def _table(results: Results) -> str:
    """The terminal's table, with further figures that the rows may hold."""
    fields = [(name, value) for row in results.rows for name, value in row.items()]
    further = list(
        dict.fromkeys(
            name for name, value in fields if name not in KNOWN and isinstance(value, (int, float))
        )
    )
    heads = ["policy", "", *(column.heading for column in table.columns(results.about))]
    heads += [name.replace("_", " ") for name in further]
    body = []
    for row in results.rows:
        cells = [
            row["policy"],
            table.kind_of(row, results.about),
            *(cell.strip() for cell in table.cells(row, results.about)),
        ]
        cells += [
            f"{row[name]:.4g}" if isinstance(row.get(name), (int, float)) else "-"
            for name in further
        ]
        kind = f' class="{cells[1]}"'
        body.append(
            "<tr>"
            + "".join(
                f"<td{kind if i == 1 else ''}>{html.escape(cell)}</td>"
                for i, cell in enumerate(cells)
            )
            + "</tr>"
        )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    told = [*table.notes(results.about), *estimates.notes(results.report)]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in told)
    rows = "".join(body)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f'<ul class="notes">{notes}</ul>'
    )
