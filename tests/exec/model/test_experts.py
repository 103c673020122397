"""The experts' grouped matrix products against the plain loop over experts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the model needs fmsim[model]")
pytest.importorskip("transformers", reason="the model needs fmsim[model]")

from kernel_pools import on_each_device, relative_error
from tiny_model import CSA, TINY
from transformers import DeepseekV4Config

from fmsim.exec.model.experts import Experts, MoE


def config_of(count: int, width: int) -> DeepseekV4Config:
    return DeepseekV4Config(
        **TINY
        | {
            "n_routed_experts": count,
            "moe_intermediate_size": width,
            "layer_types": [CSA],
            "num_hidden_layers": 1,
        }
    )


def experts_of(count: int, width: int, device: str, dtype: torch.dtype) -> Experts:
    experts = Experts(config_of(count, width)).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.3)
    return experts.to(device, dtype)


def routed(
    tokens: int, count: int, favourites: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Different experts for each token, out of ``favourites`` of them, so that some get many tokens
    and some none.
    """
    chosen = torch.stack([torch.randperm(favourites)[:3] for _ in range(tokens)]) + (
        count - favourites
    )
    return chosen.to(device), torch.rand(tokens, 3).to(device)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 40),
    count=st.integers(9, 24),
    favourites=st.integers(3, 9),
    width=st.sampled_from([8, 12, 16]),
)
def test_grouped_is_the_loop(seed, tokens, count, favourites, width):
    torch.manual_seed(seed)
    experts = experts_of(count, width, "cpu", torch.float32)
    x, (chosen, weights) = (
        torch.randn(tokens, TINY["hidden_size"]),
        routed(tokens, count, favourites, "cpu"),
    )
    torch.testing.assert_close(
        experts._grouped(x, chosen, weights),
        experts._one_by_one(x, chosen, weights),
        atol=1e-5,
        rtol=1e-5,
    )


@on_each_device
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32), tokens=st.sampled_from([1, 2, 128]), favourites=st.integers(3, 16)
)
def test_in_bfloat16_it_is_taken_and_rounds_no_worse(device, seed, tokens, favourites):
    torch.manual_seed(seed)
    experts = experts_of(16, 16, device, torch.bfloat16)
    x, (chosen, weights) = (
        torch.randn(tokens, TINY["hidden_size"]).to(device, torch.bfloat16),
        routed(tokens, 16, favourites, device),
    )
    found, loop = experts(x, chosen, weights), experts._one_by_one(x, chosen, weights)
    assert torch.equal(found, experts._grouped(x, chosen, weights))
    exact = experts.float()._one_by_one(x.float(), chosen, weights)
    errors = [relative_error(out, exact) for out in (found, loop)]
    chance = 2 / found.numel() ** 0.5  # errors of few numbers differ by themselves
    assert errors[0] < 0.01 and errors[0] < (1.2 + chance) * errors[1]


def test_training_is_told_the_load_and_learns_through_either_path():
    """Through grouped products in bfloat16 as through the loop in float32."""
    torch.manual_seed(0)
    layer = MoE(config_of(12, 16), hashed=False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, tokens, gradients = (
        torch.randn(1, 9, TINY["hidden_size"]).bfloat16(),
        torch.zeros(1, 9, dtype=torch.int64),
        [],
    )
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype).zero_grad()
        layer.gate.float()  # the same choices
        out, load = (
            layer.experts(x[0].to(dtype), *layer.gate(x[0].float(), tokens[0])),
            layer.to(dtype)(x.to(dtype), tokens)[1],
        )
        out.float().square().sum().backward()
        gradients.append(layer.experts.down_proj.grad.float())
        assert load.sum().item() == pytest.approx(1)
        with torch.no_grad():
            assert layer(x.to(dtype), tokens)[1] is None
    assert (
        gradients[0].abs().max() > 0
        and (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph cannot be captured"
)
def test_a_graph_holds_it_for_any_routing():
    torch.manual_seed(0)
    experts = experts_of(64, 128, "cuda", torch.bfloat16)
    x, (chosen, weights) = (
        torch.randn(8, TINY["hidden_size"]).to("cuda", torch.bfloat16),
        routed(8, 64, 5, "cuda"),
    )
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        experts(x, chosen, weights)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, chosen, weights)
    for favourites in (3, 17, 64):
        for static, new in zip((chosen, weights), routed(8, 64, favourites, "cuda")):
            static.copy_(new)
        graph.replay()
        assert relative_error(out, experts._one_by_one(x, chosen, weights)) < 0.01
