"""float8 e4m3fn in numpy: one sign, four exponent (bias 7) and three mantissa bits; no infinities,
NaN = 0x7f and 0xff.

The format of index keys in DeepSeek's caches; definition: "FP8 Formats for Deep Learning", arXiv
2209.05433, table 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX = 448.0  # the largest finite value, code 0x7e
NAN_CODES = (0x7F, 0xFF)


def _positive_values() -> NDArray[np.float32]:
    """float32 [127]: the values of codes 0x00 to 0x7e, ascending."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    subnormal = mantissa * 2.0**-9
    normal = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    return np.where(exponent == 0, subnormal, normal).astype(np.float32)


VALUES = _positive_values()
TABLE = np.concatenate([VALUES, [np.nan], -VALUES, [np.nan]]).astype(np.float32)  # code -> value
# A value above midpoint i rounds to code i + 1 or higher. A float64 midpoint of two codes is exact.
MIDPOINTS = (VALUES[:-1].astype(np.float64) + VALUES[1:]) / 2


def decode(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 codes of any shape -> float32 values."""
    values: NDArray[np.float32] = TABLE[codes]
    return values


def encode(values: np.ndarray) -> NDArray[np.uint8]:
    """Finite floats of any shape -> uint8 codes, to the nearest value, ties to the even code;
    beyond +-448 saturates.

    NaN becomes 0x7f.
    """
    values = np.asarray(values, dtype=np.float32)
    size = np.abs(values)
    codes = np.searchsorted(MIDPOINTS, size, side="left").astype(np.uint8)
    tie = (codes < len(MIDPOINTS)) & (MIDPOINTS[np.minimum(codes, len(MIDPOINTS) - 1)] == size)
    codes += (tie & (codes % 2 == 1)).astype(np.uint8)
    codes = np.where(np.isnan(values), np.uint8(NAN_CODES[0]), codes)
    signed: NDArray[np.uint8] = codes | (np.signbit(values).astype(np.uint8) << 7)
    return signed


def quantise(keys: np.ndarray) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """float32 [..., E, D] -> (codes uint8 [..., E, D], scales float32 [..., 1]), with keys ~ scales
    * decode(codes).

    One scale for all entries: what it has to fit is the format's range of 2**15 between normal
    numbers, not a mantissa.
    """
    largest = np.abs(keys).max(axis=(-2, -1), initial=0.0)
    scales = np.where(largest > 0, largest / MAX, 1.0).astype(np.float32)
    return encode(keys / scales[..., None, None]), scales[..., None]
