"""The page of `fmsim eval`: what a model still answers, against the bytes that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmsim import __version__
from fmsim.report.charts.chart import AnyChart, Bars, Part
from fmsim.report.charts.scale import ChartAxis
from fmsim.report.grid import Grid
from fmsim.report.pages.layout import Page, Section, Table
from fmsim.report.pages.marks import Marks, Spot, percent, quality_against_bytes
from fmsim.report.tables import accuracy as table
from fmsim.units import GIB


def page(report: Mapping[str, Any], name: str) -> Page:
    """The page of a report of `fmsim eval`."""
    about, averages = report["about"], report["averages"]
    overall = {row["policy"]: row for row in report["overall"]}
    marks = Marks({label: _kind(row) for label, row in overall.items()})
    spots = [
        Spot(
            row["policy"],
            row["gpu_bytes"],
            row["score"],
            None,
            f"{row['policy']} at {row['tokens']:,} tokens: score {100 * row['score']:.1f} with"
            f" {row['gpu_bytes'] / GIB:.3f} GiB, {row['gpu_ratio']:.1%} of full",
        )
        for row in averages
    ]
    grids = [part for part in table.parts(dict(report)) if isinstance(part, Grid)]
    prices = grids[-1]
    cells = [[str(cell).strip() for cell in row] for row in prices.rows if row is not None]
    notes = [str(part) for part in table.notes(dict(report))]
    lengths = sorted({row["tokens"] for row in averages})
    return Page(
        name=name,
        question=(
            f"What does {about['model']} still answer with less KV on the GPU, at"
            f" {' and '.join(f'{tokens:,}' for tokens in lengths)} tokens?"
        ),
        answer=_answer(overall),
        chart=quality_against_bytes(spots, marks, "score"),
        chart_text=(
            "The score is the mean over tasks, by RULER's rules. Up is better, left is cheaper; a"
            " line joins one policy's lengths. The square is the full cache, triangles are bounds."
        ),
        table=Table([one.heading for one in prices.fields], [("", cells)], notes),
        facts={
            "model": about["model"],
            "bytes": f"of {about['plan']['model']}, as an engine allocates them",
            "budget": f"{about['plan']['budget']} of the prompt's entries",
            "times": f"simulated for {about['plan']['hardware']}",
        },
        footer=f"Made by fmsim {__version__}.",
        table_kind="measured",
        sections=[_tasks(report, marks, tokens) for tokens in lengths],
    )


def _answer(overall: Mapping[str, Mapping[str, Any]]) -> str:
    rivals = [row for label, row in overall.items() if label != "full" and _kind(row) != "bound"]
    full = overall.get("full")
    if full is None or not rivals:
        return f"{len(overall)} policies answered."
    best = max(rivals, key=lambda row: row["score"])
    return (
        f"{best['policy']} answers best with less: {100 * best['score']:.1f} of 100 with"
        f" {best['gpu_ratio']:.1%} of the full cache's bytes; the full cache has"
        f" {100 * full['score']:.1f}."
    )


def _kind(row: Mapping[str, Any]) -> str:
    """Exact where all selected mass was kept; oracle is a bound."""
    if str(row["policy"]).split(":")[0] in ("oracle", "belady"):
        return "bound"
    return "exact" if (row["mass_kept"] or 0.0) > 1 - 1e-9 else "lossy"


def _tasks(report: Mapping[str, Any], marks: Marks, tokens: int) -> Section:
    """Scores by task, a chart a task."""
    cells = [cell for cell in report["cells"] if cell["tokens"] == tokens]
    charts: list[AnyChart] = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        own = [cell for cell in cells if cell["task"] == task]
        parts = [
            [
                Part(
                    cell["score"],
                    marks[cell["policy"]].color,
                    f"{cell['policy']}, {task}: {100 * cell['score']:.1f} of 100",
                )
            ]
            for cell in own
        ]
        charts.append(
            Bars(
                f"task-{task.replace('_', '-')}-{tokens}",
                task,
                f"scores of {len(own)} policies at {tokens:,} tokens",
                ChartAxis("score", percent, high=1.0),
                [cell["policy"] for cell in own],
                parts,
                texts=[f"{100 * cell['score']:.1f}" for cell in own],
                row=20,
            )
        )
    title = f"Tasks at {tokens:,} tokens"
    return Section(f"tasks-{tokens}", f"{tokens:,}", title, "measured", "", charts)
