"""Reading a `config.json`: a field, or an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST = 2**40  # of any number in a config
_MOST_LAYERS = 10_000
# What a config may leave out, and what is a number where it stands.
_NUMBERS = (
    "n_shared_experts",
    "partial_rotary_factor",
    "qk_rope_head_dim",
    "max_position_embeddings",
    "moe_intermediate_size",
    "intermediate_size",
    "index_topk_freq",
    "index_skip_topk_offset",
    "index_local_blocks",
    "sparse_block_size",
    "sparse_index_dim",
    "sparse_topk_blocks",
    "sparse_local_block",
    "sparse_num_index_heads",
)
_PARTS = ("text_config", "sparse_attention_config")


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse a text, or more than any model has, where arithmetic wants a number: a text times a
    number is a very long text. ValueError names the key.
    """
    for part in (config, *(config.get(name) for name in _PARTS)):
        if not isinstance(part, Mapping):
            continue
        for key in _NUMBERS:
            value = part.get(key)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= _MOST):
                raise ValueError(f"'{key}' is no number from 0 to {_MOST:,}")
        layers = part.get("num_hidden_layers")
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise ValueError(f"'num_hidden_layers' is more than {_MOST_LAYERS:,}")


def need(config: Mapping[str, Any], key: str) -> int:
    """The whole number at ``key``, above zero; ValueError names the key."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"'{key}' is missing or no whole number above 0")
    return value


def weight_bytes_of(config: Mapping[str, Any], parameters: int) -> float:
    """Bytes of all weights: one a parameter where the config says fp8, else two (bfloat16)."""
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    if quantised not in (None, "fp8"):
        raise ValueError(f"'quantization_config' has quant_method {quantised!r}; known is fp8")
    return float(parameters if quantised == "fp8" else 2 * parameters)
