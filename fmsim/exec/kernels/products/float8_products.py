"""Ways to products of rounded rows beside `linear`'s: by our kernel that reads through descriptors,
and by cuBLAS, which torch brings. From about a hundred rows on one of them is faster.

Which is fastest for a shape was measured (`float8_ways.json`, by benchmarks/float8_products.py); of
a card or a shape that was not, the nearest decides. A shape that one refuses is not asked again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.norms.rounded_rows import Float8Rows
from fmsim.exec.kernels.products.described_linear import described_linear
from fmsim.exec.kernels.weights import BLOCK

TABLE = Path(__file__).parent / "float8_ways.json"
OWN = "own"  # with the sizes that `tuning.linear` gives
# our own with other sizes
OWN_TUNES = {
    "own, 64 rows": tuning.FLOAT8_LINEAR_OF_SOME,
    "own, 128 rows": tuning.FLOAT8_LINEAR_OF_MANY,
}
COLUMNS = 4 * BLOCK  # of a weight: its scales lie in rows of 16 bytes


def by_cublas(rows: Float8Rows, weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """As `linear` with rounded rows; groups one after another."""
    from torch.nn.functional import ScalingType, scaled_mm

    inputs = weight.shape[1]
    parts = zip(
        rows.codes.split(inputs, 1),
        rows.scales.split(inputs // BLOCK),
        weight.chunk(groups),
        scale.chunk(groups),
        strict=True,
    )
    products = [
        scaled_mm(
            codes,
            weight.T,
            scales.T,
            ScalingType.BlockWise1x128,
            scale.T,
            ScalingType.BlockWise128x128,
            output_dtype=rows.dtype,
        )[: rows.count]
        for codes, scales, weight, scale in parts
    ]
    out = products[0] if groups == 1 else torch.cat(products, 1)
    return out.view(*rows.leading, len(weight))


Way = Callable[[Float8Rows, Tensor, Tensor, int], Tensor]
WAYS: dict[str, Way] = {"cublas": by_cublas} | {
    name: partial(described_linear, tune=tune) for name, tune in tuning.DESCRIBED_LINEAR.items()
}
_refused: set[tuple[str, tuple[int, ...]]] = set()


def product(
    rows: Float8Rows,
    weight: Tensor,
    scale: Tensor,
    groups: int,
    own: Callable[..., Tensor],
) -> Tensor | None:
    """``rows`` [..., groups * in] of bfloat16 -> [..., out] by the fastest of the ways that can be
    had; None where that is our ``own`` kernel (`linear_triton`) with its usual sizes.
    """
    outputs, inputs = weight.shape
    if not (weight.is_cuda and _is_hopper(weight.device)):
        return None
    if inputs % COLUMNS or outputs // groups % BLOCK or rows.dtype != torch.bfloat16:
        return None
    shape = (outputs, inputs, groups)
    for name in order(torch.cuda.get_device_name(weight.device), rows.count, *shape):
        if name == OWN:
            return None
        if name in OWN_TUNES:
            return own(rows, weight, scale, groups, tune=OWN_TUNES[name])
        if (name, shape) in _refused:
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
