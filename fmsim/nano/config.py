"""The shape of ``nano``: DeepSeek-V4 in everything but size, and how its weights start."""

from __future__ import annotations

import math

import torch
from transformers import DeepseekV4Config

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA, HCA, SLIDING

VOCABULARY = 4096


def nano_config() -> DeepseekV4Config:
    return DeepseekV4Config(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=11,
        layer_types=[SLIDING, SLIDING, *[CSA, CSA, HCA] * 3],
        compress_rates={CSA: 4, HCA: 128},
        sliding_window=128,
        num_attention_heads=6,
        head_dim=64,
        partial_rotary_factor=0.25,
        q_lora_rank=192,
        o_groups=2,
        o_lora_rank=160,
        index_n_heads=8,
        index_head_dim=32,
        index_topk=512,
        hc_mult=4,
        hc_sinkhorn_iters=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=160,
        num_hash_layers=2,
        rope_theta=10_000.0,
        compress_rope_theta=160_000.0,
        max_position_embeddings=1_048_576,
        num_nextn_predict_layers=0,
    )


@torch.no_grad()
def initialise(model: DeepseekV4, seed: int) -> None:
    """Weights of variance 1 / fan-in, block outputs scaled down by depth, hyper-connections near a
    plain residual.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith("position_bias"):
            continue  # norms are 1, sinks, biases and hyper-connection bases 0
        std = parameter.shape[-1] ** -0.5
        if "embed_tokens" in name:
            std = 0.3
        elif name.endswith((".fn", ".hc_fn")):
            std = 0.05 * std
        elif name.endswith(("lm_head.weight", "gate_proj.weight")) and "mlp" not in name:
            std = 0.3 * std  # near-uniform first predictions, and compressors that start as means
        elif name.endswith(("o_b_proj.weight", "down_proj", "down_proj.weight")):
            std *= depth_scale
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    for number, layer in enumerate(model.model.layers):
        _start_hyper_connection(layer.attn_hc, 2 * number)
        _start_hyper_connection(layer.ffn_hc, 2 * number + 1)
        if layer.mlp.gate.hashed:
            choice = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator)
            layer.mlp.gate.tid2eid.copy_(choice.topk(config.num_experts_per_tok).indices)


def _start_hyper_connection(connection, block: int) -> None:
    """Streams keep to themselves; each block favours reading and writing one of them, so that they
    come to differ.
    """
    count = connection.streams
    favoured = torch.full((count,), -0.5)
    favoured[block % count] = 1.5
    identity = torch.eye(count) * math.log(30.0)
    connection.base.copy_(torch.cat((favoured, favoured, identity.flatten())))
