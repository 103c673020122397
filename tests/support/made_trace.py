"""A small trace for tests of everything behind the reader: entries that come back now and then, and
a heavy few.
"""

import numpy as np

from fmsim.indexer import checkpoint
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import LayerWeights, ScorerConfig
from fmsim.trace import ModelInfo, Trace, TraceHeader

TOPK, HIDDEN, KEY_WIDTH = 16, 8, 4


def make_trace(prompt_tokens=4096, n_steps=160, n_layers=3, seed=0, **header):
    """Layers and steps select 16 of the visible entries: three quarters are the last step's, the
    rest are drawn.
    """
    rng = np.random.default_rng(seed)
    ids = np.empty((n_steps, n_layers, TOPK), np.int32)
    for layer in range(n_layers):
        chosen = rng.choice(prompt_tokens // 4, TOPK, replace=False)
        for step in range(n_steps):
            drawn = rng.permutation(
                np.setdiff1d(np.arange((prompt_tokens + step + 1) // 4), chosen)
            )[: TOPK // 4]
            chosen = np.concatenate([rng.permutation(chosen)[: TOPK - TOPK // 4], drawn])
            ids[step, layer] = np.sort(chosen)
    mass = rng.exponential(size=ids.shape) ** 3
    mass = (mass / mass.sum(-1, keepdims=True) * 0.5).astype(np.float16)
    geometry = {
        "model_type": "deepseek_v4",
        "hidden_size": HIDDEN,
        "index_topk": TOPK,
        "index_head_dim": KEY_WIDTH,
        "csa_layers": list(range(2, 2 + 2 * n_layers, 2)),
    }
    given = {
        "geometry": geometry,
        "model": ModelInfo(name="made for a test", dtype="float32"),
        "source": "deepseek_v4",
        "prompt_kind": "needles",
        "prompt_tokens": prompt_tokens,
        "prompt_mass_queries": 64,
        "seed": seed,
        "device": "cpu",
        "created": "2026-01-01T00:00:00",
        "quality": {"asked": 4, "exact": 3},
    }
    n_entries = (prompt_tokens + n_steps) // 4
    return Trace(
        header=TraceHeader(**(given | header)),
        entry_ids=ids,
        mass=mass,
        window_mass=np.full(ids.shape[:2], 0.4, np.float16),
        sink_mass=np.full(ids.shape[:2], 0.1, np.float16),
        token_ids=np.zeros(prompt_tokens + n_steps, np.int32),
        forced=np.zeros(n_steps, bool),
        hidden=rng.standard_normal((-(-n_steps // 64), n_layers, HIDDEN)).astype(np.float16),
        index_keys=rng.integers(0, 120, (n_layers, n_entries, KEY_WIDTH)).astype(np.uint8),
        index_key_scales=np.ones((n_layers, 1), np.float32),
        prompt_mass=rng.uniform(size=(n_layers, n_entries)).astype(np.float16),
    )


def save_indexer(path) -> str:
    """Random weights of an indexer over three layers: decisions that mean nothing, and must still
    be the same in every world.
    """
    rng, heads = np.random.default_rng(0), 4
    shapes = ((6, HIDDEN), (6,), (heads * KEY_WIDTH, 6), (heads, HIDDEN))
    layers = {
        layer: LayerWeights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
        for layer in (0, 1, 2)
    }
    checkpoint.save(Checkpoint(layers, ScorerConfig(rope_dims=2, rope_theta=1e4), 0.5), path)
    return str(path)
