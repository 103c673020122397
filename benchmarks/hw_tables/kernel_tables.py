"""Derive fmsim/hw/tables/*.json, kernel times by GPU and engine, from aiconfigurator-core's tables.

    pip download --no-deps aiconfigurator-core==0.12.0 && unzip -d aic aiconfigurator_core-*.whl
    python benchmarks/hw_tables/kernel_tables.py aic [--out fmsim/hw/tables]

The wheel (NVIDIA, Apache-2.0, 81.7 MB) holds kernel times measured on each GPU under SGLang and
vLLM. What is taken of them, and what is done to it:

- attention modules of decode and of prefill, by tensor-parallel size, FP8 GEMM, FP8 KV;
- their top-k was timed with all scores equal, which SGLang's kernels find hard. The same wheel
  times the top-k alone, with equal scores and with real ones: the difference is taken off;
- experts under three distributions of tokens over experts; where two kernels were timed, the
  faster; shared experts, routers, dense layers and output heads from the GEMM tables;
- all-reduce, all-gather, reduce-scatter, and DeepEP's dispatch and combine.

All times are in ms, rounded to four digits. Sizes: see `fmsim/hw/tables.py`, which reads them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from aiconfigurator import (
    BATCHES,
    CHUNKS,
    ENGINES,
    FORMATS,
    GPUS,
    MODELS,
    SHORT,
    STARTS,
    TOKENS,
    VERSION,
    Grid,
    Tables,
    curve,
    rounded,
)


def attention_table(grid: Grid) -> tuple[dict[str, Any], np.ndarray]:
    """One layer's decode module: `short_ms` [context][batch] up to 4,096 tokens, and what a longest
    context adds at batch 1 (`grown_ms`).

    Rows that were not measured at a short context keep the ratio of the nearest batch that was.
    With it, [n, 2], what the rows of several longer requests add: (tokens of the others beyond the
    short contexts, ms).
    """
    batches = [batch for batch in BATCHES if (batch, 1) in grid]
    short = np.full((len(SHORT), len(batches)), np.nan)
    for i, context in enumerate(SHORT):
        for j, batch in enumerate(batches):
            near = _near(grid, batch, context)
            if near is not None:
                short[i, j] = near
        for j in np.flatnonzero(np.isnan(short[i])):
            short[i, j] = short[i - 1, j] * short[i, j - 1] / short[i - 1, j - 1]
    long = {c: grid[1, c] for b, c in grid if b == 1 and c >= SHORT[-1]}
    contexts = sorted(long)
    grown = np.maximum.accumulate([max(0.0, long[c] - long[contexts[0]]) for c in contexts])
    added = [
        (
            (batch - 1) * (context - SHORT[-1]),
            ms - short[-1, batches.index(batch)] - float(np.interp(context, contexts, grown)),
        )
        for (batch, context), ms in grid.items()
        if batch > 1 and context > SHORT[-1] and batch in batches
    ]
    table = {
        "context": list(SHORT),
        "batch": batches,
        "short_ms": [rounded(line) for line in short],
        "grown_at": contexts,
        "grown_ms": rounded(grown),
    }
    return table, np.array(added, dtype=float).reshape(-1, 2)


def token_ns(added: list[np.ndarray]) -> float:
    """What each token of a further request adds, in ns: least squares through zero over all
    tensor-parallel sizes, since neither scores nor entries are split over them.
    """
    tokens, ms = np.concatenate(added).T
    if not len(tokens):
        return 0.0
    return float(f"{max(0.0, float(tokens @ ms / (tokens @ tokens))) * 1e6:.3g}")


def _near(grid: Grid, batch: int, context: int) -> float | None:
    """The row at this context, or between its neighbours."""
    line = sorted((c, ms) for (b, c), ms in grid.items() if b == batch)
    xs = [c for c, _ in line]
    if not xs or context > xs[-1]:
        return None
    return float(np.interp(context, xs, [ms for _, ms in line]))


def prefill_table(grid: Grid) -> dict[str, Any]:
    """[chunk][start] ms; what was not measured is drawn on from the two starts before it."""
    table = []
    chunks = [chunk for chunk in CHUNKS if (chunk, 0) in grid]
    for chunk in chunks:
        line = sorted((start, ms) for (c, start), ms in grid.items() if c == chunk)
        xs = np.array([start for start, _ in line], dtype=float)
        ys = np.maximum.accumulate([ms for _, ms in line])
        far = max(0, len(xs) - 4)
        slope = (ys[-1] - ys[far]) / max(1.0, xs[-1] - xs[far])
        table.append(
            rounded(
                float(np.interp(start, xs, ys)) + max(0.0, start - xs[-1]) * slope
                for start in STARTS
            )
        )
    return {"chunk": chunks, "start": list(STARTS), "ms": table}


def model_table(tables: Tables, name: str, keep: Callable[[Grid], Grid] = dict) -> dict[str, Any]:
    """Everything of one model; empty where its attention was not timed.

    `keep`: which attention rows to use (benchmarks/steps.py leaves some out).
    """
    model = MODELS[name]
    if name.startswith("v4"):
        modules = ("csa", "hca")
    elif model.heads[0]:
        modules = ("msa", "gqa")
    else:
        modules = ("dsa", "dsa_shared") if model.shared_index else ("dsa",)
    attention: dict[str, Any] = {}
    prefill: dict[str, Any] = {}
    for module in modules:
        added = []
        for tp in (1, 2, 4, 8):
            grid = keep(tables.attention(module, model, tp))
            if max((c for b, c in grid if b == 1), default=0) < SHORT[-1]:
                continue  # not timed, or not at contexts that matter
            attention.setdefault(module, {})[str(tp)], of_others = attention_table(grid)
            added.append(of_others)
            context = tables.prefill(module, model, tp)
            if context:
                prefill.setdefault(module, {})[str(tp)] = prefill_table(context)
        if added:
            # a dense layer reads what its GPU has of the KV, which differs by split: its rates say
            attention[module]["token_ns"] = 0.0 if module == "gqa" else token_ns(added)
    kinds = model.formats or ("fp8", "fp4")
    experts = {kind: found for kind in kinds if (found := tables.experts(model, FORMATS[kind]))}
    if set(attention) != set(modules) or not experts:
        return {}
    made: dict[str, Any] = {"attention": attention, "prefill": prefill, "experts": experts}
    made["router"] = curve(tables.gemm(model.n_experts, model.hidden, "bfloat16"), TOKENS)
    if model.hyper_connections:
        made["hyper_connections"] = curve(tables.hyper_connections(model.hidden), TOKENS)
    made["head"] = {
        str(tp): curve(tables.gemm(model.vocabulary // tp, model.hidden, "bfloat16"), TOKENS)
        for tp in (1, 2, 4, 8)
    }
    for part, width in (("shared_expert", model.expert_width), ("dense", model.dense_width)):
        if width:
            made[part] = {
                str(tp): curve(tables.mlp(model.hidden, width // tp), TOKENS) for tp in (1, 2, 4, 8)
            }
    made["all_to_all"] = tables.all_to_all(model)
    return made


def table(tables: Tables) -> dict[str, Any]:
    """The whole file."""
    models = {name: made for name in MODELS if (made := model_table(tables, name))}
    return {
        "gpu": tables.gpu,
        "device": tables.device(),
        "engine": f"{tables.engine} {tables.version}",
        "source": f"aiconfigurator-core {VERSION}, NVIDIA, github.com/ai-dynamo/aiconfigurator",
        "licence": "Apache-2.0; Copyright (c) NVIDIA CORPORATION & AFFILIATES",
        "made_by": "benchmarks/hw_tables/kernel_tables.py, which says what was changed",
        "all_reduce": tables.all_reduce(),
        "all_gather": tables.nccl("all_gather"),
        "reduce_scatter": tables.nccl("reduce_scatter"),
        "models": models,
    }


def written(path: Path, made: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`made`; where only some models are asked for, the file's others stay as they are."""
    if not names or not path.is_file():
        return made
    old = json.loads(path.read_text())
    kept = {name: value for name, value in made["models"].items() if name in names}
    return old | {"models": old["models"] | kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="folder with the unpacked wheel")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[2] / "fmsim" / "hw" / "tables"
    )
    parser.add_argument("--only", nargs="*", default=[], help="models to write anew")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for gpu in GPUS:
        for engine in ENGINES:
            made = table(Tables(given.wheel, gpu, engine))
            if not made["models"]:
                continue
            path = given.out / f"{gpu}-{engine}.json"
            made = written(path, made, given.only)
            path.write_text(json.dumps(made, separators=(",", ":")) + "\n")
            print(f"{path.name}: {path.stat().st_size:,} bytes, {', '.join(made['models'])}")


if __name__ == "__main__":
    main()
