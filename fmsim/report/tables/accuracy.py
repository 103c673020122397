"""What a model still answers under each policy: the table of `fmsim eval`."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.console import share_text, spread_text
from fmsim.report.grid import Field, Grid
from fmsim.units import GIB, MIB

PRICE_FIELDS = (
    Field("policy", 0, "left"),
    Field("score", 1),
    Field("on GPU\nGiB", 2),
    Field("of\nfull", 3),
    Field("paper's\nof full", 8),
    Field("golden\nkept", 6),
    Field("mass\nkept", 4),
    Field("PCIe\nMiB/step", 7),
    Field("stall*", 5),
)


def parts(report: dict[str, Any]) -> list[Text | Grid]:
    """A table a length, then the prices."""
    lengths = sorted({cell["tokens"] for cell in report["cells"]})
    told: list[Text | Grid] = [part for tokens in lengths for part in _scores(report, tokens)]
    told += [Text("all lengths", "bold"), _prices(report)]
    return [
        *told,
        *_paired(report),
        *_signals(report),
        *(Text(note, style="dim") for note in notes(report)),
    ]


def _scores(report: dict[str, Any], tokens: int) -> list[Text | Grid]:
    """Policies by tasks: the average first."""
    cells = {
        (cell["task"], cell["policy"]): cell for cell in report["cells"] if cell["tokens"] == tokens
    }
    tasks = list(dict.fromkeys(task for task, _ in cells))
    ranked = [Field(task.replace("_", "\n"), rank) for rank, task in enumerate(tasks, 3)]
    fields = [Field("policy", 0, "left"), Field("average", 1), Field("on GPU\nGiB", 2), *ranked]
    grid = Grid(fields)
    for row in report["averages"]:
        if row["tokens"] != tokens:
            continue
        policy = row["policy"]
        own = [cells.get((task, policy)) for task in tasks]
        answers = ["-" if cell is None else _score(cell) for cell in own]
        grid.add(policy, _score(row), f"{row['gpu_bytes'] / GIB:.3f}", *answers)
    return [Text(f"scores at {tokens:,} tokens", "bold"), grid]


def _score(row: dict[str, Any]) -> str:
    mark = _mark(row["versus_full_ci95"]) if row.get("versus_full_ci95") else ""
    return f"{_points(row)}{mark}"


def _mark(interval: dict[str, Any]) -> str:
    """Whether a difference to the full cache is one: + or - where its interval leaves out 0."""
    if interval["half_width"] is None or interval["low"] <= 0 <= interval["high"]:
        return " "
    return "+" if interval["low"] > 0 else "-"


def _points(row: dict[str, Any]) -> str:
    """A score of 100, and half of its interval's width."""
    return f"{100 * row['score']:.1f}{spread_text(row['score_ci95'])}"


def _prices(report: dict[str, Any]) -> Grid:
    grid = Grid(PRICE_FIELDS)
    for row in report["overall"]:
        grid.add(
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
    return grid


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


def notes(report: dict[str, Any]) -> list[str]:
    """What the columns are, and how sure."""
    about, samples = report["about"], sorted({cell["samples"] for cell in report["cells"]})
    return [
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
            "±: half of a 95% interval, from a bootstrap over contexts; (n alike): all n contexts"
            " scored the same.  +, -: the paired difference to full has an interval that leaves"
            " out 0."
        ),
        (
            f"* simulated for {about['plan']['hardware']}, not measured; the rest is"
            " measured or counted."
        ),
    ]


def _seeds(about: dict[str, Any]) -> str:
    seeds = about["plan"]["seeds"]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
