"""The second witness beside nano: the ladder of policies at equal GPU bytes.

    python benchmarks/witness.py ladder --checkpoint INDEXER --native NATIVE --out FILE TRACE...
    python benchmarks/witness.py best INDEXER...
    python benchmarks/witness.py traits TRACE... --out FILE
    python benchmarks/witness.py gather FOLDER --out benchmarks/results/witness.json

`ladder` replays policies on traces; each trace in its own model's bytes: nano's as V4-Flash, a
witness' by its header. `best` names the memory indexer that kept most of the traces that it was
chosen by. `traits` says how selections differ. `gather` puts together what
`benchmarks/witness.sh` left in its folder, and the ladders and traits of nano's traces there.
The mass kept is over windows from the second on: `all` of what was selected, and `far`, of tokens
that are neither the first four nor among the newest 128. A dense model's attention goes mostly to
those, as a DeepSeek-V4's goes to its window.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import BudgetTooSmall, FmsimError
from fmsim.experiments.workers.parallel import in_parallel
from fmsim.files import write_text
from fmsim.geometry import PRESETS, Geometry
from fmsim.geometry.described import from_description
from fmsim.indexer import checkpoint
from fmsim.policies import registry
from fmsim.policies.guard import Guarded
from fmsim.replay.decode_loop import DecodeLoop
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, spread
from fmsim.trace import TAU, Trace, read

BUDGETS = ("1%", "2%", "3%", "5%", "10%", "5% gpu", "10% gpu", "12.5% gpu")
NEAR_TOKENS, FIRST_TOKENS = 128, 4
HELD = {"policy": "lru", "cadence": 64, "on_miss": "mask"}


def specs(indexer: Path | None, native: Path | None, trace: Trace) -> dict[str, dict[str, Any]]:
    """Policies by label; `indexer` is the memory indexer (nano's if None), `native` the model's own
    indexers as such a file.

    What keeps the newest entries keeps those of 128 tokens, a V4's window; `foresight` has 4
    entries by default, since that window is there beside them.
    """
    scored = {"checkpoint": indexer}
    near = {"recent_entries": NEAR_TOKENS // trace.header.entry_tokens}
    found: dict[str, dict[str, Any]] = {
        "recency": {"policy": "recency"},
        "snapkv": {"policy": "snapkv"},
        "h2o": {"policy": "h2o"},
        "lru held": HELD,
        "lru held, seeded": HELD | {"prompt_history": True},
        "lsa": {"policy": "lsa"} | scored | near,
        "foresight": {"policy": "foresight"} | scored,
        "foresight, 128 newest": {"policy": "foresight"} | scored | near,
        "oracle, one set": {"policy": "oracle", "scope": "shared"},
        "oracle": {"policy": "oracle"},
    }
    if native is not None:
        own = {"checkpoint": native, "layers": tuple(trace.csa_numbers), "scope": "per_layer"}
        own |= {"sees": "all", "stale": False}
        found["native held"] = {"policy": "lsa"} | own | near
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
            # of no consequence: only bytes of KV are counted
            **dict.fromkeys(("hidden_size", "n_heads", "head_dim", "parameters"), 1),
        },
        header.model.name,
    )


class Ladder:
    """One trace, replayed in its own model's bytes."""

    def __init__(self, path: Path) -> None:
        trace = read(path)
        geometry = geometry_of(trace)
        memory = ModelMemory(geometry, spread(trace.n_layers, geometry.n_csa))
        self.replayer = Replayer(trace, memory=memory)
        header, ids = trace.header, self.replayer.ids
        newest = header.prompt_tokens + np.arange(len(ids))[:, None, None]
        last = (ids + 1) * header.entry_tokens - 1  # tokens of the entries
        self.far = (last >= FIRST_TOKENS) & (last <= newest - NEAR_TOKENS)
        self.later = slice(header.tau, None)  # the first window is left out

    def kept(self, spec: Mapping[str, Any]) -> dict[str, float] | str:
        """Shares of the mass, or why the policy cannot be."""
        replayer = self.replayer
        try:
            source = replayer.source(Guarded(registry.build(dict(spec))))
            loop = DecodeLoop([source.book], source)
            for _ in range(replayer.n_steps):
                loop.advance()
        except BudgetTooSmall:
            return "too small"
        except FmsimError as error:
            return str(error)
        there = source.paged.by_entry(source.attended, replayer.n_layers)[self.later]
        found = {}
        for name, which in (("all", replayer.ids >= 0), ("far", self.far)):
            mass = np.where(which, replayer.mass, 0)[self.later]
            found[name] = round(float((mass * there).sum() / mass.sum()), 4)
        return found


def ladder(
    path: Path, indexer: Path | None, native: Path | None, budgets: Sequence[str]
) -> dict[str, dict[str, dict[str, float] | str]]:
    """By policy and budget what is kept."""
    one = Ladder(path)
    named = specs(indexer, native, one.replayer.trace)
    work = [(label, budget) for label in named for budget in budgets]
    rows = in_parallel(
        lambda index: one.kept(named[work[index][0]] | {"budget": work[index][1]}), len(work)
    )
    found: dict[str, dict[str, dict[str, float] | str]] = {label: {} for label in named}
    for (label, budget), row in zip(work, rows, strict=True):
        found[label][budget] = row
    return found


def traits(path: Path) -> dict[str, float]:
    """How a trace's attention lies, means over steps and layers. Shares of the mass on selected
    entries: of the heaviest eighth of the top-k, and of the first four and the newest 128 tokens.
    The share of a step's entries that the step before selected too. The share of all entries that a
    window of 64 steps selects.
    """
    one = Ladder(path)
    ids, mass, steps = one.replayer.ids, one.replayer.mass, one.replayer.n_steps
    descending = -np.sort(-mass, axis=-1)
    again, union = [], []
    for layer in range(ids.shape[1]):
        rows = [row[row >= 0] for row in ids[:, layer]]
        again += [len(np.intersect1d(row, before)) / len(row) for before, row in pairwise(rows)]
        union += [
            len(np.unique(np.concatenate(rows[first : first + TAU]))) / one.replayer.entries[first]
            for first in range(0, steps - TAU + 1, TAU)
        ]
    found = {
        "heaviest_eighth": descending[..., : ids.shape[2] // 8].sum() / mass.sum(),
        "near": 1 - np.where(one.far, mass, 0).sum() / mass.sum(),
        "selected_before": np.mean(again),
        "union_of_window": np.mean(union),
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def told(args: argparse.Namespace) -> None:
    rows = {path.stem: traits(path) for path in args.traces}
    write_text(args.out, json.dumps(rows, indent=1) + "\n")


def gathered(args: argparse.Namespace) -> None:
    """FOLDER has positions.json, and of each length found-NAME.json, indexers-NAME.jsonl,
    ladder-NAME.json, traits-NAME.json and memory-NAME.safetensors; "nano" has the ladder and the
    traits alone.
    """
    folder: Path = args.folder
    read_json = lambda name: json.loads((folder / name).read_text())
    report: dict[str, Any] = {
        "command": "benchmarks/witness.sh; python benchmarks/witness.py gather FOLDER",
        "positions": read_json("positions.json"),
        "lengths": {},
        "nano": {"ladder": read_json("ladder-nano.json"), "traits": read_json("traits-nano.json")},
    }
    found = {path: read_json(path.name) for path in folder.glob("found-*.json")}
    for path in sorted(found, key=lambda path: found[path]["context"]):
        name = path.stem.removeprefix("found-")
        lines = (folder / f"indexers-{name}.jsonl").read_text().splitlines()
        losses = [json.loads(line) for line in lines]
        report["lengths"][name] = {
            "losses": [{key: line[key] for key in ("step", "seconds", "loss")} for line in losses],
            "found": found[path],
            "memory_indexer": checkpoint.load(folder / f"memory-{name}.safetensors").training,
            "ladder": read_json(f"ladder-{name}.json"),
            "traits": read_json(f"traits-{name}.json"),
        }
    write_text(args.out, json.dumps(report, indent=1) + "\n")


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
        rows = ladder(path, args.checkpoint, args.native, BUDGETS)
        report["by_trace"][path.stem] = rows
        write_text(args.out, json.dumps(report, indent=1) + "\n")
        for label, row in rows.items():
            kept = [each if isinstance(each, str) else each["far"] for each in row.values()]
            print(f"{path.stem} {label:20s}", *kept, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("ladder")
    command.add_argument("traces", nargs="+", type=Path)
    command.add_argument("--checkpoint", type=Path)
    command.add_argument("--native", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=replayed)
    command = commands.add_parser("traits")
    command.add_argument("traces", nargs="+", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=told)
    command = commands.add_parser("gather")
    command.add_argument("folder", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=gathered)
    command = commands.add_parser("best")
    command.add_argument("indexers", nargs="+", type=Path)
    command.set_defaults(do=lambda args: print(best(args.indexers)))
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
