"""How fast the serving simulation runs: an hour of simulated traffic with 60 concurrent requests.

    python benchmarks/serve.py [--trace traces/nano-500k-needles.safetensors] [--hours 1] [--out
    benchmarks/results/serve.json]

Sixty clients in a closed loop, prompts of 512K tokens, on 8 x H20. Three policies, one after
another: the full cache, whose spans are long; a lookahead policy, in which nearly every step begins
some request's window; and LRU, in which every step has misses. Times are of one process; the replay
of the trace comes before and is not in them. The digest is of all that a run reports; it is the
same every time.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from fmsim.geometry import PRESETS
from fmsim.hw import load_hardware
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import ClosedLoop, Server
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.trace import read

ROOT = Path(__file__).parents[1]
REQUESTS = 60
POLICIES = {
    "full": {"policy": "full"},
    "lookahead": {"policy": "oracle", "budget": "9.375%", "granularity": 64, "scope": "shared"},
    "lru": {"policy": "lru", "budget": "2x topk"},
}


def timed(demand: Demand, hours: float) -> dict[str, Any]:
    """One simulation: its wall and CPU seconds, its size, and a digest of all that it reports."""
    workload = ClosedLoop(
        kind="closed_loop",
        requests=REQUESTS,
        ramp_s=60,
        prompt_tokens=524_288,
        output_tokens=[500, 2000],
        duration_s=3600 * hours,
    )
    # Four times the GPU's and the host's memory, so that all sixty run at once under every policy.
    hw = load_hardware("h20")
    doubled = {
        name: getattr(hw, name).model_copy(update={"value": 4 * getattr(hw, name).value})
        for name in ("hbm_bytes", "host_bytes")
    }
    server = ServerRun(
        hw.model_copy(update=doubled),
        PRESETS["v4-flash"],
        demand,
        Server(prefill="done"),
        RequestGenerator(workload),
    )
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    server.run()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    row = summary(server)
    return {
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "simulated_s": round(row["simulated_s"], 1),
        "held": row["held"],
        "requests": row["requests"]["finished"],
        "tokens": row["tokens"],
        "spans": len(server.log.samples),
        "sha256": hashlib.sha256(json.dumps(row).encode()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--trace", type=Path, default=ROOT / "traces" / "nano-500k-needles.safetensors"
    )
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "serve.json"
    )
    given = parser.parse_args()
    geometry = PRESETS["v4-flash"]
    replayer = Replayer(read(given.trace), memory=ModelMemory(geometry))
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": (
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python"
            f" {platform.python_version()}, numpy {np.__version__}, SimPy {simpy.__version__}"
        ),
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "trace": given.trace.name,
        "concurrent_requests": REQUESTS,
        "runs": {},
    }
    for name, spec in POLICIES.items():
        demand = Demand(replayer.run(registry.build(dict(spec))), geometry)
        row = result["runs"][name] = timed(demand, given.hours)
        print(
            f"{name:10} {row['simulated_s']:,.0f} s simulated in {row['wall_s']} s, {row['cpu_s']}"
            f" CPU s; {row['tokens']:,} tokens, {row['spans']:,} spans",
            flush=True,
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
