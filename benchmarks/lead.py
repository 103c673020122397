"""Parts of README and the tutorials: they show a result file's figures in a sentence or two."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from typing import Any

Result = Mapping[str, Any]
MIB = 2**20
EXEC = "benchmarks/results/exec.json"


def one_gpu(result: Result) -> str:
    """README's first figures, measured: as many requests as a fixed KV pool holds, of exec.json."""
    lines = [
        f"Measured on one {result['device'].removeprefix('NVIDIA ')} ([file]({EXEC}))."
        f" {result['kv_budget_gib']:.0f} GiB hold KV.",
        f"Requests have {result['context_tokens']:,} tokens.",
        "",
        "| policy | MiB a request | of full | requests at once | tokens/s | attention kept |",
        "|---|---|---|---|---|---|",
    ]
    most: dict[str, Mapping[str, Any]] = {}
    for row in result["rows"]:
        name = row["policy"]
        if "," not in name and row["batch"] > most.get(name, {"batch": 1})["batch"]:
            most[name] = row
    sizes = {name: row["kv_bytes"] + row["spare_bytes"] for name, row in most.items()}
    for name, row in sorted(most.items(), key=lambda found: found[1]["batch"]):
        lines.append(
            f"| `{name}` | {sizes[name] / MIB:,.0f} | {sizes[name] / sizes['full']:.1%} |"
            f" {row['batch']} | {row['tokens_per_s']:,.0f} | {row['mass_kept']:.0%} |"
        )
    return "\n".join(lines)


SHOWN = ("kind", "on-gpu-gib", "requests-fit", "mass-kept", "stall")


def first_table(result: Result) -> str:
    """The first tutorial's table, as a terminal of 80 columns shows it, of 500k.json."""
    from rich.console import Console

    from fmsim.report.grid import HEIGHT, Grid, View
    from fmsim.report.tables import decode, verdict

    [grid] = [part for part in decode.parts(dict(result)) if isinstance(part, Grid)]
    text = io.StringIO()
    console = Console(width=80, height=HEIGHT, file=text, no_color=True, highlight=False)
    console.print(grid.table(View(80, SHOWN)))
    for line in verdict.lines(dict(result)):
        console.print(line)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(["```text", *lines, "```"])


def agreement(result: Result) -> str:
    """How far the simulator is from a GPU, of headline.json."""
    rows = [row for row in result["rows"] if "failed" not in row]
    same = sum(row["identical"] for row in rows)
    step = max(abs(row["step_error"]) for row in rows)
    rate = max(abs(row["tokens_error"]) for row in rows)
    contexts = dict.fromkeys(row["context"] for row in rows)
    return textwrap.fill(
        f"On an {result['device'].removeprefix('NVIDIA ')}, {len(rows)} runs were predicted and"
        f" then measured ([table](benchmarks/results/whole-steps.md); contexts"
        f" {', '.join(contexts)}). The pages were the"
        f" same at every step in {same} of {len(rows)}. Step times were at most {step:.0%} off,"
        f" tokens/s at most {rate:.0%}.",
        80,
        break_on_hyphens=False,
        break_long_words=False,
    )
