"""The charts of a run's page, each from its results or from its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmsim.experiments.results.folder import Results
from fmsim.report.charts.chart import AnyChart, Bars, Chart, Heat, Part, Series
from fmsim.report.charts.scale import ChartAxis
from fmsim.report.pages.marks import Mark, Marks, percent, short
from fmsim.units import GIB

SMOOTH_STEPS = 16
COMPUTE, MISS, RECALL, FITS = 5, 1, 4, 7  # colours
BUDGETS = ChartAxis(
    "budget, share of the prompt's entries (logarithmic)",
    percent,
    log=True,
    at=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
)


@dataclass(frozen=True)
class RunView:
    """A run's results, how each policy is marked, and which are drawn together: by budget."""

    results: Results
    marks: Marks
    entries: Mapping[str, str]  # label -> the scenario's entry
    panels: Mapping[str, Sequence[str]]

    def mark(self, label: str) -> Mark:
        return self.marks[self.entries[label]]

    def of_panels(self) -> list[tuple[str, str, Sequence[str]]]:
        """(what tells the chart's id, what its title ends with, labels)."""
        return [
            (f"-{number}" if number else "", f", at {budget}" if budget else "", labels)
            for number, (budget, labels) in enumerate(self.panels.items())
        ]


def _line(view: RunView, label: str, x: Sequence[float], y: Sequence[float], **more: Any) -> Series:
    mark = view.mark(label)
    return Series(mark.name, x, y, mark.color, mark.kind, mark.dash, hollow=mark.hollow, **more)


def over_time(view: RunView) -> list[AnyChart]:
    """What is kept by step, in the paper's accounting, and the share of selected entries that were
    resident when their step began.
    """
    found: list[AnyChart] = []
    for id_, at, labels in view.of_panels():
        kept, rates = [], []
        for label in labels:
            ledger = view.results.ledgers[label]
            steps = list(range(ledger.n_steps))
            held = view.results.timelines[label].kv_bytes / GIB
            kept.append(_line(view, label, steps, held.tolist()))
            rate = _smooth(ledger.hit.sum(axis=1)) / np.maximum(
                _smooth(ledger.accessed.sum(axis=1)), 1e-9
            )
            rates.append(_line(view, label, steps, rate.tolist()))
        found += [
            Chart(
                f"kept{id_}",
                f"KV kept{at}",
                f"GiB that {len(labels)} policies keep of one request, by decode step",
                ChartAxis("decode step"),
                ChartAxis("KV kept, GiB (logarithmic)", short, log=True),
                kept,
                height=320,
            ),
            Chart(
                f"resident{id_}",
                f"Resident when needed{at}",
                f"share of selected entries, mean of {SMOOTH_STEPS} steps, by decode step",
                ChartAxis("decode step"),
                ChartAxis(f"resident when needed, mean of {SMOOTH_STEPS} steps", percent),
                rates,
                height=320,
            ),
        ]
    return found


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the last SMOOTH_STEPS values, or over what there is."""
    total = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - SMOOTH_STEPS, 0)
    return np.asarray((total[end] - total[start]) / (end - start))


def misses_over_budget(view: RunView, curves: dict[str, Any]) -> list[AnyChart]:
    """LRU at every budget, belady below it, a colour a page size; and where the run's own policies
    that fetch stand.
    """
    series = []
    for color, (granularity, lru) in enumerate(curves["misses"]["lru"].items()):
        page = "single entries" if granularity == "1" else f"pages of {granularity}"
        for name, curve in (("lru", lru), ("belady", curves["misses"]["belady"][granularity])):
            if curve["x"]:
                bound = name == "belady"
                series.append(
                    Series(
                        f"{name}, {page}",
                        _share(curve["x"], curves),
                        curve["y"],
                        color,
                        "triangle" if bound else "disc",
                        "dot" if bound else "solid",
                        curve=not bound,  # between its few points it may be anywhere
                        points=bound,
                        names=[*[""] * (len(curve["x"]) - 1), f"{name}, {page}"] if bound else (),
                    )
                )
    for label, ledger in view.results.ledgers.items():
        if ledger.on_miss == "fetch" and ledger.policy != "full":
            missed = 1 - float(ledger.hit.sum()) / max(1, int(ledger.accessed.sum()))
            series.append(_own(view, label, _share([ledger.budget_entries], curves), missed))
    y = ChartAxis("selected entries missed", percent, low=0)
    says = "share of the selected entries that are missed, by budget, under lru and belady"
    return [Chart("misses", "Misses over budget", says, BUDGETS, y, series, height=440)]


def lost_mass_over_budget(view: RunView, curves: dict[str, Any]) -> list[AnyChart]:
    """Each lossy policy, replayed at several budgets; the larger marks are the run's own."""
    series = []
    for label, curve in curves["lost_mass"].items():
        if curve["x"]:
            x = _share(curve["x"], curves)
            series.append(_line(view, label, x, curve["y"], points=True))
    for row in view.results.rows:
        ledger = view.results.ledgers[row["policy"]]
        if ledger.on_miss != "fetch" and row["mass_kept"] is not None:
            x = _share([ledger.budget_entries], curves)
            series.append(_own(view, row["policy"], x, 1 - row["mass_kept"], named=False))
    y = ChartAxis("attention mass lost", percent, low=0)
    says = "share of the attention mass that each lossy policy loses, by budget"
    return [Chart("lost-mass", "Lost mass over budget", says, BUDGETS, y, series, height=420)]


def over_granularity(view: RunView, curves: dict[str, Any]) -> list[AnyChart]:
    """Each policy at its own budget, with other page sizes."""
    found: list[AnyChart] = []
    for id_, title, fetches in (
        ("missed-by-page", "Selected entries missed, and fetched", True),
        ("lost-by-page", "Attention mass lost", False),
    ):
        series = [
            _line(view, label, curve["x"], curve["y"], points=True)
            for label, curve in curves["granularity"].items()
            if curve["x"] and (view.results.ledgers[label].on_miss == "fetch") == fetches
        ]
        if series:
            x = ChartAxis("entries in a page (logarithmic)", log=True, at=(1, 4, 16, 64))
            y = ChartAxis(title.lower(), percent, low=0)
            says = f"{title.lower()}, by the entries in a page"
            found.append(Chart(id_, title, says, x, y, series, height=340))
    return found


def regret(view: RunView, curves: dict[str, Any]) -> list[AnyChart]:
    """Own figure less the bound's, by trace layer, in percentage points."""
    found: list[AnyChart] = []
    for kind, title in (
        ("misses", "Entries missed, above belady's"),
        ("lost_mass", "Attention mass lost, above the oracle's"),
    ):
        of_kind = {
            label: np.subtract(one["own"], one["bound"]) * 100
            for label, one in curves["regret"].items()
            if one["kind"] == kind and view.mark(label).kind != "triangle"
        }
        if of_kind:
            values = [points.tolist() for points in of_kind.values()]
            found.append(
                Heat(
                    f"regret-{kind.replace('_', '-')}",
                    f"{title}, percentage points",
                    f"{len(values)} policies by {len(values[0])} layers",
                    list(of_kind),
                    [str(layer) for layer in range(len(values[0]))],
                    "CSA layer of the trace",
                    values,
                    "points",
                )
            )
    return found


def what_bound(view: RunView) -> list[AnyChart]:
    """Where the time of a mean step went, and how many requests fit."""
    labels = list(view.results.ledgers)
    parts, fits = [], []
    for label, row in zip(labels, view.results.rows):
        timeline = view.results.timelines[label]
        stall, late = (
            float(getattr(timeline, name).mean()) * 1e3 for name in ("stall_s", "recall_wait_s")
        )
        compute = float(timeline.step_s.mean()) * 1e3 - stall - late
        parts.append(
            [
                Part(value, color, f"{label}: {name} {value:.3f} ms of a step")
                for name, value, color in (
                    ("compute", compute, COMPUTE),
                    ("misses", stall, MISS),
                    ("late recall", late, RECALL),
                )
            ]
        )
        bound = view.results.about["details"][label]["max_requests_bound"]
        told = f"{label}: {row['max_requests']:,} requests fit; {bound} allows no more"
        fits.append((row["max_requests"], bound, told))
    return [
        Bars(
            "step",
            "Mean decode step",
            "milliseconds of a step: compute, misses, late recalls",
            ChartAxis("ms"),
            labels,
            parts,
            key=(("compute", COMPUTE), ("misses", MISS), ("late recall", RECALL)),
        ),
        Bars(
            "fits",
            "Requests that fit",
            "how many requests fit, and which memory allows no more",
            ChartAxis("requests", lambda value: f"{value:,.0f}"),
            labels,
            [[Part(count, FITS, told)] for count, _, told in fits],
            texts=[f"{count:,} · {bound}" for count, bound, _ in fits],
        ),
    ]


def _share(entries: Sequence[float], curves: dict[str, Any]) -> list[float]:
    return [n / curves["prompt_entries"] for n in entries]


def _own(view: RunView, label: str, x: Sequence[float], y: float, named: bool = True) -> Series:
    """Where a policy of this run stands."""
    tip = f"{label}, this run: {y:.1%} at {x[0]:.1%}"
    names = [view.mark(label).name if named else ""]
    return _line(
        view, label, x, [y], curve=False, points=True, radii=[7.0], names=names, tips=[tip]
    )
