"""The second witness beside nano: the ladder of policies at equal GPU bytes.

    python benchmarks/witness.py ladder --checkpoint INDEXER --native NATIVE --out FILE TRACE...
    python benchmarks/witness.py best INDEXER...
    python benchmarks/witness.py gather FOLDER --out benchmarks/results/witness.json

`ladder` replays policies on traces; each trace in its own model's bytes: nano's as V4-Flash, a
witness' by its header. `best` names the memory indexer that kept most of the traces that it was
chosen by. `gather` puts together what `benchmarks/witness.sh` left in its folder.
The mass kept is over windows from the second on.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import BudgetTooSmall, FmsimError
from fmsim.experiments.parallel import in_parallel
from fmsim.files import write_text
from fmsim.geometry import PRESETS, Geometry
from fmsim.geometry.described import from_description
from fmsim.indexer import checkpoint
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, spread
from fmsim.sim.windows import window_sums
from fmsim.trace import Trace, read

BUDGETS = ("5%", "10%", "10% gpu", "12.5% gpu", "25% gpu")
HELD = {"policy": "lru", "cadence": 64, "on_miss": "mask"}
PART = "witness"  # of benchmarks/results/witness.md


def specs(indexer: Path | None, native: Path | None) -> dict[str, dict[str, Any]]:
    """Policies by label; `indexer` is the memory indexer (nano's if None), `native` the model's
    own indexers as such a file.
    """
    scored = {"checkpoint": indexer}
    found: dict[str, dict[str, Any]] = {
        "recency": {"policy": "recency"},
        "snapkv": {"policy": "snapkv"},
        "h2o": {"policy": "h2o"},
        "lru held": HELD,
        "lru held, seeded": HELD | {"prompt_history": True},
        "lsa": {"policy": "lsa"} | scored,
        "foresight": {"policy": "foresight"} | scored,
        "oracle, one set": {"policy": "oracle", "scope": "shared"},
        "oracle": {"policy": "oracle"},
    }
    if native is not None:
        own = {"checkpoint": native, "scope": "per_layer", "sees": "all", "stale": False}
        found["native held"] = {"policy": "lsa"} | own
    return found


def geometry_of(trace: Trace) -> Geometry:
    """Whose bytes a budget is of: V4-Flash's for nano; a witness' layers as its header has them."""
    header = trace.header
    if header.source != "dense_indexed":
        return PRESETS["v4-flash"]
    assert header.layout is not None
    layer = {
        "kind": "sparse",
        "entry_tokens": header.entry_tokens,
        "entry_bytes": header.layout.entry_bytes,
        "key_bytes": header.layout.key_bytes,
        "topk": header.topk,
    }
    return from_description(
        {
            "layers": [{"repeat": trace.n_layers} | layer],
            "hidden_size": header.geometry["hidden_size"],
            "n_heads": header.geometry["n_heads"],
            "head_dim": header.geometry["head_dim"],
            "parameters": 1,  # of no consequence: only bytes of KV are counted
        },
        header.model.name,
    )


def ladder(
    path: Path, named: Mapping[str, dict[str, Any]], budgets: Sequence[str]
) -> dict[str, list[float | str]]:
    """By label the mass kept at each budget, or why a policy cannot be."""
    trace = read(path)
    geometry = geometry_of(trace)
    memory = ModelMemory(geometry, spread(trace.n_layers, geometry.n_csa))
    replayer = Replayer(trace, memory=memory)
    alike = np.ones(trace.n_layers)
    work = [(label, budget) for label in named for budget in budgets]

    def one(index: int) -> float | str:
        label, budget = work[index]
        try:
            ledger = replayer.run(registry.build(named[label] | {"budget": budget}))
        except BudgetTooSmall:
            return "too small"
        except FmsimError as error:
            return str(error)
        part, whole = (
            window_sums(ledger, mass, alike)[1:] for mass in (ledger.mass_kept, ledger.mass_total)
        )
        return round(float(part.sum() / whole.sum()), 4)

    found = list(in_parallel(one, len(work)))
    count = len(budgets)
    return {label: found[at * count : (at + 1) * count] for at, label in enumerate(named)}


def best(paths: Sequence[Path]) -> Path:
    """By the mass that the best tenth of the entries has, of the traces held out in training."""
    return max(paths, key=lambda path: checkpoint.load(path).training["mass_kept"]["0.1"])


def replayed(args: argparse.Namespace) -> None:
    report: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.UTC):%F %T}",
        "budgets": BUDGETS,
        "by_trace": {},
    }
    for path in args.traces:
        rows = ladder(path, specs(args.checkpoint, args.native), BUDGETS)
        report["by_trace"][path.stem] = rows
        write_text(args.out, json.dumps(report, indent=1) + "\n")
        for label, row in rows.items():
            print(f"{path.stem} {label:20s}", *row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("ladder")
    command.add_argument("traces", nargs="+", type=Path)
    command.add_argument("--checkpoint", type=Path)
    command.add_argument("--native", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=replayed)
    command = commands.add_parser("best")
    command.add_argument("indexers", nargs="+", type=Path)
    command.set_defaults(do=lambda args: print(best(args.indexers)))
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
