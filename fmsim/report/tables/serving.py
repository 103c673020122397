"""A serving run: where the memory goes, then a row a policy, then what was in use over time."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from fmsim.report.console import kind_text, share_text
from fmsim.report.grid import ALL, Field, Grid, View, check_columns, picture, show_parts
from fmsim.report.tables.decode import title
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import GIB, gib

BARS = " ▁▂▃▄▅▆▇█"
CHART_WIDTH = 60
BESIDE = 30  # columns that the rest of a chart's line takes, but for the policy
POOLS = {
    "gpu": "on GPU",
    "slots": "slots",
    "spare": "spare",
    "index_keys": "index keys",
    "hca": "HCA",
    "windows": "windows",
    "mirror": "host mirror",
}
MEMORY_FIELDS = (
    Field("policy", 0, "left"),
    *(Field(name, 3 if name in ("on GPU", "host mirror") else 4) for name in POOLS.values()),
    Field("fit", 1),
    Field("bound", 2, "left"),
    Field("others allow", 5, "left"),
)


def parts(report: dict[str, Any], width: int | None = None) -> list[Text | Grid | Table]:
    """From the report's JSON object; `width` is the terminal's."""
    about, rows = report["scenario"], report["policies"]
    return [
        *_head(about),
        *memory(rows),
        table(rows),
        *_notes(about, rows),
        Text("in use over time"),
        _over_time(rows, width),
    ]


def check(view: View) -> None:
    """Refuse --columns that no table of a serving run has, before the run."""
    check_columns(view, [Grid(MEMORY_FIELDS), Grid(FIELDS)])


def show(report: dict[str, Any], view: View = ALL) -> None:
    """Print to standard output."""
    show_parts(parts(report, view.width), view)


def markdown(report: dict[str, Any], view: View = ALL) -> str:
    """The table as Markdown."""
    return table(report["policies"]).markdown(view)


def svg(report: dict[str, Any], title: str) -> str:
    """The same as a picture."""
    return picture(parts(report), title)


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
        title(about),
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


def memory(rows: list[dict[str, Any]]) -> list[Text | Grid]:
    """The banner: bytes of each pool of a mean request, what fits, and why not more."""
    memory = rows[0]["memory"]
    hbm = memory["hbm_bytes"]
    title = (
        f"memory of each GPU: {gib(hbm['all'], 1)} = {hbm['weights'] / GIB:.1f} weights +"
        f" {hbm['reserve'] / GIB:.1f} reserve + {hbm['kv'] / GIB:.1f} for KV; on the host"
        f" {gib(memory['host_bytes'], 1)} for its mirror; GiB of a request of"
        f" {memory['prompt_tokens']:,} + {memory['output_tokens']:,} tokens:"
    )
    grid = Grid(MEMORY_FIELDS)
    for row in rows:
        taken, limits = row["memory"]["request_bytes"], row["memory"]["limits"]
        bound = row["memory"]["bound"]
        others = (f"{kind} {count:,}" for kind, count in limits.items() if kind != bound)
        grid.add(
            row["policy"],
            *(f"{taken[key] / GIB:.3f}" for key in POOLS),
            f"{row['memory']['fits']:,}",
            bound,
            ", ".join(others),
        )
    return [Text(title), grid]


FIELDS = (
    Field("policy", 0, "left"),
    Field("kind", 8, "left"),
    Field("mass\nkept", 3),
    Field("held*", 2),
    Field("tokens/s*", 1),
    Field("TTFT s*\np50", 10),
    Field("TTFT s*\np95", 4),
    Field("TTFT s*\np99", 12),
    Field("TPOT ms*\np50", 11),
    Field("TPOT ms*\np95", 5),
    Field("TPOT ms*\np99", 13),
    Field("goodput*\nrequests/s", 6),
    Field("in\nSLO*", 4),
    Field("stall*", 9),
    Field("done", 9),
    Field("refused", 10),
    Field("bound by*", 7, "left"),
)


def table(rows: list[dict[str, Any]]) -> Grid:
    """A row a policy."""
    grid = Grid(FIELDS)
    for row in rows:
        grid.add(*_cells(row))
    return grid


def _cells(row: dict[str, Any]) -> list[str | Text]:
    waited = row["waited_share"].get(row["bound"])
    return [
        row["policy"],
        kind_text(row["exact"], row.get("bound_policy", False)),
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


def _over_time(rows: list[dict[str, Any]], width: int | None) -> Table:
    """Shares in use, one character a stretch of time."""
    labels = max(len(row["policy"]) for row in rows)
    chart = CHART_WIDTH if width is None else max(10, min(CHART_WIDTH, width - labels - BESIDE))
    table = Table(
        header_style="bold",
        pad_edge=False,
        box=None,
    )
    table.add_column("policy", no_wrap=True)
    table.add_column("")
    table.add_column(f"0 to {rows[0]['simulated_s']:,.0f} s", no_wrap=True, min_width=chart)
    table.add_column("mean", justify="right")
    table.add_column("peak", justify="right")
    for row in rows:
        for number, (kind, series) in enumerate(_series(row).items()):
            use = row["in_use"][kind]
            peak = use.get("peak", max(series))
            table.add_row(
                row["policy"] if number == 0 else "",
                kind,
                _bars(series, chart),
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


def _bars(series: list[float], most: int) -> str:
    per_bar = max(1, -(-len(series) // most))
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
            " waited for (PCIe) or did (compute); where none ran, what refused them."
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
