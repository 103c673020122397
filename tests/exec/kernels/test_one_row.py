"""Products of one row: the kernel against its reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error

from fmsim.exec.kernels.one_row import one_row_reference, one_row_triton
from fmsim.exec.kernels.tuning import OneRowTuning
from fmsim.exec.kernels.weights import quantise
from fmsim.exec.model.norm_rope import RMSNorm

SMALL = OneRowTuning(block_bytes=16_384)


@on_each_device
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    outputs=st.sampled_from([16, 130]),
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
