"""The experts of few tokens: the kernels against a plain loop over the experts."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error
from torch.nn import functional as F
from transformers import DeepseekV4Config

from fmsim.exec.kernels import experts as kernels
from fmsim.exec.kernels.experts import mixture_of_experts, mixture_of_experts_triton
from fmsim.exec.kernels.tuning import Experts as Tuning
from fmsim.exec.kernels.weights import dequantise, scale_shape
from fmsim.exec.model import Experts, SwiGLU

SMALL = Tuning(gate_rows=16, down_rows=16, block_depth=32, warps=4, stages=2, sum_columns=32)
# bfloat16: gated values are rounded before the second product on both sides, and one unit of the last place apart where sums differ
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 1e-2}


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [..., out, in] in float8 with scales that differ, and are no powers of two."""
    scale = (0.5 + torch.rand(scale_shape(weight.shape))) / 64
    return (weight / dequantise(torch.ones_like(weight), scale)).to(torch.float8_e4m3fn), scale


def made(seed: int, count: int, hidden: int, width: int, dtype: torch.dtype, device: str) -> tuple[Experts, SwiGLU]:
    """Routed experts and a shared one whose gates reach the limit now and then."""
    torch.manual_seed(seed)
    config = DeepseekV4Config(hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=count, swiglu_limit=2.0)
    routed, shared = Experts(config).requires_grad_(False), SwiGLU(config).requires_grad_(False)
    for parameter in (*routed.parameters(), *shared.parameters()):
        parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    if dtype == torch.float8_e4m3fn:
        routed.gate_up_proj.data, routed.gate_up_scale = quantised(routed.gate_up_proj)
        routed.down_proj.data, routed.down_scale = quantised(routed.down_proj)
        for linear in shared.children():
            linear.weight.data, scale = quantised(linear.weight)
            linear.register_buffer("scale", scale)
        return routed.to(device), shared.to(device)
    return routed.to(device, dtype), shared.to(device, dtype)


def drawn(tokens: int, count: int, top_k: int, hidden: int, favourites: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, chosen, weights: each token's own choice among ``favourites`` experts, the last; more than once where they are fewer than it needs."""
    chosen = (torch.rand(tokens, favourites).argsort(1).repeat(1, top_k)[:, :top_k]) + count - favourites
    return torch.randn(tokens, hidden).to(device, dtype), chosen.to(device), torch.rand(tokens, top_k).to(device)


def exact(x, chosen, weights, routed: Experts, shared: SwiGLU | None) -> torch.Tensor:
    """float64, by the formula, pair by pair; gated values in the type of x."""

    def wide(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return (weight if scale is None else dequantise(weight, scale)).double()

    def swiglu(row: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (F.silu((gate @ row).clamp(max=routed.limit)) * (up @ row).clamp(-routed.limit, routed.limit)).to(x.dtype).double() @ down.T

    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, row in enumerate(x.double()):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            scales = (None, None) if routed.down_scale is None else (routed.gate_up_scale[expert], routed.down_scale[expert])
            out[token] += weight * swiglu(row, *wide(routed.gate_up_proj[expert], scales[0]).chunk(2), wide(routed.down_proj[expert], scales[1]))
        if shared is not None:
            out[token] += swiglu(row, *(wide(linear.weight, getattr(linear, "scale", None)) for linear in shared.children()))
    return out


@on_each_device
@settings(max_examples=25, deadline=None)
@example(seed=0, tokens=20, count=3, top_k=3, favourites=1, hidden=40, width=24, dtype=torch.bfloat16, tile=16, with_shared=True)  # all on one expert
@example(seed=0, tokens=1, count=2, top_k=2, favourites=2, hidden=200, width=136, dtype=torch.float8_e4m3fn, tile=1, with_shared=True)
@example(seed=0, tokens=3, count=2, top_k=1, favourites=2, hidden=272, width=144, dtype=torch.float8_e4m3fn, tile=16, with_shared=True)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 20),
    count=st.integers(1, 9),
    top_k=st.integers(1, 4),
    favourites=st.integers(1, 9),
    hidden=st.sampled_from([16, 40, 64]),
    width=st.sampled_from([8, 20, 48]),
    dtype=st.sampled_from(list(LIMITS)),
    tile=st.sampled_from([1, 16, 32]),
    with_shared=st.booleans(),
)
@torch.no_grad()
def test_the_kernels_are_the_formula(device, seed, tokens, count, top_k, favourites, hidden, width, dtype, tile, with_shared):
    routed, shared = made(seed, count, hidden, width, dtype, device)
    kind = torch.float32 if dtype == torch.float32 else torch.bfloat16
    inputs = drawn(tokens, count, top_k, hidden, min(favourites, count), kind, device)
    given_ = *inputs, routed, shared if with_shared else None
    found = mixture_of_experts_triton(*given_, SMALL._replace(token_tile=tile))
    assert found.dtype == kind and found.shape == (tokens, hidden)
    assert relative_error(found, exact(*given_)) < LIMITS[dtype]
    assert torch.equal(found, mixture_of_experts_triton(*given_, SMALL._replace(token_tile=tile)))
    assert relative_error(routed._one_by_one(*inputs), exact(*inputs, routed, None)) < LIMITS[dtype]
