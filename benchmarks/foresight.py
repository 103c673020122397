"""How `foresight`'s numbers were chosen: the mass that it keeps on traces of the training text.

    python benchmarks/foresight.py --out results/foresight.json TRACE...

The traces are recorded by `python -m fmsim.nano.measure.record_traces --split train`. Every point
of the grid is replayed on each trace at each budget; the mass kept is over windows from the second
on, and the score of a choice is its mean over traces and budgets. Rivals stand beside it. Nothing
is read of the held-out traces.
"""

from __future__ import annotations

import argparse
import datetime
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.experiments.parallel import in_parallel
from fmsim.geometry import PRESETS
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, spread
from fmsim.sim.windows import window_sums
from fmsim.trace import read

MODEL = "v4-flash"
BUDGETS = ("10% gpu", "12.5% gpu", "25% gpu", "5%")
GRID = {
    "layers": (None, (4,)),
    "unit": (0.003, 0.01),
    "weight": (1.0, 1.5),
    "fade": (0.5,),
    "prompt_share": (0.15, 1.0),
}
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


def choices() -> dict[str, dict[str, Any]]:
    found = {}
    for values in product(*GRID.values()):
        given = dict(zip(GRID, values, strict=True))
        label = " ".join(f"{key}={value}" for key, value in given.items())
        found[label] = {"policy": "foresight"} | given
    return found


def kept(path: Path, specs: dict[str, dict[str, Any]]) -> dict[str, list[float | None]]:
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

    work = [(label, budget) for label in specs for budget in BUDGETS]
    found = list(in_parallel(one, len(work)))
    count = len(BUDGETS)
    return {label: found[place * count : (place + 1) * count] for place, label in enumerate(specs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    specs = RIVALS | choices()
    by_trace = {path.name: kept(path, specs) for path in args.traces}
    rows = []
    for label in specs:
        figures = np.array([by_trace[name][label] for name in by_trace], dtype=np.float64)
        by_budget = [float(value) for value in np.nanmean(figures, axis=0)]
        rows.append({"policy": label, "kept": by_budget, "mean": float(np.mean(by_budget))})
    rows.sort(key=lambda row: -row["mean"])
    date = f"{datetime.datetime.now():%F %T}"
    report = {"date": date, "model": MODEL, "budgets": BUDGETS, "rows": rows, "by_trace": by_trace}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in [*rows[:12], *(row for row in rows[12:] if row["policy"] in RIVALS)]:
        print(f"{row['policy']:64s}", *(f"{value:.3f}" for value in row["kept"]))


if __name__ == "__main__":
    main()
