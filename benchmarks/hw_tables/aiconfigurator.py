"""aiconfigurator-core's tables: one GPU's and engine's rows, by what this project asks of them.

The wheel is NVIDIA's, Apache-2.0; kernel_tables.py beside this file says how to get it and what is
done to its rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
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
SPLITS = {  # of the experts over GPUs: (tensor-parallel, groups that hold whole experts)
    "tp1": (1, 1),
    **{
        f"{kind}{n}": (n, 1) if kind == "tp" else (1, n) for n in (2, 4, 8) for kind in ("tp", "ep")
    },
    **{f"tp{tp} x ep{ep}": (tp, ep) for tp, ep in ((2, 2), (2, 4), (4, 2))},
}
SECOND_TURN_MS = 0.02  # of equal scores' excess, above which a second turn is looked for

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
    formats: tuple[str, ...] = ()  # of its experts; fp8 and fp4 unless given
    heads: tuple[int, int, int] = (0, 0, 0)  # query heads, KV heads and their width, grouped-query


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
    "minimax-m3": Model(
        ("MiniMaxAI/MiniMax-M3",),
        6144,
        3072,
        4,
        128,
        200064,
        12288,
        formats=("fp4", "bf16"),
        heads=(64, 4, 128),
    ),
}
FORMATS = {  # of the experts, by what the tables call them
    "fp8": ("fp8_block",),
    "fp4": ("w4a8_mxfp4_mxfp8", "nvfp4"),
    "bf16": ("bfloat16",),
}
MSA = {"sglang": "0.5.16"}  # MiniMax-M3's block-sparse attention was timed in another version


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
        if module == "msa":
            return _grid(self._msa("msa_generation_module", tp), "batch_size", "step")
        if module == "gqa":
            return self._grouped_query(model, tp)
        if module in ("csa", "hca"):
            rows = self.rows("sparse_attention", f"dsv4_{module}_generation_module_perf")
            op = f"dsv4_{module}_generation_module"
        else:
            rows = self.rows("sparse_attention", "dsa_generation_module_perf")
            op = "dsa_generation_module" + ("_skip_indexer" if module == "dsa_shared" else "")
        wanted = {"tp_size": tp, "op_name": op}
        grid = _grid(_fp8_kv(_of(model, _only(rows, wanted))), "batch_size", "step")
        excess = self._flat_excess(module, model, decode=True)
        return _less(grid, _in_turns(grid, excess) if module == "csa" else excess)

    def prefill(self, module: str, model: Model, tp: int) -> Grid:
        """ms of one layer's prefill module by (chunk, tokens before it), one prompt."""
        if module == "msa":
            rows = _only(self._msa("msa_context_module", tp), {"batch_size": 1})
            return _grid(rows, "isl", "step")
        if module == "gqa":
            return self._grouped_query_prefill(model, tp)
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

    def _msa(self, module: str, tp: int) -> Rows:
        """MiniMax-M3's sparse layers, bfloat16 KV."""
        rows = self.rows("msa", f"{module}_perf", version=MSA.get(self.engine, "-"))
        return _only(rows, {"tp_size": tp, "kv_cache_dtype": "bfloat16"})

    def _grouped_query(self, model: Model, tp: int) -> Grid:
        """ms of a dense layer's decode: the attention kernel, and its projections' products."""
        heads, kv_heads, width = model.heads
        wanted = _kernel(heads // tp, max(1, kv_heads // tp), width)
        rows = _only(self.rows("attention", "generation_attention_perf"), wanted)
        around = self._projections(model, tp)
        found = {}
        for (batch, step), ms in _grid(rows, "batch_size", "step").items():
            found[batch, step if step == 1 else step + 1] = ms + float(np.interp(batch, *around))
        return found

    def _grouped_query_prefill(self, model: Model, tp: int) -> Grid:
        """ms of a dense layer's prefill: the kernel was timed on whole prompts, so a chunk is what
        the longer prompt takes more; times beyond the longest grow with its square.
        """
        heads, kv_heads, width = model.heads
        wanted = _kernel(heads // tp, max(1, kv_heads // tp), width) | {"batch_size": 1}
        rows = _only(self.rows("attention", "context_attention_perf"), wanted)
        if not rows:
            return {}
        whole = {row["isl"]: row["latency"] for row in rows if row["step"] == 0}
        sizes = sorted(whole)
        squared = whole[sizes[-1]] / sizes[-1] ** 2

        def prompt(tokens: int) -> float:
            if tokens > sizes[-1]:
                return squared * tokens**2
            return float(np.interp(tokens, sizes, [whole[size] for size in sizes]))

        around = self._projections(model, tp)
        return {
            (chunk, start): prompt(start + chunk)
            - (prompt(start) if start else 0.0)
            + float(np.interp(chunk, *around))
            for chunk in CHUNKS
            for start in STARTS
        }

    def _projections(self, model: Model, tp: int) -> tuple[list[int], list[float]]:
        """(tokens, ms) of a grouped-query layer's products: queries, keys and values; output."""
        heads, kv_heads, width = model.heads
        into = (heads // tp + 2 * max(1, kv_heads // tp)) * width
        first = self.gemm(into, model.hidden, "bfloat16")
        second = self.gemm(model.hidden, heads // tp * width, "bfloat16")
        sizes = sorted(set(first) & set(second))
        return sizes, [first[size] + second[size] for size in sizes]

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
                    found.setdefault(split, {})[distribution] = curve(best, TOKENS)
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
        return curve(times, BATCHES) if times else {}


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


def _kernel(heads: int, kv_heads: int, width: int) -> dict[str, Any]:
    """What names a grouped-query kernel's rows: bfloat16, no window."""
    return {
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "attn_dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "window_size": 0,
    }


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


def _in_turns(grid: Grid, excess: Grid) -> Grid:
    """`excess`, twice where a CSA row holds it twice.

    The top-k alone was timed on an idle GPU, in one turn up to 128 requests and in two from 256 on.
    On Blackwell some modules' rows at 64 and 128 requests hold two: V4-Flash's on a B200 at 128
    requests takes 130 us with 2,048 tokens, where all entries are selected and nothing is sorted,
    259 us with 4,096 and 203 with 6,144, and the excess is 62. A row holds two if it is no faster
    without them than at the longest context that has none (less 5%, which rows scatter by).
    """
    found = dict(excess)
    for (batch, context), ms in excess.items():
        plain = [c for b, c in excess if b == batch and excess[b, c] == 0.0 and (b, c) in grid]
        if ms < SECOND_TURN_MS or not plain or (batch, context) not in grid:
            continue
        row = grid[batch, context]
        if 1.05 * row - 2 * ms >= grid[batch, max(plain)]:
            found[batch, context] = 2 * ms
    return found


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
        found[str(n_gpus)] = curve(times, sizes[::2])
    return found


def curve(times: dict[int, float], at: Iterable[int]) -> dict[str, Any]:
    """`times` at these sizes, interpolated where they were not measured, up to the largest that
    was.
    """
    sizes = sorted(times)
    wanted = [size for size in at if sizes[0] <= size <= sizes[-1]]
    return {
        "at": wanted,
        "ms": rounded(np.interp(wanted, sizes, [times[size] for size in sizes])),
    }


def rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
