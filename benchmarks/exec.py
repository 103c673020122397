"""Policies on a whole model of random weights at a preset's size, on one GPU: KV bytes, step times,
tokens/s, beside what the simulator predicts.

    python benchmarks/exec.py [--trace traces/nano-500k-needles.safetensors] [--kv-budget 16] [--out
    benchmarks/results/exec.json]

Each policy runs for one request and for as many as the KV budget (GiB) holds (granularities for one
request only), all in one process with one set of weights. The prediction is the simulator's with a
preset that the same process calibrates, at contexts and batches other than those measured here, on
the modules of the same weights (as many experts a layer). Weights are float8 where the release's
are, and bfloat16 elsewhere. Times are medians over the steps after the second decision.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from step_profile import a_step

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.layout import KEY, LATENT
from fmsim.exec.measure import calibrate
from fmsim.exec.measure.kernel_cases import recall
from fmsim.exec.measure.sizes import Sizes
from fmsim.exec.measure.timing import captured, median_s
from fmsim.exec.model.weights.synthetic import experts_that_fit, synthetic_config
from fmsim.exec.runs import synthetic as synthetic_run
from fmsim.geometry import PRESETS, Geometry
from fmsim.hw.calibration import write_preset
from fmsim.hw.spec import load_hardware, replace_figure
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.replay.replayer import Replayer
from fmsim.sim import metrics
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import ModelMemory, allocation, spread

GIB = 2**30
# beside the KV budget: pages for recall ahead, block tables, scores of many requests
SPARE_BYTES = 4 * GIB
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "lsa": {"policy": "lsa", "budget": "4%"},
    "lru": {"policy": "lru"},
    "recency": {"policy": "recency", "budget": "10%"},
    "h2o": {"policy": "h2o", "budget": "10%"},
} | {
    f"{name}, pages of {entries}": {"policy": name, "budget": "10%", "granularity": entries}
    for name in ("lsa", "lru")
    for entries in (1, 4, 16, 64)
}
AT_MOST = (
    "full",
    "lsa",
    "lru",
    "recency",
    "h2o",
)  # whose largest batch in the KV budget is decoded too
SIZES = Sizes(
    contexts=(4096, 262_144, 1_048_576),
    batches=(1, 4, 16, 64, 128),
    gathers={584: (512, 4096, 32_768), 37_376: (96, 2000)},
    kernel_shapes=(),
)


class Setting:
    """The trace, the geometry and the weights that all runs share."""

    def __init__(self, path: Path, model: str, steps: int, kv_budget_bytes: int, device: str):
        self.path, self.device, self.geometry = path, device, PRESETS[model]
        found = traces.read(path)
        self.replayer = Replayer(
            found,
            memory=ModelMemory(self.geometry),
            max_steps=steps,
        )
        self.layer_map = spread(found.n_layers, self.geometry.n_csa)
        self.kv_bytes = kv_budget_bytes + SPARE_BYTES

    def load(self) -> None:
        """Fill the weights; after the calibration, which takes what memory holds before them for
        the runtime's.
        """
        self.weights, self.n_experts = synthetic_run.weights_for(
            self.geometry, self.device, self.kv_bytes, 0
        )

    def experts_to_be(self) -> int:
        """How many experts a layer `load` will find room for."""
        free_bytes = synthetic_run.free_weight_bytes(self.geometry, self.device, self.kv_bytes)
        return experts_that_fit(self.geometry, free_bytes)

    def request_bytes(self, make: Callable[[], Policy]) -> int:
        return allocation(self.replayer.run(make()), self.geometry).total

    def kinds(self, run: synthetic_run.SyntheticRun) -> np.ndarray:
        """What sets each step apart: a decision, an entry that closed before it, or nothing."""
        entries, cadence = self.replayer.entries[: self.replayer.n_steps], run.policy.params.cadence
        closed = np.diff(entries, prepend=entries[0]) > 0
        decides = (np.arange(len(entries)) % cadence == 0) & (cadence > 1)
        return np.where(decides, "decision", np.where(closed, "entry closed", "other"))

    def measured(self, label: str, make: Callable[[], Policy], batch: int) -> dict[str, Any]:
        run = synthetic_run.run(
            label,
            make,
            self.replayer,
            self.geometry,
            self.layer_map,
            self.weights,
            self.device,
            batch,
        )
        row = synthetic_run.report(
            [run],
            self.replayer,
            self.geometry,
            self.layer_map,
            self.n_experts,
            self.device,
            self.path.name,
        )
        about, figures = row["scenario"]["details"][label], row["policies"][0]
        step_s = run.outcome.step_s[run.warm_up_steps :]
        kinds = self.kinds(run)[run.warm_up_steps :]
        return {
            "policy": label,
            "batch": batch,
            "gpu_bytes": run.gpu_bytes,
            "gpu_ratio": figures["gpu_ratio"],
            "spare_bytes": about["spare_bytes"],
            "open_bytes": about["open_bytes"],
            "mass_kept": figures["mass_kept"],
            "step_p50_s": figures["step_s"]["p50"],
            "step_p99_s": figures["step_s"]["p99"],
            "step_mean_s_of": {
                kind: float(step_s[kinds == kind].mean()) for kind in np.unique(kinds)
            },
            "tokens_per_s": batch * len(step_s) / float(step_s.sum()),
            "h2d_bytes_per_step": run.outcome.h2d_bytes / self.replayer.n_steps,
            "recall_wait_s": float(run.outcome.recall_wait_s[run.warm_up_steps :].sum()),
        }


def calibrated(setting: Setting, experts: int, folder: Path) -> Path:
    """A preset of this GPU for the simulator, with the experts that the weights will have."""
    geometry: Geometry = setting.geometry
    config, path = synthetic_config(geometry, experts), folder / "here.yaml"
    write_preset(
        calibrate.measure(
            geometry, config, (LATENT, KEY), setting.device, SIZES, 0, lambda line: None
        ),
        path,
    )
    return path


def predicted(
    setting: Setting, hardware: Path, batch: int, make: Callable[[], Policy]
) -> dict[str, Any]:
    """What the simulator says of the same policy, batch and steps on the calibrated preset, with as
    many experts as the weights have.
    """
    geometry, preset = (
        replace(setting.geometry, n_experts=setting.n_experts),
        load_hardware(hardware.name, hardware.parent),
    )
    # All requests follow one trace here and share its mirror, where the simulator counts one for
    # each.
    preset = replace_figure(preset, "host_bytes", preset.host_bytes.value * batch)
    timeline = simulate(
        setting.replayer.run(make()),
        geometry,
        preset,
        batch=batch,
        layer_map=setting.layer_map,
        one_text=True,
    )
    row = metrics.timed(timeline)
    return {
        "predicted_step_p50_s": row["step_s"]["p50"],
        "predicted_tokens_per_s": row["decode_tokens_per_s"],
    }


def kernels_of(step: Callable[[int], None], most: int = 24) -> list[dict[str, Any]]:
    """Where a step spends its time, by kernel."""
    steps, spent, count = 2, collections.Counter(), collections.Counter()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number in range(3, 3 + steps):
            step(number)
        torch.cuda.synchronize()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.device_time / steps
            count[event.name] += 1
    return [
        {"kernel": name[:120], "launches": count[name] // steps, "us": round(us, 1)}
        for name, us in spent.most_common(most)
    ] + [
        {
            "kernel": "all",
            "launches": sum(count.values()) // steps,
            "us": round(sum(spent.values()), 1),
        }
    ]


def beside_recall(step: Callable[[int], None], programs: int, runs: int = 12) -> dict[str, Any]:
    """Median seconds of a step alone, and while single entries are recalled all the time on another
    stream, by so many programs.
    """
    tune = tuning.GATHER._replace(programs=programs)
    entries = recall(584, 32_768, "cuda", tune, host_bytes=2**29)
    copies, side = captured(entries.run), torch.cuda.Stream()
    recall_s = median_s(entries.run, "cuda", runs=8, cold=False)

    def timed(times: int) -> float:
        marks = []
        for number in range(runs):
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                for _ in range(times):
                    copies()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step(number)
            end.record()
            torch.cuda.synchronize()
            marks.append(start.elapsed_time(end) / 1e3)
        return sorted(marks)[runs // 2]

    alone_s = timed(0)
    beside_s = timed(round(1.3 * alone_s / recall_s) + 1)
    return {
        "programs": programs,
        "bytes_per_s": entries.n_bytes / recall_s,
        "alone_s": alone_s,
        "beside_s": beside_s,
        "slower": beside_s / alone_s - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("traces/nano-500k-needles.safetensors"))
    parser.add_argument("--model", default="v4-flash", choices=sorted(PRESETS))
    parser.add_argument("--kv-budget", type=float, default=16.0, help="GiB")
    parser.add_argument("--steps", type=int, default=136)
    parser.add_argument(
        "--policy", action="append", choices=sorted(POLICIES), help="only this one; repeat for more"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exec.json")
    given = parser.parse_args()
    setting = Setting(
        given.trace, given.model, given.steps, int(given.kv_budget * GIB), given.device
    )
    experts = setting.experts_to_be()
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "CPU",
        "command": (
            f"python benchmarks/exec.py --trace {given.trace} --model {given.model} --kv-budget"
            f" {given.kv_budget:g} --steps {given.steps}"
        ),
        "torch": torch.__version__,
        "weights": setting.geometry.weight_type,
        "experts": experts,
        "context_tokens": setting.replayer.header.prompt_tokens,
        "kv_budget_gib": given.kv_budget,
    }
    result: dict[str, Any] = about | {"rows": []}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{about['device']}, {experts} experts a layer", flush=True)

    def keep() -> None:
        given.out.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        hardware = calibrated(setting, experts, Path(folder))
        setting.load()
        result["calibration"] = yaml.safe_load(hardware.read_text())
        keep()
        if given.device == "cuda":
            step = a_step(setting.weights, setting.replayer, setting.geometry, setting.device)
            result["a_full_step_beside_recall"] = [
                beside_recall(step, programs) for programs in (2, 4, 8, 16)
            ]
            for line in result["a_full_step_beside_recall"]:
                print(
                    f"recall on {line['programs']} programs, {line['bytes_per_s'] / 1e9:.1f} GB/s:"
                    f" a step beside it {line['slower']:+.1%}",
                    flush=True,
                )
            result["kernels_of_a_full_step"] = kernels_of(step)
            for line in result["kernels_of_a_full_step"]:
                print(f"{line['us']:9.1f} us {line['launches']:5}  {line['kernel'][:90]}")
            del step
            gc.collect()
            keep()
        for label in given.policy or POLICIES:
            spec = POLICIES[label]
            make = lambda spec=spec: registry.build(spec)
            most = (
                [
                    synthetic_run.batch_that_fits(
                        int(given.kv_budget * GIB), setting.request_bytes(make)
                    )
                ]
                if label in AT_MOST
                else []
            )
            for batch in (1, *most):
                try:
                    row = setting.measured(label, make, batch)
                    result["rows"].append(row)
                    keep()
                    row |= predicted(setting, hardware, batch, make)
                    keep()
                except (FmsimError, torch.OutOfMemoryError) as error:
                    print(f"{label}, batch {batch}: {error}", flush=True)
                    continue
                off = row["predicted_step_p50_s"] / row["step_p50_s"] - 1
                print(
                    f"{label:8} batch {batch:3}  on GPU {row['gpu_bytes'] / 2**20:7.1f} MiB,"
                    f" {row['gpu_ratio']:6.1%} of full  step {row['step_p50_s'] * 1e3:6.2f} ms"
                    f" (predicted {off:+.0%}) "
                    f" {row['tokens_per_s']:7.1f} tokens/s "
                    f" {row['h2d_bytes_per_step'] / 2**20:6.2f} MiB/step",
                    flush=True,
                )


if __name__ == "__main__":
    main()
