"""Products with float8 weights: the kernel against its reference, and the reference against numbers
by hand and the exact product.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, rounded_by_hand

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.norms.rounded_rows import round_rows_triton
from fmsim.exec.kernels.products import described_linear as described
from fmsim.exec.kernels.products import linear as products
from fmsim.exec.kernels.products.linear import linear_reference, linear_triton
from fmsim.exec.kernels.weights import dequantise, quantise, scale_shape

LIMITS = {
    torch.float32: 0.0,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}  # one last bit of bfloat16: the interpreter cuts it off
TUNES = [
    tuning.LinearTuning(block_outputs=16, block_inputs=64, programs=1),
    tuning.LinearTuning(block_outputs=32, programs=40),
    tuning.LinearTuning(block_outputs=128, block_rows=128, programs=6, warps=8, stages=3),
    tuning.LinearTuning(block_outputs=64, block_rows=32, programs=7, near_rows=2),
    tuning.LinearTuning(block_outputs=64, block_rows=64, programs=20),
]


# a GPU adds float8's products up in fewer bits than float32 has, 128 of them at a time
FLOAT8_LIMIT = 1e-3


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
@settings(max_examples=10, deadline=None)  # each shape is compiled anew there
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 2, 9, 17, 128, 130]),
    outputs=st.sampled_from([1, 16, 128, 200, 257]),
    inputs=st.sampled_from([1, 64, 128, 200, 384]),
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
    if device == "cuda":  # an interpreter adds up in one order
        assert torch.equal(found, linear_triton(x, weight, scale, tune=tune))


@pytest.mark.parametrize(
    ("blocks", "turns", "splits"),
    [(24, 32, 4), (72, 32, 3), (96, 32, 2), (384, 32, 1), (64, 64, 4), (128, 64, 3), (640, 8, 1)],
)
def test_columns_are_split_where_blocks_are_few(blocks, turns, splits):
    """As was fastest of some rows on an H200 (float8-products-h200.json)."""
    assert products._splits(blocks, turns, tuning.FLOAT8_LINEAR_OF_SOME) == splits


def sized(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Rows that differ in size a thousandfold."""
    size = torch.exp2(torch.rand(rows, 1, 1, generator=generator) * 12 - 6)
    return torch.randn(rows, 1, columns, generator=generator) * size


def exactly(x: torch.Tensor, wide: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in groups, and the sum of its terms' amounts."""
    x, wide = x.unflatten(-1, (groups, -1)), wide.unflatten(0, (groups, -1))
    of = [torch.einsum("rxgi,goi->rxgo", *pair) for pair in ((x, wide), (x.abs(), wide.abs()))]
    return of[0].flatten(-2), of[1].flatten(-2)


@on_each_device
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 17, 130]),
    outputs=st.sampled_from([16, 200, 257]),
    inputs=st.sampled_from([64, 128, 200, 384]),
    groups=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tune=st.sampled_from(TUNES[1:]),
    before=st.booleans(),
)
def test_float8_rows_are_the_products_of_rounded_ones(
    device, seed, rows, outputs, inputs, groups, dtype, tune, before
):
    """Exact but for the order of sums and the result's type, be they rounded ``before`` or not. Few
    rows stay as they are, and rows whose scales would lie across two groups."""
    generator = torch.Generator().manual_seed(seed)
    outputs = outputs // 16 * 16 * groups if groups > 1 else outputs
    weight, scale = (part.to(device) for part in drawn(generator, outputs, inputs))
    x = sized(generator, rows, groups * inputs).to(device, dtype)
    rounds = rows > tuning.FEW_ROWS and (groups == 1 or inputs % 128 == 0)
    near = rounded_by_hand(x) if rounds else x.double()
    exact, amounts = exactly(near, dequantise(weight, scale).double(), groups)
    given_ = round_rows_triton(x) if before and rounds else x
    tune = tune._replace(block_inputs=128)
    found = linear_triton(given_, weight, scale, groups, float8_rows=True, tune=tune)
    assert found.dtype == dtype and found.shape == (rows, 1, outputs)
    limit = max(LIMITS[dtype], FLOAT8_LIMIT) if rounds and device == "cuda" else LIMITS[dtype]
    assert agrees(found, exact, amounts, limit)
    # the rounded rows themselves are held in x's type, which bfloat16 does exactly
    reference = linear_reference(x.float(), weight, scale, groups, float8_rows=True)
    assert agrees(reference, exact, amounts, 0)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no CUDA device of compute capability 9.0",
)
@settings(max_examples=12, deadline=None)  # each may compile a kernel, for some seconds
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([17, 64, 65, 129, 300]),
    outputs=st.sampled_from([64, 192]),
    turns=st.sampled_from([3, 18, 32]),  # one to four splits, of more turns than stages too
    groups=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tune=st.sampled_from(
        [*tuning.DESCRIBED_LINEAR.values(), tuning.DescribedLinearTuning(near_rows=2)]
    ),
)
def test_products_through_descriptors_are_those_of_rounded_rows(
    seed, rows, outputs, turns, groups, dtype, tune
):
    """The same, and bit for bit the same each time."""
    generator = torch.Generator().manual_seed(seed)
    weight, scale = (part.cuda() for part in drawn(generator, outputs * groups, 128 * turns))
    x = sized(generator, rows, groups * 128 * turns).to("cuda", dtype)
    exact, amounts = exactly(rounded_by_hand(x), dequantise(weight, scale).double(), groups)
    given_ = round_rows_triton(x), weight, scale, groups, tune
    found = described.described_linear(*given_)
    assert found.dtype == dtype and found.shape == (rows, 1, outputs * groups)
    assert agrees(found, exact, amounts, max(LIMITS[dtype], FLOAT8_LIMIT))
    assert torch.equal(found, described.described_linear(*given_))


@pytest.mark.parametrize(
    ("blocks", "turns", "splits"),
    [
        (96, 32, 4),
        (99, 32, 4),
        (100, 32, 2),
        (198, 32, 2),
        (199, 32, 1),
        (24, 3, 1),
        (24, 6, 2),
        (66, 256, 4),
        (67, 256, 2),
    ],
)
def test_programs_that_wait_for_each_other_fit_a_gpu_at_a_time(blocks, turns, splits):
    tune = tuning.DESCRIBED_LINEAR["described, 64 rows"]
    assert described._splits(blocks, turns, tune, multiprocessors=132) == splits


@on_each_device
def test_rounding_costs_what_three_bits_cost(device):
    """Of normal rows and weights: 1 part in 16 at most of each value, 2.6% of the result."""
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantise(torch.randn(256, 512, generator=generator))
    x = torch.randn(64, 512, generator=generator)
    exact = x @ dequantise(weight, scale).T
    found = linear_triton(x.to(device), weight.to(device), scale.to(device), float8_rows=True).cpu()
    assert 0.01 < float((found - exact).norm() / exact.norm()) < 0.04


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


@on_each_device
def test_no_rows_widen_a_weight(device, monkeypatch):
    """However many, in memory: a decode of 129 requests would widen all of a model's at each
    step."""
    monkeypatch.setattr(products, "runs_compiled", lambda x: True)

    def widened(*_, **__):
        raise AssertionError("a whole weight was widened")

    monkeypatch.setattr(products, "dequantise", widened)
    weight, scale = (part.to(device) for part in quantise(torch.randn(32, 256)))
    for rows in (1, 16, 17, 128, 129, 256, 400):
        for float8_rows in (False, True):
            found = products.linear(
                torch.ones(rows, 256, device=device), weight, scale, float8_rows=float8_rows
            )
            assert found.shape == (rows, 32)
