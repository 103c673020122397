"""Float8 and joined projections: the products are the same, the weights' values and names too, and
nothing is kept twice.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error
from torch import nn

from fmsim.exec.kernels.norms.rounded_rows import round_rows
from fmsim.exec.kernels.weights import dequantise
from fmsim.exec.model import attention, projections
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.experts import Experts, MoE
from fmsim.exec.model.kinds import CSA, HCA, SLIDING
from fmsim.exec.model.projections import Float8Linear, Joined, grouped, wide_weight
from fmsim.exec.model.weights.quantised import (
    fill_float8,
    float8_weights,
    hold_float8,
    published_float8,
)
from fmsim.nano.config import nano_config

INPUTS = 40


def projection(kind: str, outputs: int) -> nn.Module:
    if kind != "float8":
        return nn.Linear(INPUTS, outputs, bias=False).to(getattr(torch, kind)).requires_grad_(False)
    made = Float8Linear(INPUTS, outputs)
    fill_float8(made)
    return made


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.float().clone() for name, tensor in module.state_dict().items()}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    parts=st.lists(
        st.tuples(st.sampled_from(["bfloat16", "float8"]), st.sampled_from([8, 128, 200, 256])),
        min_size=1,
        max_size=7,
    ),
    mode=st.booleans(),
)
def test_joined_they_compute_the_same_from_the_same_memory(seed, parts, mode):
    """Made within inference mode or not; float8 outputs of no whole number of scale blocks stay
    alone.
    """
    torch.manual_seed(seed)
    module = nn.ModuleList(projection(*part) for part in parts)
    x, before = torch.randn(2, 1, INPUTS).to(torch.bfloat16), tensors(module)
    expected = [part(x) for part in module]
    with torch.inference_mode(mode):
        joined, again = Joined(module), Joined(module)
    for found in (joined, again):
        outputs = found(x)
        assert [out.shape[-1] for out in outputs] == [size for _, size in parts]
        for out, want in zip(outputs, expected, strict=True):
            torch.testing.assert_close(out, want)
    after = tensors(module)
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    kinds = len({kind for kind, size in parts if kind != "float8" or size % 128 == 0}) + sum(
        kind == "float8" and size % 128 > 0 for kind, size in parts
    )
    assert (
        len({part.weight.untyped_storage().data_ptr() for part in module})
        == len(joined.products)
        == kinds
    )
    for (_, product), (_, same) in zip(joined.products, again.products, strict=True):
        assert product.weight.data_ptr() == same.weight.data_ptr()


def test_new_values_reach_the_joined_product():
    """As when weights are loaded after a decode was made."""
    parts = nn.ModuleList([projection("float8", 128), projection("float8", 128)])
    joined, x = Joined(parts), torch.randn(3, INPUTS)
    old = joined(x)
    fill_float8(parts)
    for out, was, part in zip(joined(x), old, parts, strict=True):
        assert torch.equal(out, part(x)) and not torch.equal(out, was)


@pytest.mark.parametrize("kind", ["float32", "float8"])
def test_groups_have_inputs_of_their_own(kind):
    made, x = projection(kind, 24), torch.randn(2, 5, 3 * INPUTS)
    wide = wide_weight(made)
    expected = [
        x[..., g * INPUTS : (g + 1) * INPUTS] @ wide[g * 8 : (g + 1) * 8].T for g in range(3)
    ]
    torch.testing.assert_close(grouped(x, made, 3), torch.cat(expected, -1))
    torch.testing.assert_close(made(x[..., :INPUTS]), x[..., :INPUTS] @ wide.T)


@on_each_device
@torch.inference_mode()
def test_a_prompts_rows_are_rounded_once(device, monkeypatch):
    """The result is as if each projection rounded its own; on a GPU, kernels make what torch made
    then, and its last bit decides what is rounded up.
    """
    torch.manual_seed(0)
    config = nano_config()
    config.o_groups, config.o_lora_rank = 3, 128  # whole scales
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer = Attention(config, CSA).to(device, dtype)
    hold_float8(layer, published_float8(layer), float8_rows=True)
    fill_float8(layer)
    x = torch.randn(2, 20, config.hidden_size).to(device, dtype)
    positions = torch.arange(20, device=device).expand(2, 20)
    assert layer.takes_float8(40)
    found, there = layer(round_rows(x), positions, None)
    for module in (attention, projections):
        monkeypatch.setattr(module, "takes_float8", lambda *_, **__: False)
    expected, accessed = layer(x, positions, None)
    assert relative_error(found, expected) <= (0 if device == "cpu" else 0.03)
    assert torch.equal(there.ids, accessed.ids) and torch.equal(there.hidden, accessed.hidden)


def test_what_the_release_has_in_float8():
    """transformers' list of what an official float8 checkpoint leaves in bfloat16, read the other
    way round.
    """
    config = nano_config()
    attention = ["q_a_proj", "q_b_proj", "kv_proj", "o_a_proj", "o_b_proj"]
    for kind, more in ((SLIDING, []), (HCA, []), (CSA, ["compressor.indexer.q_b_proj"])):
        assert published_float8(Attention(config, kind)) == attention + more
    assert set(published_float8(MoE(config, hashed=False))) == {"experts"} | {
        f"shared_experts.{part}_proj" for part in ("gate", "up", "down")
    }


def test_experts_hold_float8_and_compute_with_it():
    config = nano_config()
    config.n_routed_experts, config.hidden_size, config.moe_intermediate_size = 10, 150, 100
    experts = Experts(config).requires_grad_(False)
    layer = nn.ModuleDict({"experts": experts})
    hold_float8(layer, ["experts"])
    fill_float8(layer, torch.Generator().manual_seed(0))
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.float8_e4m3fn
    assert experts.gate_up_scale.shape == (10, 2, 2) and experts.down_scale.shape == (10, 2, 1)
    assert len(list(float8_weights(layer))) == 20
    wide = Experts(config).requires_grad_(False)
    wide.gate_up_proj.copy_(dequantise(experts.gate_up_proj, experts.gate_up_scale))
    wide.down_proj.copy_(dequantise(experts.down_proj, experts.down_scale))
    assert wide.down_proj.std().item() == pytest.approx(100**-0.5, rel=0.05)
    x, chosen, weights = (
        torch.randn(6, 150),
        torch.stack([torch.randperm(10)[:2] for _ in range(6)]),
        torch.rand(6, 2),
    )
    torch.testing.assert_close(experts(x, chosen, weights), wide._one_by_one(x, chosen, weights))
