"""What `fmsim plan` found: the walls, what would move them, and from where on KV on the host
pays.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from fmsim.report.console import NO_MASS, share_text, wide_console
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import GIB

WALLS = ("GPU memory", "host memory", "NVMe", "batch limit", "PCIe", "compute")


def show(report: dict[str, Any]) -> None:
    """Print to standard output: one server in detail, or several side by side."""
    about = report["scenario"]
    plans = [plan for plan in report["policies"] if "error" not in plan]
    failed = [plan for plan in report["policies"] if "error" in plan]
    places = dict.fromkeys((plan["hardware"], plan["deployment"]) for plan in report["policies"])
    parts: list[Text | Table] = [*_head(about, plans, len(places) == 1)]
    if len(places) == 1:
        parts += [_walls(plans), _moves(plans)]
    else:
        parts += [_compared(plans)]
    crossed = [plan for plan in plans if plan["crossover"]]
    if crossed:
        parts.append(_crossovers(crossed, len(places) > 1))
    parts += [Text(f"{plan['hardware']}, {plan['deployment']}: {plan['error']}") for plan in failed]
    parts += [Text(note, style="dim") for note in _notes(plans)]
    if any(plan["mass_kept"] is None for plan in plans):
        parts.append(Text(NO_MASS, style="dim"))
    unbounded = wide_console(1000)
    console = wide_console(
        max(unbounded.measure(part).maximum for part in parts if isinstance(part, Table))
    )
    for part in parts:
        console.print(part)


def _head(about: dict[str, Any], plans: list[dict[str, Any]], one: bool) -> list[Text]:
    first = plans[0]
    lines = [
        Text(
            f"requests of {first['context_tokens']:,} + {first['output_tokens']:,} tokens of"
            f" {about['model']['name']}; at most {first['tpot_slo_s'] * 1e3:g} ms a token"
            + (f", {first['ttft_slo_s']:g} s to the first" if first["ttft_slo_s"] else "")
        )
    ]
    if one:
        lines.append(Text(hardware_line(first)))
    if "trace" in about:
        trace = about["trace"]
        lines.append(
            Text(
                f"policies replayed on {trace['file']}: {trace['model']},"
                f" {trace['prompt_tokens']:,} tokens, in shares"
            )
        )
        if "stands_for" in about:
            lines.append(Text(about["stands_for"], style="yellow"))
    else:
        sources = dict.fromkeys(f"{plan['policy']}: {plan['source']}" for plan in plans)
        lines.append(Text("no trace: policies as published figures have them"))
        lines += [Text(f"  {source}", style="dim") for source in sources]
    return lines


def _compared(plans: list[dict[str, Any]]) -> Table:
    """A row a policy on each server."""
    priced = any(plan["usd_per_million_tokens"] is not None for plan in plans)
    table = Table(header_style="bold", pad_edge=False)
    for name in ("hardware", "deployment", "policy"):
        table.add_column(name, no_wrap=True)
    figures = ["KV pool", "GiB each", "requests", "tokens/s", "a GPU", "ms", "good/s"]
    for name in figures + (["$/M tokens"] if priced else []):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("wall", no_wrap=True)
    table.add_column("what moves it most", no_wrap=True)
    best = max(plan["tokens_per_s_per_gpu"] for plan in plans)
    last = None
    for plan in plans:
        place = plan["hardware"], plan["deployment"]
        if last not in (None, place):
            table.add_section()
        pool, speed = plan["kv_pool"], plan["speed"]
        cells: list[str | Text] = [
            f"{pool['bytes_per_gpu'] / GIB:.1f}{'?' if pool['guess'] else ' '}",
            f"{plan['gpu_bytes'] / GIB:.3f}",
            str(plan["all_requests"]),
            f"{plan['all_tokens_per_s']:,.0f}",
            Text(
                f"{plan['tokens_per_s_per_gpu']:,.0f}",
                "bold green" if plan["tokens_per_s_per_gpu"] == best else "",
            ),
            f"{speed['step_s'] * 1e3:.1f}" if speed else "-",
            f"{plan['all_goodput_per_s']:.2f}",
        ]
        if priced:
            usd = plan["usd_per_million_tokens"]
            cells.append("-" if usd is None else f"{usd:.2f}")
        shown = ("", "") if last == place else place
        kept = "" if plan["exact"] else f" ({plan['mass_kept']:.0%} of the mass)"
        table.add_row(
            *shown, plan["policy"] + kept, *cells, plan["max_requests_bound"], _best_move(plan)
        )
        last = place
    return table


def _best_move(plan: dict[str, Any]) -> Text:
    move = max(plan["moves"], key=lambda move: move["max_requests"])
    gain = move["max_requests"] - plan["max_requests"]
    return Text(f"{move['change']}: {gain:+d}" if gain > 0 else "nothing alone", "dim")


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
            share_text(plan["mass_kept"]),
            f"{plan['gpu_bytes'] / GIB:.3f}",
            f"{plan['host_kv_bytes'] / GIB:.3f}",
            str(plan["max_requests"]),
            plan["max_requests_bound"],
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
    gain = move["max_requests"] - plan["max_requests"]
    price = f", ${move['usd']:,.0f}" if "usd" in move else ""
    text = f"{move['max_requests']} ({gain:+d}), {move['max_requests_bound']}{price}"
    return Text(text, "" if gain else "dim")


def _crossovers(plans: list[dict[str, Any]], several: bool) -> Table:
    """Does KV on the host pay: from which context, and from how many requests on."""
    table = Table(
        title="does KV on the host pay: tokens/s at the most requests, policy / full, by context",
        title_justify="left",
        title_style="",
        header_style="bold",
        pad_edge=False,
    )
    table.add_column("server and policy" if several else "policy", no_wrap=True)
    contexts = [row["context_tokens"] for row in plans[0]["crossover"]["by_context"]]
    for tokens in contexts:
        table.add_column(
            f"{tokens // 1024}K" if tokens < 10**6 else "1M", justify="right", no_wrap=True
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
        where = f"{plan['hardware']} {plan['deployment']}, " if several else ""
        table.add_row(where + plan["policy"], *cells, *ends)
    return table


def _notes(plans: list[dict[str, Any]]) -> list[str]:
    first = plans[0]
    notes = [
        (
            "All figures are simulated from kernel tables and link curves, not measured; mass kept"
            " is counted in a replay."
        ),
        (
            "PCIe: beyond that many, recalls are late, or misses take longer than computing. "
            " compute: beyond that many, a token takes longer than asked."
        ),
        (
            "good/s: requests a second that keep the times asked for, prefill included; it is a"
            " steady load's, without bursts."
        ),
        (
            f"from batch: at {first['context_tokens']:,} tokens, the number of requests at once"
            " from which the policy makes more tokens/s than the full cache."
        ),
    ]
    notes += dict.fromkeys(plan["kernels_stand_in"] for plan in plans if "kernels_stand_in" in plan)
    guesses = {plan["hardware"]: plan["kv_pool"] for plan in plans if plan["kv_pool"]["guess"]}
    for name, pool in guesses.items():
        notes.append(f"? KV pool of {name}: a guess. {pool['source']}")
    return notes
