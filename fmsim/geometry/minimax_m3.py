"""MiniMax-M3: block-sparse attention over grouped-query KV.

An indexer scores the keys of every token and picks whole blocks of 128; so a block is an entry.
The first layers are dense.

Source: the published `config.json`; KV and index keys in bfloat16, as engines keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmsim.geometry.described import Described, from_description
from fmsim.geometry.fields import need, weight_bytes_of

MODEL_TYPES = ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text")
_BFLOAT16 = 2


def from_config(config: Mapping[str, Any], name: str = "") -> Described:
    """The geometry of a MiniMax-M3 `config.json`; ValueError names what is missing."""
    config = {**config, **(config.get("text_config") or {})}
    sparse = config.get("sparse_attention_config") or {}
    n_layers = need(config, "num_hidden_layers")
    chosen = sparse.get("sparse_attention_freq")
    if chosen is None:
        types = config.get("layer_types") or []
        chosen = [kind == "minimax_m3_sparse" for kind in types]
    if len(chosen) < n_layers:
        raise ValueError(f"'sparse_attention_freq' must say 0 or 1 for each of {n_layers} layers")
    block = sparse.get("sparse_block_size") or need(config, "index_block_size")
    index_width = sparse.get("sparse_index_dim") or need(config, "index_head_dim")
    kv_heads, head_dim = need(config, "num_key_value_heads"), need(config, "head_dim")
    token_bytes = 2 * kv_heads * head_dim * _BFLOAT16
    dense = {
        "kind": "dense",
        "entry_tokens": 1,
        "entry_bytes": token_bytes,
        "kv_heads": kv_heads,
    }
    picked = {
        "kind": "sparse",
        "entry_tokens": block,
        "entry_bytes": block * token_bytes,
        "key_bytes": block * index_width * _BFLOAT16,
        "rows": block,
        "topk": (
            (sparse.get("sparse_topk_blocks") or need(config, "index_topk_blocks"))
            + sparse.get("sparse_local_block", config.get("index_local_blocks", 0))
        ),
        "kv_heads": kv_heads,
    }
    experts, shared, active = _parameters(config, n_layers)
    return from_description(
        {
            "family": "block-sparse",
            "layers": [picked if flag else dense for flag in chosen[:n_layers]],
            "hidden_size": need(config, "hidden_size"),
            "n_heads": need(config, "num_attention_heads"),
            "head_dim": head_dim,
            "index_n_heads": sparse.get("sparse_num_index_heads") or need(config, "index_n_heads"),
            "index_head_dim": index_width,
            "dense_mlps": n_layers - _routed(config, n_layers),
            "vocabulary": need(config, "vocab_size"),
            "parameters": experts + shared,
            "expert_parameters": experts,
            "parameters_of_a_token": active,
            "weights_total_bytes": weight_bytes_of(config, experts + shared),
            "max_positions": config.get("max_position_embeddings"),
        },
        name,
    )


def _routed(config: Mapping[str, Any], n_layers: int) -> int:
    """Layers with routed experts."""
    routed = config.get("moe_layer_freq") or [1] * n_layers
    return sum(bool(flag) for flag in routed[:n_layers])


def _parameters(config: Mapping[str, Any], n_layers: int) -> tuple[int, int, int]:
    """(routed experts, everything else, what one token uses)."""
    hidden, head_dim = need(config, "hidden_size"), need(config, "head_dim")
    heads, kv_heads = need(config, "num_attention_heads"), need(config, "num_key_value_heads")
    n_sparse = _routed(config, n_layers)
    one_expert = 3 * hidden * (config.get("moe_intermediate_size") or config["intermediate_size"])
    n_experts = need(config, "num_local_experts")
    shared = n_layers * hidden * head_dim * (2 * heads + 2 * kv_heads)
    shared += (n_layers - n_sparse) * 3 * hidden * need(config, "dense_intermediate_size")
    shared += n_sparse * (3 * hidden * need(config, "shared_intermediate_size"))
    shared += n_sparse * hidden * n_experts + 2 * need(config, "vocab_size") * hidden
    active = shared + n_sparse * need(config, "num_experts_per_tok") * one_expert
    return n_sparse * n_experts * one_expert, shared, active
