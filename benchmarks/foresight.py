"""`foresight` beside its rivals: the mass that each keeps at equal bytes on the GPU, and at shares
of the entries.

    python benchmarks/foresight.py --out benchmarks/results/ladder.json traces/nano-*.safetensors

The mass kept is over windows from the second on. What `foresight` goes by was fitted on training
text (`benchmarks/nano/fit_foresight.py`).
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.geometry import PRESETS
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, spread
from fmsim.sim.windows import window_sums
from fmsim.trace import read

MODEL = "v4-flash"
BUDGETS = ("2%", "3%", "5%", "10%", "10% gpu", "12.5% gpu", "25% gpu")
# The first of them less the keys of one layer of 21: 132 bytes an entry, to 716 in each slot.
PAID = {"2%": "1.15%", "3%": "2.15%", "5%": "4.15%", "10%": "9.15%"}
HISTORY = ("lru held", "lru held, seeded", "h2o")
HELD = {"policy": "lru", "cadence": 64, "on_miss": "mask"}
RIVALS: dict[str, dict[str, Any]] = {
    "lru held": HELD,
    "lru held, seeded": HELD | {"prompt_history": True},
    "h2o": {"policy": "h2o"},
    "lsa": {"policy": "lsa"},
    "lsa-history": {"policy": "lsa-history"},
    "lsa-history, seeded": {"policy": "lsa-history", "prompt_history": True},
    "oracle": {"policy": "oracle"},
}
OWN: dict[str, dict[str, Any]] = {
    "foresight": {"policy": "foresight"},
}
PART = "ladder"  # of benchmarks/results/foresight.md
FITTED = "fitted"


def kept(
    path: Path, specs: dict[str, dict[str, Any]], budgets: Sequence[str]
) -> dict[str, list[float | None]]:
    """By label the mass kept at each budget; None where a policy cannot be."""
    trace = read(path)
    geometry = PRESETS[MODEL]
    memory = ModelMemory(geometry, spread(trace.n_layers, geometry.n_csa))
    replayer = Replayer(trace, memory=memory)
    alike = np.ones(trace.n_layers)

    def one(index: int) -> float | None:
        label, budget = work[index]
        try:
            ledger = replayer.run(registry.build(specs[label] | {"budget": budget}))
        except FmsimError:
            return None
        part, whole = (
            window_sums(ledger, mass, alike)[1:] for mass in (ledger.mass_kept, ledger.mass_total)
        )
        return float(part.sum() / whole.sum())

    work = [(label, budget) for label in specs for budget in budgets]
    found = list(in_parallel(one, len(work)))
    count = len(budgets)
    return {label: found[place * count : (place + 1) * count] for place, label in enumerate(specs)}


def tables(result: Mapping[str, Any]) -> str:
    """A table a trace: policies in rows, budgets in columns, the best that a server has in bold."""
    parts = []
    for name, rows in result["by_trace"].items():
        parts += [
            f"{name.removesuffix('.safetensors')}:",
            "",
            f"| mass kept | {' | '.join(result['budgets'])} |",
            f"|---|{'---|' * len(result['budgets'])}",
        ]
        best = [
            max(
                (row[at] for label, row in rows.items() if label != "oracle" and row[at]), default=0
            )
            for at in range(len(result["budgets"]))
        ]
        for label, row in rows.items():
            cells = ["-" if value is None else f"{value:.3f}" for value in row]
            cells = [
                f"**{cell}**" if label != "oracle" and value == most else cell
                for cell, value, most in zip(cells, row, best, strict=True)
            ]
            parts.append(f"| {label} | {' | '.join(cells)} |")
        parts.append("")
    columns = [BUDGETS.index(budget) for budget in PAID]
    parts += [
        "At the bytes of so many entries, the keys of the layer that it scores paid for:",
        "",
        f"| foresight, best of history | {' | '.join(PAID)} |",
        f"|---|{'---|' * len(PAID)}",
    ]
    for name, row in result["keys_paid"].items():
        rows = result["by_trace"][name]
        best = [max(rows[label][at] for label in HISTORY) for at in columns]
        cells = [f"{own:.3f}, {most:.3f}" for own, most in zip(row, best, strict=True)]
        parts.append(f"| {name.removesuffix('.safetensors')} | {' | '.join(cells)} |")
    return "\n".join(parts).strip()


def fitted(result: Mapping[str, Any]) -> str:
    """The page's part of `nano/fit_foresight.py`: what was tried, and kept of validation
    contexts.
    """
    budgets = [f"{budget:.0%}" for budget in result["budgets"]]
    lengths = ("8192", "32768", "131072", "524288")
    lines = [
        f"| mass kept | {' | '.join(budgets)} | {' | '.join(f'5% of {n}' for n in lengths)} |",
        f"|---|{'---|' * (len(budgets) + len(lengths))}",
    ]
    at = result["budgets"].index(0.05)
    for name, rows in result["kept"].items():
        of_length = [
            np.mean([row[at] for key, row in rows.items() if key.startswith(f"{length}-")])
            for length in lengths
        ]
        cells = [f"{value:.3f}" for value in (*rows["mean"], *of_length)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    specs = RIVALS | OWN
    report: dict[str, Any] = {
        "command": "python benchmarks/foresight.py --out FILE TRACE...",
        "date": f"{datetime.datetime.now(datetime.UTC):%F %T}",
        "model": MODEL,
        "budgets": BUDGETS,
        "by_trace": {},
        "keys_paid": {},
    }
    for path in args.traces:
        found = kept(path, specs, BUDGETS)
        report["by_trace"][path.name] = {
            label: [None if value is None else round(value, 4) for value in row]
            for label, row in found.items()
        }
        paid = kept(path, OWN, tuple(PAID.values()))["foresight"]
        report["keys_paid"][path.name] = [None if x is None else round(x, 4) for x in paid]
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    by_trace = report["by_trace"].values()
    means = {
        label: np.nanmean(np.array([rows[label] for rows in by_trace], np.float64), axis=0)
        for label in specs
    }
    for label in sorted(means, key=lambda label: -np.nanmean(means[label])):
        print(f"{label:64s}", *(f"{value:.3f}" for value in means[label]))


if __name__ == "__main__":
    main()
