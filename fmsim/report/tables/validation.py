"""What `fmsim validate` prints: the replay beside the engine, a row a policy."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from fmsim.report.console import wide_console
from fmsim.units import MIB


def show(report: dict[str, Any]) -> None:
    """Print to standard output, from the report's JSON object."""
    about = report["scenario"]
    console = wide_console(170 if about["whole_steps"] else 132)
    console.print(
        Text(
            f"{about['name']}: {about['trace']}, {about['steps']} steps; pages of"
            f" {about['model']}'s {about['csa_layers']} CSA layers on {about['device']}"
        )
    )
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in (
        "slots\nidentical",
        "pages moved\nreplay",
        "\nengine",
        "MiB moved\nreplay",
        "\nengine",
        "on GPU MiB\npredicted",
        "\nbuilt",
        "\ndiffers",
        "of it\nspare",
        "step ms p50\nsimulated",
        "\nmeasured",
        *(["\ndiffers", "tokens/s\nsimulated", "\nmeasured"] if about["whole_steps"] else []),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["policies"]:
        table.add_row(*_cells(row))
    console.print(table)
    for note in about["notes"]:
        console.print(Text(note, style="dim"))


def _cells(row: dict[str, Any]) -> list[str | Text]:
    differs = (
        row["first_difference"]
        if row["first_difference"] is not None
        else ", ".join(row["differing_fields"]) or "bytes"
    )
    where = f"no: step {differs}" if row["first_difference"] is not None else f"no: {differs}"
    return [
        row["policy"],
        Text("yes", "green") if row["identical"] else Text(where, "red"),
        f"{row['replay_pages']:,}",
        f"{row['engine_pages']:,}",
        f"{row['replay_bytes'] / MIB:.2f}",
        f"{row['engine_bytes'] / MIB:.2f}",
        f"{row['predicted_gpu_bytes'] / MIB:.2f}",
        f"{(row['allocator_gpu_bytes'] or row['built_gpu_bytes']) / MIB:.2f}",
        Text(f"{row['memory_error']:+.2%}", "" if row["memory_holds"] else "red"),
        f"{row['spare_bytes'] / MIB:.2f}",
        f"{row['simulated_step_p50_s'] * 1e3:.2f}",
        f"{row['measured_step_p50_s'] * 1e3:.2f}",
        *(
            [
                f"{row['step_error']:+.1%}",
                f"{row['simulated_tokens_per_s']:.1f}",
                f"{row['measured_tokens_per_s']:.1f}",
            ]
            if "step_error" in row
            else []
        ),
    ]
