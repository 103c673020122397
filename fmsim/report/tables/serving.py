"""A serving run: where the memory goes, then a row a policy, then what was in use over time."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fmsim.report.console import picture, share_text, wide_console
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import GIB, gib

BARS = " ▁▂▃▄▅▆▇█"
CHART_WIDTH = 60
POOLS = {
    "gpu": "on GPU",
    "slots": "slots",
    "spare": "spare",
    "index_keys": "index keys",
    "hca": "HCA",
    "windows": "windows",
    "mirror": "host mirror",
}


def render(report: dict[str, Any]) -> Group:
    """From the report's JSON object."""
    about, rows = report["scenario"], report["policies"]
    return Group(
        *_head(about), memory_table(rows), _table(rows), *_notes(about, rows), _over_time(rows)
    )


def show(report: dict[str, Any]) -> None:
    """Print to standard output."""
    wide_console(_width(report)).print(render(report))


def svg(report: dict[str, Any], title: str) -> str:
    """The same as a picture."""
    return picture(render(report), _width(report), title)


def _width(report: dict[str, Any]) -> int:
    """Columns that the widest table needs."""
    unbounded = Console(width=1000)
    return max(
        unbounded.measure(part).maximum
        for part in render(report).renderables
        if isinstance(part, Table)
    )


def _head(about: dict[str, Any]) -> list[Text]:
    workload = about["workload"]
    server = about["workload"]["server"]
    hardware = about["hardware"]
    trace = about["trace"]
    kind = {
        "closed_loop": "clients",
        "poisson": "requests",
        "bursts": "requests",
        "sessions": "sessions",
        "file": "recorded requests",
    }[workload["kind"]]
    lines = [
        Text.assemble((about["name"], "bold"), f"  {about['description']}"),
        Text(
            f"workload  {workload['kind'].replace('_', ' ')}: {workload['first_requests']:,}"
            f" {kind}, prompts of {workload['prompt_tokens_mean']:,.0f} and outputs of"
            f" {workload['output_tokens_mean']:,.0f} tokens (mean), seed {workload['seed']};"
            f" prefill {server['prefill']}"
        ),
        Text(f"server    {hardware_line(hardware)}; model {about['model']['name']}"),
        Text(
            f"replays   {trace['file']}: {trace['model']}, {trace['prompt_tokens']:,} tokens +"
            f" {trace['steps']} steps, in shares of each request's length"
        ),
    ]
    if workload.get("repeated_prompt_share"):
        lines.append(
            Text(
                f"          {workload['repeated_prompt_share']:.0%} of the prompt blocks repeat"
                " earlier ones",
                "dim",
            )
        )
    return lines


def memory_table(rows: list[dict[str, Any]]) -> Table:
    """The banner: bytes of each pool of a mean request, what fits, and why not more."""
    memory = rows[0]["memory"]
    hbm = memory["hbm_bytes"]
    title = (
        f"memory of each GPU: {gib(hbm['all'], 1)} = {hbm['weights'] / GIB:.1f} weights +"
        f" {hbm['reserve'] / GIB:.1f} reserve + {hbm['kv'] / GIB:.1f} for KV; on the host"
        f" {gib(memory['host_bytes'], 1)} for its mirror"
    )
    table = Table(
        title=title, title_justify="left", title_style="", header_style="bold", pad_edge=False
    )
    table.add_column(
        f"GiB of a request of {memory['prompt_tokens']:,} + {memory['output_tokens']:,} tokens",
        no_wrap=True,
    )
    for name in POOLS.values():
        table.add_column(name, justify="right")
    table.add_column("fit", justify="right")
    table.add_column("why not more")
    for row in rows:
        pools, limits = row["memory"]["request_bytes"], row["memory"]["limits"]
        others = ", ".join(
            f"{kind} {count:,}" for kind, count in limits.items() if kind != row["memory"]["bound"]
        )
        why = row["memory"]["bound"] + (f" ({others})" if others else "")
        table.add_row(
            row["policy"],
            *(f"{pools[key] / GIB:.3f}" for key in POOLS),
            f"{row['memory']['fits']:,}",
            why,
        )
    return table


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(header_style="bold", pad_edge=False, row_styles=("", "dim"))
    table.add_column("policy", no_wrap=True)
    table.add_column("")
    for name in (
        "mass\nkept",
        "held*",
        "tokens/s*",
        "TTFT s*\np50",
        "\np95",
        "\np99",
        "TPOT ms*\np50",
        "\np95",
        "\np99",
        "goodput*\nrequests/s",
        "in\nSLO*",
        "stall*",
        "done",
        "refused",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by*", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str | Text]:
    waited = row["waited_share"].get(row["bound"])
    return [
        row["policy"],
        Text("exact", "green") if row["exact"] else Text("lossy", "yellow"),
        share_text(row["mass_kept"]),
        str(row["held"]),
        f"{row['tokens_per_s']:,.0f}",
        *(_number(row["ttft_s"][q]) for q in ("p50", "p95", "p99")),
        *(_number(row["tpot_s"][q], 1e3) for q in ("p50", "p95", "p99")),
        f"{row['goodput_per_s']:.3f}",
        f"{row['slo_share']:.0%}",
        f"{row['stall_share']:.1%}",
        f"{row['requests']['finished']:,}",
        f"{row['requests']['refused']:,}",
        row["bound"] + (f", {waited:.0%} of the time" if waited else ""),
    ]


def _number(seconds: float | None, scale: float = 1.0) -> str:
    return "-" if seconds is None else f"{seconds * scale:.4g}"


def _over_time(rows: list[dict[str, Any]]) -> Table:
    """Shares in use, one character a stretch of time."""
    table = Table(
        title="in use over time",
        title_justify="left",
        title_style="",
        header_style="bold",
        pad_edge=False,
        box=None,
    )
    table.add_column("policy", no_wrap=True)
    table.add_column("")
    table.add_column(f"0 to {rows[0]['simulated_s']:,.0f} s", no_wrap=True, min_width=CHART_WIDTH)
    table.add_column("mean", justify="right")
    table.add_column("peak", justify="right")
    for row in rows:
        for number, (kind, series) in enumerate(_series(row).items()):
            use = row["in_use"][kind]
            peak = use.get("peak", max(series))
            table.add_row(
                row["policy"] if number == 0 else "",
                kind,
                _bars(series),
                f"{use['mean']:.0%}",
                f"{peak:.0%}",
            )
    return table


def _series(row: dict[str, Any]) -> dict[str, list[float]]:
    """Shares in use by resource; a memory's is taken from its peak, so that no capacity needs to be
    known here.
    """
    over, use = row["over_time"], row["in_use"]
    found = {}
    for kind, name in (("GPU memory", "gpu_bytes"), ("host memory", "host_bytes")):
        top = max(over[name])
        if top:
            found[kind] = [value / top * use[kind]["peak"] for value in over[name]]
    rate = use["PCIe"]["bytes_per_s"]
    if any(over["h2d_bytes_per_s"]):
        found["PCIe"] = [value / rate for value in over["h2d_bytes_per_s"]]
    return found


def _bars(series: list[float]) -> str:
    per_bar = max(1, len(series) // CHART_WIDTH)
    means = [
        sum(series[i : i + per_bar]) / len(series[i : i + per_bar])
        for i in range(0, len(series), per_bar)
    ]
    return "".join(
        BARS[min(len(BARS) - 1, max(0, round(value * (len(BARS) - 1))))] for value in means
    )


def _notes(about: dict[str, Any], rows: list[dict[str, Any]]) -> list[Text]:
    slo = about["workload"]["slo"]
    notes = [
        (
            f"SLO: first token within {slo['ttft_s']:g} s, then {slo['tpot_s'] * 1e3:g} ms a token."
            "  held: most requests at once.  refused: they could never fit."
        ),
        (
            "* simulated from kernel tables, link curves and shares of one trace, not measured. "
            " mass kept: counted in the trace's replay."
        ),
        (
            "bound by: what the queue's head waited for; where nobody waited, what running requests"
            " waited for (PCIe) or did (compute)."
        ),
        (
            "TTFT is a lower bound: prefill was not timed on this GPU, so it takes its operations"
            " at the device's matrix rate."
            if rows[0]["prefill_lower_bound"]
            else "TTFT: prefill from modules timed on the GPU, one chunk a step, without the"
            " tokenizer or the network to the user."
        ),
        *_prefix_notes(rows),
        "goodput and tokens/s: over the time from the first arrival to the last request's end.",
    ]
    return [Text(note, style="dim") for note in notes]


def _prefix_notes(rows: list[dict[str, Any]]) -> list[str]:
    """What was not prefilled again, by policy."""
    found = []
    for row in rows:
        if row["prefix"] is not None:
            tiers = ", ".join(
                f"{tokens:,} on {tier}"
                for tier, tokens in row["prefix"]["hit_tokens"].items()
                if tokens
            )
            found.append(
                f"{row['policy']}: {row['prefix']['reused_share']:.0%} of prompt tokens reused"
                + (f" (found: {tiers})" if tiers else "")
            )
    return found
