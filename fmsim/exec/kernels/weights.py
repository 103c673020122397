"""How quantised weights lie, as DeepSeek-V4 is released: float8 e4m3 with a scale for each block of
128 x 128, and pairs of 4-bit values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import cdiv

BLOCK = 128  # rows and columns that share one scale
LARGEST = 448.0  # float8 e4m3
FP4_BLOCK = 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))


def scale_shape(
    shape: torch.Size | tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)
) -> tuple[int, ...]:
    """Of the scales of a weight [..., out, in]."""
    return (*shape[:-2], cdiv(shape[-2], block[0]), cdiv(shape[-1], block[1]))


def quantise(
    weight: Tensor, block: tuple[int, int] = (BLOCK, BLOCK), powers: bool = False
) -> tuple[Tensor, Tensor]:
    """A weight [..., out, in] -> float8_e4m3fn of the same shape and float32 scales: each block's
    largest amount becomes 448, or no more than it where scales are ``powers`` of two, as the
    release's are: then bfloat16 holds what comes back exactly.
    """
    rows, columns = weight.shape[-2:]
    spare = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(weight.float(), spare)
    # [..., out blocks, rows of one, in blocks, columns of one]
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    largest = blocks.abs().amax((-3, -1))
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    if powers:
        scale = torch.exp2(scale.log2().ceil())
    codes = (blocks / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous(), scale


def dequantise(
    weight: Tensor,
    scale: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `quantise` makes, or any values [..., out, in] with a scale for each ``block``, as
    ``dtype``; rounded once.
    """
    wide = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return (weight.float() * wide[..., : weight.shape[-2], : weight.shape[-1]]).to(dtype)


def four_bit_values(pairs: Tensor) -> Tensor:
    """Pairs of e2m1 values, the even one in a byte's low half, int8 or uint8 [..., n] -> float32
    [..., 2 n], unscaled.
    """
    codes = pairs.view(torch.uint8)
    return E2M1.to(codes.device)[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
