"""A whole decode step at batches from 1 to 256 on one GPU: no batch's step may stand out.

    python benchmarks/batches.py --rows bfloat16 [--policy h2o] [--seconds 120] [--out FILE.json]

All layers of V4-Flash at full width with random weights and few experts, as `exec.py` has them.
A step costs more than its neighbours' interpolation where a kernel changes its way; beyond 1.25
times of it the row is marked, and the run ends with an error. Rows with float8 activations and
without are apart.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exec import POLICIES

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.exec.model.projections import Float8Linear
from fmsim.exec.model.weights.synthetic import model_bytes, synthetic_model
from fmsim.exec.runs import synthetic as synthetic_run
from fmsim.geometry import PRESETS
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, spread

# Powers of two, and on both sides of what changes a kernel's way (fmsim/exec/kernels/tuning.py).
# The most telling first: a run that ends early has them.
BATCHES = (1, 256, 128, 129, 16, 17, 64, 65, 2, 4, 32, 8, 3, 15, 31, 192)
MOST = 1.25  # of what its neighbours' steps say


def of_neighbours(steps_s: dict[int, float]) -> dict[int, float]:
    """Each batch's step over the straight line between its neighbours'."""
    batches, found = sorted(steps_s), {}
    for low, batch, high in zip(batches, batches[1:], batches[2:], strict=False):
        share = (batch - low) / (high - low)
        line_s = steps_s[low] + share * (steps_s[high] - steps_s[low])
        found[batch] = steps_s[batch] / line_s
    return found


def with_neighbours(kind: str, steps_s: dict[int, float]) -> list[dict[str, Any]]:
    """Rows of an activations' kind, by batch."""
    shares = of_neighbours(steps_s)
    return [
        {"activations": kind, "batch": batch, "step_s": steps_s[batch]}
        | ({"of_neighbours": shares[batch]} if batch in shares else {})
        for batch in sorted(steps_s)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("traces/nano-32k-needles.safetensors"))
    parser.add_argument("--policy", default="h2o", choices=sorted(POLICIES))
    parser.add_argument("--model", default="v4-flash", choices=sorted(PRESETS))
    parser.add_argument("--experts", type=int, default=16, help="a layer")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, action="append", help="only this one; repeat for more")
    parser.add_argument(
        "--rows", choices=("float8", "bfloat16", "both"), default="both", help="activations"
    )
    parser.add_argument("--seconds", type=float, default=600, help="start no batch after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "batches.json"
    )
    given = parser.parse_args()
    start_s, geometry = time.monotonic(), PRESETS[given.model]
    found = traces.read(given.trace)
    replayer = Replayer(found, memory=ModelMemory(geometry), max_steps=given.steps)
    layer_map = spread(found.n_layers, geometry.n_csa)
    model, experts = synthetic_model(
        geometry, given.device, model_bytes(geometry, given.experts), seed=0
    )
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/batches.py --policy {given.policy} --rows {given.rows}",
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "model": given.model,
        "experts": experts,
        "context_tokens": replayer.header.prompt_tokens,
        "policy": given.policy,
        "rows": [],
    }
    print(f"{result['device']}, {experts} experts, {time.monotonic() - start_s:.0f} s", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("bfloat16", "float8") if given.rows == "both" else (given.rows,):
        for part in model.modules():
            if isinstance(part, Float8Linear):
                part.float8_rows = kind == "float8"
        steps_s: dict[int, float] = {}
        for batch in given.batch or BATCHES:
            if time.monotonic() - start_s > given.seconds:
                print(f"{kind}, batch {batch}: no time left", flush=True)
                continue
            try:
                run = synthetic_run.run(
                    given.policy,
                    lambda: registry.build(POLICIES[given.policy]),
                    replayer,
                    geometry,
                    layer_map,
                    model,
                    given.device,
                    batch,
                )
            except (FmsimError, torch.OutOfMemoryError) as error:
                print(f"{kind}, batch {batch}: {error}", flush=True)
                continue
            steps_s[batch] = float(np.median(run.timeline().step_s))
            at_s = time.monotonic() - start_s
            print(
                f"{at_s:3.0f} s  {kind:9} batch {batch:3}  {steps_s[batch] * 1e3:7.2f} ms",
                flush=True,
            )
            rows = [row for row in result["rows"] if row["activations"] != kind]
            result["rows"] = rows + with_neighbours(kind, steps_s)
            result["took_s"] = at_s
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    high = [row for row in result["rows"] if row.get("of_neighbours", 0.0) > MOST]
    for row in high:
        share = row["of_neighbours"]
        print(f"{row['activations']}, batch {row['batch']}: {share:.2f} times its neighbours'")
    print(f"{time.monotonic() - start_s:.0f} s in all; written to {given.out}")
    if high:
        sys.exit(f"a step costs more than {MOST} times what its neighbours' say")


if __name__ == "__main__":
    main()
