"""The choice of experts: the kernel against the model's own."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device
from torch import nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.experts.router import (
    route,
    route_reference,
    route_triton,
    routed_reference,
    routed_triton,
)
from fmsim.exec.kernels.tuning import OneRowTuning
from fmsim.exec.model.experts import Router

VOCABULARY = 50


def router_of(count: int, top_k: int, hashed: bool, device: str, inputs: int = 8) -> Router:
    config = DeepseekV4Config(
        hidden_size=inputs,
        vocab_size=VOCABULARY,
        n_routed_experts=count,
        num_experts_per_tok=top_k,
        routed_scaling_factor=2.5,
    )
    router = Router(config, hashed).requires_grad_(False)
    if hashed:
        router.tid2eid.random_(0, count)
    else:
        router.e_score_correction_bias.normal_()
    return router.to(device)


def in_order(chosen: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, order = chosen.sort(stable=True)
    return chosen, weights.gather(1, order)


@on_each_device
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 4),
    count=st.integers(1, 40),
    top_k=st.integers(1, 9),
    hashed=st.booleans(),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@torch.no_grad()
def test_the_kernel_is_the_model(device, seed, batch, count, top_k, hashed, spread, dtype):
    """From logits so small that 1 + e^logit is 1, to such that e^logit is infinite."""
    torch.manual_seed(seed)
    router = router_of(count, min(top_k, count), hashed, device)
    logits, tokens = (
        (spread * torch.randn(batch, count)).to(device, dtype),
        torch.randint(0, VOCABULARY, (batch,)).to(device),
    )
    (chosen, weights), (found, found_weights) = (
        in_order(*run(logits, tokens, router)) for run in (route_reference, route_triton)
    )
    assert (
        torch.equal(found, chosen)
        and found.dtype == torch.int64
        and found_weights.dtype == torch.float32
    )
    torch.testing.assert_close(found_weights, weights, rtol=1e-5, atol=1e-8)


@on_each_device
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 40),
    top_k=st.integers(1, 9),
    hashed=st.booleans(),
    inputs=st.sampled_from([96, 128, 256]),
    block_bytes=st.sampled_from([2**9, 2**11]),
)
@torch.no_grad()
def test_so_is_the_kernel_with_the_product(device, seed, count, top_k, hashed, inputs, block_bytes):
    """The logits of two experts may be one bfloat16 number apart: so the weights are compared, and
    the chosen ones' scores with those left out.
    """
    torch.manual_seed(seed)
    router = router_of(count, min(top_k, count), hashed, device, inputs)
    router.weight = nn.Parameter(torch.randn(count, inputs, device=device).bfloat16(), False)
    x = (torch.randn(1, inputs) * inputs**-0.5).to(device, torch.bfloat16)
    tokens, tune = torch.randint(0, VOCABULARY, (1,)).to(device), OneRowTuning(block_bytes)
    _, weights = routed_reference(x, tokens, router)
    found, found_weights = routed_triton(x, tokens, router, tune)
    scores = F.softplus((x.float() @ router.weight.float().T).float()).sqrt()
    own = scores.gather(1, found)
    own = own / own.sum() * router.scaling
    torch.testing.assert_close(found_weights, own, rtol=0.02, atol=1e-6)
    if hashed:
        assert torch.equal(found, router.tid2eid[tokens])
    else:
        ranks = scores + router.e_score_correction_bias
        rest = ranks.scatter(1, found, -torch.inf)
        assert ranks.gather(1, found).min() >= rest.max() - 0.02
    for _ in range(2):  # the count of programs is as it was
        again = routed_triton(x, tokens, router, tune)
        assert torch.equal(again[0], found) and torch.equal(again[1], found_weights)
    assert found.unique().numel() == found.numel() or hashed
    torch.testing.assert_close(
        found_weights.sort().values, weights.sort().values, rtol=0.02, atol=1e-6
    )


@on_each_device
@torch.no_grad()
def test_of_equal_scores_each_is_taken_once(device):
    router = router_of(6, 4, False, device)
    router.e_score_correction_bias.zero_()
    chosen, weights = route_triton(
        torch.zeros(2, 6, device=device), torch.zeros(2, dtype=torch.int64, device=device), router
    )
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full((2, 4), 2.5 / 4, device=device))


@on_each_device
@torch.no_grad()
def test_what_is_no_number_chooses_experts_that_exist(device):
    router = router_of(5, 3, False, device)
    chosen, weights = route_triton(
        torch.full((1, 5), float("nan"), device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        router,
    )
    assert chosen.tolist() == [[0, 1, 2]] and weights.isnan().all()


def test_training_takes_the_model():
    router = router_of(5, 3, False, "cuda" if torch.cuda.is_available() else "cpu")
    logits = torch.randn(2, 5, device=router.weight.device, requires_grad=True)
    route(logits, torch.zeros(2, dtype=torch.int64, device=logits.device), router)[
        1
    ].sum().backward()
    assert logits.grad is not None
