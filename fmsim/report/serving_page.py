"""One run of a workload as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from importlib.resources import files
from string import Template
from typing import Any

import plotly.graph_objects as plotly_objects
import plotly.offline

from fmsim.experiments.results import ServingResults
from fmsim.report.console import share_text
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import gib

MOST_LIVES = 400  # requests whose lives are drawn, of each policy
LIFE = {  # a request's stretches: name -> (from, to, colour)
    "waits": ("arrival_s", "admitted_s", "#c9d2e0"),
    "is prefilled": ("admitted_s", "first_token_s", "#e0a458"),
    "decodes": ("first_token_s", "finished_s", "#3b6fd4"),
}
OVER_TIME = {  # name -> what it is
    "running": "requests that decode",
    "waiting": "requests that wait",
    "gpu_bytes": "GPU memory in use, bytes",
    "host_bytes": "host memory in use, bytes",
    "nvme_bytes": "NVMe in use, bytes",
    "h2d_bytes_per_s": "link to the GPU, bytes a second",
    "tokens_per_s": "tokens a second",
    "miss_rate": "misses, of what was selected",
}


def render(results: ServingResults) -> str:
    """The page's text."""
    about, rows = results.report["scenario"], results.report["policies"]
    page = Template((files("fmsim.report") / "page.html").read_text(encoding="utf-8"))
    sections = [("table", "All policies", "", _table(rows))]
    sections.append(
        (
            "time",
            "Over time",
            "What was in use, and what came of it. A figure that is zero for every policy is left"
            " out.",
            _over_time(rows),
        )
    )
    for number, row in enumerate(rows):
        own = [request for request in results.requests if request["policy"] == row["policy"]]
        sections.append(
            (
                f"life-{number}",
                f"Requests of {row['policy']}",
                f"A line a request, the first {MOST_LIVES}: it waits to be admitted, is prefilled,"
                " and decodes.",
                _lives(own[:MOST_LIVES], number),
            )
        )
    return page.substitute(
        title=html.escape(about["name"]),
        description=html.escape(about["description"]),
        plotly=plotly.offline.get_plotlyjs(),
        links="".join(f'<a href="#{id_}">{html.escape(name)}</a>' for id_, name, *_ in sections),
        facts=_facts(about),
        cards="",
        sections="\n".join(_section(*section) for section in sections),
        footer=html.escape(f"Made by fmsim {about['fmsim']} from {about['file']}."),
    )


def _section(id_: str, title: str, text: str, body: str) -> str:
    badge = '<span class="kind simulated">simulated, not measured</span>'
    words = f"<p>{html.escape(text)}</p>" if text else ""
    return f'<section id="{id_}">{badge}<h2>{html.escape(title)}</h2>{words}{body}</section>'


def _facts(about: dict[str, Any]) -> str:
    workload = about["workload"]
    facts = {
        "workload": f"{workload['kind'].replace('_', ' ')}: {workload['first_requests']:,} first"
        f" requests, prompts of {workload['prompt_tokens_mean']:,.0f} and outputs of"
        f" {workload['output_tokens_mean']:,.0f} tokens (mean)",
        "server": f"{hardware_line(about['hardware'])}; model {about['model']['name']}",
        "service level": f"{workload['slo']['ttft_s']:g} s to the first token,"
        f" {workload['slo']['tpot_s'] * 1e3:g} ms a token",
    }
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in facts.items()
    )


def _table(rows: list[dict[str, Any]]) -> str:
    heads = [
        "policy",
        "",
        "mass kept",
        "on GPU,\na request",
        "held",
        "tokens/s",
        "TTFT s\nmean",
        "\np95",
        "TPOT ms\nmean",
        "\np95",
        "good\nrequests/s",
        "in SLO",
        "stalled",
        "misses",
        "prompt\nreused",
        "bound by",
    ]
    body = []
    for row in rows:
        kind = "exact" if row["exact"] else "lossy"
        prefix = row["prefix"]
        cells = [
            row["policy"],
            kind,
            share_text(row["mass_kept"]),
            gib(row["memory"]["request_bytes"]["gpu"], 3),
            f"{row['held']:,}",
            f"{row['tokens_per_s']:,.0f}",
            *(_number(row["ttft_s"][name]) for name in ("mean", "p95")),
            *(_number(row["tpot_s"][name], 1e3) for name in ("mean", "p95")),
            f"{row['goodput_per_s']:.3f}",
            f"{row['slo_share']:.0%}",
            f"{row['stall_share']:.1%}",
            f"{row['miss_rate']:.1%}",
            "-" if prefix is None else f"{prefix['reused_share']:.0%}",
            row["bound"],
        ]
        body.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _number(seconds: float | None, scale: float = 1.0) -> str:
    return "-" if seconds is None else f"{seconds * scale:.4g}"


def _over_time(rows: list[dict[str, Any]]) -> str:
    drawn = []
    for name, title in OVER_TIME.items():
        if not any(any(row["over_time"][name]) for row in rows):
            continue
        figure = plotly_objects.Figure()
        for row in rows:
            over = row["over_time"]
            figure.add_scatter(x=over["t_s"], y=over[name], name=row["policy"], mode="lines")
        figure.update_layout(title=title, height=260, xaxis_title="seconds")
        drawn.append(_drawn(figure, f"time-{name}"))
    return "".join(drawn)


def _lives(requests: list[dict[str, Any]], number: int) -> str:
    figure = plotly_objects.Figure()
    names = [f"request {request['request']:.0f}" for request in requests]
    for stretch, (first, last, colour) in LIFE.items():
        spans = [_span(request, first, last) for request in requests]
        figure.add_bar(
            y=names,
            base=[start for start, _ in spans],
            x=[length for _, length in spans],
            name=stretch,
            orientation="h",
            marker_color=colour,
        )
    figure.update_layout(
        barmode="overlay",
        height=max(240, 60 + 14 * len(names)),
        xaxis_title="seconds",
        yaxis={"autorange": "reversed", "showticklabels": len(names) <= 60},
    )
    return _drawn(figure, f"lives-{number}")


def _span(request: dict[str, Any], first: str, last: str) -> tuple[float | None, float | None]:
    """A stretch's start and length; None where the request never came to it."""
    start, end = request[first], request[last]
    return (None, None) if start is None or end is None else (start, end - start)


def _drawn(figure: Any, name: str) -> str:
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 40, "b": 40}, plot_bgcolor="#fff", paper_bgcolor="#fff"
    )
    text: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        config={"displaylogo": False, "responsive": True},
    )
    return text
