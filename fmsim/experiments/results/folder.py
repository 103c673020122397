"""The folder that `fmsim run --out` writes: where each thing stands in it, and reading it back."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fmsim.errors import FmsimError, shown
from fmsim.files import strict_json
from fmsim.files.inputs import (
    MOST_BYTES_OF_RESULTS,
    check_regular,
    read_json,
    read_text,
    reason,
)
from fmsim.files.place_lock import Taken, place_lock
from fmsim.replay.ledger import Ledger
from fmsim.sim.timeline import SimulatedTimeline

REQUESTS_NAME = "requests.csv"
REPORT_NAME = "report.json"
SCHEMA_VERSION = 4  # of the report


@contextlib.contextmanager
def writing(folder: Path | None) -> Iterator[None]:
    """While the block runs, `folder` is this command's alone; None for none.

    Raises FmsimError where another run writes it, or where nothing can be written.
    """
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise FmsimError(f"--out {shown(folder)}: is a file; name a folder for the results")
    with contextlib.ExitStack() as held:
        try:
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                held.callback(_remove_empty, folder)
            held.enter_context(place_lock(folder / REPORT_NAME))
        except Taken as taken:
            raise FmsimError(f"--out {folder}: another run writes this folder; {taken}") from None
        except OSError as error:
            raise FmsimError(
                f"--out {folder}: cannot be written ({reason(error)}); choose another folder"
            ) from None
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def ledger_path(folder: Path, label: str) -> Path:
    return folder / "ledgers" / f"{_stem(label)}.npz"


def timeline_path(folder: Path, label: str) -> Path:
    return folder / "timelines" / f"{_stem(label)}.json"


def _stem(label: str) -> str:
    """A file name of its own for every label: what a file name cannot hold is replaced, and a
    digest of the label added, so that "lru a" and "lru_a" do not share a file, on file systems
    without case either.
    """
    plain = re.sub(r"[^a-z0-9+_-]", "_", label.lower())[:80]
    digest = hashlib.sha256(label.encode()).hexdigest()[:10]
    return label if plain == label else f"{plain}.{digest}"


def files_of(folder: Path, labels: Iterable[str]) -> dict[str, list[str | None]]:
    """By label the digests of its ledger and timeline as they lie in `folder`, so that a report is
    never read with another run's; None for one that is not there.
    """
    return {
        label: [_digest(ledger_path(folder, label)), _digest(timeline_path(folder, label))]
        for label in labels
    }


def _digest(path: Path) -> str | None:
    try:
        check_regular(path, MOST_BYTES_OF_RESULTS)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def by_budget(about: dict[str, Any], labels: Iterable[str]) -> dict[str | None, list[str]]:
    """Labels that stand together in a report of this head: under several budgets of the scenario
    a group each, by the budget; all others under None, before them.
    """
    budgets = about["budgets"] if len(about["budgets"]) > 1 else {}
    found: dict[str | None, list[str]] = {None: []} | {budget: [] for budget in budgets}
    for label in labels:
        budget = about["runs"][label]["budget"]
        found[budget if budget in budgets else None].append(label)
    return {budget: group for budget, group in found.items() if group}


def failed_altogether(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What failed in a report; but not a policy that one of the scenario's budgets is too small
    for, where it ran at another: that is an answer.
    """
    failed: list[dict[str, Any]] = report["failed"]
    runs = report["scenario"].get("runs")
    if runs is None:  # of a server
        return failed
    done = {runs[row["policy"]]["entry"] for row in report["policies"]}
    elsewhere = lambda failure: runs[failure["policy"]]["entry"] in done
    return [one for one in failed if "least_gpu_bytes" not in one or not elsewhere(one)]


class _Open(BaseModel):
    """Part of a report: the keys that are read, and any others."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Spread(_Open):
    p50: float
    p99: float


class _Answers(_Open):
    value: float = Field(ge=0)
    half_width: float | None
    contexts: int = Field(ge=1)
    tokens: int = Field(ge=1)


class _Row(_Open):
    policy: str
    answers_kept: _Answers | None
    gpu_bytes: int = Field(ge=0)
    gpu_ratio: float = Field(ge=0)
    kv_hbm_bytes: int = Field(ge=0)
    kv_hbm_ratio: float = Field(ge=0)
    entry_recall: float
    entry_recall_per_step: float
    mass_kept: float
    set_overlap: float | None
    decode_tokens_per_s: float = Field(ge=0)
    step_s: _Spread
    h2d_bytes: int = Field(ge=0)
    h2d_bytes_per_step: float = Field(ge=0)
    stall_ratio: float
    max_requests: int = Field(ge=0)


class _Details(_Open):
    exact: bool | None
    allocated: dict[str, int]
    host_kv_bytes: int = Field(ge=0)
    max_requests_bound: str


class _Trace(_Open):
    file: str
    steps: int = Field(ge=1)
    content_sha256: str | None


class _Hardware(_Open):
    name: str
    title: str
    kernel_source: str


class _About(_Open):
    name: str
    description: str
    file: str
    fmsim: str
    trace: _Trace
    hardware: _Hardware
    layer_map: list[int]
    budgets: dict[str, int | None]
    runs: dict[str, dict[str, str]]
    full_gpu_bytes: int = Field(ge=1)
    full_kv_bytes: int = Field(ge=1)
    details: dict[str, _Details]


class _Failed(_Open):
    policy: str
    error: str
    least_gpu_bytes: int | None = Field(None, ge=0)


class _Report(_Open):
    scenario: _About
    policies: list[_Row]
    failed: list[_Failed] = []
    files: dict[str, list[str | None]]


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
            report = read_json(path, MOST_BYTES_OF_RESULTS)
            if not isinstance(report, dict) or not isinstance(report.get("scenario"), dict):
                raise FmsimError(
                    f"{path}: not a report of `fmsim run --out`; run the scenario again"
                )
            version = report["scenario"].get("schema_version", 1)
            if version != SCHEMA_VERSION:
                raise FmsimError(
                    f"{path}: report schema {version}, but this fmsim reads {SCHEMA_VERSION}; run"
                    " the scenario again"
                )
            strict_json.check(_Report, report, str(path))
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
        timelines = {
            label: SimulatedTimeline.load(timeline_path(folder, label)) for label in labels
        }
        if report["files"] != files_of(folder, labels):
            raise FmsimError(
                f"{path}: its ledgers or timelines are another run's, or were changed since; run"
                " the scenario again, into a folder of its own"
            )
        return cls(report, ledgers, timelines)


@dataclass(frozen=True)
class ServingResults:
    """What `ServingReport.save` wrote: the report as JSON, and a row a request."""

    report: dict[str, Any]
    requests: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: Path) -> ServingResults | None:
        """None where the folder's report is of no workload.

        Raises FmsimError where its requests are missing.
        """
        try:
            report = read_json(folder / REPORT_NAME, MOST_BYTES_OF_RESULTS)
        except (OSError, FmsimError):
            return None  # a decode's loader says what is wrong
        if not isinstance(report, dict) or not _of_a_workload(report):
            return None
        path = folder / REQUESTS_NAME
        try:
            rows = list(csv.DictReader(read_text(path, MOST_BYTES_OF_RESULTS).splitlines()))
            requests = [{name: _value(text) for name, text in row.items()} for row in rows]
        except (OSError, csv.Error) as error:
            raise FmsimError(
                f"{path}: cannot be read ({error}); run the scenario again with --out {folder}"
            ) from None
        return cls(report, requests)


def evaluated(folder: Path) -> dict[str, Any] | None:
    """What `fmsim eval --out` wrote there; None for another report."""
    try:
        report = read_json(folder / REPORT_NAME, MOST_BYTES_OF_RESULTS)
    except (OSError, FmsimError):
        return None  # a decode's loader says what is wrong
    wanted = ("about", "cells", "averages", "overall", "paired", "signals")
    found = isinstance(report, dict) and all(key in report for key in wanted)
    return report if found else None


def _of_a_workload(report: dict[str, Any]) -> bool:
    about = report.get("scenario")
    rows = report.get("policies")
    return isinstance(about, dict) and "workload" in about and isinstance(rows, list)


def _value(text: str) -> Any:
    """A CSV's cell: a number, None where it is empty, or text."""
    try:
        return float(text) if text else None
    except ValueError:
        return text
