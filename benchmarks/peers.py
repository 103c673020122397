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

from fmsim.exec.kernels.attention_rows import Rows
from fmsim.exec.kernels.layout import LATENT, slots_of
from fmsim.exec.kernels.rounded_rows import round_rows
from fmsim.exec.kernels.weights import BLOCK

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
    """FlashMLA's sparse decode over the window and, as its extra cache, the entries."""
    if masses:
        return {}
    flash = package("flash_mla")
    if isinstance(flash, str):
        return {"FlashMLA": flash}
    batch, window = len(queries), rows.window_rows
    if rows.layout != LATENT or rows.layout.per_page(rows.pool) != PAGE or window % PAGE:
        return {"FlashMLA": f"it reads pages of {PAGE} packed entries"}
    values = rows.window[:, : window * LATENT.value_bytes]
    scales = rows.window[:, window * LATENT.value_bytes :]
    near = torch.cat(
        (values.reshape(batch * window // PAGE, -1), scales.reshape(batch * window // PAGE, -1)), 1
    )
    places = torch.arange(batch * window, dtype=torch.int32, device=queries.device)
    places = places.view(batch, 1, window)
    short = torch.arange(window, device=queries.device) >= rows.window_lengths[:, None]
    places = places.masked_fill(short[:, None], -1)
    slots = slots_of(rows.table, rows.ids, PAGE).to(torch.int32)[:, None]
    metadata = flash.get_mla_metadata()[0]
    asked = queries.to(torch.bfloat16)[:, None]

    def run() -> Tensor:
        return flash.flash_mla_with_kvcache(
            asked,
            near.view(-1, PAGE, 1, LATENT.entry_bytes),
            None,
            None,
            LATENT.width,
            metadata,
            softmax_scale=scale,
            is_fp8_kvcache=True,
            indices=places,
            attn_sink=sinks,
            extra_k_cache=rows.pool.view(-1, PAGE, 1, LATENT.entry_bytes),
            extra_indices_in_kvcache=slots,
            use_legacy=True,
            kv_format="V4",
        )[0]

    return {"FlashMLA": run}


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


def of_product(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, float8_rows: bool
) -> dict[str, Way]:
    """Float8 rows times float8 weights by cuBLAS and by DeepGEMM, the rounding of rows included."""
    rows = x.flatten(0, -2)
    if not float8_rows or groups > 1:
        return {}
    count, outputs = len(rows), len(weight)

    def rounded() -> tuple[Tensor, Tensor]:
        codes, scales = round_rows(rows)
        return codes, scales[:, :count].T  # [rows, blocks], a block's scales side by side

    def by_cublas() -> Tensor:
        from torch.nn.functional import ScalingType, scaled_mm

        codes, scales = rounded()
        return scaled_mm(
            codes,
            weight.T,
            # no stride of its own beyond the rows
            scales.T.contiguous().T,
            ScalingType.BlockWise1x128,
            scale.T,
            ScalingType.BlockWise128x128,
            output_dtype=x.dtype,
        )

    gemm = package("deep_gemm")
    if isinstance(gemm, str):
        return {"cuBLAS, float8": by_cublas, "DeepGEMM": gemm}
    out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)

    def by_deep_gemm() -> Tensor:
        codes, scales = rounded()
        gemm.fp8_gemm_nt((codes, scales.contiguous()), (weight, scale), out)
        return out

    assert weight.shape[1] % BLOCK == 0
    return {"cuBLAS, float8": by_cublas, "DeepGEMM": by_deep_gemm}
