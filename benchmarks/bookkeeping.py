"""What a policy's bookkeeping costs a decode step on one GPU.

    python benchmarks/bookkeeping.py [--part whole --part nano] [--seconds 120] [--out FILE.json]

`whole`: V4-Flash at full width with random weights: `lru`, `lfu` and fallback beside `recency`,
which moves nothing; the misses' own time, of the same rows copied alone, is taken off. They score
all entries, `recency` its own: beside it stands one that scores all too. `lsa` at 97 requests, in
pages of 64 entries and of one: its slowest step and those from its largest decision on
(`--trace traces/nano-500k-needles.safetensors --batch 97` has these at 512K). What the first steps
wait for, in which kernels are compiled, is told apart. `nano`: real weights, 1 to 64 requests of
unlike lengths: milliseconds of a step by device events where the host may run ahead, and of the
host alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.measure.kernel_cases import recall
from fmsim.exec.measure.timing import median_s
from fmsim.exec.model.weights.loader import load_model
from fmsim.exec.model.weights.synthetic import model_bytes, synthetic_model
from fmsim.exec.runs import synthetic as synthetic_run
from fmsim.geometry import PRESETS
from fmsim.nano.tokenizer import MODEL_FOLDER
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, spread

DEVICE = "cuda"
RECENCY = {"policy": "recency", "budget": "10%"}
WHOLE: tuple[tuple[dict[str, Any], int], ...] = (
    (RECENCY, 1),
    (RECENCY | {"sees": "all"}, 1),
    ({"policy": "lru"}, 1),
    ({"policy": "lfu"}, 1),
    ({"policy": "lru", "budget": "10%", "on_miss": "fallback"}, 1),
    (RECENCY, 32),
    (RECENCY | {"sees": "all"}, 32),
    ({"policy": "lru"}, 32),
    ({"policy": "lfu"}, 32),
    ({"policy": "lru", "budget": "10%", "on_miss": "fallback"}, 32),
    ({"policy": "lsa", "budget": "10%", "granularity": 64}, 97),
    ({"policy": "lsa", "budget": "10%"}, 97),
)
NANO: tuple[dict[str, Any], ...] = (
    RECENCY,
    {"policy": "lru", "budget": "2x topk"},
    {"policy": "lfu", "budget": "2x topk"},
    {"policy": "lru", "budget": "10%", "on_miss": "fallback", "granularity": 4},
    {"policy": "fifo", "budget": "2x topk"},
    {"policy": "s3fifo", "budget": "2x topk"},
    {"policy": "random-fetch", "budget": "2x topk"},
    {"policy": "lru-prefetch", "budget": "2x topk"},
    {"policy": "lsa", "budget": "40%", "granularity": 64},
)
BATCHES = (1, 8, 64)
TOKENS, SHORTER, STEPS = 4096, 37, 192
TRACE = Path("traces/nano-32k-needles.safetensors")
STEPS_AFTER = 8  # that are told from a decision on


def whole(path: Path, steps: int, experts: int, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of V4-Flash, or of them those of some batches."""
    geometry = PRESETS["v4-flash"]
    found = traces.read(path)
    replayer = Replayer(found, memory=ModelMemory(geometry), max_steps=steps)
    layer_map = spread(found.n_layers, geometry.n_csa)
    model, _ = synthetic_model(geometry, DEVICE, model_bytes(geometry, experts), seed=0)
    without: dict[int, dict[str, float]] = {}
    for spec, batch in WHOLE:
        if batches and batch not in batches:
            continue
        try:
            run = synthetic_run.run(
                spec["policy"],
                lambda spec=spec: registry.build(spec),
                replayer,
                geometry,
                layer_map,
                model,
                DEVICE,
                batch,
            )
        except (FmsimError, torch.OutOfMemoryError) as error:
            yield {"part": "whole", "spec": spec, "batch": batch, "failed": str(error)[:200]}
            continue
        timeline, before = run.timeline(), run.warm_up_steps
        step_s = np.asarray(timeline.step_s)
        warm_up_s = run.outcome.recall_wait_s[:before]
        row = {
            "part": "whole",
            "trace": path.stem,
            "spec": spec,
            "batch": batch,
            "step_p50_ms": float(np.median(step_s)) * 1e3,
            "step_max_ms": float(step_s.max()) * 1e3,
            "slowest_step": before + int(step_s.argmax()),
            **(_largest_decision(run, step_s) if run.policy.params.cadence > 1 else {}),
            "recall_wait_max_ms": float(timeline.recall_wait_s.max()) * 1e3,
            "warm_up": {
                "steps": before,
                "recall_wait_max_ms": float(warm_up_s.max()) * 1e3,
                "at_step": int(warm_up_s.argmax()),
            },
        }
        if spec["policy"] == "recency":
            without.setdefault(batch, {})[spec.get("sees", "resident")] = row["step_p50_ms"]
        elif batch in without:
            row |= _over_recency(run, row["step_p50_ms"], without[batch])
        yield row
        torch.cuda.empty_cache()


def _largest_decision(run: synthetic_run.SyntheticRun, step_s: np.ndarray) -> dict[str, Any]:
    """Pages of all requests that a decision after the warm-up recalls, at most, and those that have
    spare pages; and what steps take from it on, of `step_s` after the warm-up.
    """
    ledger = run.outcome.ledger
    recalled = ledger.lookahead_loads[run.warm_up_steps :].max(axis=1)
    at = int(recalled.argmax())
    return {
        "recalled_pages_a_layer": int(recalled[at]) * run.batch,
        "spare_pages_a_layer": max(ledger.ahead_slots or [0]) * run.batch,
        "steps_from_it_on_ms": [round(1e3 * float(s), 3) for s in step_s[at : at + STEPS_AFTER]],
    }


def _over_recency(
    run: synthetic_run.SyntheticRun, step_ms: float, base_ms: dict[str, float]
) -> dict[str, Any]:
    """What is beyond `recency`, by what it sees, and a step's misses, each layer's copied alone."""
    loads = run.outcome.ledger.demand_loads
    rows = int(np.median(loads[len(loads) // 2 :].mean(axis=1))) * run.batch
    miss_ms = 0.0
    if rows:
        case = recall(584, rows, DEVICE, ascending=True)
        miss_ms = median_s(case.run, DEVICE) * 1e3 * run.decode.geometry.n_csa
    return {
        "rows_missed_a_layer": rows,
        "misses_ms": miss_ms,
        "over_recency_and_misses": (step_ms - miss_ms) / base_ms["resident"] - 1,
        "over_recency_that_sees_all": (step_ms - miss_ms) / base_ms["all"] - 1,
    }


def nano(batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of real weights."""
    model = load_model(MODEL_FOLDER, DEVICE)
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(0, model.config.vocab_size, (TOKENS,), generator=generator).tolist()
    prompts = [
        Prompt(model, text[: TOKENS - SHORTER * number], STEPS) for number in range(max(batches))
    ]
    for spec in NANO:
        for batch in batches:
            decoding = Batch(prompts[:batch], registry.build(spec))
            hosts_s = []
            for _ in range(STEPS // 2):
                torch.cuda.synchronize()
                start_s = time.perf_counter()
                decoding.step()
                hosts_s.append(time.perf_counter() - start_s)
            for _ in range(STEPS - STEPS // 2):  # the host may run ahead
                decoding.step()
            step_s = np.asarray(decoding.timeline().step_s)[STEPS // 2 :]
            yield {
                "part": "nano",
                "spec": spec,
                "batch": batch,
                "step_p50_ms": float(np.median(step_s)) * 1e3,
                "step_max_ms": float(step_s.max()) * 1e3,
                "host_p50_ms": float(np.median(hosts_s[8:])) * 1e3,
                "host_max_ms": float(np.max(hosts_s[8:])) * 1e3,
            }
            del decoding
            torch.cuda.empty_cache()


def _words() -> list[str]:
    """What was asked, but for the place of the result."""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=("whole", "nano"))
    parser.add_argument("--trace", type=Path, action="append", help=f"of `whole`; {TRACE}")
    parser.add_argument("--batch", type=int, action="append", help="only this one")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--experts", type=int, default=16, help="a layer")
    parser.add_argument("--seconds", type=float, default=600, help="start no row after so many")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "bookkeeping.json"
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/bookkeeping.py needs a CUDA device, and torch finds none")
    start_s = time.monotonic()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "command": f"python benchmarks/bookkeeping.py {' '.join(_words())}".strip(),
        "rows": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for part in given.part or ("nano", "whole"):
        rows = (
            nano(given.batch or BATCHES)
            if part == "nano"
            else chain.from_iterable(
                whole(trace, given.steps, given.experts, given.batch or ())
                for trace in given.trace or [TRACE]
            )
        )
        for row in rows:
            row["at_s"] = time.monotonic() - start_s
            result["rows"].append(row)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(row), flush=True)
            if time.monotonic() - start_s > given.seconds:
                print(f"{part}: no time left for further rows", flush=True)
                break


if __name__ == "__main__":
    main()
