"""What `fmsim validate` prints: the replay beside the engine, a row a policy."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid
from fmsim.units import MIB

FIELDS = (
    Field("policy", 0, "left"),
    Field("slots\nidentical", 0),
    Field("pages moved\nreplay", 3),
    Field("pages moved\nengine", 3),
    Field("MiB moved\nreplay", 6),
    Field("MiB moved\nengine", 6),
    Field("on GPU MiB\npredicted", 2),
    Field("on GPU MiB\nbuilt", 2),
    Field("on GPU\ndiffers", 1),
    Field("of it\nspare", 7),
    Field("step ms p50\nsimulated", 5),
    Field("step ms p50\nmeasured", 5),
)
CONTEXT = Field("context\ntokens", 1)
WHOLE_STEPS = (
    Field("batch", 0),
    Field("step ms\ndiffers", 4),
    Field("tokens/s\nsimulated", 4),
    Field("tokens/s\nmeasured", 4),
)


def parts(report: dict[str, Any]) -> list[Text | Grid]:
    """From the report's JSON object."""
    about = report["scenario"]
    head = (
        f"{about['name']}: {about['trace']}, {about['steps']} steps; pages of"
        f" {about['model']}'s {about['csa_layers']} CSA layers on {about['device']}"
    )
    notes = [Text(note, style="dim") for note in about["notes"]]
    return [Text(head), table(report), *notes]


def table(report: dict[str, Any]) -> Grid:
    """A row a policy."""
    rows = report["policies"]
    several = len({row.get("context_tokens") for row in rows}) > 1
    first, *others = FIELDS
    contexts = [CONTEXT] if several else []
    timed = WHOLE_STEPS if report["scenario"]["whole_steps"] else ()
    grid = Grid([first, *contexts, *others, *timed])
    for row in rows:
        name, *cells = _cells(row)
        grid.add(name, *([f"{row['context_tokens']:,}"] if several else []), *cells)
    return grid


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
                f"{row['batch']}",
                f"{row['step_error']:+.1%}",
                f"{row['simulated_tokens_per_s']:.1f}",
                f"{row['measured_tokens_per_s']:.1f}",
            ]
            if "step_error" in row
            else []
        ),
    ]
