"""The time to prefill part of a prompt on one rank: measured modules, added up, as a decode step's
are.

Where no prefill was timed (a calibration's own preset, a GPU without such tables) it is a lower
bound: operations at the device's measured matrix rate, or the reading of the weights.
"""

from __future__ import annotations

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
        self._hw, self._geometry = hw, geometry
        self._timed = modules(hw, geometry).prefill
        self._full: dict[tuple[int, int], float] = {}  # seconds of whole chunks, by start and size

    @property
    def lower_bound(self) -> bool:
        """Nobody timed the prefill of this deployment."""
        return self._timed is None

    def seconds(self, start_tokens: np.ndarray, chunk_tokens: np.ndarray) -> NDArray[np.float64]:
        """[n]: for each chunk of `chunk_tokens` [n] that follows `start_tokens` [n] of its
        prompt.
        """
        start, chunk = np.asarray(start_tokens, dtype=float), np.asarray(chunk_tokens, dtype=float)
        if self._timed is None:
            return _at_matrix_rate_s(self._hw, self._geometry, start, chunk)
        ms = self._timed.attention.ms(chunk, start) + self._timed.rest_ms(chunk)
        return ms / 1e3

    def prompt(
        self, prompt_tokens: int, chunk_tokens: int, done_tokens: int = 0
    ) -> list[tuple[int, float]]:
        """(tokens, seconds) of each chunk of one prompt, of which `done_tokens` are there."""
        found = []
        for start in range(done_tokens, prompt_tokens, chunk_tokens):
            tokens = min(chunk_tokens, prompt_tokens - start)
            if tokens < chunk_tokens:
                found.append((tokens, self._one_s(start, tokens)))
                continue
            if (start, tokens) not in self._full:
                self._full[start, tokens] = self._one_s(start, tokens)
            found.append((tokens, self._full[start, tokens]))
        return found

    def _one_s(self, start: int, tokens: int) -> float:
        if self._timed is None:
            return float(self.seconds(np.array([start]), np.array([tokens]))[0])
        ms = self._timed.attention.one_ms(tokens, start) + self._timed.rest_ms.one(tokens)
        return ms / 1e3


def _at_matrix_rate_s(
    hw: Hardware, geometry: Geometry, start_tokens: np.ndarray, chunk_tokens: np.ndarray
) -> NDArray[np.float64]:
    """Projections and experts are split over the tensor-parallel GPUs; attention and index scores
    are not, since the one KV head is on every GPU, and the attention kernel works on all query
    heads (as the engine that FlashMemory published does).
    """
    context = start_tokens + (chunk_tokens + 1) / 2  # mean over the chunk's tokens
    entries = context / geometry.csa_rate
    split = geometry.split_flops_per_token / hw.placed.tp
    whole = geometry.attention_flops_per_token(context, entries, _FP8_SPEEDUP)
    reading_s = hw.weight_bytes(geometry) / hw.hbm_bytes_per_s.value
    computing_s: NDArray[np.float64] = chunk_tokens * (split + whole) / hw.matmul_flops.value
    return np.maximum(computing_s, reading_s)
