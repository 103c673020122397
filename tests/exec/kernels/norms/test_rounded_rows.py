"""Rows rounded to float8: the reference against numbers by hand, and every launch that rounds what
it makes against the reference, bit for bit.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, rounded_by_hand
from torch import Tensor
from transformers import DeepseekV4Config

from fmsim.exec.kernels.attention.rows import Rows
from fmsim.exec.kernels.attention.sparse_attention import (
    sparse_attention_reference,
    sparse_attention_triton,
)
from fmsim.exec.kernels.layout import plain
from fmsim.exec.kernels.norms.norm_rope import norm_rope_reference, norm_rope_triton
from fmsim.exec.kernels.norms.rms_norm import rms_norm_reference, rms_norm_triton
from fmsim.exec.kernels.norms.rounded_rows import (
    Float8Rows,
    round_rows_reference,
    round_rows_triton,
    wide_rows,
)
from fmsim.exec.kernels.products.hyper_connection import enter_triton
from fmsim.exec.kernels.tuning import AttentionTuning
from fmsim.exec.model.hyper_connection import HyperConnection
from fmsim.exec.model.norm_rope import RMSNorm

DTYPES = [torch.float32, torch.bfloat16]


def same(found: Float8Rows, wide: Tensor) -> bool:
    """Whether rows are what ``wide`` [..., in] rounds to."""
    expected, count = round_rows_reference(wide), found.count
    assert (found.leading, found.dtype) == (expected.leading, expected.dtype)
    assert found.codes.shape == expected.codes.shape and found.scales.shape == expected.scales.shape
    return torch.equal(
        found.codes[:count].view(torch.uint8), expected.codes[:count].view(torch.uint8)
    ) and torch.equal(found.scales[:, :count], expected.scales[:, :count])


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers whose rows differ in size by twelve orders of magnitude."""
    size = torch.exp2(torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) * 40 - 20)
    return torch.randn(shape, generator=generator) * size


@on_each_device
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 9, 300]),
    columns=st.sampled_from([1, 128, 200]),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_are_rounded_as_the_reference_rounds(device, seed, rows, columns, dtype):
    """Out of longer rows too. cuBLAS takes whole sixteens of rows, and scales side by side."""
    generator = torch.Generator().manual_seed(seed)
    x = drawn(generator, rows, columns + 8).to(device, dtype)[:, :columns]
    found = round_rows_triton(x)
    assert same(found, x)
    assert len(found.codes) % 16 == 0 and found.scales.is_contiguous()
    by_hand = rounded_by_hand(x.float()).float()
    assert torch.equal(round_rows_reference(x.float()).widened(), by_hand)
    assert torch.equal(wide_rows(found), x) and torch.equal(wide_rows(x), x)


@on_each_device
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 18),
    width=st.sampled_from([32, 192, 1536]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_norm_rounds_what_it_makes(device, seed, rows, width, dtype):
    generator = torch.Generator().manual_seed(seed)
    norm = RMSNorm(width, 1e-6).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    norm, x = norm.to(device), drawn(generator, rows, 1, width).to(device, dtype)
    found = rms_norm_triton(x, norm, rounded=True)
    assert torch.equal(found.wide, rms_norm_triton(x, norm)) and same(found, found.wide)
    assert same(rms_norm_reference(x, norm, rounded=True), rms_norm_reference(x, norm))


@on_each_device
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3),
    shape=st.sampled_from([(6, 64), (3, 16), (20, 512), (40, 64)]),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([None, 1e-6]),
)
def test_turned_heads_are_rounded_side_by_side(device, seed, rows, shape, dtype, eps):
    generator = torch.Generator().manual_seed(seed)
    x, angles = drawn(generator, rows, *shape).to(device, dtype), torch.rand(rows, 8).to(device)
    given_ = x, (angles.cos(), angles.sin()), eps, True
    for run in (norm_rope_triton, norm_rope_reference):
        assert same(run(*given_, rounded=True), run(*given_).flatten(1))


@on_each_device
def test_a_connection_rounds_what_it_reads(device):
    connection = HyperConnection(DeepseekV4Config(hidden_size=192, hc_sinkhorn_iters=2))
    connection, norm = connection.requires_grad_(False).to(device), RMSNorm(192, 1e-6).to(device)
    connection.fn.normal_(std=0.1)
    streams = torch.randn(3, 1, 4, 192, device=device).to(torch.bfloat16)
    _, x, *gates = enter_triton(streams, None, connection, norm, rounded=True)
    _, wide, *as_before = enter_triton(streams, None, connection, norm)
    assert torch.equal(x.wide, wide) and same(x, wide)
    assert all(map(torch.equal, gates, as_before))


@on_each_device
@pytest.mark.parametrize("programs", [1, 12], ids=["whole", "split"])
@pytest.mark.parametrize(("heads", "size"), [(6, 64), (4, 128)])
def test_attention_rounds_its_output(device, programs, heads, size):
    """Heads of 64 share a scale: where rows are split, that takes a launch more."""
    layout, batch = plain(torch.float32, size), 2
    pool = torch.randn(batch, 40 * size).view(torch.uint8).view(batch, -1).to(device)
    ids = torch.randint(0, 40, (batch, 20), dtype=torch.int32, device=device)
    whole = torch.full((batch,), 40, dtype=torch.int32, device=device)
    table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    rows = Rows(layout, pool, whole, pool, table, ids)
    angles = torch.rand(batch, 8).to(device)
    queries, sinks = torch.randn(batch, heads, size).to(device), torch.zeros(heads).to(device)
    given_ = queries, rows, sinks, size**-0.5, False, (angles.cos(), angles.sin()), torch.bfloat16
    tune = AttentionTuning(block_heads=16, block_rows=16, programs=programs)
    for run, how in ((sparse_attention_triton, {"tune": tune}), (sparse_attention_reference, {})):
        found, wide = (run(*given_, rounded, **how)[0] for rounded in (True, False))
        assert same(found, wide.flatten(1))
