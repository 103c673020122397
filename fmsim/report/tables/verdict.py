"""One sentence a policy: how many more requests fit with it, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmsim.experiments.results.folder import by_budget

Row = Mapping[str, Any]
MOST = 4  # policies at one budget that all get a sentence; of more, the best of each kind


def lines(report: dict[str, Any]) -> list[str]:
    """The sentences, from the report's JSON object; none where the full cache is not among the
    rows.
    """
    about = report["scenario"]
    full = next((row for row in report["policies"] if _is_full(row, about)), None)
    if full is None or not full["max_requests"]:
        return []
    found = []
    for labels in by_budget(about, [row["policy"] for row in report["policies"]]).values():
        rows = [
            row
            for row in report["policies"]
            if row["policy"] in labels and not _is_full(row, about) and not _is_bound(row, about)
        ]
        told = rows if len(rows) <= MOST else _best(rows, about)
        found += [sentence(row, full, _is_exact(row, about)) for row in told]
    return found


def answer(report: dict[str, Any]) -> str:
    """The sentences that answer a run: of the smallest budget the lossy policy that keeps most, and
    of all exact ones that with which most requests fit.
    """
    about = report["scenario"]
    rows = [one for one in report["policies"] if not _is_bound(one, about)]
    full = next((row for row in rows if _is_full(row, about)), None)
    rivals = [row for row in rows if row is not full]
    if full is None or not full["max_requests"] or not rivals:
        return f"{len(rows)} policies were replayed; the full cache is not among them."
    exact = [row for row in rivals if _is_exact(row, about)]
    lossy = [row for row in rivals if not _is_exact(row, about)]
    least = min((row["gpu_bytes"] for row in lossy), default=0)
    small = [row for row in lossy if row["gpu_bytes"] <= 1.1 * least]
    found = []
    if small:
        best = max(small, key=lambda row: row["mass_kept"] or row["hit_rate"])
        found.append(_lossy_answer(best, full, about))
    if exact:
        best = max(exact, key=lambda row: row["max_requests"])
        ratio = best["max_requests"] / full["max_requests"]
        found.append(
            f"Losing nothing, {name_of(best, about)} fits {ratio:.2g} x the requests with"
            f" {best['gpu_ratio']:.0%} of the bytes, and waits for the host"
            f" {best['stall_ratio']:.1%} of the time."
        )
    return " ".join(found)


def _lossy_answer(row: Row, full: Row, about: dict[str, Any]) -> str:
    ratio = row["max_requests"] / full["max_requests"]
    half_width = row.get("ci95", {}).get("mass_kept", {}).get("half_width")
    margin = "" if half_width is None else f" ± {100 * half_width:.2g}"
    kept = row["mass_kept"]
    share = "an unknown share" if kept is None else f"{100 * kept:.3g}{margin}%"
    return (
        f"With {row['gpu_ratio']:.1%} of the full cache's bytes, {name_of(row, about)} keeps"
        f" {share} of the attention mass, and {ratio:.2g} x the requests fit."
    )


def name_of(row: Row, about: dict[str, Any]) -> str:
    """The policy's label; under a heading with its budget the scenario's own."""
    name: str = about["runs"][row["policy"]]["entry"] if about["budgets"] else row["policy"]
    return name


def sentence(row: Row, full: Row, exact: bool) -> str:
    """What one policy gives and takes, beside the full cache."""
    ratio = row["max_requests"] / full["max_requests"]
    gain = f"{row['policy']}: {ratio:.2g} x the requests of {full['policy']} in the same memory"
    if exact:
        return f"{gain}; loses nothing; waits for the host {row['stall_ratio']:.1%} of the time."
    if row["mass_kept"] is None:
        return f"{gain}; what it loses is not known of this trace."
    half_width = row.get("ci95", {}).get("mass_kept", {}).get("half_width")
    margin = "" if half_width is None else f" ± {100 * half_width:.2g}"
    return f"{gain}; loses {100 * (1 - row['mass_kept']):.2g}%{margin} of the mass."


def _best(rows: Sequence[Row], about: dict[str, Any]) -> list[Row]:
    """The lossy policy that keeps most, and the exact one with which most requests fit."""
    exact = [row for row in rows if _is_exact(row, about)]
    lossy = [row for row in rows if not _is_exact(row, about)]
    found = [max(lossy, key=lambda row: row["mass_kept"] or 0.0)] if lossy else []
    return found + ([max(exact, key=lambda row: row["max_requests"])] if exact else [])


def _is_full(row: Row, about: dict[str, Any]) -> bool:
    return bool(about["runs"][row["policy"]]["budget"] == "all")


def _is_bound(row: Row, about: dict[str, Any]) -> bool:
    return bool(about["runs"][row["policy"]]["evidence"] == "future")


def _is_exact(row: Row, about: dict[str, Any]) -> bool:
    return bool(about["details"][row["policy"]]["exact"])
