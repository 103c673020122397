"""Captures of a small DSA model, as engines write them."""

import base64
import io
import json
from pathlib import Path

import numpy as np

TOPK, LAYERS, PROMPT, GENERATED = 8, 3, 40, 30

CONFIG = {
    "model_type": "deepseek_v32",
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": TOPK,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}


def config_file(folder: Path, **changes) -> Path:
    path = folder / "tiny-v32" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(CONFIG | changes))
    return path


def rows(rng: np.random.Generator, tokens: int = PROMPT + GENERATED - 1, layers: int = LAYERS):
    """int32 [tokens, layers, TOPK], unsorted, -1 where a query sees fewer."""
    found = np.full((tokens, layers, TOPK), -1, np.int32)
    for position in range(tokens):
        for layer in range(layers):
            count = min(TOPK, position + 1)
            found[position, layer, :count] = rng.permutation(position + 1)[:count]
    return found


def sglang(array: np.ndarray, prompt: int = PROMPT, **meta) -> dict:
    generated = len(array) + 1 - prompt
    return {
        "text": "...",
        "meta_info": {
            "id": "a",
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "indexer_topk": base64.b64encode(array.astype("<i4").tobytes()).decode(),
        }
        | meta,
    }


def vllm(array: np.ndarray, prompt: int = PROMPT, start: int = 0) -> dict:
    stream = io.BytesIO()
    np.save(stream, array[start:].astype(np.int32))
    return {
        "usage": {"prompt_tokens": prompt, "completion_tokens": len(array) + 1 - prompt},
        "choices": [
            {
                "text": "...",
                "indexer_topk": base64.b64encode(stream.getvalue()).decode(),
                "indexer_topk_prompt_start": start,
            }
        ],
    }
