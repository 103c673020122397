"""A model's own lightning indexer as a memory indexer's checkpoint: the two are one function
(`fmsim.indexer.scorer`).

Held for a window, it is the baseline that a trained memory indexer has to beat: it knows what the
last token wants, not what the next 64 will.
"""

from __future__ import annotations

from dataclasses import replace

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA
from fmsim.exec.model.projections import wide_weight
from fmsim.exec.runs.record import geometry
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import LayerWeights, ScorerConfig


def native_indexer(model: DeepseekV4, name: str) -> Checkpoint:
    """Every CSA layer's lightning indexer, float32; ``name`` is the model's, for the record."""
    layers = [layer.self_attn for layer in model.model.layers if layer.self_attn.kind == CSA]
    weights = {number: _weights(attention) for number, attention in enumerate(layers)}
    scorer = replace(
        ScorerConfig.from_geometry(geometry(model)), norm_eps=model.config.rms_norm_eps
    )
    return Checkpoint(weights, scorer, training={"native_indexer_of": name})


def _weights(attention) -> LayerWeights:
    indexer = attention.compressor.indexer
    q_a, q_b, weights = (
        wide_weight(part)
        for part in (attention.q_a_proj, indexer.q_b_proj, indexer.scorer.weights_proj)
    )
    return LayerWeights(
        *(
            part.cpu().numpy().copy()
            for part in (q_a, attention.q_a_norm.weight.detach().float(), q_b, weights)
        )
    )
