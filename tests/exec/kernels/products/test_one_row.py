"""Products of one row: the kernel against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error

from fmsim.exec.kernels.products.few_rows import few_rows_triton
from fmsim.exec.kernels.products.in_turns import HeadTurn
from fmsim.exec.kernels.products.one_row import (
    one_row_reference,
    one_row_triton,
    two_rows_reference,
    two_rows_triton,
)
from fmsim.exec.kernels.tuning import FewRowsTuning, OneRowTuning
from fmsim.exec.kernels.weights import quantise
from fmsim.exec.model.norm_rope import RMSNorm

SMALL = OneRowTuning(block_bytes=16_384, turn_bytes=4096, programs=8)


@on_each_device
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    outputs=st.sampled_from([16, 130, 256]),
    inputs=st.sampled_from([128, 200, 1024]),
    groups=st.sampled_from([1, 2]),
    float8=st.booleans(),
    normed=st.booleans(),
    alongside=st.booleans(),
)
def test_the_kernel_is_the_product(
    device, seed, outputs, inputs, groups, float8, normed, alongside
):
    """Of whole blocks and others; where float8 blocks differ in size, a wrong scale shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        torch.exp2(torch.arange(inputs) // 128 * 3.0) * (1 + torch.arange(outputs) // 128)[:, None]
    )
    weight, scale = torch.randn(outputs, inputs, generator=generator) * sizes, None
    weight, scale = quantise(weight) if float8 else (weight.bfloat16(), None)
    x = torch.randn(1, 1, groups * inputs, generator=generator).bfloat16()
    norm = None
    if normed and groups == 1:
        norm = RMSNorm(inputs, 1e-6).requires_grad_(False)
        norm.weight.normal_(generator=generator)
        norm = norm.bfloat16().to(device)
    given_ = [part if part is None else part.to(device) for part in (x, weight, scale)]
    found = one_row_triton(*given_, groups, norm, alongside, tune=SMALL)
    expected = one_row_reference(*given_, groups, norm)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    # a last bit of bfloat16 at each rounding: the interpreter cuts it off
    assert relative_error(found, expected) < (1 + normed) * 2**-7


@on_each_device
def test_two_products_of_one_row(device):
    """Of float8 and bfloat16, in either order, and outputs that fill no last program."""
    x = torch.randn(1, 1, 512).bfloat16().to(device)
    float8, scale = (part.to(device) for part in quantise(torch.randn(256, 512)))
    plain = torch.randn(70, 512).bfloat16().to(device)
    for weights, scales in (((float8, plain), (scale, None)), ((plain, float8), (None, scale))):
        found = two_rows_triton(x, weights, scales, SMALL)
        for part, expected in zip(found, two_rows_reference(x, weights, scales), strict=True):
            assert part.shape == expected.shape and relative_error(part, expected) < 2**-7


@on_each_device
@pytest.mark.parametrize("rows", [2, 3])
def test_a_few_rows(device, rows):
    """And outputs and inputs that fill no last program."""
    x = torch.randn(rows, 1, 200).bfloat16().to(device)
    weight = torch.randn(70, 200).bfloat16().to(device)
    found = few_rows_triton(x, weight, FewRowsTuning(block_values=1024))
    assert found.shape == (rows, 1, 70)
    for part, row in zip(found, x, strict=True):
        assert relative_error(part, one_row_reference(row, weight)) < 2**-7


@on_each_device
def test_outputs_are_turned(device):
    """RoPE of the last channels of heads of 64, in several turns of a program."""
    x = torch.randn(1, 1, 256).bfloat16().to(device)
    weight, scale = (part.to(device) for part in quantise(torch.randn(512, 256)))
    angles = torch.randn(1, 16, device=device)
    turn = HeadTurn(angles.cos(), angles.sin(), 64)
    found = one_row_triton(x, weight, scale, turn=turn, tune=SMALL)
    assert relative_error(found, one_row_reference(x, weight, scale, turn=turn)) < 2**-7
