"""Products with float8 weights: the kernel against its reference, and the reference against numbers
by hand and the exact product.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.linear import linear_reference, linear_triton
from fmsim.exec.kernels.weights import dequantise, quantise, scale_shape

LIMITS = {
    torch.float32: 0.0,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}  # one last bit of bfloat16: the interpreter cuts it off
TUNES = [
    tuning.LinearTuning(block_outputs=16, block_inputs=64, programs=1),
    tuning.LinearTuning(block_outputs=32, programs=40),
    tuning.LinearTuning(block_outputs=128, programs=6, warps=8, stages=3, block_sums=32),
]


def drawn(
    generator: torch.Generator, outputs: int, inputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose blocks differ in size a thousandfold."""
    size = torch.rand(scale_shape((outputs, inputs)), generator=generator) * 10 - 5
    sizes = torch.exp2(size).repeat_interleave(128, 0).repeat_interleave(128, 1)[:outputs, :inputs]
    return quantise(torch.randn(outputs, inputs, generator=generator) * sizes)


def agrees(found: torch.Tensor, exact: torch.Tensor, amounts: torch.Tensor, limit: float) -> bool:
    """Within ``limit`` of what is ``exact``, for its type, and a millionth of the ``amounts`` added
    up, for sums in float32.
    """
    return float((found.double() - exact).norm()) <= limit * float(exact.norm()) + 1e-6 * float(
        amounts.norm()
    )


def test_quantised_by_hand():
    weight = torch.zeros(130, 129)
    weight[0, 0], weight[0, 1], weight[127, 127], weight[129, 128] = 896.0, -2.0, 1.0, 7.0
    codes, scale = quantise(weight)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape
    assert scale.tolist() == [[2.0, 1.0], [1.0, 7.0 / 448]]  # a block of zeros keeps a scale of one
    assert (codes[0, 0], codes[0, 1], codes[127, 127], codes[129, 128]) == (448, -1, 0.5, 448)
    assert torch.equal(dequantise(codes, scale), weight)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    experts=st.integers(0, 3),
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 300),
)
def test_quantising_loses_a_sixteenth_at_most(seed, experts, outputs, inputs):
    """Of each value, but for those that a block's largest dwarfs.

    Matrices stacked are quantised one by one.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*[experts] * (experts > 0), outputs, inputs, generator=generator)
    codes, scale = quantise(weight)
    assert scale.shape == scale_shape(weight.shape) and not codes.float().isnan().any()
    wide = dequantise(codes, scale)
    assert ((wide - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-10).all()
    for number in range(experts):
        assert torch.equal(dequantise(*quantise(weight[number])), wide[number])


@on_each_device
@settings(
    max_examples=15 if torch.cuda.is_available() else 60, deadline=None
)  # each shape is compiled anew there
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 2, 9, 17, 128]),
    outputs=st.sampled_from([1, 16, 128, 200, 257]),
    inputs=st.sampled_from([1, 64, 128, 200, 640]),
    dtype=st.sampled_from(list(LIMITS)),
    tune=st.sampled_from(TUNES),
    apart=st.booleans(),
)
def test_the_kernel_is_the_reference(device, seed, rows, outputs, inputs, dtype, tune, apart):
    """``apart``: rows are parts of longer ones, as a product of several projections at once gives
    them.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, scale = (part.to(device) for part in drawn(generator, outputs, inputs))
    x = torch.randn(rows, 1, inputs + 16 * apart, generator=generator).to(device, dtype)[
        ..., :inputs
    ]
    wide = dequantise(weight, scale).double()
    exact, amounts = x.double() @ wide.T, x.double().abs() @ wide.abs().T
    found = linear_triton(x, weight, scale, tune=tune)
    assert found.dtype == dtype and found.shape == (rows, 1, outputs)
    assert agrees(found, exact, amounts, LIMITS[dtype])
    assert agrees(linear_reference(x.float(), weight, scale), exact, amounts, 0)
    assert torch.equal(found, linear_triton(x, weight, scale, tune=tune))


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 3, 20]),
    groups=st.sampled_from([2, 8]),
    of_group=st.sampled_from([16, 48, 128]),
    inputs=st.sampled_from([32, 128, 200]),
    tune=st.sampled_from(TUNES),
)
def test_groups_have_inputs_of_their_own(device, seed, rows, groups, of_group, inputs, tune):
    generator = torch.Generator().manual_seed(seed)
    weight, scale = (part.to(device) for part in drawn(generator, groups * of_group, inputs))
    x = torch.randn(rows, 1, groups * inputs, generator=generator).to(device)

    def product(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                x[..., g * inputs : (g + 1) * inputs] @ wide[g * of_group : (g + 1) * of_group].T
                for g in range(groups)
            ],
            -1,
        )

    x64, wide = x.double(), dequantise(weight, scale).double()
    exact, amounts = product(x64, wide), product(x64.abs(), wide.abs())
    for run in (linear_reference, lambda *given_: linear_triton(*given_, tune=tune)):
        assert agrees(run(x, weight, scale, groups), exact, amounts, 0)
