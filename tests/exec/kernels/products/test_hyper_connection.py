"""Hyper-connections of few tokens: the kernels against the model's own functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error
from torch import nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.experts.router import routed_triton
from fmsim.exec.kernels.products.hyper_connection import (
    Pending,
    Shares,
    enter_reference,
    enter_triton,
    read_out_reference,
    read_out_triton,
)
from fmsim.exec.kernels.products.one_row import one_row_triton, two_rows_triton
from fmsim.exec.kernels.tuning import HyperConnectionTuning
from fmsim.exec.model.experts import Router
from fmsim.exec.model.hyper_connection import HyperConnection, HyperHead
from fmsim.exec.model.norm_rope import RMSNorm

SMALL = HyperConnectionTuning(block_channels=32, programs=4, tile_channels=16, input_channels=64)
# bfloat16: the model rounds every product on the way back, the kernel the sum of them
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


def modules(
    seed: int, width: int, count: int, device: str, iterations: int = 4
) -> tuple[HyperConnection, HyperConnection, HyperHead, RMSNorm]:
    """Two connections, a head and a norm with weights of a trained model's spread: no gate
    saturates, none is flat.
    """
    torch.manual_seed(seed)
    config = DeepseekV4Config(hidden_size=width, hc_mult=count, hc_sinkhorn_iters=iterations)
    made = nn.ModuleList(
        [
            HyperConnection(config),
            HyperConnection(config),
            HyperHead(config),
            RMSNorm(width, config.rms_norm_eps),
        ]
    )
    for name, parameter in made.requires_grad_(False).named_parameters():
        parameter.normal_(std=(count * width) ** -0.5 if name.endswith("fn") else 1.0)
    return tuple(made.to(device))


def check(
    found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], limit: float
) -> None:
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert relative_error(got, want) < limit


@on_each_device
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    count=st.sampled_from([2, 4]),
    width=st.sampled_from([32, 96, 128]),
    dtype=st.sampled_from(list(LIMITS)),
    first=st.booleans(),
    shares=st.sampled_from([0, 1, 3]),
)
def test_the_kernels_are_the_model(device, seed, batch, count, width, dtype, first, shares):
    """One connection after another, and the head: at the first layer nothing is pending, and all
    streams are one embedding. A block's output may come in shares.
    """
    one, other, head, norm = modules(seed, width, count, device)
    streams, out = (
        torch.randn(batch, 1, count, width, device=device).to(dtype),
        torch.randn(batch, 1, width, device=device).to(dtype),
    )
    if first:
        streams, pending = streams[:, :, :1].expand(-1, -1, count, -1), None
    else:
        given_out = out
        if shares:
            values = torch.randn(batch, shares + 1, width, device=device)
            given_out = Shares(values, torch.rand(batch, shares, device=device))
        pending = Pending(one, given_out, *one.enter(torch.randn_like(streams))[1:])
    expected = enter_reference(streams, pending, other, norm)
    check(enter_triton(streams, pending, other, norm, tune=SMALL), expected, LIMITS[dtype])
    streams, _, *gates = expected
    pending = Pending(other, out, *gates)
    check(
        (read_out_triton(streams, pending, head, norm, tune=SMALL),),
        (read_out_reference(streams, pending, head, norm),),
        LIMITS[dtype],
    )


@on_each_device
def test_mixing_is_doubly_stochastic(device):
    """However the products come out; with the width and the tuning of DeepSeek-V4-Flash."""
    one, _, _, norm = modules(0, 4096, 4, device, iterations=20)
    _, _, write, mix = enter_triton(5 * torch.randn(1, 1, 4, 4096, device=device), None, one, norm)
    ones = torch.ones(1, 1, 4, device=device)
    torch.testing.assert_close(mix.sum(-1), ones, atol=1e-3, rtol=0)
    torch.testing.assert_close(mix.sum(-2), ones, atol=1e-4, rtol=0)
    assert (mix > 0).all() and (write > 0).all() and (write < 2).all()


@on_each_device
@torch.no_grad()
def test_the_next_product_works_out_the_gates(device):
    """As the connection itself does: the product of one weight, of two, the router's, or of none,
    where the way back does it.
    """
    one, other, _, norm = modules(0, 128, 4, device)
    streams = torch.randn(1, 1, 4, 128, device=device).bfloat16()
    plain = torch.randn(24, 128, device=device).bfloat16()
    router = Router(DeepseekV4Config(hidden_size=128, n_routed_experts=24), hashed=False)
    router.weight, router.due = nn.Parameter(plain), one.due
    router.to(device)
    expected = enter_triton(streams, None, one, norm)
    pending = Pending(one, expected[1], *expected[2:])
    left = enter_triton(expected[0], pending, other, norm)[0]
    for product in (
        lambda x: one_row_triton(x, plain, due=one.due),
        lambda x: two_rows_triton(x, (plain, plain), (None, None), due=one.due),
        lambda x: routed_triton(x[0], torch.zeros(1, dtype=torch.int64, device=device), router),
        lambda x: None,
    ):
        found = enter_triton(streams, None, one, norm, then=plain)
        product(found[1])
        again = enter_triton(found[0], Pending(one, found[1], *found[2:]), other, norm)[0]
        check((*found[:2], again), (*expected[:2], left), LIMITS[torch.bfloat16])
        check(found[2:], expected[2:], LIMITS[torch.float32])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph needs one")
def test_a_cuda_graph_holds_them():
    from fmsim.exec.measure.timing import captured

    one, other, head, norm = modules(0, 384, 4, "cuda")
    streams, out, read = (
        torch.randn(8, 1, 4, 384, device="cuda"),
        torch.randn(8, 1, 384, device="cuda"),
        torch.empty(8, 1, 384, device="cuda"),
    )
    pending = Pending(one, out, *one.enter(streams)[1:])

    def work() -> torch.Tensor:
        left, _, *gates = enter_triton(streams, pending, other, norm)
        return read.copy_(read_out_triton(left, Pending(other, out, *gates), head, norm))

    replay = captured(work)
    streams.normal_()
    expected = work().clone()
    replay()
    assert torch.equal(read, expected)
