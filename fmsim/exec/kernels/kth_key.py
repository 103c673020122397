"""The k-th largest of many scores, and bounds of it, by counting: what `top_k` chooses by.

Scores are searched by keys, uint32 that order as float32 values do. A program holds them in its
registers, and parts what lies between two keys in four at each turn, by how many reach the three
between.
"""

from __future__ import annotations

from fmsim.exec.kernels.lang import tl, triton


@triton.jit
def keys_of(
    values,
    groups,
    start,
    count,
    length,
    GROUP: tl.constexpr,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Values ``start ...`` of ``count``, of the listed groups where GATHER: uint32 keys that order
    as they do, and ids, [CHUNK / GROUP, GROUP].

    The key is 0 where there is no value or it is -inf. Loads take VECTOR values at once, whose rows
    must hold as many beyond a length.
    """
    row, lane = tl.arange(0, CHUNK // GROUP), tl.arange(0, GROUP)[None, :]
    first = start + row * GROUP
    if GATHER:
        first = (
            tl.load(groups + start // GROUP + row, mask=first < count, other=length // GROUP + 1)
            * GROUP
        )
    index = first[:, None] + lane
    value = tl.load(values + index, mask=index // VECTOR * VECTOR < length, other=float("-inf"))
    return tl.where(index < length, ordered(value), 0).to(tl.uint32), index


@triton.jit
def ordered(value):
    """uint32 keys that order as float32 values do; 0 for -inf."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)  # -0.0 is 0.0
    key = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return tl.where(value != float("-inf"), key, 0).to(tl.uint32)


@triton.jit
def sums_before(counts):
    """Sums of all that precede each of [rows, columns], row by row, and the whole sum."""
    rows = tl.sum(counts, 1)
    return tl.cumsum(counts, 1) - counts + (tl.cumsum(rows, 0) - rows)[:, None], tl.sum(rows, 0)


@triton.jit
def _thresholds(low, sure):
    """Three keys that part those from ``low`` to ``sure`` in four."""
    step = (sure - low + 3) >> 2
    return low + step, tl.minimum(low + 2 * step, sure), tl.minimum(low + 3 * step, sure)


@triton.jit
def _reaching(keys, one, two, three, COUNT_BITS: tl.constexpr):
    """How many keys reach each threshold: three counts in one int64, and so one sum over all
    threads.
    """
    counts = (
        (keys >= one).to(tl.int64)
        + ((keys >= two).to(tl.int64) << COUNT_BITS)
        + ((keys >= three).to(tl.int64) << 2 * COUNT_BITS)
    )
    return tl.sum(counts)


@triton.jit
def _counts(counts, COUNT_BITS: tl.constexpr):
    """The three of `_reaching`."""
    mask: tl.constexpr = (1 << COUNT_BITS) - 1
    return (
        (counts & mask).to(tl.int32),
        ((counts >> COUNT_BITS) & mask).to(tl.int32),
        (counts >> 2 * COUNT_BITS).to(tl.int32),
    )


@triton.jit
def _narrowed(low, sure, above, one, two, three, counts, k, COUNT_BITS: tl.constexpr):
    """``low``, ``sure`` and ``above`` after a turn of the search, of which `search` tells."""
    first, second, third = _counts(counts, COUNT_BITS)
    low = tl.where(third > k, three, tl.where(second > k, two, tl.where(first > k, one, low)))
    sure = tl.where(first <= k, one, tl.where(second <= k, two, tl.where(third <= k, three, sure)))
    above = tl.where(
        first <= k, first, tl.where(second <= k, second, tl.where(third <= k, third, above))
    )
    return low, sure, above


@triton.jit
def search(keys, k, COUNT_BITS: tl.constexpr):
    """Among keys that are held at once, 0 for none: ``sure`` and ``above``.

    The keys from ``sure`` on are among the k largest, and are ``above`` many. Where that is fewer
    than k, the others have the key ``sure - 1``, and are enough (or it is 0, and no more exist).
    More than k keys reach ``low``, if any so few do; at most k reach ``sure``. The two approach
    until they are neighbours, or exactly k keys reach ``sure``.
    """
    above = tl.sum((keys > 0).to(tl.int32))
    low, sure = tl.zeros([], tl.uint32), tl.full([], 1, tl.uint32)
    if above > k:
        sure, above = tl.max(keys) + 1, tl.zeros([], tl.int32)
        low = tl.min(tl.where(keys > 0, keys, 0xFFFFFFFF).to(tl.uint32))
        while (sure - low > 1) & (above < k):
            one, two, three = _thresholds(low, sure)
            counts = _reaching(keys, one, two, three, COUNT_BITS)
            low, sure, above = _narrowed(low, sure, above, one, two, three, counts, k, COUNT_BITS)
    return sure, above


@triton.jit
def bound_of(maxima, count, k, KEYS: tl.constexpr, COUNT_BITS: tl.constexpr):
    """A key that at least k of some scores reach, and about k; 1 where there are no more maxima.

    Maxima of the ``count`` maxima are parted by it, KEYS at most: every n-th of them are one's, so
    that high scores that lie together count apart.
    """
    each = tl.cdiv(count, KEYS)
    step = tl.cdiv(count, tl.maximum(each, 1))
    place = tl.arange(0, KEYS)
    best = tl.full([KEYS], float("-inf"), tl.float32)
    for turn in range(each):
        index = turn * step + place
        known = (place < step) & (index < count)
        best = tl.maximum(best, tl.load(maxima + index, mask=known, other=float("-inf")))
    keys = ordered(best)
    reaching = tl.sum((keys > 0).to(tl.int32))
    low = tl.full([], 1, tl.uint32)
    if reaching > k:
        sure = tl.max(keys) + 1
        low = tl.min(tl.where(keys > 0, keys, 0xFFFFFFFF).to(tl.uint32))
        while (sure - low > 1) & (reaching > k + k // 4):
            one, two, three = _thresholds(low, sure)
            first, second, third = _counts(_reaching(keys, one, two, three, COUNT_BITS), COUNT_BITS)
            sure = tl.where(
                first < k, one, tl.where(second < k, two, tl.where(third < k, three, sure))
            )
            reaching = tl.where(
                third >= k,
                third,
                tl.where(second >= k, second, tl.where(first >= k, first, reaching)),
            )
            low = tl.where(
                third >= k, three, tl.where(second >= k, two, tl.where(first >= k, one, low))
            )
    return low


@triton.jit
def kth_key(
    values,
    groups,
    count,
    length,
    k,
    GROUP: tl.constexpr,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    COUNT_BITS: tl.constexpr,
):
    """`search` among values in memory.

    Keys that fit a chunk are read once; more are read every turn.
    """
    if count <= CHUNK:
        keys, _ = keys_of(values, groups, 0, count, length, GROUP, GATHER, CHUNK, VECTOR)
        sure, above = search(keys, k, COUNT_BITS)
    else:
        low, sure, above = (
            tl.zeros([], tl.uint32),
            tl.full([], 0xFF800001, tl.uint32),
            tl.zeros([], tl.int32),
        )  # beyond the key of +inf
        while (sure - low > 1) & (above < k):
            one, two, three = _thresholds(low, sure)
            counts = tl.zeros([], tl.int64)
            for start in range(0, count, CHUNK):
                keys, _ = keys_of(
                    values, groups, start, count, length, GROUP, GATHER, CHUNK, VECTOR
                )
                counts += _reaching(keys, one, two, three, COUNT_BITS)
            low, sure, above = _narrowed(low, sure, above, one, two, three, counts, k, COUNT_BITS)
    return sure, above
