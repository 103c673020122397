"""The memory indexer beside its rivals on nano's shipped traces: benchmarks/results/indexer.md.

    python benchmarks/indexer.py [--trace NAME ...]

Three parts, each on the state that a policy has that recalls ahead (stale by one window), window 0
left out: policies at equal bytes on the GPU (`fmsim.experiments.rivals`); rankings cut at a share
of the entries; and recall of golden entries by how many layers must agree (`fmsim.indexer.eval`).
All of it is replayed, nothing simulated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import regions
from leaderboard import TRACES as ALL_TRACES

from fmsim.experiments.rivals import BOUNDS, FIRST, compare
from fmsim.files import write_text
from fmsim.geometry import PRESETS
from fmsim.indexer import checkpoint as checkpoints
from fmsim.indexer import native as native_indexer
from fmsim.indexer.eval import evaluate
from fmsim.indexer.labels import LabelRule
from fmsim.indexer.windows import read_windows
from fmsim.trace import read

ROOT = Path(__file__).parents[1]
MODEL = "v4-flash"
BUDGETS = ("12.5% gpu", "25% gpu", "40% gpu")
STATE_AGE = 1
LAYERS = (1, 2, 3)  # that must agree on a golden entry
TRACES = tuple(name for name in ALL_TRACES if name.startswith("nano-"))
SHOWN = ("oracle", "lsa (max)", "lsa + history", "h2o", "lru", "lfu", "native, held")
SHOWN_SHARES = (0.02, 0.05, 0.10)
PART = "indexer tables"  # of the page
CURVE = "recall by contexts"

Found = dict[str, Any]


def measure(path: Path) -> Found:
    """All three parts on one trace."""
    trace = read(path)
    indexer = checkpoints.load(checkpoints.SHIPPED)
    whole = len(trace.keyed) == trace.n_layers  # else the model's own indexers lack keys
    native = native_indexer.of_model(checkpoints.SHIPPED.parent) if whole else None
    found: Found = {
        "policies": compare(trace, BUDGETS, PRESETS[MODEL], native=whole),
        "rankings": {},
    }
    for layers in LAYERS:
        windows = read_windows(trace, path.name, LabelRule(0.6, layers, state_age=STATE_AGE))
        ranked = evaluate(indexer, [(trace, windows)], native=native)
        visible = [windows.golden[w, :seen].mean() for w, seen in enumerate(windows.entries)]
        mass = (windows.golden * windows.mass).sum(1) / windows.mass.sum(1)
        ranked["golden_share"] = float(sum(visible[1:]) / len(visible[1:]))
        ranked["golden_mass"] = float(mass[1:].mean())
        found["rankings"][str(layers)] = ranked
    return found


def rounded(value: Any) -> Any:
    """The same with numbers to four digits behind the point."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def tables(result: Found) -> str:
    """The page's part between its markers."""
    parts = ["### At equal bytes on the GPU", _policies(result)]
    parts += ["### Rankings, cut at a share of the entries", _rankings(result)]
    parts += ["### Golden recall, by how many layers must agree", _agreement(result)]
    return "\n\n".join(parts)


def _policies(result: Found) -> str:
    """Mass kept, a table a budget; bold where a policy is no worse than the best."""
    traces = result["traces"]
    parts = []
    for budget in result["budgets"]:
        rows: dict[str, dict[str, Found]] = {}
        for name, found in traces.items():
            for row in found["policies"]:
                if row["budget"] == budget:
                    rows.setdefault(row["policy"], {})[name] = row
        lines = [_head(["policy", *map(_short, traces)])]
        absent = []
        for label, by_trace in rows.items():
            if all("why" in row for row in by_trace.values()):
                absent.append(label)
                continue
            cells = [_mass(rows, label, name) for name in traces]
            bound = " (bound)" if label in BOUNDS else ""
            lines.append(f"| {label}{bound} | {' | '.join(cells)} |")
        parts += [f"Mass kept at {budget.removesuffix(' gpu')} of the full cache's bytes:"]
        parts.append("\n".join(lines))
        if absent:
            names = ", ".join(f"`{label}`" for label in absent)
            parts.append(_wrapped(f"Not possible, since all index keys alone take more: {names}."))
    return "\n\n".join(parts)


def _mass(rows: dict[str, dict[str, Found]], label: str, name: str) -> str:
    row = rows[label].get(name)
    if row is None or "why" in row:
        return "–"
    shown = _estimate(row["mass_kept"], row["ci95"]["mass_kept"]["half_width"])
    rivals = [
        by_trace[name]["mass_kept"]
        for label, by_trace in rows.items()
        if label not in BOUNDS and "why" not in by_trace.get(name, {"why": "not there"})
    ]
    return f"**{shown}**" if row["mass_kept"] == max(rivals) else shown


def _rankings(result: Found) -> str:
    lines = [_head(["trace", "kept", *SHOWN])]
    for name, found in result["traces"].items():
        ranked = found["rankings"]["1"]
        for share in SHOWN_SHARES:
            place = ranked["kept_shares"].index(share)
            cells = [
                f"{_recall(ranked, 'mass_recall', label, place)}"
                f" ({_recall(ranked, 'golden_recall', label, place).partition(' ')[0]})"
                for label in SHOWN
            ]
            lines.append(f"| {_short(name)} | {share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _agreement(result: Found) -> str:
    lines = [_head(["trace", "layers", "golden", "their mass", *SHOWN])]
    for name, found in result["traces"].items():
        for layers, ranked in found["rankings"].items():
            place = ranked["kept_shares"].index(0.10)
            cells = [_recall(ranked, "golden_recall", label, place) for label in SHOWN]
            shares = f"{ranked['golden_share']:.2%} | {ranked['golden_mass']:.2f}"
            lines.append(f"| {_short(name)} | {layers} | {shares} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _recall(ranked: Found, measure: str, label: str, place: int) -> str:
    """A ranking's recall where it is cut at the share of that place; "–" where it could not be."""
    if label not in ranked[measure]:
        return "–"
    return _estimate(ranked[measure][label][place], ranked["half_width"][measure][label][place])


def _head(names: list[str]) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def _short(trace: str) -> str:
    return trace.removeprefix("nano-").replace("-", " ").replace("continuation", "text")


def _estimate(value: float | None, half_width: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" + (f" ±{half_width:.2f}" if half_width else "")


def curve(result: Found) -> str:
    """The page's part of `nano/indexer_curve.py`: what more contexts teach, and the bounds."""
    counts = result["contexts"]["validation"]
    lines = [_head(["contexts", "layers", "seed", *result["columns"]])]
    shipped = result["shipped"]["max"]["mean"]
    lines.append(f"| 14 (shipped) | 1, 4 | – | {' | '.join(f'{x:.3f}' for x in shipped)} |")
    for run in sorted(result["runs"], key=lambda run: (run["layers"], run["contexts"])):
        cells = " | ".join(f"{x:.3f}" for x in run["validation"]["max"]["mean"])
        layers = ", ".join(map(str, run["layers"]))
        lines.append(f"| {run['contexts']} | {layers} | {run['seed']} | {cells} |")
    parts = [
        _wrapped(f"Validation contexts: {sum(counts.values())}, as many of each length."),
        "\n".join(lines),
    ]
    for title, runs in result["more contexts"].items():
        rows = [_head(["contexts", *result["columns"]])]
        rows += [
            f"| {name} | {' | '.join(f'{x:.3f}' for x in row)} |" for name, row in runs.items()
        ]
        parts += [_wrapped(title), "\n".join(rows)]
    rows = [_head(["validation contexts", *result["bounds"]["columns"]])]
    for name, row in sorted(
        result["bounds"]["rows"].items(), key=lambda item: (int(item[0].split()[0]), item[0])
    ):
        rows.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in row)} |")
    return "\n\n".join([*parts, "The bounds:", "\n".join(rows)])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def measured(
    traces: Sequence[str] = (), progress: Callable[[str], None] = lambda text: None
) -> Found:
    """The result file, on `traces` (`TRACES` unless given)."""
    start = time.perf_counter()
    found = {}
    for name in traces or TRACES:
        found[name] = rounded(measure(ROOT / "traces" / f"{name}.safetensors"))
        progress(f"{name}: {time.perf_counter() - start:.0f} s")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/indexer.py",
        "device": f"{platform.machine()}, Python {platform.python_version()}",
        "seconds": round(time.perf_counter() - start),
        "model": MODEL,
        "state_age": STATE_AGE,
        "beside": FIRST,
        "budgets": list(BUDGETS),
        "replayed": ["mass_kept", "entry_recall", "mass_recall", "golden_recall", "gpu_bytes"],
        "traces": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", action="append", help="a name; repeat for more")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/indexer.json")
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks/results/indexer.md")
    given = parser.parse_args()
    result = measured(given.trace or (), partial(print, file=sys.stderr))
    result["command"] = " ".join(["python benchmarks/indexer.py", *sys.argv[1:]])
    write_text(given.out, json.dumps(result, indent=1) + "\n")
    page = given.page.read_text(encoding="utf-8")
    write_text(given.page, regions.replace(page, PART, tables(result)))
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
