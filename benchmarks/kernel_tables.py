"""Derive fmsim/hw/tables/*.json, kernel times by GPU and engine, from aiconfigurator-core's tables.

    pip download --no-deps aiconfigurator-core==0.12.0 && unzip -d aic aiconfigurator_core-*.whl
    python benchmarks/kernel_tables.py aic [--out fmsim/hw/tables]

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
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "0.12.0"
GPUS = {
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
ENGINES = {"sglang": "0.5.14", "vllm": "0.24.0"}
SHORT = (1, 1024, 2048, 4096)  # contexts at which every batch stands
BATCHES = tuple(2**k for k in range(11))
TOKENS = (*BATCHES, 2048, 4096, 8192, 16384)  # of a step, or of a prefill's chunk
CHUNKS = (128, 512, 1024, 2048, 4096, 8192)
STARTS = (0, 4096, 16384, 32768, 65536, 131072, 262144, 524288, 1000000)
DISTRIBUTIONS = ("balanced", "power_law_1.01", "power_law_1.2")
SPLITS = {"tp1": (1, 1)} | {
    f"{kind}{n}": (n, 1) if kind == "tp" else (1, n) for n in (2, 4, 8) for kind in ("tp", "ep")
}

Rows = list[dict[str, Any]]
Grid = dict[tuple[int, int], float]


@dataclass(frozen=True)
class Model:
    """What names a model's rows."""

    rows: tuple[str, ...]  # the tables' names of it, the first that has rows
    hidden: int
    expert_width: int
    n_active: int
    n_experts: int
    vocabulary: int
    dense_width: int = 0  # of its first dense layers; 0 = none
    hyper_connections: bool = False
    shared_index: bool = False  # some layers take another's selection


MODELS = {
    "v4-flash": Model(("sgl-project/DeepSeek-V4-Flash-FP8",), 4096, 2048, 6, 256, 129280, 0, True),
    "v4-pro": Model(
        ("sgl-project/DeepSeek-V4-Pro-FP8", "deepseek-ai/DeepSeek-V4-Pro"),
        7168,
        3072,
        6,
        384,
        129280,
        0,
        True,
    ),
    "v3.2": Model(("deepseek-ai/DeepSeek-V3.2",), 7168, 2048, 8, 256, 129280, 18432),
    "glm-5": Model(("zai-org/GLM-5-FP8", "zai-org/GLM-5"), 6144, 2048, 8, 256, 154880, 12288),
    "glm-5.2": Model(  # its layers that select are GLM-5's
        ("zai-org/GLM-5.2-FP8", "nvidia/GLM-5.2-NVFP4", "zai-org/GLM-5-FP8", "zai-org/GLM-5"),
        6144,
        2048,
        8,
        256,
        154880,
        12288,
        False,
        True,
    ),
}
FORMATS = {  # of the experts, by what the tables call them
    "fp8": ("fp8_block",),
    "fp4": ("w4a8_mxfp4_mxfp8", "nvfp4"),
}


class Tables:
    """One GPU's tables of one engine."""

    def __init__(self, root: Path, gpu: str, engine: str) -> None:
        self.root = root / "aiconfigurator_core" / "systems" / "data" / GPUS[gpu]
        self.gpu = gpu
        self.engine = engine
        self.version = ENGINES[engine]

    def rows(self, family: str, name: str, engine: str = "", version: str = "") -> Rows:
        """All rows of a table; none where there is no such table."""
        return _read(
            self.root
            / family
            / (engine or self.engine)
            / (version or self.version)
            / f"{name}.parquet"
        )

    def device(self) -> str:
        return self.rows("gemm", "gemm_perf")[0]["device"]

    # Attention

    def attention(self, module: str, model: Model, tp: int) -> Grid:
        """ms of one layer's decode module by (batch, context); scores not flat."""
        if module in ("csa", "hca"):
            rows = self.rows("sparse_attention", f"dsv4_{module}_generation_module_perf")
            op = f"dsv4_{module}_generation_module"
        else:
            rows = self.rows("sparse_attention", "dsa_generation_module_perf")
            op = "dsa_generation_module" + ("_skip_indexer" if module == "dsa_shared" else "")
        wanted = {"tp_size": tp, "op_name": op}
        grid = _grid(_fp8_kv(_of(model, _only(rows, wanted))), "batch_size", "step")
        return _less(grid, self._flat_excess(module, model, decode=True))

    def prefill(self, module: str, model: Model, tp: int) -> Grid:
        """ms of one layer's prefill module by (chunk, tokens before it), one prompt."""
        if module in ("csa", "hca"):
            rows = self.rows("sparse_attention", f"dsv4_{module}_context_module_perf")
            op = f"dsv4_{module}_context_module"
        else:
            rows = self.rows("sparse_attention", "dsa_context_module_perf")
            op = "dsa_context_module" + ("_skip_indexer" if module == "dsa_shared" else "")
        wanted = {"tp_size": tp, "op_name": op}
        wanted["batch_size"] = 1
        grid = _grid(_fp8_kv(_of(model, _only(rows, wanted))), "isl", "step")
        return _less(grid, self._flat_excess(module, model, decode=False))

    def _flat_excess(self, module: str, model: Model, decode: bool) -> Grid:
        """ms by which equal scores slow the top-k; nothing where it was not timed alone."""
        if self.engine != "sglang" or module not in ("csa", "dsa"):
            return {}
        if module == "csa":
            rows = self.rows("sparse_attention", "dsv4_csa_topk_calib_perf")
            rows = _of(model, rows)
            modes = ("v2_flat", "v2_top_last") if decode else ("v1_flat", "v1_top_last")
        else:
            rows = self.rows("sparse_attention", "glm5_topk_module_perf")
            modes = ("flat", "top_last")
        rows = _only(rows, {"isl": 1} if decode else {"batch_size": 1})
        x = "batch_size" if decode else "isl"
        flat, real = (_grid(_only(rows, {"score_mode": mode}), x, "step") for mode in modes)
        return {at: flat[at] - real[at] for at in flat if at in real}

    # Everything else of a layer

    def experts(self, model: Model, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """ms by split over GPUs and distribution, tokens of all GPUs together; the faster kernel.

        A distribution that a split lacks is left out.
        """
        shape = {
            "hidden_size": model.hidden,
            "inter_size": model.expert_width,
            "topk": model.n_active,
            "num_experts": model.n_experts,
        }
        rows = _only(self.rows("moe", "moe_perf"), shape)
        rows = [row for row in rows if row["moe_dtype"] in names]
        found: dict[str, dict[str, Any]] = {}
        for split, (tp, ep) in SPLITS.items():
            of_split = _only(rows, {"moe_tp_size": tp, "moe_ep_size": ep})
            for distribution in DISTRIBUTIONS:
                best: dict[int, float] = {}
                for row in _only(of_split, {"distribution": distribution}):
                    n = row["num_tokens"]
                    best[n] = min(best.get(n, np.inf), row["latency"])
                if best:
                    found.setdefault(split, {})[distribution] = _curve(best, TOKENS)
        return found

    def gemm(self, n: int, k: int, dtype: str) -> dict[int, float]:
        """ms of an [m, k] x [k, n] product by m; between measured widths linear."""
        grids: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
        for row in _only(self.rows("gemm", "gemm_perf"), {"gemm_dtype": dtype}):
            old = grids[row["m"]].get((row["n"], row["k"]), np.inf)
            grids[row["m"]][row["n"], row["k"]] = min(old, row["latency"])
        found = {}
        for m, grid in grids.items():
            widths = sorted({width for width, depth in grid if depth == k})
            if not widths:
                depths = sorted({depth for _, depth in grid})
                at_depth = [
                    float(np.interp(n, *_line(grid, depth)))
                    for depth in depths
                    if len(_line(grid, depth)[0])
                ]
                found[m] = float(np.interp(k, depths, at_depth))
                continue
            xs, ys = _line(grid, k)
            beyond = max(0.0, n - xs[-1]) * ys[-1] / xs[-1]
            found[m] = float(np.interp(n, xs, ys)) + beyond
        return found

    def mlp(self, hidden: int, width: int) -> dict[int, float]:
        """A gated feed-forward layer's two products."""
        dtypes = {row["gemm_dtype"] for row in self.rows("gemm", "gemm_perf")}
        dtype = "fp8_block" if "fp8_block" in dtypes else "fp8"
        up, down = self.gemm(2 * width, hidden, dtype), self.gemm(hidden, width, dtype)
        return {m: up[m] + down[m] for m in up if m in down}

    def hyper_connections(self, hidden: int) -> dict[int, float]:
        """Before and after a layer's two parts."""
        rows = self.rows("mhc", "mhc_module_perf") or self.rows(
            "mhc", "mhc_module_perf", "sglang", ENGINES["sglang"]
        )
        total: dict[int, float] = defaultdict(float)
        for row in _only(rows, {"hidden_size": hidden}):
            total[row["num_tokens"]] += row["latency"]
        return dict(total)

    # Between GPUs

    def all_reduce(self) -> dict[str, dict[str, Any]]:
        """ms by GPUs and bytes. The tables count bfloat16 elements."""
        rows = self.rows("comm", "custom_allreduce_perf")
        graph = [row for row in rows if row["kernel_source"].endswith("graph")]
        return _by_gpus(graph or rows)

    def nccl(self, op: str) -> dict[str, dict[str, Any]]:
        rows = _only(self.rows("comm", "nccl_perf", "nccl", "2.29.2"), {"op_name": op})
        return _by_gpus(_only(rows, {"nccl_dtype": "half"}))

    def all_to_all(self, model: Model) -> dict[str, Any]:
        """ms of DeepEP's low-latency dispatch and combine over 8 GPUs, by tokens of one GPU."""
        rows = _only(
            self.rows("comm", "wideep_deepep_ll_perf", "sglang", "0.5.12"),
            {"hidden_size": model.hidden, "num_topk": model.n_active},
        )
        nearest = min(
            {row["num_experts"] for row in rows},
            key=lambda n: abs(n - model.n_experts),
            default=0,
        )
        times = {
            row["num_token"]: (row["dispatch_avg_t_us"] + row["combine_avg_t_us"]) / 1e3
            for row in _only(rows, {"num_experts": nearest})
        }
        return _curve(times, BATCHES) if times else {}


@lru_cache(maxsize=64)
def _read(path: Path) -> Rows:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist() if path.is_file() else []


def _only(rows: Rows, wanted: dict[str, Any]) -> Rows:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _of(model: Model, rows: Rows) -> Rows:
    """The model's rows, FP8 products before bfloat16 ones."""
    found = (
        _only(rows, {"model": name, "gemm_type": dtype})
        for name in model.rows
        for dtype in ("fp8_block", "bfloat16")
    )
    return next(filter(None, found), [])


def _fp8_kv(rows: Rows) -> Rows:
    return [row for row in rows if row["kv_cache_dtype"].startswith("fp8")]


def _grid(rows: Rows, x: str, y: str) -> Grid:
    return {(row[x], row[y]): row["latency"] for row in rows}


def _less(grid: Grid, excess: Grid) -> Grid:
    """`grid` without the excess, which is interpolated over the second key where it was not
    timed.
    """
    lines: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (x, y), value in sorted(excess.items()):
        lines[x].append((y, value))
    corrected = {}
    for (x, y), value in grid.items():
        line = lines.get(x)
        off = excess.get((x, y))
        if off is None:
            off = float(np.interp(y, *zip(*line))) if line else 0.0
        corrected[x, y] = value - off
    return corrected


def _line(grid: dict[tuple[int, int], float], depth: int) -> tuple[list[int], list[float]]:
    widths = sorted(width for width, k in grid if k == depth)
    return widths, [grid[width, depth] for width in widths]


def _by_gpus(rows: Rows) -> dict[str, dict[str, Any]]:
    found = {}
    for n_gpus in sorted({row["num_gpus"] for row in rows}):
        times = {
            2 * row["message_size"]: row["latency"] for row in _only(rows, {"num_gpus": n_gpus})
        }
        sizes = tuple(size for size in sorted(times) if 2**11 <= size <= 2**28)
        found[str(n_gpus)] = _curve(times, sizes[::2])
    return found


def _curve(times: dict[int, float], at: Iterable[int]) -> dict[str, Any]:
    """`times` at these sizes, interpolated where they were not measured, up to the largest that
    was.
    """
    sizes = sorted(times)
    wanted = [size for size in at if sizes[0] <= size <= sizes[-1]]
    return {
        "at": wanted,
        "ms": _round(np.interp(wanted, sizes, [times[size] for size in sizes])),
    }


def _round(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


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
        "short_ms": [_round(line) for line in short],
        "grown_at": contexts,
        "grown_ms": _round(grown),
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
            _round(
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
            attention[module]["token_ns"] = token_ns(added)
    experts = {
        kind: found for kind, names in FORMATS.items() if (found := tables.experts(model, names))
    }
    if set(attention) != set(modules) or not experts:
        return {}
    made: dict[str, Any] = {"attention": attention, "prefill": prefill, "experts": experts}
    made["router"] = _curve(tables.gemm(model.n_experts, model.hidden, "bfloat16"), TOKENS)
    if model.hyper_connections:
        made["hyper_connections"] = _curve(tables.hyper_connections(model.hidden), TOKENS)
    made["head"] = {
        str(tp): _curve(tables.gemm(model.vocabulary // tp, model.hidden, "bfloat16"), TOKENS)
        for tp in (1, 2, 4, 8)
    }
    for part, width in (("shared_expert", model.expert_width), ("dense", model.dense_width)):
        if width:
            made[part] = {
                str(tp): _curve(tables.mlp(model.hidden, width // tp), TOKENS)
                for tp in (1, 2, 4, 8)
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
        "made_by": "benchmarks/kernel_tables.py, which says what was changed",
        "all_reduce": tables.all_reduce(),
        "all_gather": tables.nccl("all_gather"),
        "reduce_scatter": tables.nccl("reduce_scatter"),
        "models": models,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="folder with the unpacked wheel")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "fmsim" / "hw" / "tables"
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for gpu in GPUS:
        for engine in ENGINES:
            made = table(Tables(given.wheel, gpu, engine))
            if not made["models"]:
                continue
            path = given.out / f"{gpu}-{engine}.json"
            path.write_text(json.dumps(made, separators=(",", ":")) + "\n")
            print(f"{path.name}: {path.stat().st_size:,} bytes, {', '.join(made['models'])}")


if __name__ == "__main__":
    main()
