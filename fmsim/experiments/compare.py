"""Two results side by side: what was set differently, what came of it, and what is beyond error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fmsim.errors import FmsimError, shown
from fmsim.experiments.results.folder import REPORT_NAME, Results, ServingResults
from fmsim.experiments.run import run_scenario
from fmsim.experiments.serve import serve_scenario
from fmsim.experiments.workers.progress import Progress, silent
from fmsim.policies import registry
from fmsim.replay.ledger import Ledger
from fmsim.scenario import PolicySpec, ScenarioFile, shipped
from fmsim.sim.windows import differences

# Of a report's head what follows from the rest, or says where things lie.
DERIVED = (
    *("name", "description", "file", "details", "runs", "simulated", "replayed", "layer_map"),
    *("full_gpu_bytes", "full_kv_bytes", "schema_version", "budgets", "set"),
)
DERIVED_WITHIN = ("file", "source", "title", "steady_steps", "content_sha256", "kernel_source")


@dataclass(frozen=True)
class Compared:
    """One that two rows are compared by."""

    name: str  # where it stands in a row: "step_s.p99"
    unit: str  # "share", "bytes", "s", or "" for counts and rates
    more_is_better: bool | None
    kind: Literal["sampled", "counted", "simulated"] = "simulated"  # sampled: with an interval


FIGURES = (
    Compared("mass_kept", "share", True, "sampled"),
    Compared("entry_recall", "share", True, "sampled"),
    Compared("hit_rate", "share", True, "sampled"),
    Compared("gpu_bytes", "bytes", False, "counted"),
    Compared("max_requests", "", True),
    Compared("at_max_requests.decode_tokens_per_s", "", True),
    Compared("decode_tokens_per_s", "", True),
    Compared("step_s.p99", "s", False),
    Compared("stall_ratio", "share", False),
    Compared("h2d_bytes_per_step", "bytes", False, "counted"),
)
SERVING_FIGURES = (
    *FIGURES[:2],
    Compared("held", "", True),
    Compared("tokens_per_s", "", True),
    Compared("goodput_per_s", "", True),
    Compared("slo_share", "share", True),
    Compared("ttft_s.p95", "s", False),
    Compared("tpot_s.p95", "s", False),
    Compared("stall_share", "share", False),
)


@dataclass(frozen=True)
class Side:
    """One of the two: a report, and the ledgers of its policies where they are at hand."""

    name: str
    report: dict[str, Any]
    ledgers: Mapping[str, Ledger]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """By policy."""
        return {row["policy"]: row for row in self.report["policies"]}

    @property
    def served(self) -> bool:
        """Whether it is of many requests on a server."""
        return "workload" in self.report["scenario"]


def compare(
    one: str,
    other: str,
    scenario: str = "128k",
    overrides: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Two folders of `fmsim run --out`, two scenarios, or two policies on `scenario`.

    -> {"a", "b": names, "settings": what was set differently, "rows": a row a figure of each
    policy}. A row's "error" says how its change is known: "paired" (both were replayed on the same
    steps) or "independent", each with a 95% interval's half width; "not known" (too few windows);
    "counted" or "simulated", without spread. Raises FmsimError where they cannot be compared.
    """
    named = [_is_result(text) or _is_scenario(text) for text in (one, other)]
    if not any(named):
        return _policies(one, other, ScenarioFile(scenario, overrides, [one, other]), progress)
    if not all(named):
        lone = (one, other)[named.index(False)]
        raise FmsimError(
            f"compare: {shown(lone)} is neither a folder of `fmsim run --out` nor a scenario;"
            " give two of one kind, or two policies"
        )
    served = [_is_served(text, overrides) for text in (one, other)]
    if served[0] != served[1]:
        raise FmsimError(f"compare: only one of {shown(one)} and {shown(other)} has a workload")
    a, b = (_side(text, overrides, progress) for text in (one, other))
    shared = [label for label in a.rows if label in b.rows]
    if not shared:
        raise FmsimError(
            f"compare: {shown(one)} and {shown(other)} have no policy in common"
            f" ({', '.join(a.rows)}; {', '.join(b.rows)})"
        )
    return _compared(a, b, [(label, label) for label in shared])


def _policies(one: str, other: str, file: ScenarioFile, progress: Progress) -> dict[str, Any]:
    """Two policies on one scenario; where it has several budgets, at each that both can keep."""
    runs = [_runs(file, name) for name in (one, other)]
    file.selected = tuple({spec.label: spec for spec in runs[0] + runs[1]}.values())
    both = _ran(one, file, progress)
    pairs = [
        (spec.label, rival.label)
        for spec in runs[0]
        for rival in runs[1]
        if len(runs[0]) == len(runs[1]) == 1
        or spec.params.get("budget") == rival.params.get("budget")
    ]
    had = [pair for pair in pairs if pair[0] in both.rows and pair[1] in both.rows]
    if not had:
        why = "; ".join(one["error"] for one in both.report["failed"])
        raise FmsimError(
            f"compare: {shown(one)} and {shown(other)} have no budget in common on"
            f" {shown(file.path)}; give each its own, as lru:budget=10%" + (why and f" ({why})")
        )
    return _compared(both, both, had) | {"a": one, "b": other}


def _runs(file: ScenarioFile, name: str) -> list[PolicySpec]:
    """Of the selected runs those meant by a label, or else by a policy's name."""
    every = list(file.selected)
    by_label = [spec for spec in every if spec.entry == name]
    return by_label or [spec for spec in every if spec.policy == registry.split(name)[0]]


def _is_result(text: str) -> bool:
    return (Path(text) / REPORT_NAME).is_file()


def _is_scenario(text: str) -> bool:
    return text in shipped.scenarios() or Path(text).suffix in (".yaml", ".yml")


def _is_served(text: str, overrides: Sequence[str]) -> bool:
    """Whether it has a workload, before anything runs."""
    if _is_result(text):
        return ServingResults.load(Path(text)) is not None
    return ScenarioFile(text, overrides).scenario.workload is not None


def _side(text: str, overrides: Sequence[str], progress: Progress) -> Side:
    if not _is_result(text):
        return _ran(text, ScenarioFile(text, overrides), progress)
    served = ServingResults.load(Path(text))
    if served is not None:
        return Side(text, served.report, {})
    found = Results.load(text)
    return Side(text, found.report, found.ledgers)


def _ran(name: str, file: ScenarioFile, progress: Progress) -> Side:
    if file.scenario.workload is not None:
        served = serve_scenario(file, progress)
        return Side(name, served.as_json(), served.ledgers)
    report = run_scenario(file, progress=progress)
    return Side(name, report.as_json(), {run.label: run.ledger for run in report.runs})


def _compared(a: Side, b: Side, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    rows = [row for label, other in pairs for row in _figures(a, b, label, other)]
    return {"a": a.name, "b": b.name, "settings": _settings(a, b, pairs), "rows": rows}


def _figures(a: Side, b: Side, label: str, other: str) -> list[dict[str, Any]]:
    """A row a figure that both have."""
    paired = _paired(a, b, label, other)
    found = []
    for figure in SERVING_FIGURES if a.served else FIGURES:
        values = [_at(a.rows[label], figure.name), _at(b.rows[other], figure.name)]
        if None in values:
            continue
        change = values[1] - values[0]
        error = _error(figure, a.rows[label], b.rows[other], paired)
        beyond = change != 0 if error is None else abs(change) > error
        better = None if figure.more_is_better is None else (change > 0) == figure.more_is_better
        found.append(
            {
                "policy": label if label == other else f"{label} -> {other}",
                "figure": figure.name,
                "unit": figure.unit,
                "a": values[0],
                "b": values[1],
                "change": change,
                "ratio": values[1] / values[0] if values[0] else None,
                "half_width": error,
                "error": _kind_of_error(figure, error, paired),
                "beyond_error": None if figure.kind == "sampled" and error is None else beyond,
                "better": better if beyond else None,
            }
        )
    return found


def _kind_of_error(figure: Compared, error: float | None, paired: Mapping[str, Any]) -> str:
    if figure.kind != "sampled":
        return figure.kind
    if error is None:
        return "not known"
    return "paired" if figure.name in paired else "independent"


def _error(
    figure: Compared, one: dict[str, Any], other: dict[str, Any], paired: Mapping[str, float | None]
) -> float | None:
    """Half of the 95% interval of the difference."""
    if figure.kind != "sampled":
        return None
    if figure.name in paired:
        return paired[figure.name]
    widths = [row.get("ci95", {}).get(figure.name, {}).get("half_width") for row in (one, other)]
    return None if None in widths else math.hypot(*widths)


def _paired(a: Side, b: Side, label: str, other: str) -> dict[str, float | None]:
    """By figure the error of the difference where both were replayed on the same steps: smaller
    than that of two of which each has its own.
    """
    heads = a.report["scenario"], b.report["scenario"]
    same = [(head["trace"].get("content_sha256"), head["layer_map"]) for head in heads]
    if same[0] != same[1] or same[0][0] is None:
        return {}
    if label not in a.ledgers or other not in b.ledgers:
        return {}
    ledgers = {"a": a.ledgers[label], "b": b.ledgers[other]}
    if ledgers["a"].n_steps != ledgers["b"].n_steps or ledgers["a"].tau != ledgers["b"].tau:
        return {}
    rows = differences(ledgers, heads[0]["layer_map"])
    return {row["figure"]: row["half_width"] for row in rows}


def _settings(a: Side, b: Side, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """What was set differently: of the scenario, then of each policy."""
    heads = [_flat(_set(side.report["scenario"])) for side in (a, b)]
    found = _unlike("", *heads)
    for label, other in pairs:
        params = [
            side.report["scenario"].get("details", {}).get(name, {}).get("params", {})
            for side, name in ((a, label), (b, other))
        ]
        lead = f"{label}." if label == other else "policy."
        found += [one for one in _unlike(lead, *map(_flat, params)) if one not in found]
    return found


def _unlike(lead: str, one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key": lead + key, "a": one.get(key), "b": other.get(key)}
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]


def _set(head: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in head.items() if key not in DERIVED}


def _flat(value: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if lead and key in DERIVED_WITHIN:
            continue
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{lead}{key}.")
        else:
            found[lead + key] = inner
    return found


def _at(row: dict[str, Any], name: str) -> float | None:
    """The figure, "step_s.p99" within "step_s"; None where the row has none."""
    value: Any = row
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, (int, float)) else None
