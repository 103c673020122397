"""What a model still answers under each policy: the table of `fmsim eval`."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fmsim.report.console import share_text, wide_console
from fmsim.units import GIB, MIB

MIN_WIDTH, TASK_WIDTH, CELL_WIDTH = 132, 24, 24  # columns; figures are never cut


def show(report: dict[str, Any]) -> None:
    """Print to standard output: a table a length, then the prices."""
    lengths = sorted({cell["tokens"] for cell in report["cells"]})
    parts = [part for tokens in lengths for part in (_scores(report, tokens), Text())]
    policies = len(report["overall"])
    wide_console(max(MIN_WIDTH, TASK_WIDTH + CELL_WIDTH * policies)).print(
        Group(*parts, _prices(report), *_paired(report), *_signals(report), *_notes(report))
    )


def _scores(report: dict[str, Any], tokens: int) -> Table:
    """Tasks x policies: score / GiB on the GPU."""
    cells = {
        (cell["task"], cell["policy"]): cell for cell in report["cells"] if cell["tokens"] == tokens
    }
    averages = {row["policy"]: row for row in report["averages"] if row["tokens"] == tokens}
    table = Table(
        title=f"{tokens:,} tokens: score / GiB on the GPU",
        title_justify="left",
        header_style="bold",
        pad_edge=False,
    )
    table.add_column("task", no_wrap=True)
    for policy in averages:
        table.add_column(
            policy.replace(":", "\n").replace(",", "\n"), justify="right", no_wrap=True
        )
    for task in dict.fromkeys(task for task, _ in cells):
        table.add_row(
            task,
            *(
                _score(cells[task, policy]) if (task, policy) in cells else "-"
                for policy in averages
            ),
        )
    table.add_section()
    table.add_row("average", *(_score(row) for row in averages.values()), style="bold")
    return table


def _score(row: dict[str, Any]) -> str:
    mark = _mark(row["versus_full_ci95"]) if row.get("versus_full_ci95") else ""
    return f"{_points(row)}{mark} / {row['gpu_bytes'] / GIB:.3f}"


def _mark(interval: dict[str, Any]) -> str:
    """Whether a difference to the full cache is one: + or - where its interval leaves out 0."""
    if interval["half_width"] is None or interval["low"] <= 0 <= interval["high"]:
        return " "
    return "+" if interval["low"] > 0 else "-"


def _points(row: dict[str, Any]) -> str:
    """A score of 100, and half of its interval's width."""
    half_width = row["score_ci95"]["half_width"]
    return f"{100 * row['score']:.1f}" + ("" if half_width is None else f" ±{100 * half_width:.1f}")


def _prices(report: dict[str, Any]) -> Table:
    table = Table(title="all lengths", title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in (
        "score",
        "on GPU GiB",
        "of full",
        "paper's of full",
        "golden kept",
        "mass kept",
        "PCIe MiB/step",
        "stall*",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["overall"]:
        table.add_row(
            row["policy"],
            _points(row),
            f"{row['gpu_bytes'] / GIB:.3f}",
            f"{row['gpu_ratio']:.1%}",
            f"{row['kv_ratio']:.1%}",
            f"{row['golden_kept']:.1%}",
            share_text(row["mass_kept"]),
            f"{row['h2d_bytes_per_step'] / MIB:.2f}",
            f"{row['stall_ratio']:.1%}",
        )
    return table


def _paired(report: dict[str, Any]) -> list[Text]:
    """Where policies beat the full cache, where they lose to it, and how sure their difference
    is.
    """
    lines = [Text("beside full, sample by sample", "bold")] if report["paired"] else []
    for policy, row in report["paired"].items():
        interval, seeds = row["difference_ci95"], len(row["by_seed"])
        n = f"n = {interval['n']} contexts of {seeds} seed{'s' * (seeds > 1)}"
        spread = (
            f"one context tells no interval; {n}"
            if interval["half_width"] is None
            else f"95%: {100 * interval['low']:+.1f} to {100 * interval['high']:+.1f}; {n}"
        )
        counts = f"better in {row['better']}, worse in {row['worse']}, same in {row['same']}"
        lines.append(Text(f"{policy}: {counts}; {100 * row['difference']:+.1f} ({spread})"))
    return lines


def _signals(report: dict[str, Any]) -> list[Text]:
    lines = (
        [Text("what tells a lost answer from a kept one (AUC; 0.5 is nothing)", "bold")]
        if report["signals"]
        else []
    )
    for policy, row in report["signals"].items():
        known = ", ".join(f"{name} {auc:.2f}" for name, auc in row["auc"].items())
        lines.append(Text(f"{policy}: {row['lost']} lost, {row['kept']} kept; {known}"))
    return lines


def _notes(report: dict[str, Any]) -> list[Text]:
    about, samples = report["about"], sorted({cell["samples"] for cell in report["cells"]})
    notes = [
        (
            f"{about['model']}, {' to '.join(map(str, dict.fromkeys((samples[0], samples[-1]))))}"
            f" samples a cell, {_seeds(about)}, budget {about['plan']['budget']} of the prompt's"
            " entries where a policy names none; scores by RULER's rules, of 100."
        ),
        (
            f"on GPU: all that an engine allocates for a request of {about['plan']['model']} with"
            " nano's slots.  paper's: the kept share of CSA entries, mean over the answer's"
            " steps."
        ),
        (
            "±: half of a 95% interval, from a bootstrap over contexts.  +, -: the paired"
            " difference to full has an interval that leaves out 0."
        ),
        (
            f"* simulated for {about['plan']['hardware']}, not measured; the rest is"
            " measured or counted."
        ),
    ]
    return [Text(note, style="dim") for note in notes]


def _seeds(about: dict[str, Any]) -> str:
    seeds = about["plan"]["seeds"]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
