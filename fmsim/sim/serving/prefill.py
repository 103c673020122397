"""The time to prefill part of a prompt: operations at the device's measured matrix rate, or the
reading of the weights.

A lower bound.
"""

from __future__ import annotations

import numpy as np

from fmsim.geometry import Geometry
from fmsim.hw.spec import Hardware

_FP8_SPEEDUP = 2.0  # of index scores over bf16


def prefill_s(
    hw: Hardware, geometry: Geometry, start_tokens: np.ndarray, chunk_tokens: np.ndarray
) -> np.ndarray:
    """Seconds for each chunk of `chunk_tokens` [n] that follows `start_tokens` [n] of its prompt.

    Projections and experts are split over the tensor-parallel GPUs; attention and index scores are
    not, since the one KV head is on every GPU, and the attention kernel works on all query heads
    (as the engine that FlashMemory published does).
    """
    context = start_tokens + (chunk_tokens + 1) / 2  # mean over the chunk's tokens
    csa, hca = context / geometry.csa_rate, context / geometry.hca_rate
    attended = (
        geometry.n_csa * np.minimum(geometry.index_topk, csa)
        + geometry.n_layers * geometry.window_tokens
        + geometry.n_hca * hca
    )
    attention = attended * 4 * geometry.n_heads * geometry.head_dim
    scoring = (
        geometry.n_csa
        * csa
        * geometry.index_n_heads
        * (2 * geometry.index_head_dim + 2)
        / _FP8_SPEEDUP
    )
    per_token = 2 * geometry.active_parameters / hw.n_gpus + attention + scoring
    reading_s = geometry.weight_bytes(hw.n_gpus) / hw.hbm_bytes_per_s.value
    return np.maximum(chunk_tokens * per_token / hw.matmul_flops.value, reading_s)


def chunks(prompt_tokens: int, chunk_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of a prompt's chunks."""
    start = np.arange(0, prompt_tokens, chunk_tokens)
    return start, np.minimum(chunk_tokens, prompt_tokens - start)
