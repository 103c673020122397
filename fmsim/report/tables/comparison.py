"""What `fmsim compare` found: settings that differ, then figures, the sure ones marked."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.grid import ALL, Field, Grid, View, show_parts
from fmsim.units import sized

FIELDS = (
    Field("policy", 3, "left"),
    Field("figure", 0, "left", names_row=True),
    Field("A", 2),
    Field("B", 1),
    Field("change", 0),
    Field("error", 4),
    Field("says", 0, "left"),
)
MOST_SETTINGS = 20  # lines; the JSON has all
CALLED = {  # as the headings of `fmsim run` call them
    "entry_recall": "golden kept",
    "hit_rate": "golden kept, per step",
    "gpu_bytes": "on GPU",
    "max_requests": "requests fit",
    "at_max_requests.decode_tokens_per_s": "tokens/s then",
    "decode_tokens_per_s": "decode tokens/s",
    "step_s.p99": "p99 a step",
    "stall_ratio": "stall",
    "h2d_bytes_per_step": "PCIe a step",
    "tokens_per_s": "tokens/s",
    "goodput_per_s": "goodput, requests/s",
    "slo_share": "in SLO",
    "ttft_s.p95": "TTFT p95",
    "tpot_s.p95": "TPOT p95",
    "stall_share": "stall",
}


def show(found: dict[str, Any], view: View = ALL) -> None:
    """Print to standard output, from the comparison's JSON object."""
    settings = found["settings"]
    parts: list[Text | Grid] = [Text(f"A  {found['a']}\nB  {found['b']}", "bold")]
    if not settings:
        parts.append(Text("nothing is set differently"))
    parts += [
        Text(f"   {one['key']}: {_told(one['a'])} -> {_told(one['b'])}")
        for one in settings[:MOST_SETTINGS]
    ]
    if len(settings) > MOST_SETTINGS:
        parts.append(Text(f"   and {len(settings) - MOST_SETTINGS} more: --json"))
    parts += [table(found["rows"]), *(Text(note, "dim") for note in NOTES)]
    show_parts(parts, view)


NOTES = (
    "change: points of a share, else the factor, or % where it is within 1%.",
    "error: half of a 95% interval of the change; paired where both were replayed on the same"
    " steps.  within error: it may be chance.",
    "* simulated: it has no spread, so every change is told. How far simulated and measured"
    " figures are apart is in docs/explanation/simulation.md.",
)


def _told(value: Any) -> str:
    return "-" if value is None else str(value)


def table(rows: list[dict[str, Any]]) -> Grid:
    """A row a figure."""
    grid = Grid(FIELDS)
    last = None
    for row in rows:
        if last not in (None, row["policy"]):
            grid.part()
        simulated = row["error"] == "simulated"
        name = CALLED.get(row["figure"], row["figure"].replace("_", " "))
        grid.add(
            row["policy"] if row["policy"] != last else "",
            name + ("*" if simulated else ""),
            _value(row["a"], row["unit"]),
            _value(row["b"], row["unit"]),
            _change(row),
            "" if row["half_width"] is None else f"±{100 * row['half_width']:.1f}",
            _says(row),
        )
        last = row["policy"]
    return grid


def _value(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.1%}"
    if unit == "bytes":
        return sized(value)
    if unit == "s":
        return f"{value * 1e3:,.2f} ms"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _change(row: dict[str, Any]) -> str:
    """Points of a share; of anything else the factor, or within 1% how many percent."""
    if row["change"] == 0:
        return "none"
    if row["unit"] == "share" or row["ratio"] is None:
        factor = 100 if row["unit"] == "share" else 1
        return f"{factor * row['change']:+.1f}"
    more = row["ratio"] - 1
    return f"{more:+.2%}" if abs(more) < 0.01 else f"x {row['ratio']:.3g}"


def _says(row: dict[str, Any]) -> Text:
    if row["change"] == 0:
        return Text("same", "dim")
    if row["beyond_error"] is None:
        return Text("error not known")
    if not row["beyond_error"]:
        return Text("within error", "dim")
    return Text("better", "green") if row["better"] else Text("worse", "red")
