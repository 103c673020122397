"""Which selected entries matter: the paper's golden entries of a step (arXiv 2606.09079)."""

from __future__ import annotations

import numpy as np

GOLDEN_SHARE = 0.6  # of a step's mass; section 3.2
CHUNK_STEPS = 64  # bounds the temporaries


def golden_mask(ids: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """bool [T, L, K]: the head of each step's list sorted by mass, up to and with the entry that
    reaches GOLDEN_SHARE.

    Of equal masses the earlier in the list comes first; a list without mass has no golden entry.
    """
    golden = np.empty(ids.shape, dtype=bool)
    place = (ids.shape[2] - 1 - np.arange(ids.shape[2])).astype(np.int32)
    for first in range(0, len(ids), CHUNK_STEPS):
        part = mass[first : first + CHUNK_STEPS].astype(np.float16)
        key = (
            part.view(np.int16).astype(np.int32) << 16
        ) | place  # float16 bits of a mass >= 0 keep its order
        ranked = -np.sort(-key, axis=-1)
        sorted_mass = (ranked >> 16).astype(np.int16).view(np.float16).astype(np.float32)
        before = np.cumsum(sorted_mass, axis=-1) - sorted_mass
        head = (before < GOLDEN_SHARE * sorted_mass.sum(axis=-1, keepdims=True)) & (sorted_mass > 0)
        least = np.take_along_axis(
            ranked, np.maximum(head.sum(axis=-1, keepdims=True) - 1, 0), axis=-1
        )
        golden[first : first + CHUNK_STEPS] = (key >= least) & (part > 0)
    return golden
