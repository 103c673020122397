"""How fast the serving simulation runs: an hour with 60 concurrent requests, and a recorded file.

    python benchmarks/serve.py [--trace traces/nano-500k-needles.safetensors] [--hours 1]
        [--recorded 100000] [--repeat 3] [--out benchmarks/results/serve.json]

Sixty clients in a closed loop, prompts of 512K tokens, on 8 x H20. Three policies, one after
another: the full cache, whose spans are long; a lookahead policy, in which nearly every step begins
some request's window; and LRU, in which every step has misses. Then 100,000 requests of a file in
Azure's format, 2.5 a second, of some 1,500 + 30 tokens, with prefill, on 8 x H200; the time to read
it is in. Times are the best of `--repeat`, of one process; the replay of the trace comes before and
is not in them. The digest is of all that a run reports; it is the same every time.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
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
from fmsim.sim.serving.spec import ClosedLoop, RequestFile, Server
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.trace import read

ROOT = Path(__file__).parents[1]
TRACE = ROOT / "traces" / "nano-500k-needles.safetensors"
REQUESTS = 60
POLICIES = {
    "full": {"policy": "full"},
    "lookahead": {"policy": "oracle", "budget": "9.375%", "granularity": 64, "scope": "shared"},
    "lru": {"policy": "lru", "budget": "2x topk"},
}


def an_hour(demand: Demand, hours: float) -> ServerRun:
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
    larger = {
        name: getattr(hw, name).model_copy(update={"value": 4 * getattr(hw, name).value})
        for name in ("hbm_bytes", "host_bytes")
    }
    return ServerRun(
        hw.model_copy(update=larger),
        PRESETS["v4-flash"],
        demand,
        Server(prefill="done"),
        RequestGenerator(workload),
    )


def of_a_file(demand: Demand, path: Path) -> ServerRun:
    workload = RequestFile(kind="file", file=path)
    return ServerRun(
        load_hardware("h200"), PRESETS["v4-flash"], demand, Server(), RequestGenerator(workload)
    )


def write_requests(path: Path, n_requests: int) -> None:
    """In Azure's format, with lengths and rate as its code trace of 2023 has them."""
    rng = np.random.default_rng(0)
    seconds = np.cumsum(rng.exponential(1 / 2.5, n_requests))
    prompts = np.clip(rng.lognormal(7.2, 0.9, n_requests), 3, 7437).astype(int)
    outputs = np.clip(rng.lognormal(2.6, 1.1, n_requests), 1, 1899).astype(int)
    start = datetime.datetime(2023, 11, 16)
    rows = [
        f"{start + datetime.timedelta(seconds=at_s)},{prompt},{output}"
        for at_s, prompt, output in zip(seconds.tolist(), prompts.tolist(), outputs.tolist())
    ]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")


def timed(make: Callable[[], ServerRun], repeat: int) -> dict[str, Any]:
    """One simulation: its wall and CPU seconds, its size, and a digest of all that it reports."""
    walls, cpus = [], []
    for _ in range(repeat):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        server = make()
        server.run()
        walls.append(time.perf_counter() - wall_s)
        cpus.append(time.process_time() - cpu_s)
    row = summary(server)
    return {
        "wall_s": round(min(walls), 2),
        "cpu_s": round(min(cpus), 2),
        "simulated_s": round(row["simulated_s"], 1),
        "held": row["held"],
        "requests": row["requests"]["finished"],
        "tokens": row["tokens"],
        "spans": len(server.log.samples),
        "sha256": hashlib.sha256(json.dumps(row).encode()).hexdigest(),
    }


def measured(
    trace: Path = TRACE, hours: float = 1.0, recorded: int = 100_000, repeat: int = 3
) -> dict[str, Any]:
    """The result file."""
    geometry = PRESETS["v4-flash"]
    replayer = Replayer(read(trace), memory=ModelMemory(geometry))
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": (
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python"
            f" {platform.python_version()}, numpy {np.__version__}, SimPy {simpy.__version__}"
        ),
        "command": "python benchmarks/serve.py",
        "trace": trace.name,
        "concurrent_requests": REQUESTS,
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.csv"
        write_requests(path, recorded)
        for name, spec in POLICIES.items():
            demand = Demand(replayer.run(registry.build(dict(spec))), geometry)
            runs = {name: lambda: an_hour(demand, hours)}
            if name == "full":
                runs[f"{name}, {recorded} recorded"] = lambda: of_a_file(demand, path)
            for title, make in runs.items():
                row = result["runs"][title] = timed(make, repeat)
                print(
                    f"{title:22} {row['simulated_s']:,.0f} s simulated in {row['wall_s']} s,"
                    f" {row['cpu_s']} CPU s; {row['tokens']:,} tokens, {row['spans']:,} spans",
                    flush=True,
                )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--recorded", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "serve.json"
    )
    given = parser.parse_args()
    result = measured(given.trace, given.hours, given.recorded, given.repeat)
    result["command"] = " ".join(["python benchmarks/serve.py", *sys.argv[1:]])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
