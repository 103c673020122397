"""The second nano's shape, and how the first one grows into it without forgetting anything.

A CSA layer is put behind each of nano's three, a copy whose outputs are zero, so that the streams
pass it as they were; and every lightning indexer gets as many heads again, which weigh nothing at
first. So the grown model computes what nano does, to within the 0.01% by which hyper-connections
mix the streams.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from fmsim.exec.model.deepseek_v4 import DeepseekV4, Layer
from fmsim.exec.model.kinds import CSA
from fmsim.nano.config import nano_config

INDEX_HEADS = 8
IDENTITY = 11.0  # of a new layer's mixing logits: a stream keeps 99.99% of itself


def grown_config() -> DeepseekV4Config:
    """nano's, with every CSA layer twice and ``INDEX_HEADS`` index heads."""
    small = nano_config()
    kinds = [kind for kind in small.layer_types for _ in range(2 if kind == CSA else 1)]
    fields = small.to_dict() | {
        "layer_types": kinds,
        "num_hidden_layers": len(kinds),
        "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * (len(kinds) - 2),
        "index_n_heads": INDEX_HEADS,
    }
    return DeepseekV4Config.from_dict(fields)


@torch.no_grad()
def grow(small: DeepseekV4, seed: int = 0) -> DeepseekV4:
    """A model of `grown_config` that computes what ``small``, of `nano_config`, does."""
    grown, generator = DeepseekV4(grown_config()), torch.Generator().manual_seed(seed)
    targets, sources = iter(grown.model.layers), small.model.layers
    for source in sources:
        _copy(next(targets), source, generator)
        if source.self_attn.kind == CSA:
            _silence(copied := next(targets), source, generator)
            _pass_streams(copied)
    for name in ("embed_tokens", "norm", "hc_head"):
        getattr(grown.model, name).load_state_dict(getattr(small.model, name).state_dict())
    grown.lm_head.load_state_dict(small.lm_head.state_dict())
    return grown


def _copy(target: Layer, source: Layer, generator: torch.Generator) -> None:
    state = source.state_dict()
    for name, parameter in target.state_dict().items():
        if "indexer" in name and parameter.shape != state[name].shape:
            _widen(parameter, state[name], name, generator)
        else:
            parameter.copy_(state[name])


def _widen(parameter: Tensor, old: Tensor, name: str, generator: torch.Generator) -> None:
    """More index heads: queries drawn at random, weights of 0; the old ones' weights make up for
    the scale factor.
    """
    known = len(old)
    if "weights_proj" in name:
        parameter.zero_()
        parameter[:known] = old * math.sqrt(len(parameter) / known)
    else:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * old.std())
        parameter[:known] = old


def _silence(target: Layer, source: Layer, generator: torch.Generator) -> None:
    """A copy that adds nothing to the streams."""
    _copy(target, source, generator)
    target.self_attn.o_b_proj.weight.zero_()
    target.mlp.experts.down_proj.zero_()
    target.mlp.shared_experts.down_proj.weight.zero_()


def _pass_streams(layer: Layer) -> None:
    """Hyper-connections that leave each stream to itself."""
    for connection in (layer.attn_hc, layer.ffn_hc):
        count = connection.streams
        connection.fn[2 * count :] = 0.0
        connection.base[2 * count :] = torch.eye(count).flatten() * IDENTITY
