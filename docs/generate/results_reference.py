"""docs/reference/results.md: a run's figures from `sim.metrics.row`, a ledger's from its class."""

from __future__ import annotations

import inspect
import re

from describe import fields, item, one_line, section

from fmsim.replay.ledger import Ledger
from fmsim.sim import metrics


def figures() -> str:
    """The fields of a policy's row, and those of a ledger."""
    row = inspect.cleandoc(metrics.row.__doc__ or "")
    _, *items = re.split(r"^- ", row, flags=re.MULTILINE)
    last, _, rest = items[-1].partition("\n\n")
    said = [one_line(text).rstrip(";.") for text in [*items[:-1], last]]
    ledger = [
        item(f"`{node.target.id}`", text)  # type: ignore[attr-defined]
        for node, text in fields(Ledger)
        if text
    ]
    return "\n".join(
        [
            section("A policy's row", one_line(rest), (item(text) for text in said)),
            section(
                "A ledger",
                "What `run --out` keeps in `ledgers/`, a compressed numpy file a policy."
                " `Ledger.load` reads it, `to_frame` makes a table of it. Axes: T steps, L layers"
                " of the trace, G groups (a layer each, or all in one).",
                iter(ledger),
            ),
        ]
    )
