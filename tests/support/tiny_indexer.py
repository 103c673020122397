"""A memory indexer with random weights for the tiny model."""

import numpy as np

from fmsim.indexer import checkpoint
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import LayerWeights, ScorerConfig

TAU = 8


def lookahead(folder, budget, layers=(0, 1), hidden=32, **options):
    """LSA with random weights: what they choose means nothing, but that it comes from live states
    and is carried out can be seen.
    """
    rng, heads, width = np.random.default_rng(0), 4, 16
    shapes = ((6, hidden), (6,), (heads * width, 6), (heads, hidden))
    retrievers = {
        layer: LayerWeights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
        for layer in layers
    }
    served = {layer: rng.standard_normal((8, heads, hidden)).astype(np.float32) for layer in layers}
    checkpoint.save(
        Checkpoint(retrievers, ScorerConfig(rope_dims=8, rope_theta=1e4), 0.01, served=served),
        folder / "indexer.safetensors",
    )
    return {
        "policy": "lsa",
        "checkpoint": str(folder / "indexer.safetensors"),
        "budget": budget,
        "cadence": TAU,
        "recent_entries": 2,
    } | options
