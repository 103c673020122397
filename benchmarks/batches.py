"""A whole decode step at batches from 1 to 256 on one GPU: no batch's step may stand out.

    python benchmarks/batches.py [--trace FILE] [--policy h2o] [--seconds 120] [--out FILE.json]

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

BATCHES = (1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 65, 96, 128, 129, 144, 192, 256)
MOST = 1.25  # of what its neighbours' steps say


def of_neighbours(steps_s: dict[int, float]) -> dict[int, float]:
    """Each batch's step over the straight line between its neighbours'."""
    batches, found = sorted(steps_s), {}
    for low, batch, high in zip(batches, batches[1:], batches[2:], strict=False):
        share = (batch - low) / (high - low)
        line_s = steps_s[low] + share * (steps_s[high] - steps_s[low])
        found[batch] = steps_s[batch] / line_s
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("traces/nano-32k-needles.safetensors"))
    parser.add_argument("--policy", default="h2o", choices=sorted(POLICIES))
    parser.add_argument("--model", default="v4-flash", choices=sorted(PRESETS))
    parser.add_argument("--experts", type=int, default=16, help="a layer")
    parser.add_argument("--steps", type=int, default=24)
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
    high = False
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
            result["rows"].append({"activations": kind, "batch": batch, "step_s": steps_s[batch]})
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{kind:9} batch {batch:3}  {steps_s[batch] * 1e3:7.2f} ms", flush=True)
        for batch, share in of_neighbours(steps_s).items():
            row = next(
                row
                for row in result["rows"]
                if row["activations"] == kind and row["batch"] == batch
            )
            row["of_neighbours"] = share
            if share > MOST:
                high = True
                print(f"{kind}, batch {batch}: {share:.2f} times its neighbours'", flush=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.monotonic() - start_s:.0f} s in all; written to {given.out}")
    if high:
        sys.exit(f"a step costs more than {MOST} times what its neighbours' say")


if __name__ == "__main__":
    main()
