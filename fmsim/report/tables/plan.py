"""What `fmsim plan` found: the walls, what would move them, and from where on KV on the host
pays.
"""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.console import NO_MASS, kind_text, share_text
from fmsim.report.grid import ALL, Field, Grid, View, show_parts, width_of
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import GIB

WALLS = {  # by the rank of their columns
    "GPU memory": 9,
    "host memory": 9,
    "NVMe": 13,
    "batch limit": 12,
    "PCIe": 9,
    "compute": 9,
}
NO_WALL = "-"
MOST_REQUESTS = 4096  # that a plan looks as far as
COMPARED = (
    Field("hardware", 0, "left"),
    Field("deployment", 0, "left"),
    Field("policy", 0, "left"),
    Field("KV\npool", 10),
    Field("GiB\neach", 8),
    Field("requests", 2),
    Field("tokens/s", 6),
    Field("tokens/s\na GPU", 3),
    Field("ms", 9),
    Field("good/s", 7),
)


def show(report: dict[str, Any], view: View = ALL) -> None:
    """Print to standard output: one server in detail, or several side by side."""
    show_parts(parts(report, view.width), view)


def parts(report: dict[str, Any], width: int | None = None) -> list[Text | Grid]:
    """From the report's JSON object; `width` is the terminal's."""
    about = report["scenario"]
    plans = [plan for plan in report["policies"] if "error" not in plan]
    failed = [plan for plan in report["policies"] if "error" in plan]
    places = dict.fromkeys((plan["hardware"], plan["deployment"]) for plan in report["policies"])
    found: list[Text | Grid] = [*_head(about, plans, len(places) == 1)]
    if len(places) == 1:
        found += [_walls(plans), Text("what would move it: requests (more), the next wall")]
        found += _moves(plans, width)
    else:
        found += [_compared(plans)]
    crossed = [plan for plan in plans if plan["crossover"]]
    if crossed:
        found.append(
            Text(
                "does KV on the host pay: tokens/s at the most requests, policy / full, by context"
            )
        )
        found.append(_crossovers(crossed, len(places) > 1))
    found += [Text(f"{plan['hardware']}, {plan['deployment']}: {plan['error']}") for plan in failed]
    found += [Text(note, style="dim") for note in _notes(plans)]
    if any(plan["mass_kept"] is None for plan in plans):
        found.append(Text(NO_MASS, style="dim"))
    return found


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


def _compared(plans: list[dict[str, Any]]) -> Grid:
    """A row a policy on each server."""
    priced = any(plan["usd_per_million_tokens"] is not None for plan in plans)
    price = [Field("$/M\ntokens", 4)] if priced else []
    table = Grid([*COMPARED, *price, Field("wall", 5, "left"), Field("moved most by", 11, "left")])
    best = max(plan["tokens_per_s_per_gpu"] for plan in plans)
    last = None
    for plan in plans:
        place = plan["hardware"], plan["deployment"]
        if last not in (None, place):
            table.part()
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
        table.add(
            *shown, plan["policy"] + kept, *cells, plan["max_requests_bound"], _best_move(plan)
        )
        last = place
    return table


def _best_move(plan: dict[str, Any]) -> Text:
    move = max(plan["moves"], key=lambda move: move["max_requests"])
    gain = move["max_requests"] - plan["max_requests"]
    return Text(f"{move['change']}: {gain:+d}" if gain > 0 else "nothing alone", "dim")


def _walls(plans: list[dict[str, Any]]) -> Grid:
    table = Grid(
        [
            Field("policy", 0, "left"),
            Field("kind", 7, "left"),
            Field("mass\nkept", 2),
            Field("GPU\nGiB", 4),
            Field("host\nGiB", 10),
            Field("requests", 1),
            Field("wall", 3, "left"),
            *(Field(wall.replace(" ", "\n"), rank) for wall, rank in WALLS.items()),
            Field("tokens/s", 5),
            Field("ms a\ntoken", 6),
            Field("waits", 8),
        ]
    )
    for plan in plans:
        speed = plan["speed"]
        table.add(
            plan["policy"],
            kind_text(plan["exact"], plan["bound"]),
            share_text(plan["mass_kept"]),
            f"{plan['gpu_bytes'] / GIB:.3f}",
            f"{plan['host_kv_bytes'] / GIB:.3f}",
            str(plan["max_requests"]),
            plan["max_requests_bound"],
            *(_wall(plan["walls"].get(wall)) for wall in WALLS),
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


def _wall(requests: int | None) -> str:
    """Requests that it allows; a dash where there is no such wall, or none that was found."""
    return NO_WALL if requests is None or requests >= MOST_REQUESTS else str(requests)


def _moves(plans: list[dict[str, Any]], width: int | None) -> list[Text | Grid]:
    """A row a change, a column a policy; as many tables as the policies need room for."""
    if width is not None and len(plans) > 1:
        whole = _moves_of(plans)
        if width_of(whole.table(ALL)) > width:
            half = len(plans) // 2
            return [*_moves(plans[:half], width), *_moves(plans[half:], width)]
    return [_moves_of(plans)]


def _moves_of(plans: list[dict[str, Any]]) -> Grid:
    grid = Grid([Field("with", 0, "left"), *(Field(plan["policy"], 0, "left") for plan in plans)])
    found = [{move["change"]: move for move in plan["moves"]} for plan in plans]
    for change in dict.fromkeys(change for moves in found for change in moves):
        grid.add(change, *(_move(plan, moves.get(change)) for plan, moves in zip(plans, found)))
    return grid


def _move(plan: dict[str, Any], move: dict[str, Any] | None) -> Text:
    if move is None:
        return Text("-")
    gain = move["max_requests"] - plan["max_requests"]
    price = f", ${move['usd']:,.0f}" if "usd" in move else ""
    text = f"{move['max_requests']} ({gain:+d}), {move['max_requests_bound']}{price}"
    return Text(text, "" if gain else "dim")


def _crossovers(plans: list[dict[str, Any]], several: bool) -> Grid:
    """Does KV on the host pay: from which context, and from how many requests on."""
    contexts = [row["context_tokens"] for row in plans[0]["crossover"]["by_context"]]
    asked = plans[0]["context_tokens"]
    nearest = sorted(contexts, key=lambda n: abs(n - asked))
    table = Grid(
        [
            Field("server and policy" if several else "policy", 0, "left"),
            *(
                Field(f"{n // 1024}K" if n < 10**6 else "1M", 3 + nearest.index(n))
                for n in contexts
            ),
            Field("from\ncontext", 1),
            Field("from\nbatch", 2),
        ]
    )
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
        table.add(where + plan["policy"], *cells, *ends)
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
            " compute: beyond that many, a token takes longer than asked.  -: no wall below"
            f" {MOST_REQUESTS:,} requests."
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
