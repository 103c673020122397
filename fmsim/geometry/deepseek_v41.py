"""DeepSeek-V4.1: layers that share the KV of a few, and selections that several of them use.

A layer of `kv_source_layer_ids` makes KV, which the layers after it read up to the next one; a
layer of `index_source_layer_ids` selects, for the layers after it alike. Entries are of one or two
tokens (`compress_ratios`).

Sources: the config's fields as SGLang 0.5.23 reads them; rows in fp4 as engines keep them on
Blackwell (a scale byte per 16 values), index keys in fp4 and the window in fp8 (a byte per 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmsim.geometry.described import Described, from_description
from fmsim.geometry.fields import need

MODEL_TYPES = ("deepseek_v41", "deepseek_v41_text")


def from_config(config: Mapping[str, Any], name: str = "") -> Described:
    """The geometry of a DeepSeek-V4.1 `config.json`; ValueError names what is missing."""
    config = {**config, **(config.get("text_config") or {})}
    n_layers = need(config, "num_hidden_layers")
    layers = _layers(config, n_layers)
    experts, shared, active = _parameters(config, n_layers)
    tables = config.get("engram_num_embeddings") or []
    return from_description(
        {
            "family": "DeepSeek-V4.1",
            "layers": layers,
            "hidden_size": need(config, "hidden_size"),
            "n_heads": need(config, "num_attention_heads"),
            "head_dim": need(config, "head_dim"),
            "index_n_heads": need(config, "index_n_heads"),
            "index_head_dim": need(config, "index_head_dim"),
            "vocabulary": need(config, "vocab_size"),
            "parameters": experts + shared,
            "expert_parameters": experts,
            "parameters_of_a_token": active,
            "table_bytes": float(sum(tables) * need(config, "engram_head_dim")) if tables else 0.0,
            "max_positions": config.get("max_position_embeddings"),
        },
        name,
    )


def _layers(config: Mapping[str, Any], n_layers: int) -> list[dict[str, Any]]:
    ratios = config.get("compress_ratios") or []
    kv_sources = set(config.get("kv_source_layer_ids") or [])
    selecting = set(config.get("index_source_layer_ids") or [])
    if len(ratios) < n_layers or not kv_sources or not kv_sources <= selecting:
        raise ValueError(
            f"'compress_ratios' must say 0, 1 or 2 for each of {n_layers} layers, and"
            " 'index_source_layer_ids' name every layer of 'kv_source_layer_ids'"
        )
    width = need(config, "head_dim")
    key_width = need(config, "index_head_dim")
    window = {
        "window_tokens": config.get("sliding_window") or need(config, "window_size"),
        "window_bytes": width + width // 32,
    }
    layers = []
    source = selection = None
    for number, ratio in enumerate(ratios[:n_layers]):
        if not ratio:
            layers.append({"kind": "window", **window})
            continue
        layer = {"kind": "sparse", "entry_tokens": ratio, "topk": need(config, "index_topk")}
        if number in kv_sources:
            source = number
            layer["entry_bytes"] = width // 2 + width // 16
            layer["key_bytes"] = key_width // 2 + key_width // 32
        else:
            layer["kv_of"] = source
        if number in selecting:
            selection = number
        else:
            layer["shares"] = selection
        layers.append(layer | window)
    return layers


def _parameters(config: Mapping[str, Any], n_layers: int) -> tuple[int, int, int]:
    """(routed experts, everything else, what a decoded token uses); tables are not counted."""
    hidden, heads, width = (
        need(config, key) for key in ("hidden_size", "num_attention_heads", "head_dim")
    )
    q_rank, o_rank = need(config, "q_lora_rank"), need(config, "o_lora_rank")
    attention = hidden * q_rank + q_rank * heads * width + heads * width * o_rank
    attention += need(config, "o_groups") * o_rank * hidden + hidden * width
    index_heads, index_width = need(config, "index_n_heads"), need(config, "index_head_dim")
    indexer = q_rank * index_heads * index_width + hidden * index_heads + width * index_width
    one_expert = 3 * hidden * need(config, "moe_intermediate_size")
    n_experts = need(config, "n_routed_experts")
    layer = attention + config.get("n_shared_experts", 1) * one_expert + hidden * n_experts
    shared = n_layers * layer + 2 * need(config, "vocab_size") * hidden
    shared += len(config["kv_source_layer_ids"]) * 2 * hidden * width
    shared += len(config["index_source_layer_ids"]) * indexer
    active = shared + n_layers * need(config, "num_experts_per_tok") * one_expert
    return n_layers * n_experts * one_expert, shared, active
