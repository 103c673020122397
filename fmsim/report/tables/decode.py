"""One run as one table: a row a policy, exact and lossy ones together, each with both of its
prices.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fmsim.report.console import estimate_text, margin_text, picture, share_text, wide_console
from fmsim.report.tables import estimates
from fmsim.report.tables.hardware import hardware_line
from fmsim.units import GIB, MIB, gib

MIN_WIDTH = 172  # columns that the table needs
FIGURES = (  # headings of the columns behind the policy and its kind; * = simulated
    "on GPU\nGiB",
    "of\nfull",
    "paper's\nof full",
    "golden\nkept",
    "per\nstep",
    "mass\nkept",
    "set\noverlap",
    "decode\ntokens/s*",
    "step ms*\np50",
    "\np99",
    "PCIe\nMiB/step",
    "stall*",
    "requests\nfit*",
)
NO_MASS = (
    "golden kept, mass kept: the trace has no attention masses (engines capture what was selected,"
    " not how much), so these cannot be known.  hit: selected entries resident when their step"
    " began."
)
NOTES = (
    (
        "exact: every entry selected in this trace was attended to; a miss stalls its layer. "
        " lossy: what was not resident was left out."
    ),
    (
        "on GPU: all that an engine allocates for one request: slots, spare pages for misses and"
        " recalls, index keys, HCA entries, windows."
    ),
    (
        "paper's: its accounting, the kept share of CSA entries, mean over steps.  golden kept:"
        " resident when needed, of all; per step: the mean of the steps' shares."
    ),
    (
        "* simulated from kernel tables and link curves, not measured; the rest is counted in the"
        " replay.  h: host memory binds."
    ),
)


def render(report: dict[str, Any]) -> Group:
    """The head, the table and its notes, from the report's JSON object."""
    told = [*notes(report["scenario"]), *estimates.notes(report)]
    return Group(*head(report["scenario"]), _table(report), *(Text(note, "dim") for note in told))


def has_mass(about: dict[str, Any]) -> bool:
    """Whether the trace of a report has attention masses; old reports are of such."""
    return bool(about["trace"].get("masses", True))


def headings(about: dict[str, Any]) -> tuple[str, ...]:
    """FIGURES; without masses the share of hits stands in the place of golden entries kept."""
    if has_mass(about):
        return FIGURES
    return tuple("hit" if name == "golden\nkept" else name for name in FIGURES)


def notes(about: dict[str, Any]) -> tuple[str, ...]:
    return NOTES if has_mass(about) else (*NOTES, NO_MASS)


def show(report: dict[str, Any]) -> None:
    """Print to standard output."""
    wide_console(MIN_WIDTH).print(render(report))


def svg(report: dict[str, Any], title: str) -> str:
    """The same as a picture."""
    return picture(render(report), MIN_WIDTH, title)


def head(about: dict[str, Any]) -> list[Text]:
    """Lines that say what the rows were made from."""
    trace, model, hardware = about["trace"], about["model"], about["hardware"]
    quality = ", ".join(
        f"{key} {value}"
        for key, value in trace["quality"].items()
        if isinstance(value, (int, float, str))
    )
    lines = [
        Text.assemble((about["name"], "bold"), f"  {about['description']}"),
        Text(
            f"trace     {trace['file']}: {trace['model']}, {trace['prompt_kind']},"
            f" {trace['prompt_tokens']:,} tokens + {trace['steps']} steps, {trace['csa_layers']}"
            f" CSA layers, top-{trace['topk']}" + (f"; {quality}" if quality else "")
        ),
        Text(
            f"model     {model['name']}: {model['csa_layers']} of {model['layers']} layers CSA;"
            f" {_layer_map(about)}"
        ),
        Text(
            f"hardware  {hardware_line(hardware)}; batch"
            f" {about['batch']}; full cache {gib(about['full_gpu_bytes'])} a request"
            + _figures(hardware["figures"])
        ),
    ]
    if "stands_for" in about:
        lines.insert(2, Text(f"          {about['stands_for']}", style="yellow"))
    if trace["source"] == "dense_pooled":
        lines.insert(
            2,
            Text(
                "          dense attention, pooled over 4-token entries, then top-k: not a sparse"
                " model's own choice"
            ),
        )
    return lines


def _figures(figures: dict[str, float]) -> str:
    return (
        f"; the scenario's own: {', '.join(f'{name} {value:g}' for name, value in figures.items())}"
        if figures
        else ""
    )


def _layer_map(about: dict[str, Any]) -> str:
    layers, driven = about["trace"]["csa_layers"], about["layer_map"]
    counts = sorted({driven.count(layer) for layer in range(layers)})
    if counts == [1]:
        return "each driven by a trace layer of its own"
    return f"layer map: each trace layer drives {' or '.join(map(str, counts))} of them"


def _table(report: dict[str, Any]) -> Table:
    table = Table(header_style="bold", pad_edge=False, row_styles=("", "dim"))
    table.add_column("policy", no_wrap=True)
    table.add_column("")
    for name in headings(report["scenario"]):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["policies"]:
        table.add_row(*cells(row, report["scenario"]["details"][row["policy"]]))
    return table


def cells(row: dict[str, Any], details: dict[str, Any]) -> list[str | Text]:
    """One policy's line: its label, exact or lossy, then FIGURES."""
    known = "hit_rate" if row["entry_recall"] is None else "entry_recall"
    exact = details["exact"]
    bound = " h" if details["max_requests_bound"] == "host memory" else "  "
    return [
        row["policy"],
        Text("exact", "green") if exact else Text("lossy", "yellow"),
        f"{row['gpu_bytes'] / GIB:.3f}",
        f"{row['gpu_ratio']:.1%}",
        f"{row['kv_hbm_ratio']:.1%}",
        estimate_text(row[known], estimates.half_width(row, known)),
        share_text(row["entry_recall_per_step"]),
        estimate_text(row["mass_kept"], estimates.half_width(row, "mass_kept")),
        _overlap(row),
        f"{row['decode_tokens_per_s']:.1f}",
        f"{row['step_s']['p50'] * 1e3:.2f}",
        f"{row['step_s']['p99'] * 1e3:.2f}",
        f"{row['h2d_bytes_per_step'] / MIB:.2f}",
        f"{row['stall_ratio']:.1%}",
        f"{row['max_requests']}{bound}",
    ]


def _overlap(row: dict[str, Any]) -> str:
    if row["set_overlap"] is None:
        return "-"
    half_width = estimates.half_width(row, "set_overlap")
    return f"{row['set_overlap']:.2f}" + margin_text(half_width, 2)
