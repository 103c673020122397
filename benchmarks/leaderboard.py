"""All policies on shipped traces at two equal GPU budgets: docs/leaderboard.md.

    python benchmarks/leaderboard.py [-p path/file.py:Class] [--trace NAME ...]

A budget is a share of the bytes that the full cache takes on the GPU for one request, such as
"12.5% gpu" in a scenario. A policy that cannot be that small says why. A plug-in named with -p
stands beside fmsim's own; a `budget` among its parameters is replaced. Misses and mass kept are
replayed, step times simulated: one request of V4-Flash on an H100, whose CSA layers the trace's
layers drive. Intervals are those of `fmsim.bootstrap`: of a trace's figure over its windows, of a
mean over the traces. Of contexts shorter than 500K the questions stand for all kinds of text.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import regions

from fmsim import bootstrap
from fmsim.errors import BudgetTooSmall, FmsimError
from fmsim.experiments.sharing import MOST_SETS, mass_by_sharing
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.files import write_text
from fmsim.geometry import PRESETS
from fmsim.hw import load_hardware
from fmsim.policies import registry
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.sim import metrics
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import ModelMemory, allocation, spread
from fmsim.sim.windows import layer_weights, steady_steps, window_sums
from fmsim.trace import read

ROOT = Path(__file__).parents[1]
MODEL, HARDWARE = "v4-flash", "h100"
SHARES = (0.125, 0.4)  # below and above what all index keys take, with some entries
BOUNDS = ("oracle", "belady")  # they read the trace's future
HELD = {"cadence": 64, "on_miss": "mask"}
VARIANTS: dict[str, dict[str, Any]] = {  # beside every policy with its defaults
    "lru, held": {"policy": "lru"} | HELD,
    "lru, held, prompt": {"policy": "lru", "prompt_history": True} | HELD,
    "lru, held, sees all": {"policy": "lru", "sees": "all"} | HELD,
    "lru, held, sees all, prompt": {"policy": "lru", "sees": "all", "prompt_history": True} | HELD,
    "lfu, held": {"policy": "lfu"} | HELD,
    "lfu, held, prompt": {"policy": "lfu", "prompt_history": True} | HELD,
    "lfu, held, sees all": {"policy": "lfu", "sees": "all"} | HELD,
    "lfu, held, sees all, prompt": {"policy": "lfu", "sees": "all", "prompt_history": True} | HELD,
    "lsa, fallback": {"policy": "lsa", "on_miss": "fallback"},
    "lsa-history, prompt": {"policy": "lsa-history", "prompt_history": True},
    "lsa-history, sees all": {"policy": "lsa-history", "sees": "all"},
}
SHARED = {  # one set for all layers: what is kept by the number of layers that share it
    "oracle": {"policy": "oracle", "scope": "shared"},
    "lsa": {"policy": "lsa"},
    "lsa-history": {"policy": "lsa-history"},
}
SHARING_BUDGET = 0.1
PART = "leaderboard"  # of the page
NEW_PAGE = regions.marked(PART, "benchmarks/leaderboard.py", "# Leaderboard\n\n")
MIB = 2**20
TRACES = (
    "nano-128k-needles",
    "nano-32k-needles",
    "nano-500k-continuation",
    "nano-500k-memory",
    "nano-500k-needles",
)

Row = dict[str, Any]


class Board:
    """One trace, and what every policy is worth on it."""

    def __init__(self, path: Path) -> None:
        self.trace = trace = read(path)
        self.name = path.stem
        self.geometry, self.hw = PRESETS[MODEL], load_hardware(HARDWARE)
        layers = spread(trace.n_layers, self.geometry.n_csa)
        self.replayer = Replayer(trace, memory=ModelMemory(self.geometry, layers))
        self.layer_map = layers
        tokens = trace.header.prompt_tokens + trace.n_steps
        self.full_bytes = self.geometry.full_gpu_bytes(tokens)

    def row(self, label: str, spec: dict[str, Any], share: float) -> Row:
        """The row of a policy at `share` of the full cache's bytes."""
        row: Row = {"trace": self.name, "share": share, "policy": label}
        try:
            ledger = self.replayer.run(registry.build(spec | {"budget": f"{share:.1%} gpu"}))
        except BudgetTooSmall as error:
            return row | {"why": str(error), "least_bytes": error.least_bytes}
        except FmsimError as error:
            return row | {"why": re.sub(r"^policy \S+: ", "", str(error))}
        timeline = simulate(ledger, self.geometry, self.hw, self.layer_map)
        figures = metrics.kept(ledger, self.layer_map) | metrics.timed(
            timeline, steady_steps(ledger.n_steps, ledger.tau)
        )
        return row | {
            "entries": ledger.budget_entries,
            "gpu_bytes": allocation(ledger, self.geometry, self.layer_map).total,
            "misses": float(1 - ledger.hit.sum() / ledger.accessed.sum()),
            "mass_kept": figures["mass_kept"],
            "exact": metrics.exact(ledger),
            "step_s": 1 / figures["decode_tokens_per_s"],
            "stall_ratio": figures["stall_ratio"],
            "windows": self.windows(ledger),
        }

    def windows(self, ledger: Ledger) -> dict[str, list[list[float]]]:
        """By figure its (part, whole), summed over each window's steps."""
        weights = layer_weights(ledger, self.layer_map)
        missed = ledger.accessed - ledger.hit
        pairs = {"misses": (missed, ledger.accessed)}
        if ledger.masses:
            pairs["mass_kept"] = (ledger.mass_kept, ledger.mass_total)
        return {
            name: [window_sums(ledger, values, weights).round(6).tolist() for values in pair]
            for name, pair in pairs.items()
        }

    def sharing(self, label: str) -> list[Row]:
        """Rows of a policy with one set for 1, 2 and more layers; the indexer scores its own."""
        spec = SHARED[label] | {"budget": f"{SHARING_BUDGET:.0%}"}
        policy_of = lambda layers: registry.build(spec)
        found = mass_by_sharing(self.trace, policy_of, self.trace.n_layers)
        return [
            {
                "trace": self.name,
                "policy": label,
                "layers": each.layers,
                "mass_kept": each.mass.value,
                "half_width": each.mass.half_width,
            }
            for each in found
        ]


def contestants(plugins: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Policies by label: fmsim's own with their defaults, variants, and plug-ins as -p names them;
    but not `full`, which has no budget.
    """
    named = {name: {"policy": name} for name in registry.OWN if name != "full"} | VARIANTS
    for text in plugins:
        name, params = registry.split(text)
        named[registry.get(name).name] = {"policy": name} | params
    return named


def tables(result: dict[str, Any]) -> str:
    """The page's part between its markers."""
    parts = []
    for share in result["shares"]:
        rows = [row for row in result["rows"] if row["share"] == share]
        sizes = ", ".join(
            f"{name} {share * n / MIB:.0f} MiB" for name, n in result["full_bytes"].items()
        )
        parts.append(f"## {share:.1%} of the full cache's bytes\n\n{_wrapped(sizes + '.')}")
        # A policy that loses something on one trace stands in the first table with all its traces.
        lossy_labels = {row["policy"] for row in rows if row.get("exact") is False}
        ran = [row for row in rows if "why" not in row]
        lossy = [row for row in ran if row["policy"] in lossy_labels]
        exact = [row for row in ran if row["policy"] not in lossy_labels]
        if lossy:
            parts.append("Mass kept, of policies that lose something; more is better:")
            parts.append(_table(result, lossy, "mass_kept", 1, 3, best=max))
        if exact:
            parts.append("Misses, in % of what is selected, of policies that load them:")
            parts.append(_table(result, exact, "misses", 100, 2, best=min))
        parts += _absent([row for row in rows if "why" in row])
    parts.append(_sharing(result))
    return "\n\n".join(parts)


def _table(
    result: dict[str, Any], rows: list[Row], key: str, unit: float, digits: int, best: Any
) -> str:
    """Policies by their mean over the traces, in bold the best of each column and what is no worse
    by the paired difference.
    """
    traces = list(result["full_bytes"])
    found = {(row["policy"], row["trace"]): row for row in rows}
    labels = list(dict.fromkeys(row["policy"] for row in rows))
    # Sorted by the mean over the traces on which all of the table ran.
    common = [name for name in traces if all((label, name) in found for label in labels)]
    place = lambda label: mean(found[label, name][key] for name in common) if common else 0.0
    labels.sort(key=place, reverse=best is max)
    judged = [label for label in labels if label not in BOUNDS]
    lines = [
        "| policy | " + " | ".join(_short(name) for name in traces) + " | mean | ms |",
        "|---" * (len(traces) + 3) + "|",
    ]
    for label in labels:
        cells = []
        for name in traces:
            if (label, name) not in found:
                cells.append("–")
                continue
            rivals = [found[other, name] for other in judged if (other, name) in found]
            leader = best(rivals, key=lambda row: row[key])
            row = found[label, name]
            shown = _text(bootstrap.ratio(*row["windows"][key]), unit, digits)
            level = label in judged and _level(row, leader, key)
            cells.append(f"**{shown}**" if level else shown)
        over = bootstrap.mean([found[label, name][key] for name in common])
        cells.append(_text(over, unit, digits))
        times = [found[label, name]["step_s"] for name in common]
        bound = " (bound)" if label in BOUNDS else ""
        lines.append(f"| {label}{bound} | {' | '.join(cells)} | {_ms(times)} |")
    return "\n".join(lines)


def _text(found: bootstrap.Estimate | None, unit: float, digits: int) -> str:
    """A figure and half of its 95% interval's width."""
    if found is None:
        return "–"
    spread = "" if not found.half_width else f" ±{unit * found.half_width:.{digits}f}"
    return f"{unit * found.value:.{digits}f}{spread}"


def _level(row: Row, leader: Row, key: str) -> bool:
    """Whether a policy is as good as the best on its trace: the interval of their difference, on
    the same windows, holds 0.
    """
    draws, values = [], []
    for each in (row, leader):
        part, whole = map(np.array, each["windows"][key])
        draws.append(bootstrap.ratio_draws(part, whole, (len(part),)))
        values.append(part.sum() / whole.sum())
    found = bootstrap.estimate(values[0] - values[1], draws[0] - draws[1], (len(part),))
    return abs(found.value) <= (found.half_width or 0.0)


def _sharing(result: dict[str, Any]) -> str:
    """What is kept by the number of layers that share one set."""
    rows = result["sharing"]
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    lines = [
        "## One set for several layers",
        _wrapped(
            f"Mass kept with {100 * SHARING_BUDGET:.0f}% of the entries in one set, by how many of"
            f" nano's layers share it; the mean over at most {MOST_SETS} choices of so many layers."
            f" In V4-Flash a set serves {PRESETS[MODEL].n_csa} layers, and nano's"
            f" {max(row['layers'] for row in rows)} stand in for them. So the figures of a policy"
            " whose layers share a set are too good, by what more layers would take:"
        ),
    ]
    head = [
        "| policy | layers | " + " | ".join(_short(name) for name in traces) + " |",
        "|---" * (len(traces) + 2) + "|",
    ]
    found = {(row["policy"], row["layers"], row["trace"]): row for row in rows}
    for label, layers in dict.fromkeys((row["policy"], row["layers"]) for row in rows):
        cells = []
        for name in traces:
            row = found.get((label, layers, name))
            cells.append("–" if row is None else f"{row['mass_kept']:.3f} ±{row['half_width']:.3f}")
        head.append(f"| {label} | {layers} | {' | '.join(cells)} |")
    return "\n\n".join([*lines, "\n".join(head)])


def _ms(times: list[float]) -> str:
    return f"{1e3 * mean(times):.2f}" if times else "–"


def _short(trace: str) -> str:
    """nano-500k-continuation -> 500k text; of another model's, its name."""
    model, length, kind = trace.split("-")
    return f"{length} {kind.replace('continuation', 'text')}" if model == "nano" else model


def _absent(rows: list[Row]) -> list[str]:
    """Why policies have no figure: what they take before the first entry, or their own words."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        short = _short(row["trace"])
        needs = row.get("least_bytes")
        why = row["why"] if needs is None else f"{needs / MIB:.0f} MiB"
        reasons.setdefault((short, why), []).append(row["policy"])
    places: dict[tuple[str, ...], list[str]] = {}
    for (short, why), labels in reasons.items():
        places.setdefault(tuple(labels), []).append(f"{short}: {why}")
    if not places:
        return []
    lines = [
        _wrapped(f"- {', '.join(f'`{label}`' for label in labels)}. {'; '.join(whys)}.", "  ")
        for labels, whys in places.items()
    ]
    head = (
        "Without a figure, and the bytes that they take before the first entry (index keys, spare"
        " slots, HCA entries, windows), or the reason:"
    )
    return [_wrapped(head), "\n".join(lines)]


def _wrapped(text: str, indent: str = "") -> str:
    """In lines of at most 100 columns."""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def measured(
    plugins: Sequence[str] = (),
    traces: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The result file: fmsim's own policies, and `plugins`, on `traces` (`TRACES` unless given)."""
    start = time.perf_counter()
    paths = [ROOT / "traces" / f"{name}.safetensors" for name in traces or TRACES]
    rows: list[Row] = []
    sharing: list[Row] = []
    full_bytes: dict[str, int] = {}
    named = contestants(plugins)
    work = [(label, named[label], share) for share in SHARES for label in named]
    alike = list(SHARED)
    for path in paths:
        board = Board(path)
        full_bytes[board.name] = board.full_bytes
        rows += in_parallel(lambda i, board=board: board.row(*work[i]), len(work))
        shared = in_parallel(lambda i, board=board: board.sharing(alike[i]), len(alike))
        sharing += itertools.chain(*shared)
        progress(f"{board.name}: {time.perf_counter() - start:.0f} s")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/leaderboard.py",
        "device": f"{platform.machine()}, Python {platform.python_version()}",
        "seconds": round(time.perf_counter() - start),
        "model": MODEL,
        "hardware": HARDWARE,
        "simulated": ["step_s"],
        "replayed": ["gpu_bytes", "misses", "mass_kept"],
        "shares": list(SHARES),
        "full_bytes": full_bytes,
        "rows": rows,
        "sharing": sharing,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-p", "--policy", action="append", default=[], help="a plug-in beside them")
    parser.add_argument("--trace", action="append", help="a name; repeat for more")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/leaderboard.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/leaderboard.md")
    given = parser.parse_args()
    try:
        result = measured(given.policy, given.trace or (), partial(print, file=sys.stderr))
    except FmsimError as error:
        print(error, file=sys.stderr)
        return 2
    result["command"] = " ".join(["python benchmarks/leaderboard.py", *sys.argv[1:]])
    write_text(given.out, json.dumps(result, indent=1) + "\n")
    page = given.page.read_text(encoding="utf-8") if given.page.exists() else NEW_PAGE
    write_text(given.page, regions.replace(page, PART, tables(result)))
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
