"""The few array operations that the array API standard lacks, for numpy and torch alike, with equal
results.

Shapes: G groups, P pages. A table is [G, P + 1]; page -1 reads and writes a sink column (flat index
-1 past a row's start is the last column of the row above, or of the last row: a sink either way).
"""

from __future__ import annotations

from typing import Any

import array_api_compat
import array_api_compat.numpy as numpy_namespace
import numpy as np

Array = Any

PAGE_BITS = 24  # 16.7 million pages a request
WORTH_BITS = 37  # a float32 takes 32; policies that count may use all
MAX_PAGES = 2**PAGE_BITS
PROTECTED = 2**62  # above every key: a page that must stay


def is_numpy_array(array: Array) -> bool:
    return isinstance(array, np.ndarray)


def array_namespace(array: Array) -> Any:
    """That of array_api_compat, which asks several libraries first: most arrays are numpy's."""
    return numpy_namespace if is_numpy_array(array) else array_api_compat.array_namespace(array)


def offsets(table: Array, xp: Any) -> Array:
    """[G, 1] int64: the flat index at which each row of a [G, n] array starts."""
    return (xp.arange(table.shape[0], dtype=xp.int64, device=table.device) * table.shape[1])[
        :, None
    ]


def read(table: Array, start: Array, pages: Array) -> Array:
    """table[g, pages[g, i]] as [G, n]; `start` is `offsets(table)`.

    In numpy this is several times faster than two indices.
    """
    flat = table.reshape(-1)
    return flat.take(pages + start, mode="wrap") if is_numpy_array(table) else flat[pages + start]


def put(table: Array, start: Array, pages: Array, values: Array | float) -> None:
    """table[g, pages[g, i]] = values[g, i], in place.

    Pages must be unique in a row, padding aside.
    """
    flat, places = table.reshape(-1), pages + start
    if not is_numpy_array(table) and isinstance(values, (bool, int, float)):
        flat.index_fill_(
            0, places.reshape(-1).long(), values
        )  # indexed assignment would copy a number to the GPU, and wait for that
    else:
        flat[places] = values


def replaced(table: Array, mask: Array, values: Array | int) -> Array:
    """table [G, n] with `values`, a number or a row [1, n], where `mask`; in numpy table itself.

    There it is a few writes where the mask is mostly False, as it is for pages that must stay.
    """
    if not is_numpy_array(table):
        return array_namespace(table).where(mask, values, table)
    places = mask.reshape(-1).nonzero()[0]
    if not isinstance(values, int):
        values = values.reshape(-1)[places % table.shape[1]]
    table.reshape(-1)[places] = values
    return table


def order_key(worth: Array, pages: Array) -> Array:
    """One int64 that orders pages by worth, then page id: no ties, so any library sorts alike.

    Below PROTECTED, and >= 0.

    worth: float32, made order-preserving by its bits, or integers in [0, 2**37). Pages >= 0 (a key
    of another means nothing); broadcast against worth.
    """
    xp = array_namespace(worth)
    if xp.isdtype(worth.dtype, "real floating"):
        bits = (xp.astype(worth, xp.float32, copy=False) + 0.0).view(
            xp.int32
        )  # + 0.0: -0 and 0 are equal
        bits ^= (bits >> 31) & 0x7FFFFFFF
        key = xp.astype(bits, xp.int64)
        key += 2**31
    else:
        key = xp.astype(worth, xp.int64)  # a copy
    key <<= PAGE_BITS
    key |= pages
    return key


def smallest(key: Array, n: int) -> Array:
    """Column indices [G, n] of the n smallest keys of each row, ascending. Keys are distinct."""
    xp = array_namespace(key)
    if not is_numpy_array(key):
        return key.topk(n, dim=1, largest=False, sorted=True).indices
    if n == 1:
        return xp.argmin(key, axis=1)[:, None]
    if n == key.shape[1]:
        return xp.argsort(key, axis=1)
    columns = xp.argpartition(key, n - 1, axis=1)[:, :n]
    start = offsets(key, xp)
    order = xp.argsort(read(key, start, columns), axis=1)
    return read(columns, offsets(columns, xp), order)


def nth_largest(key: Array, n: int) -> Array:
    """The n-th largest key of each row, [G, 1]; any negative number where that is negative (a page
    that may not be kept).
    """
    if not is_numpy_array(key):
        return key.topk(n, dim=1).values[:, -1:]
    xp = array_namespace(key)
    least = xp.full((len(key), 1), -1, dtype=xp.int64)
    for row, out in zip(key, least, strict=True):
        live = row[row >= 0]  # many equal keys make a partition slow
        if live.size >= n:
            out[0] = xp.partition(live, live.size - n)[live.size - n]
    return least


def nth_largest_of_each(key: Array, n: Array) -> Array:
    """The n[g]-th largest key of row g, [G, 1], n int64 [G, 1]; where a row has fewer, or that one
    is negative, a number that is not above its keys >= 0.
    """
    if is_numpy_array(key):
        rows = [nth_largest(row[None], int(count)) for row, count in zip(key, n[:, 0], strict=True)]
        return array_namespace(key).concat(rows)
    ranked = key.sort(dim=1, descending=True).values
    return ranked.gather(1, n.clamp(max=key.shape[1]) - 1)


def width(mask: Array, limit: int) -> int:
    """Columns that a packed copy of `mask` needs: what its fullest row holds in numpy, always
    `limit` in torch.

    This is the only place where shapes follow data; a CUDA graph needs them fixed, and the results
    are the same.
    """
    return min(int(mask.sum(axis=1).max()), limit) if is_numpy_array(mask) else limit


def pack(values: Array, mask: Array, n: int) -> Array:
    """The first n of each row's `values` where `mask`, in order, as [G, n] int64 padded with -1."""
    xp = array_namespace(mask)
    packed = xp.full((mask.shape[0], n + 1), -1, dtype=xp.int64, device=mask.device)
    values = xp.broadcast_to(values, mask.shape)
    if is_numpy_array(mask):  # touches only what is packed
        rows, columns = xp.nonzero(mask)
        per_row = xp.count_nonzero(mask, axis=1)
        at = xp.arange(rows.size) - (xp.cumulative_sum(per_row) - per_row)[rows]
        packed[rows, xp.minimum(at, n)] = values[rows, columns]
        return packed[:, :n]
    at = xp.cumulative_sum(xp.astype(mask, xp.int32), axis=1, dtype=xp.int64) - 1
    at = xp.where(mask & (at < n), at, n)
    put(packed, offsets(packed, xp), at, xp.astype(values, xp.int64))
    return packed[:, :n].contiguous()
