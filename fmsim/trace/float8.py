"""float8 e4m3fn in numpy, the format of index keys in DeepSeek's caches.

One sign, four exponent (bias 7) and three mantissa bits; no infinities, NaN = 0x7f and 0xff. The
format's definition is "FP8 Formats for Deep Learning", arXiv 2209.05433, table 1; the arithmetic is
ml_dtypes'.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

MAX = 448.0  # the largest finite value, code 0x7e
NAN_CODES = (0x7F, 0xFF)
# Code -> value. Looking codes up is several times as fast as casting them.
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def decode(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 codes of any shape -> float32 values."""
    values: NDArray[np.float32] = VALUES[codes]
    return values


def encode(values: np.ndarray) -> NDArray[np.uint8]:
    """Floats of any shape -> uint8 codes: the nearest value, of two the one of even code.

    Beyond +-448 saturates. NaN becomes 0x7f, or 0xff where its sign is set.
    """
    within = np.clip(np.asarray(values, dtype=np.float32), -MAX, MAX)
    codes: NDArray[np.uint8] = within.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes


def quantise(keys: np.ndarray) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """float32 [..., E, D] -> (codes uint8 [..., E, D], scales float32 [..., 1]), with keys ~ scales
    * decode(codes).

    One scale for all entries: what it has to fit is the format's range of 2**15 between normal
    numbers, not a mantissa.
    """
    largest = np.abs(keys).max(axis=(-2, -1), initial=0.0)
    scales = np.where(largest > 0, largest / MAX, 1.0).astype(np.float32)
    return encode(keys / scales[..., None, None]), scales[..., None]
