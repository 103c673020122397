"""The folder that `fmsim run --out` writes: where each thing stands in it, and reading it back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmsim.errors import FmsimError
from fmsim.replay.ledger import Ledger
from fmsim.sim.timeline import SimulatedTimeline

REPORT_NAME = "report.json"
SCHEMA_VERSION = 2  # of the report; 1 had none


def ledger_path(folder: Path, label: str) -> Path:
    return folder / "ledgers" / f"{_stem(label)}.npz"


def timeline_path(folder: Path, label: str) -> Path:
    return folder / "timelines" / f"{_stem(label)}.json"


def _stem(label: str) -> str:
    return re.sub(r"[^\w.+-]", "_", label)


@dataclass(frozen=True)
class Results:
    """A run's report as `fmsim run --json` prints it; ledgers and timelines by policy label, in the
    report's order.
    """

    report: dict[str, Any]
    ledgers: dict[str, Ledger]
    timelines: dict[str, SimulatedTimeline]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.report["policies"]

    @property
    def about(self) -> dict[str, Any]:
        return self.report["scenario"]

    def exact(self, label: str) -> bool:
        return self.about["details"][label]["exact"]

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read `folder`. Raises FmsimError for one that no run wrote, or that is incomplete."""
        folder = Path(folder)
        path = folder / REPORT_NAME
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if "serving" in report:
                raise FmsimError(
                    f"{path}: is of a scenario with a workload, which has no page yet; run it with"
                    " --set workload=null for a page of one decode"
                )
            version = report["scenario"].get("schema_version", 1)
            if version != SCHEMA_VERSION:
                raise FmsimError(
                    f"{path}: report schema {version}, but this fmsim reads {SCHEMA_VERSION}; run"
                    " the scenario again"
                )
            labels = [row["policy"] for row in report["policies"]]
            known = set(report["scenario"]["details"]) >= set(labels)
        except FileNotFoundError:
            raise FmsimError(
                f"{folder}: has no {REPORT_NAME}; write it with `fmsim run SCENARIO --out {folder}`"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FmsimError(
                f"{path}: not a report of `fmsim run --out` ({error}); run the scenario again"
            ) from None
        if not labels or not known:
            raise FmsimError(
                f"{path}: not a whole report of `fmsim run --out`; run the scenario again"
            )
        ledgers = {label: Ledger.load(ledger_path(folder, label)) for label in labels}
        return cls(
            report,
            ledgers,
            {label: SimulatedTimeline.load(timeline_path(folder, label)) for label in labels},
        )
