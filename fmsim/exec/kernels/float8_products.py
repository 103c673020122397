"""Products of rounded rows by kernels that others maintain: cuBLAS, which torch brings, and
DeepGEMM where its wheel (sgl-deep-gemm) is installed.

Which is fastest for a shape was measured (`float8_ways.json`, by benchmarks/float8_products.py); of
a card or a shape that was not, the nearest decides. What is not installed, or refuses a shape, is
passed over, and `linear`'s own kernel does the rest.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fmsim.exec.kernels.rounded_rows import round_rows
from fmsim.exec.kernels.weights import BLOCK

TABLE = Path(__file__).parent / "float8_ways.json"
OWN = "own"
# Rows of codes and of scales come in multiples of these: 16 bytes of a scale's column, and what
# cuBLAS takes.
DEEP_GEMM_ROWS, CUBLAS_ROWS = 4, 16


@cache
def deep_gemm() -> ModuleType | None:
    """The package, where it can be had."""
    os.environ.setdefault("DG_JIT_USE_NVRTC", "1")  # its other compiler takes ten times as long
    try:
        return importlib.import_module("deep_gemm")
    except Exception:  # a wheel for another torch or CUDA fails in its own ways
        return None


def by_deep_gemm(rows: Tensor, weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """As `linear` with rounded rows."""
    package = deep_gemm()
    assert package is not None
    count, (outputs, inputs) = len(rows), weight.shape
    codes, scales = round_rows(rows, DEEP_GEMM_ROWS)
    out = torch.empty(count, outputs, dtype=rows.dtype, device=rows.device)
    codes = codes[:count]
    if groups == 1:
        package.fp8_gemm_nt((codes, scales[:, :count].T), (weight, scale), out)
        return out
    of_groups = scales.unflatten(0, (groups, -1))[..., :count]  # [groups, blocks, rows]
    package.fp8_einsum(
        "bhr,hdr->bhd",
        (codes.view(count, groups, inputs), of_groups.permute(2, 0, 1)),
        (weight.view(groups, -1, inputs), scale.view(groups, -1, scale.shape[1])),
        out.view(count, groups, -1),
    )
    return out


def by_cublas(rows: Tensor, weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """As `linear` with rounded rows, in one group."""
    from torch.nn.functional import ScalingType, scaled_mm

    if groups > 1:
        raise ValueError("one product at a time")
    codes, scales = round_rows(rows, CUBLAS_ROWS)
    out = scaled_mm(
        codes,
        weight.T,
        scales.T,
        ScalingType.BlockWise1x128,
        scale.T,
        ScalingType.BlockWise128x128,
        output_dtype=rows.dtype,
    )
    return out[: len(rows)]


Way = Callable[[Tensor, Tensor, Tensor, int], Tensor]
WAYS: dict[str, Way] = {"deep_gemm": by_deep_gemm, "cublas": by_cublas}
_refused: set[tuple[str, tuple[int, ...]]] = set()


def product(rows: Tensor, weight: Tensor, scale: Tensor, groups: int) -> Tensor | None:
    """rows [n, groups * in] bfloat16 -> [n, out] by the fastest of the ways that can be had; None
    where that is `linear`'s own kernel.
    """
    outputs, inputs = weight.shape
    if not (rows.is_cuda and _is_hopper(rows.device)):
        return None
    if inputs % BLOCK or outputs // groups % BLOCK or rows.dtype != torch.bfloat16:
        return None
    for name in order(torch.cuda.get_device_name(rows.device), len(rows), outputs, inputs, groups):
        if name == OWN:
            return None
        shape = (len(rows), outputs, inputs, groups)
        if (name, shape) in _refused or (name == "deep_gemm" and deep_gemm() is None):
            continue
        try:
            return WAYS[name](rows, weight, scale, groups)
        except Exception:  # refusals are of many types; a shape is refused at its first call
            _refused.add((name, shape))
    return None


@cache
def order(card: str, rows: int, outputs: int, inputs: int, groups: int) -> Sequence[str]:
    """The ways to a product, the fastest first: as measured for the nearest shape and the next
    larger number of rows.
    """
    cards = _table()["cards"]
    shapes = cards.get(card) or next(iter(cards.values()), [])
    alike = [shape for shape in shapes if (shape["groups"] > 1) == (groups > 1)]
    if not alike:
        return [OWN]

    def apart(shape: dict[str, Any]) -> float:
        return abs(math.log(shape["outputs"] / outputs)) + abs(math.log(shape["inputs"] / inputs))

    found = min(alike, key=apart)["ways"]
    counts = sorted(int(count) for count in found)
    ways: list[str] = found[str(next((count for count in counts if count >= rows), counts[-1]))]
    return ways


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)
