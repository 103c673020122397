"""Norms and RoPE in one launch: the kernels against their references, and the references against
the model's functions.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error

from fmsim.exec.kernels.norms.norm_rope import norm_rope_reference, norm_rope_triton
from fmsim.exec.kernels.norms.rms_norm import rms_norm_reference, rms_norm_triton
from fmsim.exec.model.norm_rope import RMSNorm, rms_normalise, rotate

LIMITS = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
}  # one last bit of bfloat16: the interpreter cuts it off


def angles(rows: int, pairs: int, generator: torch.Generator) -> torch.Tensor:
    positions = torch.randint(0, 1_000_000, (rows,), generator=generator)
    return positions[:, None].float() * torch.logspace(0, -4, pairs)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_reference_is_the_models_rotation(eps, inverse):
    generator = torch.Generator().manual_seed(0)
    x, turn = torch.randn(3, 1, 6, 64, generator=generator), angles(3, 8, generator)
    expected = rotate(x if eps is None else rms_normalise(x, eps), turn[:, None, None], inverse)
    found = norm_rope_reference(x[:, 0], (turn.cos(), turn.sin()), eps, inverse)
    torch.testing.assert_close(found, expected[:, 0])


def test_turning_back_is_the_inverse():
    generator = torch.Generator().manual_seed(0)
    x, turn = torch.randn(3, 6, 64, generator=generator), angles(3, 8, generator)
    rotation = turn.cos(), turn.sin()
    torch.testing.assert_close(
        norm_rope_reference(norm_rope_reference(x, rotation), rotation, inverse=True), x
    )


@on_each_device
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 4),
    heads=st.sampled_from([1, 4, 6, 64]),
    width=st.sampled_from([16, 128, 512]),
    pairs=st.sampled_from([1, 4, 8]),
    dtype=st.sampled_from(list(LIMITS)),
    eps=st.sampled_from([None, 1e-6, 0.5]),
    inverse=st.booleans(),
    apart=st.booleans(),
)
def test_the_kernel_is_the_reference(
    device, seed, rows, heads, width, pairs, dtype, eps, inverse, apart
):
    """``apart``: rows are parts of longer ones, as a product of several projections at once gives
    them.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, heads + 3 * apart, width, generator=generator).to(device, dtype)[
        :, :heads
    ]
    turn = angles(rows, pairs, generator).to(device)
    given_ = x, (turn.cos(), turn.sin()), eps, inverse
    expected, found = norm_rope_reference(*given_), norm_rope_triton(*given_)
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative_error(found, expected) < LIMITS[dtype]
    if eps is None:
        assert torch.equal(found[..., : -2 * pairs], x[..., : -2 * pairs])


@on_each_device
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 4),
    width=st.sampled_from([32, 192, 1024, 1536]),
    dtype=st.sampled_from(list(LIMITS)),
    apart=st.booleans(),
)
def test_the_norms_kernel_is_the_models(device, seed, rows, width, dtype, apart):
    generator = torch.Generator().manual_seed(seed)
    norm = RMSNorm(width, 1e-6).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    x = torch.randn(rows, 1, width + 64 * apart, generator=generator).to(device, dtype)[..., :width]
    expected, found = rms_norm_reference(x, norm.to(device)), rms_norm_triton(x, norm)
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative_error(found, expected) < LIMITS[dtype]
