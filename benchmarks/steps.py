"""Step times against what they were not made from: module rows left out, and published servers.

    pip download --no-deps aiconfigurator-core==0.12.0 && unzip -d aic aiconfigurator_core-*.whl
    python benchmarks/steps.py [--wheel aic] [--out benchmarks/results/steps.json]

Module rows: the tables are made anew from every second batch, and asked for the batches between, at
all contexts; and from tensor-parallel sizes 2 and 8, and asked for 4. Published: time a token of
servers that nothing here was fitted on, as they come. Without --wheel only these are compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.geometry import PRESETS
from fmsim.hw import load_hardware
from fmsim.hw.deployment import Deployment
from fmsim.hw.tables import AttentionTimes
from fmsim.sim.serving.prefill import PrefillModel
from fmsim.sim.step_cost import StepModel

sys.path.insert(0, str(Path(__file__).parent / "hw_tables"))
import kernel_tables
from aiconfigurator import MODELS, Grid, Model, Tables

KEPT_BATCHES = (1, 4, 16, 64, 256, 1024)
LEFT_OUT = ("h100", "h200", "b200")
MEAN_WITHIN, WORST_WITHIN = 0.08, 0.20


@dataclass(frozen=True)
class Published:
    """One server's time a token."""

    model: str
    hardware: str
    deployment: dict[str, Any]
    batch: int
    context: int
    tpot_ms: float
    source: str
    prefill_per_step: int = 0  # tokens of prompts that each step prefills beside it


_COOKBOOK = "sgl-project/sglang, cookbook deepseek-v4-benchmarks.jsx, high-throughput, no drafts"
_ROADMAP = "sgl-project/sglang issue 15025, nightly of 2026-01-08, 8 x B200, DP8, prompts of 4,096"
_AGENTS = "aarora79/agentic-coding-harness-benchmarks pull request 51, vLLM, context not said"
# Requests that run are tokens/s x time a token: 7 of 8 clients, 10 of 16.
# Of the cookbook's closed loops, 8,192 + 1,024 tokens: requests that run are tokens/s x TPOT, and
# each step prefills 8 prompt tokens for each that it makes.
PUBLISHED = (
    Published("v3.2", "b200", {"tp": 1, "dp": 8, "weights": "fp8"}, 1, 4352, 19.18, _ROADMAP),
    Published("v3.2", "b200", {"tp": 1, "dp": 8, "weights": "fp8"}, 8, 4352, 19.88, _ROADMAP),
    Published("v3.2", "b200", {"tp": 1, "dp": 8, "weights": "fp8"}, 16, 4352, 25.30, _ROADMAP),
    Published(
        "v3.2", "b200", {"tp": 1, "dp": 8, "weights": "fp8"}, 64, 4352, 64 / 2392.6 * 1e3, _ROADMAP
    ),
    Published("glm-5.2", "h200", {"engine": "sglang"}, 1, 10_000, 10.3, _AGENTS),
    Published("glm-5.2", "h200", {"engine": "sglang"}, 7, 10_000, 13.0, _AGENTS),
    Published("glm-5.2", "h200", {"engine": "sglang"}, 10, 10_000, 13.3, _AGENTS),
    Published("v4-flash", "h200", {"tp": 1, "dp": 4}, 259, 8704, 147.5, _COOKBOOK, 8 * 259),
    Published("v4-flash", "b200", {"tp": 1, "dp": 8}, 507, 8704, 71.3, _COOKBOOK, 8 * 507),
    Published("v4-pro", "b200", {"tp": 1, "dp": 8}, 160, 8704, 45.5, _COOKBOOK, 8 * 160),
    Published(
        "v4-flash", "h20", {}, 11, 2**20, 11 / 455 * 1e3, "FlashMemory's report, 8 x H20, 1M"
    ),
)


def left_out(wheel: Path) -> dict[str, Any]:
    """Errors of rows that the table was not made from, by GPU, model and module."""
    rows = []
    for gpu in LEFT_OUT:
        tables = Tables(wheel, gpu, "sglang")
        for name, model in MODELS.items():
            modules = ("csa", "hca") if name.startswith("v4") else ("dsa",)
            for module in modules:
                row = _of_module(tables, module, model)
                if row:
                    rows.append({"gpu": gpu, "model": name, "module": module} | row)
                    print(
                        f"{gpu:5} {name:9} {module:4} other batches: mean"
                        f" {row['batches']['mean']:.1%}, worst {row['batches']['worst']:.1%}"
                        f" of {row['batches']['rows']};  tp 4: mean {row['tp4']['mean']:.1%}, worst"
                        f" {row['tp4']['worst']:.1%} of {row['tp4']['rows']}",
                        flush=True,
                    )
    means = [row[kind]["mean"] for row in rows for kind in ("batches", "tp4")]
    worst = [row[kind]["worst"] for row in rows for kind in ("batches", "tp4")]
    return {
        "rows": rows,
        "mean": float(np.mean(means)),
        "worst": max(worst),
        "asked": {"mean": MEAN_WITHIN, "worst": WORST_WITHIN},
    }


def _of_module(tables: Tables, module: str, model: Model) -> dict[str, Any] | None:
    grids = {tp: tables.attention(module, model, tp) for tp in (1, 2, 4, 8)}
    if not all(grids.values()):
        return None
    batches: list[float] = []
    for grid in grids.values():
        kept = {at: ms for at, ms in grid.items() if at[0] in KEPT_BATCHES}
        times = _times(kept)
        asked = {at: ms for at, ms in grid.items() if at not in kept and at[1] >= 1024}
        batches += [_ms(times, *at) / ms - 1 for at, ms in asked.items()]
    two, eight = (_times(grids[tp]) for tp in (2, 8))
    tp4 = [
        math.sqrt(_ms(two, *at) * _ms(eight, *at)) / ms - 1
        for at, ms in grids[4].items()
        if at[1] >= 1024
    ]
    return {"batches": _errors(batches), "tp4": _errors(tp4)}


def _times(grid: Grid) -> AttentionTimes:
    table, added = kernel_tables.attention_table(grid)
    return AttentionTimes.of(table, kernel_tables.token_ns([added]))


def _ms(times: AttentionTimes, batch: int, context: int) -> float:
    tokens = np.array([float(context)])
    return float(times.ms(times.of_batch(batch), batch, batch * tokens, tokens)[0])


def _errors(errors: list[float]) -> dict[str, float]:
    sizes = np.abs(errors)
    return {
        "mean": round(float(sizes.mean()), 4),
        "worst": round(float(sizes.max()), 4),
        "rows": len(errors),
    }


def published() -> list[dict[str, Any]]:
    rows = []
    for row in PUBLISHED:
        ours = modelled_ms(row)
        rows.append(
            {
                "model": row.model,
                "hardware": row.hardware,
                "deployment": row.deployment,
                "batch": row.batch,
                "context": row.context,
                "prefill_tokens_per_step": row.prefill_per_step,
                "published_tpot_ms": round(row.tpot_ms, 2),
                "modelled_tpot_ms": round(ours, 2),
                "error": round(ours / row.tpot_ms - 1, 3),
                "source": row.source,
            }
        )
        print(
            f"{row.model:9} {row.hardware:5} {row.deployment!s:22} batch {row.batch:3} at"
            f" {row.context:9,}: published {row.tpot_ms:6.1f} ms, modelled {ours:6.1f},"
            f" {ours / row.tpot_ms - 1:+.0%}",
            flush=True,
        )
    return rows


def modelled_ms(row: Published) -> float:
    hw = load_hardware(row.hardware).deployed(Deployment(**row.deployment))
    geometry = PRESETS[row.model]
    tokens = np.array([row.context])
    costs = StepModel(hw, geometry).equal(row.batch, tokens, tokens // geometry.csa_rate)
    step_s = float(costs.total_s(geometry.n_csa)[0])
    if row.prefill_per_step:
        chunk = np.array([row.prefill_per_step / hw.placed.dp])
        step_s += float(PrefillModel(hw, geometry).seconds(np.array([4096.0]), chunk)[0])
    return step_s * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="folder with the unpacked wheel")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "steps.json"
    )
    given = parser.parse_args()
    result = json.loads(given.out.read_text()) if given.out.is_file() else {}
    result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result["command"] = "python benchmarks/steps.py --wheel aic"
    result["published"] = published()
    if given.wheel:
        result["left_out"] = left_out(given.wheel)
        found = result["left_out"]
        print(f"left out: mean {found['mean']:.1%}, worst {found['worst']:.1%}")
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
