"""What `fmsim plan` found: the walls, what would move them, and from where on KV on the host
pays.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from fmsim.report.console import wide_console
from fmsim.units import GIB

WALLS = ("GPU memory", "host memory", "batch limit", "PCIe", "compute")


def show(report: dict[str, Any]) -> None:
    """Print to standard output."""
    about, plans = report["scenario"], report["plans"]
    parts = [*_head(about, plans[0]), _walls(plans), _moves(plans)]
    crossed = [plan for plan in plans if plan["crossover"]]
    if crossed:
        parts.append(_crossovers(crossed))
    parts += [Text(note, style="dim") for note in _notes(plans[0])]
    unbounded = wide_console(1000)
    console = wide_console(
        max(unbounded.measure(part).maximum for part in parts if isinstance(part, Table))
    )
    for part in parts:
        console.print(part)


def _head(about: dict[str, Any], first: dict[str, Any]) -> list[Text]:
    hardware, trace = about["hardware"], about["trace"]
    return [
        Text(
            f"{hardware['title']}, tensor parallel {hardware['tensor_parallel']}; model"
            f" {about['model']['name']}"
        ),
        Text(
            f"requests of {first['context_tokens']:,} + {first['output_tokens']:,} tokens; at most"
            f" {first['tpot_slo_s'] * 1e3:g} ms a token"
        ),
        Text(
            f"policies replayed on {trace['file']}: {trace['model']}, {trace['prompt_tokens']:,}"
            " tokens, in shares"
        ),
    ]


def _walls(plans: list[dict[str, Any]]) -> Table:
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    table.add_column("")
    for name in (
        "mass kept",
        "GPU GiB",
        "host GiB",
        "requests",
        "wall",
        *WALLS,
        "tokens/s",
        "ms a token",
        "waits",
    ):
        table.add_column(name, justify="left" if name == "wall" else "right", no_wrap=True)
    for plan in plans:
        speed = plan["speed"]
        table.add_row(
            plan["policy"],
            Text("exact", "green") if plan["exact"] else Text("lossy", "yellow"),
            f"{plan['mass_kept']:.1%}",
            f"{plan['gpu_bytes'] / GIB:.3f}",
            f"{plan['host_bytes'] / GIB:.3f}",
            str(plan["requests"]),
            plan["wall"],
            *(str(plan["walls"].get(wall, "-")) for wall in WALLS),
            *(
                (
                    f"{speed['tokens_per_s']:,.0f}",
                    f"{speed['step_s'] * 1e3:.1f}",
                    f"{speed['wait_share']:.0%}",
                )
                if speed
                else ("-", "-", "-")
            ),
        )
    return table


def _moves(plans: list[dict[str, Any]]) -> Table:
    """A row a change, a column a policy."""
    table = Table(
        title="what would move it",
        title_justify="left",
        title_style="",
        header_style="bold",
        pad_edge=False,
    )
    table.add_column("requests, and the next wall, with", no_wrap=True)
    for plan in plans:
        table.add_column(plan["policy"], no_wrap=True)
    found = [{move["change"]: move for move in plan["moves"]} for plan in plans]
    for change in dict.fromkeys(change for moves in found for change in moves):
        table.add_row(
            change, *(_move(plan, moves.get(change)) for plan, moves in zip(plans, found))
        )
    return table


def _move(plan: dict[str, Any], move: dict[str, Any] | None) -> Text:
    if move is None:
        return Text("-")
    gain = move["requests"] - plan["requests"]
    return Text(f"{move['requests']} ({gain:+d}), {move['wall']}", "" if gain else "dim")


def _crossovers(plans: list[dict[str, Any]]) -> Table:
    table = Table(
        title="where KV on the host pays",
        title_justify="left",
        title_style="",
        header_style="bold",
        pad_edge=False,
    )
    table.add_column("tokens/s at the most requests, policy / full, by context", no_wrap=True)
    contexts = [row["context_tokens"] for row in plans[0]["crossover"]["by_context"]]
    for tokens in contexts:
        table.add_column(
            f"{tokens // 1024}K" if tokens < 2**20 else "1M", justify="right", no_wrap=True
        )
    table.add_column("from context", justify="right")
    table.add_column("from batch", justify="right")
    for plan in plans:
        crossover = plan["crossover"]
        cells = [
            Text(
                f"{row['policy_tokens_per_s']:,.0f} / {row['full_tokens_per_s']:,.0f}",
                "green" if row["pays"] else "",
            )
            for row in crossover["by_context"]
        ]
        ends = [
            f"{value:,}" if value else "never"
            for value in (crossover["context_tokens"], crossover["batch"])
        ]
        table.add_row(plan["policy"], *cells, *ends)
    return table


def _notes(first: dict[str, Any]) -> list[str]:
    return [
        (
            "All figures are simulated from kernel tables and link curves, not measured; mass kept"
            " is counted in the trace's replay."
        ),
        (
            "PCIe: beyond that many, recalls are late, or misses take longer than computing. "
            " compute: beyond that many, a token takes longer than asked."
        ),
        (
            f"from batch: at {first['context_tokens']:,} tokens, the number of requests at once"
            " from which the policy makes more tokens/s than the full cache."
        ),
    ]
