"""A DeepSeek-V4 of a preset's full width and depth with random weights, and as many experts as fit:
for footprints and times only.

What it generates means nothing. A decode step reads the weights, float8 where the preset's are
published so, and moves the cache of the real model's shape, but for the experts: each token still
runs all its active ones, chosen among fewer, so a large batch reads fewer weights than the real
model's would.
"""

from __future__ import annotations

import torch
from transformers import DeepseekV4Config

from fmsim.errors import FmsimError
from fmsim.exec.kernels.weights import BLOCK
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.exchange import Exchange
from fmsim.exec.model.kinds import CSA, HCA
from fmsim.exec.model.split_experts import share_weights, split_experts
from fmsim.exec.model.weights.loader import allocate, meta_model
from fmsim.exec.model.weights.quantised import (
    fill_float8,
    has_float8_rows,
    hold_float8,
    published_float8,
)
from fmsim.geometry import Geometry
from fmsim.units import gib

HASH_LAYERS = 3  # of both published models: their first MoE layers route by the token's id
EXPERTS_MULTIPLE = 8
QUANTISED = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def synthetic_config(geometry: Geometry, n_experts: int) -> DeepseekV4Config:
    """All of ``geometry``'s layers, with ``n_experts`` routed ones.

    RoPE is plain, without YaRN, which takes the same time.
    """
    return DeepseekV4Config(
        quantization_config=QUANTISED if geometry.float8_weights else None,
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden_size,
        num_hidden_layers=geometry.n_layers,
        layer_types=list(geometry.layer_types),
        compress_rates={CSA: geometry.csa_rate, HCA: geometry.hca_rate},
        sliding_window=geometry.window_tokens,
        num_attention_heads=geometry.n_heads,
        head_dim=geometry.head_dim,
        partial_rotary_factor=geometry.rope_dim / geometry.head_dim,
        q_lora_rank=geometry.q_lora_rank,
        o_groups=geometry.o_groups,
        o_lora_rank=geometry.o_lora_rank,
        index_n_heads=geometry.index_n_heads,
        index_head_dim=geometry.index_head_dim,
        index_topk=geometry.index_topk,
        n_routed_experts=n_experts,
        n_shared_experts=geometry.n_shared_experts,
        num_experts_per_tok=geometry.n_active_experts,
        moe_intermediate_size=geometry.expert_width,
        num_hash_layers=min(HASH_LAYERS, geometry.n_layers),
    )


def synthetic_model(
    geometry: Geometry,
    device: str,
    weight_bytes: int,
    seed: int = 0,
    exchange: Exchange | None = None,
) -> tuple[DeepseekV4, int]:
    """A model whose weights take at most ``weight_bytes``, float8 as in the release or bfloat16,
    some float32; -> the model, and its experts.

    The experts of a layer are at least those that a token uses and at most the geometry's own, a
    multiple of 8 where there is room. Of several ranks, which call this together, each holds its
    part of them, and the same of all else. Raises FmsimError with the figure that is short where
    not even the fewest fit, before anything is allocated.
    """
    if exchange is None:
        n_experts = experts_that_fit(geometry, weight_bytes)
        model = allocate(_meta_model(geometry, n_experts), device)
        fill(model, seed)
    else:
        n_experts = exchange.least(experts_that_fit(geometry, weight_bytes, exchange.count))
        model = _meta_model(geometry, n_experts)
        split_experts(model, exchange)
        fill(allocate(model, device), seed + exchange.rank)
        share_weights(model, exchange)
    return model.eval().requires_grad_(False), n_experts


def experts_that_fit(geometry: Geometry, weight_bytes: int, ranks: int = 1) -> int:
    """The most experts a layer with which all weights take at most ``weight_bytes`` on each of
    ``ranks`` that share them out.
    """
    most = geometry.n_experts // ranks  # of a rank, as the numbers below
    fewest = min(geometry.n_active_experts, most)
    fewest_bytes = model_bytes(geometry, fewest)
    if fewest_bytes > weight_bytes:
        raise FmsimError(
            f"memory for weights: {geometry.name} with {fewest} experts a layer, the fewest that a"
            f" token needs, takes {gib(fewest_bytes)},"
            f" {gib(fewest_bytes - weight_bytes)} more than the {gib(weight_bytes)}"
            " that are left for them; lower --context or --batch"
        )
    expert_bytes = model_bytes(geometry, fewest + 1) - fewest_bytes
    count = min(fewest + (weight_bytes - fewest_bytes) // expert_bytes, most)
    return ranks * max(
        count // EXPERTS_MULTIPLE * EXPERTS_MULTIPLE, min(count, EXPERTS_MULTIPLE), fewest
    )


def model_bytes(geometry: Geometry, n_experts: int) -> int:
    """What the weights and tables of the synthetic model take; nothing is allocated."""
    model = _meta_model(geometry, n_experts)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _meta_model(geometry: Geometry, n_experts: int) -> DeepseekV4:
    config = synthetic_config(geometry, n_experts)
    model = meta_model(config, torch.bfloat16)
    if geometry.float8_weights:
        hold_float8(model, published_float8(model), has_float8_rows(config))
    return model


@torch.no_grad()
def fill(model: DeepseekV4, seed: int) -> None:
    """Random weights of variance 1 / fan-in, in place and on their device: every activation is then
    of the order of 1, in any layer.
    """
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.dtype == torch.float8_e4m3fn:
            continue
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        elif name.endswith("embed_tokens.weight"):
            tensor.normal_(generator=generator)
        elif name.endswith((".base", ".hc_base")):
            tensor.zero_()
        elif name.endswith((".scale", ".hc_scale")):
            tensor.fill_(1)
        else:  # matrices, and sinks and position biases, of which every value stands for itself
            fan_in = 1 if tensor.dim() == 1 or name.endswith("position_bias") else tensor.shape[-1]
            tensor.normal_(std=fan_in**-0.5, generator=generator)
    fill_float8(model, generator)
    for layer in model.model.layers:
        router = layer.mlp.gate
        if router.hashed:
            chance = torch.rand(
                len(router.tid2eid),
                len(router.weight),
                device=router.weight.device,
                generator=generator,
            )
            router.tid2eid.copy_(chance.topk(router.top_k).indices)
        else:
            router.e_score_correction_bias.normal_(std=0.1, generator=generator)
