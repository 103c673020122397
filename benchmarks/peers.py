"""The best kernels that others publish, called on our own kernels' inputs: what `kernels.py` times
beside ours.

Each function takes what a case was given and returns ways to the same result by name; a way that
cannot be had is a sentence that says why. None of them is needed: the wheels are sgl-flash-mla,
sgl-deep-gemm and apache-tvm-ffi; torch brings cuBLAS with it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.attention import flash_mla
from fmsim.exec.kernels.attention.rows import Rows
from fmsim.exec.kernels.attention.sparse_attention import sparse_attention_triton
from fmsim.exec.kernels.norms.rounded_rows import Activations, Float8Rows
from fmsim.exec.kernels.products import float8_products
from fmsim.exec.kernels.products.linear import linear_triton

Way = Callable[[], Tensor] | str
PAGE = 64  # entries, of both packages
LIMIT = 3e-2  # relative error against ours: float8 rows are rounded, bfloat16 sums have 8 bits


def package(name: str) -> ModuleType | str:
    """A package, or why it cannot be had."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a wheel for another torch or CUDA fails in its own ways
        return f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"


class Patience:
    """How long the peers' first calls may take in all: some compile for seconds at each shape."""

    def __init__(self, seconds: float):
        self.left_s = seconds


def tried(ways: dict[str, Way], ours: Tensor, patience: Patience) -> dict[str, Way]:
    """The ways that run and agree with ``ours``; of the others, why they do not."""
    found: dict[str, Way] = {}
    for name, way in ways.items():
        if isinstance(way, str):
            found[name] = way
            continue
        if patience.left_s <= 0:
            found[name] = "its first calls would take longer than --peer-seconds"
            continue
        start_s = time.monotonic()
        try:
            result = way().double().reshape(-1)
            torch.cuda.synchronize()
        except Exception as error:  # their refusals are of many types
            found[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
            continue
        finally:
            patience.left_s -= time.monotonic() - start_s
        expected = ours.double().reshape(-1)
        error = float((result - expected).norm() / expected.norm())
        found[name] = way if error <= LIMIT else f"relative error {error:.1e} against ours"
    return found


# ---------------------------------------------------------------------------------------- attention


def of_attention(
    queries: Tensor, rows: Rows, sinks: Tensor, scale: float, masses: bool
) -> dict[str, Way]:
    """FlashMLA's sparse decode over the window and, as its extra cache, the entries; and our own
    kernels, where the engine may take FlashMLA's.
    """
    if masses:
        return {}
    tune = tuning.attention(len(queries), queries.shape[1], rows.layout.kind == "latent")
    own: dict[str, Way] = {
        "own": lambda: sparse_attention_triton(queries, rows, sinks, scale, tune=tune)[0]
    }
    flash = package("flash_mla")
    if isinstance(flash, str):
        return own | {"FlashMLA": flash}
    if rows.pool.shape[1] % flash_mla.ALIGNED:
        why = "its reads of 16 bytes need pages of two packed entries or more"
        return own | {"FlashMLA": why}
    asked = queries.to(torch.bfloat16)
    return own | {"FlashMLA": lambda: flash_mla.attend(asked, rows, sinks, scale)}


# ------------------------------------------------------------------------------------- index scores


def of_index_scores(queries, weights, pool, layout, table, lengths) -> dict[str, Way]:
    """DeepGEMM's paged scores, for float8 queries."""
    gemm = package("deep_gemm")
    if isinstance(gemm, str):
        return {"DeepGEMM": gemm}
    if queries.dtype != torch.float8_e4m3fn:
        return {"DeepGEMM": "it takes float8 queries"}
    entries = int(lengths.max())
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    counts = lengths[:, None].contiguous()
    plan = gemm.get_paged_mqa_logits_metadata(counts, PAGE, processors)
    keys = pool.view(-1, PAGE, 1, layout.entry_bytes)

    def run() -> Tensor:
        scores = gemm.fp8_paged_mqa_logits(
            queries[:, None], keys, weights, counts, table, plan, entries
        )
        return scores[:, :entries]

    return {"DeepGEMM": run}


# ----------------------------------------------------------------------------------------- products


def of_product(rows: Activations, weight: Tensor, scale: Tensor, groups: int) -> dict[str, Way]:
    """Rounded rows times float8 weights by cuBLAS, by DeepGEMM and by our own kernel."""
    if isinstance(rows, Tensor):
        return {}
    given = rows, weight, scale, groups
    gemm = package("deep_gemm")
    return {
        "own": lambda: linear_triton(*given),
        "DeepGEMM": gemm if isinstance(gemm, str) else lambda: by_deep_gemm(gemm, *given),
        "cuBLAS, float8": lambda: float8_products.by_cublas(*given),
    }


def by_deep_gemm(
    gemm: ModuleType, rows: Float8Rows, weight: Tensor, scale: Tensor, groups: int
) -> Tensor:
    """Its compiler takes seconds at a new kind of shape."""
    if groups > 1:
        raise ValueError("one product at a time")
    count = rows.count
    out = torch.empty(count, len(weight), dtype=rows.dtype, device=weight.device)
    gemm.fp8_gemm_nt((rows.codes[:count], rows.scales[:, :count].T), (weight, scale), out)
    return out
