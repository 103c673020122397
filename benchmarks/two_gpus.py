"""Whole steps on two GPUs of one host, each with its requests and half of the experts, beside one
GPU's and the simulator's.

    python benchmarks/two_gpus.py [--seconds 100] [--out benchmarks/results/two-gpus-h200.json]
    python benchmarks/two_gpus.py --again benchmarks/results/two-gpus-h200.json

All layers of V4-Flash at full width, random weights, 16 of its 256 experts a layer on each GPU, as
the calibration of one GPU has them. *Alone* is one GPU with the requests of one rank and those 16
experts, which exchanges nothing. *Simulated* are that calibration's modules, with the exchange that
is timed here by itself before any step. *Planned* is what the preset h200 says of the deployment:
SGLang's kernels, and all experts. --again simulates anew what was measured; where a result holds
exchanges alone, steps that are still to be measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exec import POLICIES

from fmsim import trace as traces
from fmsim.exec.measure.step_clock import StepClock
from fmsim.exec.measure.timing import captured
from fmsim.exec.model.exchange import Exchange, joined
from fmsim.exec.model.weights.synthetic import model_bytes, synthetic_model
from fmsim.exec.runs import synthetic as synthetic_run
from fmsim.experiments.workers.parallel import as_they_end
from fmsim.files import write_text
from fmsim.geometry import deepseek_v4_named
from fmsim.hw import load_hardware
from fmsim.hw.deployment import Deployment
from fmsim.hw.spec import Hardware, replace_figure
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import ModelMemory, spread

GPUS = 2
CALIBRATED, PLANNED = "h200-1gpu", "h200"
BATCHES = (2, 16, 64, 128)  # of both GPUs
RUNS = ("full", "lsa", "lru")
RUNS_TIMED = 30  # of an exchange by itself, each of 20 one after another


class Setting:
    """What every process knows: the trace, and the model."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.device = given, given.device
        self.geometry = replace(deepseek_v4_named(given.model), n_experts=GPUS * given.experts)
        found = traces.read(given.trace)
        self.replayer = Replayer(found, memory=ModelMemory(self.geometry), max_steps=given.steps)
        self.layer_map = spread(found.n_layers, self.geometry.n_csa)

    @cached_property
    def weight_bytes(self) -> int:
        """Of one GPU."""
        return model_bytes(self.geometry, self.given.experts)

    def step_s(self, name: str, model: Any, batch: int, exchange: Exchange | None) -> np.ndarray:
        """Of the steps after the warm-up."""
        run = synthetic_run.run(
            name,
            lambda: registry.build(POLICIES[name]),
            self.replayer,
            self.geometry,
            self.layer_map,
            model,
            self.device,
            batch,
            exchange=exchange,
        )
        return run.timeline().step_s

    def warm_up_steps(self, name: str) -> int:
        """Until the first decision has come, as `step_s` leaves them out."""
        cadence = registry.build(POLICIES[name]).params.cadence
        return (cadence if cadence > 1 else 0) + synthetic_run.WARM_UP_STEPS

    def simulated_s(self, name: str, hw: Hardware, batch: int, after: int) -> float:
        """The median step; all requests share one mirror, as in the engine."""
        shared = replace_figure(hw, "host_bytes", hw.host_bytes.value * batch)
        ledger = self.replayer.run(registry.build(POLICIES[name]))
        whole = simulate(ledger, self.geometry, shared, self.layer_map, batch, one_text=True)
        return float(np.median(whole.after(after).step_s))


def exchange_ms(exchange: Exchange, batch: int, width: int) -> tuple[float, float]:
    """Of a layer's activations bfloat16 [batch, width]: to all, and the sums back; in a graph.

    Both ranks must run them equally often, however long that takes.
    """
    every = torch.zeros(batch, width, dtype=torch.bfloat16, device=exchange.device)
    own = every[: batch // exchange.count].contiguous()
    found = []
    for work, given in ((exchange.gather, own), (exchange.reduce_scatter, every)):

        def many(work=work, given=given) -> None:
            for _ in range(20):
                work(given)

        run = captured(many) if exchange.device.type == "cuda" else many
        clock = StepClock(exchange.device)
        for _ in range(RUNS_TIMED):
            with clock.step(lambda: torch.zeros(())), clock.recall():
                run()
        found.append(float(np.median(clock.figures()[0])) / 20 * 1e3)
    return found[0], found[1]


def of_rank(given: argparse.Namespace, meeting: Path, rank: int) -> list[dict[str, Any]]:
    """Measure as one of the ranks; the first says what it finds."""
    start_s = time.monotonic()
    with joined(meeting, rank, GPUS, given.device) as exchange, torch.inference_mode():
        setting = Setting(given)
        found: list[dict[str, Any]] = []

        def tell(row: dict[str, Any]) -> None:
            if rank == 0:
                found.append(row)
                print(f"{time.monotonic() - start_s:5.0f} s  {json.dumps(row)}", flush=True)
                write_text(given.out.with_suffix(".part.json"), json.dumps(found))

        for batch in given.batch or BATCHES:
            gather_ms, scatter_ms = exchange_ms(exchange, batch, setting.geometry.hidden_size)
            tell({"exchange": batch, "gather_ms": gather_ms, "scatter_ms": scatter_ms})
        of = (setting.geometry, given.device, setting.weight_bytes, 0)
        split, _ = synthetic_model(*of, exchange)
        whole, _ = synthetic_model(replace(of[0], n_experts=given.experts), *of[1:])
        for batch in given.batch or BATCHES:
            for name in given.policy or RUNS:
                spent_s = int(time.monotonic() - start_s)
                if -exchange.least(-spent_s) > given.seconds:
                    continue
                steps_s = setting.step_s(name, split, batch, exchange)
                alone_s = setting.step_s(name, whole, batch // GPUS, None)
                tell(
                    {
                        "policy": name,
                        "batch": batch,
                        "warm_up_steps": given.steps - len(steps_s),
                        "step_s": float(np.median(steps_s)),
                        "step_s_p10_p90": np.quantile(steps_s, (0.1, 0.9)).tolist(),
                        "alone_s": float(np.median(exchange.greatest(alone_s))),
                    }
                )
    return found


def measured(given: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        work = partial(of_rank, given, Path(folder) / "meeting")
        start = "spawn" if given.device == "cuda" else "fork"
        parts = list(as_they_end(work, range(GPUS), GPUS, start))
    return next(part for part in parts if part)


def with_simulated(setting: Setting, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measured steps, each beside the simulator's."""
    exchanged = {
        row["exchange"]: (row["gather_ms"] + row["scatter_ms"]) / 2
        for row in rows
        if "exchange" in row
    }
    one = load_hardware(CALIBRATED)
    kernels = {
        model: table.model_copy(update={"all_reduce_batch_ms": exchanged})
        for model, table in one.kernels.items()
    }
    two = Deployment(n_gpus=GPUS, dp=GPUS)
    of_engine = one.model_copy(update={"kernels": kernels}).deployed(two)
    planned = load_hardware(PLANNED).deployed(two)
    if all("exchange" in row for row in rows):
        rows = rows + [
            {"policy": name, "batch": batch, "warm_up_steps": setting.warm_up_steps(name)}
            for batch in BATCHES
            for name in RUNS
        ]
    for row in rows:
        if "policy" in row:
            what = (row["policy"], row["batch"], row["warm_up_steps"])
            row["simulated_s"] = setting.simulated_s(what[0], of_engine, *what[1:])
            row["planned_s"] = setting.simulated_s(what[0], planned, *what[1:])
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("traces/nano-128k-needles.safetensors"))
    parser.add_argument("--model", default="v4-flash", help="a preset, or a folder")
    parser.add_argument("--experts", type=int, default=16, help="a layer, on each GPU")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, action="append", help="of both; repeat for more")
    parser.add_argument("--policy", action="append", choices=sorted(POLICIES), help="likewise")
    parser.add_argument("--seconds", type=float, default=600, help="begin no run after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--again", type=Path, help="a result, to be simulated anew")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "two-gpus-h200.json"
    )
    given = parser.parse_args()
    if given.again is not None:
        result = json.loads(given.again.read_text())
        given.steps, given.out = result["steps"], given.again
        given.trace = given.trace.with_name(result["trace"])
    else:
        on_gpu = given.device == "cuda"
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": f"{GPUS} x {torch.cuda.get_device_name() if on_gpu else 'CPU'}",
            "torch": torch.__version__,
            "command": f"python benchmarks/two_gpus.py --seconds {given.seconds:g}",
            "model": given.model,
            "experts_a_gpu": given.experts,
            "trace": given.trace.name,
            "steps": given.steps,
            "rows": measured(given),
        }
    setting = Setting(given)
    result["context_tokens"] = setting.replayer.header.prompt_tokens
    result["calibration"] = load_hardware(CALIBRATED).kernel_source
    result["rows"] = list(with_simulated(setting, result["rows"]))
    write_text(given.out, json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        if "policy" in row:
            times = ("step_s", "alone_s", "simulated_s", "planned_s")
            shown = "  ".join(
                f"{name[:-2]} {row[name] * 1e3:6.2f} ms" for name in times if name in row
            )
            print(f"{row['policy']:6} batch {row['batch']:3}  {shown}")


if __name__ == "__main__":
    main()
