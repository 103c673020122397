"""Products of two rows with a bfloat16 weight: some of a decode step's projections, where `one_row`
does not do, and a library's product would wait for the launch before it to end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., in] is as many rows on a GPU, without gradients, and all is bfloat16."""
    return (
        runs_compiled(x)
        and 1 < x.shape[:-1].numel() <= tuning.FEW.most_rows
        and x.is_contiguous()
        and weight.is_contiguous()
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.shape[1] <= tuning.FEW.most_inputs
        and not torch.is_grad_enabled()
    )


def few_rows_triton(x: Tensor, weight: Tensor, tune: tuning.FewRowsTuning = tuning.FEW) -> Tensor:
    """x [..., in] times ``weight`` [out, in], as `torch.nn.functional.linear`."""
    (outputs, inputs), padded = weight.shape, next_power_of_2(weight.shape[1])
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    held = max(1, tune.block_values // padded)
    _few_rows[(cdiv(outputs, held),)](
        x,
        weight,
        out,
        OUTPUTS=outputs,
        INPUTS=inputs,
        PADDED=padded,
        HELD=held,
        COUNT=x.shape[:-1].numel(),
        num_warps=tune.warps,
        **overlapped(x),
    )
    return out


@triton.jit
def _few_rows(
    x,
    weight,
    out,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PADDED: tl.constexpr,
    HELD: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program: HELD outputs of each of COUNT rows. It reads weights before x is there."""
    output, place = tl.program_id(0) * HELD + tl.arange(0, HELD), tl.arange(0, PADDED)
    inside = (output < OUTPUTS)[:, None] & (place < INPUTS)[None, :]
    places = weight + output.to(tl.int64)[:, None] * INPUTS + place[None, :]
    weights = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first")
    after_previous()
    weights = weights.to(tl.float32)
    for row in tl.static_range(COUNT):
        values = tl.load(x + row * INPUTS + place, mask=place < INPUTS, other=0.0).to(tl.float32)
        total = tl.sum(weights * values[None, :], 1).to(out.dtype.element_ty)
        tl.store(out + row * OUTPUTS + output, total, mask=output < OUTPUTS)
