"""How far a live engine that masks is from the replay of what it recorded, on nano.

    python benchmarks/live_gap.py [--context 8192 --context 32768] [--steps 256] [--device cpu]
    [--out FILE]

Where a policy masks and sees resident entries alone, the engine selects top-k anew among the
resident ones, and the policy learns from those. A trace knows what was selected among all entries.
So the replay shows the policy what was selected *and* resident: fewer entries than the engine's.
Each policy decodes questions about a text once, live; its recording is replayed with the same
switches, and once with `sees: all`.

`pages_shared`: of the resident pages of a step, how many are resident in both, a mean over steps
and layers. `mass_kept`: of the attention mass on selected entries, what was resident.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmsim.exec.decode.engine import Engine
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.model.weights.loader import load_model
from fmsim.exec.runs.record import trace_header, trace_of
from fmsim.exec.runs.stream import Stream
from fmsim.nano.question import TEXT, haystack, questions
from fmsim.nano.tokenizer import MODEL_FOLDER
from fmsim.policies import registry
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.sim import metrics

POLICIES: dict[str, dict[str, Any]] = {
    "lru held": {"policy": "lru", "on_miss": "mask", "cadence": 64, "budget": "2x topk"},
    "h2o": {"policy": "h2o", "budget": "2x topk"},
}


def plan_of(stream: Stream, steps: int) -> list[int | None]:
    """What each step processes: a given token, or None for the model's own choice."""
    plan: list[int | None] = []
    for turn in stream.turns:
        plan += [*map(int, turn.forced), *[None] * turn.generate]
    return plan[:steps]


def live(
    prompt: Prompt, spec: dict[str, Any], plan: Sequence[int | None]
) -> tuple[Engine, np.ndarray]:
    """A decode; -> also the pages in the slots at the end of each step, [T, G, S]."""
    engine = Engine(prompt, registry.build(spec))
    slots = []
    for token in plan:
        engine.step([token])
        slots.append(engine.request.residency.slots.cpu().numpy().copy())
    return engine, np.stack(slots)


def replayed(replayer: Replayer, spec: dict[str, Any]) -> tuple[Ledger, np.ndarray]:
    slots: list[np.ndarray] = []
    ledger = replayer.run(
        registry.build(spec), lambda manager: slots.append(manager.residency.slots.copy())
    )
    return ledger, np.stack(slots)


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """Of the resident pages in `one`, how many are in `other`: a mean over steps and groups."""
    parts = []
    for mine, theirs in zip(one.reshape(-1, one.shape[2]), other.reshape(-1, other.shape[2])):
        kept = mine[mine >= 0]
        parts.append(np.isin(kept, theirs).mean())
    return float(np.mean(parts))


def figures(ledger: Ledger) -> dict[str, float]:
    layers = range(ledger.n_layers)
    return {
        "mass_kept": metrics.kept(ledger, layers)["mass_kept"],
        "hit_rate": metrics.hits(ledger, layers)["hit_rate"],
    }


def measure(context: int, steps: int, device: str) -> dict[str, Any]:
    model = load_model(MODEL_FOLDER, device)
    stream = questions(context, steps, 0, haystack())
    plan = plan_of(stream, steps)
    text = stream.prompt.tolist()
    start_s = time.perf_counter()
    prompt = Prompt(model, text, len(plan))
    print(f"{context} tokens read in {time.perf_counter() - start_s:.0f} s", flush=True)
    rows = {}
    for name, spec in POLICIES.items():
        engine, slots = live(prompt, spec, plan)
        header = trace_header(model, len(text), name="nano", seed=0, sha256=None)
        trace = trace_of(engine.request, header, [token is not None for token in plan])
        replayer = Replayer(trace)
        row = {"live": figures(engine.ledger())}
        for seen in ("resident", "all"):
            ledger, pages = replayed(replayer, spec | {"sees": seen})
            row[f"replay, sees {seen}"] = figures(ledger) | {"pages_shared": shared(slots, pages)}
        rows[name] = row
        print(name, json.dumps(row), flush=True)
    return {"context": len(text), "steps": len(plan), "policies": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, action="append", help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    contexts = [measure(n, given.steps, given.device) for n in given.context or (8192, 32768)]
    name = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    found = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": f"{name}, {os.cpu_count()} cores",
        "model": "nano, float32",
        "prompt": TEXT,
        "policies": POLICIES,
        "contexts": contexts,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
