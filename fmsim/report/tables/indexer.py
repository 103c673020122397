"""What an indexer's ranking keeps, and what policies keep at equal bytes: the tables of `fmsim
indexer eval`.
"""

from __future__ import annotations

import math
from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid
from fmsim.units import gib

TITLES = {"golden_recall": "golden entries recalled", "mass_recall": "attention mass kept"}
POLICY_FIELDS = (
    Field("policy", 0, "left"),
    Field("budget", 1, "left"),
    Field("entries", 5),
    Field("mass kept", 1),
    Field("golden kept", 3),
    Field("beside lsa,\nfilled", 2),
    Field("window 0", 4),
)


def parts(found: dict[str, Any]) -> list[Text | Grid]:
    """A table a measure, what the threshold keeps, the policies."""
    told: list[Text | Grid] = []
    for key, title in TITLES.items():
        told.append(Text(f"{title}, by share of entries kept ({_extent(found)})", "bold"))
        grid = Grid([Field("ranking", 0, "left"), *_shares(found["kept_shares"])])
        for name, recalls in found[key].items():
            grid.add(name, *map(_estimate, recalls, found["half_width"][key][name]))
        told.append(grid)
    row = found["threshold"]
    if row:
        told.append(
            Text(
                f"lsa (max) at the recommended threshold {row['score']:.4f}: keeps"
                f" {row['kept_share']:.1%} of the entries, {row['golden_recall']:.3f} of the golden"
                f" ones, {row['mass_recall']:.3f} of the mass"
            )
        )
    for name, rows in found.get("policies", {}).items():
        told.append(Text(f"{name}: policies at equal bytes on the GPU, window 0 left out", "bold"))
        told.append(_policies(rows))
        reasons = {row["why"] for row in rows if "why" in row and "least_bytes" not in row}
        told += [Text(why, style="yellow") for why in sorted(reasons)]
    return told


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Flat: a row a measure, ranking and share; then a row a policy."""
    ranked = [
        {
            "measure": key,
            "ranking": name,
            "kept_share": share,
            "value": value,
            "half_width": half_width,
        }
        for key in TITLES
        for name, recalls in found[key].items()
        for share, value, half_width in zip(
            found["kept_shares"], recalls, found["half_width"][key][name], strict=True
        )
    ]
    policies = [
        {"trace": name} | row for name, rows in found.get("policies", {}).items() for row in rows
    ]
    return ranked + policies


def _shares(shares: list[float]) -> list[Field]:
    """A column a share of entries kept; those about a tenth matter most."""
    by_rank = sorted(shares, key=lambda share: abs(math.log(share / 0.1)))
    return [Field(f"{share:.0%}", 1 + by_rank.index(share)) for share in shares]


def _extent(found: dict[str, Any]) -> str:
    """How many windows, and what was known of each."""
    age = found["state_age"]
    state = "the state before it" if age == 0 else f"a state {age} window{'s' * (age > 1)} older"
    return f"{found['queries']} windows, window 0 left out; {state}"


def _estimate(value: float | None, half_width: float | None) -> str:
    """A figure and half of its 95% interval's width."""
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if half_width is None else f" ±{half_width:.3f}")


def _policies(rows: list[dict[str, Any]]) -> Grid:
    """Policies at equal bytes on the GPU, of one trace."""
    grid = Grid(POLICY_FIELDS)
    for row in rows:
        if "why" in row:
            needs = f"needs {gib(row['least_bytes'], 3)}" if "least_bytes" in row else "no run"
            grid.add(row["policy"], row["budget"], "-", Text(needs, "yellow"))
            continue
        spread = {key: each["half_width"] for key, each in row["ci95"].items()}
        beside = row["versus_lsa"].get("mass_kept")
        grid.add(
            row["policy"],
            row["budget"],
            f"{row['entries']:,}",
            _estimate(row.get("mass_kept"), spread.get("mass_kept")),
            _estimate(row.get("entry_recall"), spread.get("entry_recall")),
            "" if beside is None else _estimate(beside["difference"], beside["half_width"]),
            _estimate(row["first_window"].get("mass_kept"), None),
        )
    return grid
