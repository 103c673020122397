"""Columns that lie packed in a file of version 3: entry ids and masses, a chunk of steps at a time.

Of a row of ids it is stored which of the step before go on, a bit each, and how far each new one
is above the new one before it. The bytes of these numbers, and of masses, are sorted by
significance and deflated (zlib, RFC 1950). Unpacking gives the same numbers again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmsim.errors import FmsimError

CHUNK_STEPS = 32  # packed together
LEVEL = 9  # of zlib
MANTISSA = 10  # bits of a float16


@dataclass(frozen=True, eq=False)
class PackedColumn:
    """A packed tensor left in its file: indexing unpacks the chunks of steps that it needs, once.

    ``stored`` uint8 holds all chunks one behind the other, ``ends`` int32 says where each ends,
    ``whole`` is the unpacked shape, and ``unpack`` makes a chunk of its bytes and shape. ``where``
    begins the message about a chunk that cannot be unpacked.
    """

    stored: np.ndarray
    ends: np.ndarray
    whole: tuple[int, ...]
    kind: type[np.generic]
    unpack: Callable[[bytes, tuple[int, ...]], np.ndarray]
    where: str
    _unpacked: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole

    @property
    def ndim(self) -> int:
        return len(self.whole)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.kind)

    def __len__(self) -> int:
        return self.whole[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        steps, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(steps, (int, np.integer)):
            number, place = divmod(range(len(self))[int(steps)], CHUNK_STEPS)
            one: np.ndarray = self._chunk(number)[(place, *rest)]
            return one
        if not isinstance(steps, slice):
            picked: np.ndarray = self[:][(steps, *rest)]
            return picked
        wanted = range(len(self))[steps]
        if not wanted:
            return np.zeros((0, *self.whole[1:]), self.kind)[(slice(None), *rest)]
        first = min(wanted) // CHUNK_STEPS
        numbers = range(first, max(wanted) // CHUNK_STEPS + 1)
        rows = np.concatenate([self._chunk(number) for number in numbers])
        found: np.ndarray = rows[np.asarray(wanted) - first * CHUNK_STEPS][(slice(None), *rest)]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)

    def _chunk(self, number: int) -> np.ndarray:
        if number not in self._unpacked:
            begin = int(self.ends[number - 1]) if number else 0
            rows = min(CHUNK_STEPS, len(self) - number * CHUNK_STEPS)
            shape = (rows, *self.whole[1:])
            try:
                found = self.unpack(self.stored[begin : int(self.ends[number])].tobytes(), shape)
            except (zlib.error, ValueError):
                raise FmsimError(
                    f"{self.where}: steps {number * CHUNK_STEPS} and on cannot be unpacked; the"
                    " file is damaged; copy or record it again"
                ) from None
            self._unpacked[number] = found
        return self._unpacked[number]


def pack(values: np.ndarray, pack_chunk: Callable[[np.ndarray], bytes]) -> list[np.ndarray]:
    """[T, ...] -> uint8 [bytes], int32 [chunks]: chunks of ``CHUNK_STEPS`` steps, and where each
    ends.
    """
    firsts = range(0, len(values), CHUNK_STEPS)
    parts = [pack_chunk(values[first : first + CHUNK_STEPS]) for first in firsts]
    ends = np.cumsum([len(part) for part in parts]).astype(np.int32)
    return [np.frombuffer(b"".join(parts), np.uint8), ends]


def pack_masses(masses: np.ndarray) -> bytes:
    """A chunk of float16 masses [n, L, K]."""
    return zlib.compress(_planes(masses.view(np.uint16)), LEVEL)


def unpack_masses(stored: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """What `pack_masses` made -> float32; zlib.error or ValueError where it is no such chunk."""
    size = math.prod(shape)
    words = _from_planes(_inflated(stored, 2 * size), size, "uint16")
    return words.view(np.float16).reshape(shape).astype(np.float32)


def pack_ids(ids: np.ndarray) -> bytes:
    """A chunk of rows [n, L, K] of ascending int32 ids, padding -1 last."""
    steps, layers = ids.shape[:2]
    going_on = np.zeros(ids.shape, bool)  # of the row before, by its places
    counts = np.zeros((steps, layers), np.uint32)
    gaps = []
    for step, layer in np.ndindex(steps, layers):
        row = ids[step, layer][ids[step, layer] >= 0]
        fresh = row
        if step:
            before = ids[step - 1, layer]
            going_on[step, layer] = np.isin(before, row) & (before >= 0)
            fresh = row[~np.isin(row, before)]
        counts[step, layer] = len(fresh)
        gaps.append(np.diff(fresh, prepend=-1).astype(np.uint32))
    parts = np.packbits(going_on).tobytes(), _planes(counts), _planes(np.concatenate(gaps))
    return zlib.compress(b"".join(parts), LEVEL)


def unpack_ids(stored: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """What `pack_ids` made -> int32; zlib.error or ValueError where it is no such chunk."""
    steps, layers = shape[:2]
    bits, rows = -(-math.prod(shape) // 8), steps * layers
    data = _inflated(stored, bits + 4 * rows + 4 * math.prod(shape), exactly=False)
    flags = np.frombuffer(data, np.uint8, bits)
    going_on = np.unpackbits(flags, count=math.prod(shape)).astype(bool).reshape(shape)
    counts = _from_planes(data[bits : bits + 4 * rows], rows, "uint32").astype(np.int64)
    gaps = _from_planes(data[bits + 4 * rows :], int(counts.sum()), "uint32").astype(np.int64)
    ids = np.full(shape, -1, np.int32)
    ends = np.cumsum(counts).reshape(steps, layers)
    for step, layer in np.ndindex(steps, layers):
        end = ends[step, layer]
        row = np.cumsum(gaps[end - counts[step * layers + layer] : end]) - 1
        if step:
            row = np.concatenate((ids[step - 1, layer][going_on[step, layer]], row))
            row.sort()
        ids[step, layer, : len(row)] = row
    return ids


def _planes(words: np.ndarray) -> bytes:
    """The lowest bytes of all words, then the next, and so on."""
    little = np.ascontiguousarray(words, words.dtype.newbyteorder("<"))
    return little.reshape(-1, 1).view(np.uint8).T.tobytes()


def _from_planes(data: bytes, count: int, word: str) -> np.ndarray:
    """``count`` words that `_planes` took apart; ValueError where the bytes are not as many."""
    size = np.dtype(word).itemsize
    planes = np.frombuffer(data, np.uint8).reshape(size, count)
    return np.ascontiguousarray(planes.T).view(f"<u{size}").reshape(-1).astype(word)


def _inflated(stored: bytes, most: int, exactly: bool = True) -> bytes:
    """At most ``most`` bytes, whatever the data claims to be; ValueError where there are others."""
    engine = zlib.decompressobj()
    data = engine.decompress(stored, most + 1)
    if not engine.eof or len(data) > most or (exactly and len(data) < most):
        raise ValueError("the data is not as long as it should be")
    return data


def rounded(mass: np.ndarray, bits: int) -> np.ndarray:
    """Masses to the nearest float16 of ``bits`` mantissa bits, float32: 5 bits are within 1.6%, and
    take half of a packed trace less than all 10.
    """
    words = np.asarray(mass, np.float16).view(np.uint16)
    unit = 1 << (MANTISSA - bits)
    up = words.astype(np.uint32) + (unit >> 1)
    return (up - up % unit).astype(np.uint16).view(np.float16).astype(np.float32)
