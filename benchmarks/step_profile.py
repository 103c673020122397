"""Where a decode step of `full` spends its time on one GPU, beside the least that it can take.

    python benchmarks/step_profile.py [--trace FILE] [--experts 16] [--out FILE.json]

V4-Flash at full width with random weights, one request. The floor is the bytes of all weights and
KV that a step reads over the bandwidth at which this GPU reads a large tensor. The step is a CUDA
graph: its median time by device events over steps that the host runs ahead of, and from
a profile of some replays how long each kernel held the step up.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmsim import trace as traces
from fmsim.exec.decode.synthetic_decode import SyntheticStep
from fmsim.exec.decode.trace_driven import TraceDrivenDecode
from fmsim.exec.measure.timing import median_s
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.synthetic import model_bytes, synthetic_model
from fmsim.geometry import PRESETS, Geometry
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, footprint, spread

READ_BYTES = 4 * 2**30
PROFILED = 4  # steps
BETWEEN_US = 60  # of two kernels, and more, lie two steps


def read_bytes(model: DeepseekV4, geometry: Geometry, tokens: int) -> dict[str, int]:
    """What a step of one request reads, by kind; a token's row of the embedding and what kernels
    leave to each other are not counted.
    """
    experts, others = 0, 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ".mlp.experts." in name:
            experts += tensor.nbytes * geometry.n_active_experts // len(tensor)
        elif ".mlp.shared_experts." in name:
            experts += tensor.nbytes
        elif "embed_tokens" not in name and "tid2eid" not in name:
            others += tensor.nbytes
    head = model.lm_head.weight.nbytes
    return {
        "experts": experts,
        "head": head,
        "other_weights": others - head,
        "entries": _entry_bytes(geometry, tokens),
        "index_keys": geometry.n_csa * geometry.csa_entries(tokens) * geometry.index_key_bytes,
    }


def _entry_bytes(geometry: Geometry, tokens: int) -> int:
    """Of what a token attends to: windows, selected entries, dense entries."""
    found = geometry.n_csa * geometry.index_topk * geometry.kv_entry_bytes
    for layer in geometry.layers:
        found += layer.window_tokens * layer.window_bytes
        if layer.kind == "dense":
            found += tokens // layer.entry_tokens * layer.entry_bytes
    return found


def bandwidth() -> float:
    """Bytes a second at which this GPU adds up a large tensor."""
    large = torch.zeros(READ_BYTES // 4, device="cuda")
    total = torch.zeros((), device="cuda")
    return READ_BYTES / median_s(lambda: torch.sum(large, 0, out=total), "cuda", runs=12)


def a_step(
    model: DeepseekV4, replayer: Replayer, geometry: Geometry, device: str = "cuda"
) -> SyntheticStep:
    """A whole step of `full` at batch 1, captured."""
    layer_map = spread(replayer.n_layers, geometry.n_csa)
    place = footprint(replayer.run(registry.build("full")), geometry, layer_map)
    decode = TraceDrivenDecode(
        replayer,
        registry.build("full"),
        geometry,
        place.groups,
        geometry.n_csa,
        device,
        watch=False,
    )
    step = SyntheticStep(decode, model, layer_map)
    step.decode.tables.show(step.decode.manager.residency.table)
    for number in range(3):
        step(number)
    return step


def step_s(step: Callable[[int], None], steps: int) -> np.ndarray:
    """Seconds between the ends of steps of which the host is ahead."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for number, mark in enumerate(marks):
        step(number % 8)
        mark.record()
    torch.cuda.synchronize()
    return np.array([a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)])


def profiled(step: Callable[[int], None]) -> dict[str, Any]:
    """Kernels of some steps, by name: launches a step, and microseconds by which their ends came
    later than all ends before: launches overlap, and their own times add up to more than a step.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number in range(PROFILED):
            step(number)
            torch.cuda.synchronize()
    runs = [
        (event.time_range.end, event.time_range.start, event.name[:100])
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    held, count, last = collections.Counter(), collections.Counter(), None
    for end, start, name in sorted(runs):
        count[name] += 1
        # a step begins with its first kernel, and not with what lies between steps
        since = start if last is None or start - last > BETWEEN_US else last
        held[name] += max(0.0, end - since) / PROFILED
        last = max(end, last or end)
    return {
        "launches": sum(count.values()) / PROFILED,
        "profiled_us": sum(held.values()),
        "kernels": [
            {"kernel": name, "launches": count[name] / PROFILED, "us": round(us, 1)}
            for name, us in held.most_common(40)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("traces/nano-128k-needles.safetensors"))
    parser.add_argument("--experts", type=int, default=16, help="a layer")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "step-profile.json"
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/step_profile.py needs a CUDA device, and torch finds none")
    geometry = PRESETS["v4-flash"]
    replayer = Replayer(traces.read(given.trace), memory=ModelMemory(geometry), max_steps=16)
    model, experts = synthetic_model(geometry, "cuda", model_bytes(geometry, given.experts), seed=0)
    tokens = replayer.header.prompt_tokens
    kinds = read_bytes(model, geometry, tokens)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "command": (
            f"python benchmarks/step_profile.py --trace {given.trace} --experts {given.experts}"
        ),
        "torch": torch.__version__,
        "experts": experts,
        "context_tokens": tokens,
        "read_bytes": kinds,
        "bytes_per_s": bandwidth(),
    }
    result["floor_ms"] = sum(kinds.values()) / result["bytes_per_s"] * 1e3
    with torch.inference_mode():
        step = a_step(model, replayer, geometry)
        result["step_p50_ms"] = float(np.median(step_s(step, given.steps))) * 1e3
        result["of_floor"] = result["floor_ms"] / result["step_p50_ms"]
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        result |= profiled(step)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['device']}: a step takes {result['step_p50_ms']:.2f} ms, the floor is"
        f" {result['floor_ms']:.2f} ms ({result['of_floor']:.0%});"
        f" {result['launches']:.0f} launches"
    )
    for line in result["kernels"]:
        print(f"{line['us']:9.1f} us {line['launches']:5.0f}  {line['kernel'][:90]}")


if __name__ == "__main__":
    main()
