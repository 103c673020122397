"""The time to prefill part of a prompt on one rank: measured modules, added up, as a decode step's
are.

Where no prefill was timed (a calibration's own preset, a GPU without such tables) it is a lower
bound: operations at the device's measured matrix rate, or the reading of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fmsim.geometry import Geometry
from fmsim.hw.modules import modules
from fmsim.hw.spec import Hardware

_FP8_SPEEDUP = 2.0  # of index scores over bf16


class PrefillModel:
    """Prefill times of one model on one deployment. Made once, asked often."""

    def __init__(self, hw: Hardware, geometry: Geometry) -> None:
        """Raises FmsimError where no table has this deployment."""
        timed = modules(hw, geometry).prefill
        self.lower_bound = timed is None
        self._ms: Callable[[np.ndarray, np.ndarray], np.ndarray]
        if timed is None:
            self._ms = lambda start, chunk: 1e3 * _at_matrix_rate_s(hw, geometry, start, chunk)
            return
        n_hca = geometry.n_hca
        n_sliding = geometry.n_sliding

        def measured(start: np.ndarray, chunk: np.ndarray) -> np.ndarray:
            csa = geometry.n_selecting * timed.csa.ms(chunk, start)
            hca = n_hca * timed.hca.ms(chunk, start)
            sliding = n_sliding * timed.hca.ms(chunk, np.zeros_like(start))
            ms: NDArray[np.float64] = csa + hca + sliding + timed.rest_ms(chunk)
            return ms

        self._ms = measured

    def seconds(self, start_tokens: np.ndarray, chunk_tokens: np.ndarray) -> np.ndarray:
        """[n]: for each chunk of `chunk_tokens` [n] that follows `start_tokens` [n] of its
        prompt.
        """
        start, chunk = np.asarray(start_tokens, dtype=float), np.asarray(chunk_tokens, dtype=float)
        return self._ms(start, chunk) / 1e3


def prefill_s(
    hw: Hardware, geometry: Geometry, start_tokens: np.ndarray, chunk_tokens: np.ndarray
) -> np.ndarray:
    """`PrefillModel.seconds`, for one question."""
    return PrefillModel(hw, geometry).seconds(start_tokens, chunk_tokens)


def _at_matrix_rate_s(
    hw: Hardware, geometry: Geometry, start_tokens: np.ndarray, chunk_tokens: np.ndarray
) -> np.ndarray:
    """Projections and experts are split over the tensor-parallel GPUs; attention and index scores
    are not, since the one KV head is on every GPU, and the attention kernel works on all query
    heads (as the engine that FlashMemory published does).
    """
    context = start_tokens + (chunk_tokens + 1) / 2  # mean over the chunk's tokens
    entries = context / geometry.csa_rate
    split = geometry.split_flops_per_token / hw.placed.tp
    whole = geometry.attention_flops_per_token(context, entries, _FP8_SPEEDUP)
    reading_s = hw.weight_bytes(geometry) / hw.hbm_bytes_per_s.value
    return np.maximum(chunk_tokens * (split + whole) / hw.matmul_flops.value, reading_s)


def chunks(prompt_tokens: int, chunk_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of a prompt's chunks."""
    start = np.arange(0, prompt_tokens, chunk_tokens)
    return start, np.minimum(chunk_tokens, prompt_tokens - start)
