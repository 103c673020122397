"""The page of a run of a workload: what the server held, how fast it was, each request's life."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmsim.experiments.results.folder import ServingResults
from fmsim.report.charts.chart import AnyChart, Bars, Chart, Part, Series
from fmsim.report.charts.scale import ChartAxis
from fmsim.report.console import share_text
from fmsim.report.pages.layout import Page, Section, Table
from fmsim.report.pages.marks import Marks, Spot, percent, quality_against_bytes, short
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import GIB, gib

Row = Mapping[str, Any]

MOST_LIVES = 150  # requests whose lives are drawn, of each policy
MOST_NAMED = 40  # that have a name beside their line
LIFE = {  # a request's stretches: name -> (from, to, colour)
    "waits": ("arrival_s", "admitted_s", 7),
    "is prefilled": ("admitted_s", "first_token_s", 4),
    "decodes": ("first_token_s", "finished_s", 0),
}
OVER_TIME = {  # name -> (id, title, axis, scale)
    "running": ("running", "Requests that decode", "requests", 1.0),
    "waiting": ("waiting", "Requests that wait", "requests", 1.0),
    "gpu_bytes": ("gpu", "GPU memory in use", "GiB", GIB),
    "host_bytes": ("host", "Host memory in use", "GiB", GIB),
    "nvme_bytes": ("nvme", "NVMe in use", "GiB", GIB),
    "h2d_bytes_per_s": ("link", "Link to the GPU", "GB/s", 1e9),
    "tokens_per_s": ("tokens", "Tokens a second", "tokens/s", 1.0),
    "miss_rate": ("misses", "Misses, of what was selected", "share", 1.0),
}
HEADINGS = (
    "policy",
    "kind",
    "mass\nkept",
    "on GPU,\na request",
    "held*",
    "tokens/s*",
    "TTFT s*\nmean",
    "TTFT s*\np95",
    "TPOT ms*\nmean",
    "TPOT ms*\np95",
    "good*\nrequests/s",
    "in SLO*",
    "stalled*",
    "misses",
    "prompt\nreused",
    "bound by*",
)


def page(results: ServingResults) -> Page:
    """The page of a workload."""
    about, rows = results.report["scenario"], results.report["policies"]
    kinds = {row["policy"]: _kind(row) for row in rows}
    marks = Marks(kinds, [row["policy"] for row in rows if row["policy"] == "full"])
    known = all(row["mass_kept"] is not None for row in rows)
    quality = "attention mass kept" if known else "selected entries resident"
    spots = [
        Spot(
            row["policy"],
            row["memory"]["request_bytes"]["gpu"],
            row["mass_kept"] if known else 1 - row["miss_rate"],
            row["held"],
            _tip(row),
        )
        for row in rows
    ]
    return Page(
        name=about["name"],
        question=(
            f"How many requests does this server hold, and how fast is it:"
            f" {about['model']['name']} on {about['hardware']['title']},"
            f" {about['hardware']['deployment']['title']}?"
        ),
        answer=_answer(rows),
        chart=quality_against_bytes(spots, marks, quality, "a mean request"),
        chart_text=(
            "Up is better, left is cheaper. The larger a mark, the more requests were held at once."
            " Discs are exact, diamonds lossy, triangles bounds; the square is the full cache."
        ),
        table=Table(HEADINGS, [("", [_cells(row) for row in rows])], NOTES, kind_at=1),
        facts=_facts(about),
        footer=f"Made by fmsim {about['fmsim']} from {about['file']}.",
        table_kind="simulated",
        sections=[_over_time(rows, marks), *_lives(results)],
    )


NOTES = (
    "* simulated from kernel tables and link curves, not measured.",
    "mass kept: counted in the trace's replay.  held: most requests at once.",
    "good: requests a second that kept the service level.  stalled: of the time, for pages.",
    "bound by: what the queue's head waited for; where nobody waited, what running requests did.",
)


def _kind(row: Row) -> str:
    return "bound" if row.get("bound_policy") else "exact" if row["exact"] else "lossy"


def _answer(rows: Sequence[Row]) -> str:
    deployable = [row for row in rows if _kind(row) != "bound"]
    best = max(deployable or rows, key=lambda row: row["goodput_per_s"] or row["tokens_per_s"])
    full = next((row for row in rows if row["policy"] == "full"), None)
    told = (
        f"{best['policy']} serves most: {best['goodput_per_s']:.3g} requests a second within the"
        f" service level, {best['held']:,} held at once, {best['tokens_per_s']:,.0f} tokens/s;"
        f" {best['bound']} bounds it"
    )
    if full is None or full is best:
        return f"{told}."
    return (
        f"{told}. The full cache serves {full['goodput_per_s']:.3g} a second, with"
        f" {full['held']:,} held and {full['tokens_per_s']:,.0f} tokens/s."
    )


def _tip(row: Row) -> str:
    return (
        f"{row['policy']}: {row['held']:,} held, {row['tokens_per_s']:,.0f} tokens/s*, mass kept"
        f" {share_text(row['mass_kept'])}, {gib(row['memory']['request_bytes']['gpu'], 3)} a"
        " request"
    )


def _facts(about: Mapping[str, Any]) -> dict[str, str]:
    workload = about["workload"]
    return {
        "about": about["description"],
        "workload": f"{workload['kind'].replace('_', ' ')}: {workload['first_requests']:,} first"
        f" requests, prompts of {workload['prompt_tokens_mean']:,.0f} and outputs of"
        f" {workload['output_tokens_mean']:,.0f} tokens (mean)",
        "server": f"{hardware_line(about['hardware'])}; model {about['model']['name']}",
        "service level": f"{workload['slo']['ttft_s']:g} s to the first token,"
        f" {workload['slo']['tpot_s'] * 1e3:g} ms a token",
    }


def _cells(row: Row) -> list[str]:
    prefix = row["prefix"]
    return [
        row["policy"],
        _kind(row),
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


def _number(seconds: float | None, scale: float = 1.0) -> str:
    return "-" if seconds is None else f"{seconds * scale:.4g}"


def _over_time(rows: Sequence[Row], marks: Marks) -> Section:
    charts: list[AnyChart] = []
    for name, (id_, title, unit, scale) in OVER_TIME.items():
        if not any(any(row["over_time"][name]) for row in rows):
            continue
        series = []
        for row in rows:
            mark, over = marks[row["policy"]], row["over_time"]
            values = [value / scale for value in over[name]]
            series.append(
                Series(row["policy"], over["t_s"], values, mark.color, mark.kind, mark.dash)
            )
        text = percent if unit == "share" else short
        y = ChartAxis(unit, text, low=0)
        says = f"{title.lower()} over {rows[0]['simulated_s']:,.0f} s under {len(rows)} policies"
        charts.append(
            Chart(f"time-{id_}", title, says, ChartAxis("seconds"), y, series, height=260)
        )
    return Section(
        "time",
        "Over time",
        "Over time",
        "simulated",
        "What was in use, and what came of it. A figure that is zero for every policy is left out.",
        charts,
    )


def _lives(results: ServingResults) -> list[Section]:
    found = []
    for number, row in enumerate(results.report["policies"]):
        own = [one for one in results.requests if one["policy"] == row["policy"]][:MOST_LIVES]
        names = [f"request {one['request']:.0f}" for one in own]
        parts = [_life(name, one) for name, one in zip(names, own)]
        named = len(own) <= MOST_NAMED
        says = f"{len(own)} requests, each from its arrival to its end"
        chart = Bars(
            f"lives-{number}",
            f"Requests of {row['policy']}",
            says,
            ChartAxis("seconds", lambda value: f"{value:,.0f}"),
            names,
            parts,
            key=[(name, color) for name, (_, _, color) in LIFE.items()],
            row=18 if named else 6,
            labelled=named,
        )
        found.append(
            Section(
                f"life-{number}",
                row["policy"],
                f"Requests of {row['policy']}",
                "simulated",
                f"A line a request, the first {MOST_LIVES}: it waits to be admitted, is prefilled,"
                " and decodes.",
                [chart],
            )
        )
    return found


def _life(name: str, request: Row) -> list[Part]:
    """A request's stretches, as far as it came."""
    found = []
    for stretch, (first, last, color) in LIFE.items():
        start, end = request[first], request[last]
        if start is not None and end is not None:
            tip = f"{name} {stretch} from {start:.4g} to {end:.4g} s"
            found.append(Part(end - start, color, tip, start))
    return found
