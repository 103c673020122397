"""The k-th largest of many scores, and bounds of it, by counting, and what is chosen by it: parts
of `top_k`.

Scores are searched by keys, uint32 that order as float32 values do. A program holds them in its
registers, and parts what lies between two keys in three at each turn, by how many reach the two
between.
"""

from __future__ import annotations

from fmsim.exec.kernels.lang import tl, triton

INFINITE = tl.constexpr(0xFF800000)  # the key of +inf


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
def value_of(key):
    """The float32 of a key of `ordered`; the least finite one for lower keys."""
    key = tl.maximum(key, 0x00800000)
    bits = key ^ tl.where(key >> 31 != 0, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sums_before(counts):
    """Sums of all that precede each of [rows, columns], row by row, and the whole sum."""
    rows = tl.sum(counts, 1)
    return tl.cumsum(counts, 1) - counts + (tl.cumsum(rows, 0) - rows)[:, None], tl.sum(rows, 0)


@triton.jit
def _thresholds(low, sure):
    """Two keys that part those from ``low`` to ``sure`` in three."""
    step = (sure - low + 2) // 3
    return low + step, tl.minimum(low + 2 * step, sure)


@triton.jit
def _reaching(keys, one, two):
    """How many keys, fewer than 2^15, reach each threshold: both counts in one int32, and so one
    sum over all threads.
    """
    counts = tl.sum((keys >= one).to(tl.int32) + ((keys >= two).to(tl.int32) << 16))
    return counts & 0xFFFF, counts >> 16


@triton.jit
def _narrowed(low, sure, above, one, two, first, second, k):
    """``low``, ``sure`` and ``above`` after a turn of the search, of which `search_between`
    tells.
    """
    low = tl.where(second > k, two, tl.where(first > k, one, low))
    sure = tl.where(first <= k, one, tl.where(second <= k, two, sure))
    above = tl.where(first <= k, first, tl.where(second <= k, second, above))
    return low, sure, above


@triton.jit
def _guessed(low, sure, reaching, above, k):
    """Two keys from ``low`` on: where the k-th largest would be if the keys between ``low``, which
    ``reaching`` reach, and ``sure`` were evenly spread, and half as far.
    """
    width = sure - low
    part = (reaching - k).to(tl.float32) / (reaching - above).to(tl.float32)
    far = tl.minimum((width.to(tl.float32) * part).to(tl.uint32), width)
    return low + tl.maximum(far // 2, 1), low + tl.maximum(far, 1)


@triton.jit
def search_between(keys, low, top, count, k):
    """Among keys that are held at once, of which ``count`` reach ``low`` and none is more than
    ``top``: ``sure`` and ``above``.

    The keys from ``sure`` on are among the k largest, and are ``above`` many. Where that is fewer
    than k, others have the key ``sure - 1``, and are enough, or no more reach ``low``. More than k
    keys reach ``low`` as it moves, and at most k reach ``sure``; the two approach until they are
    neighbours, or exactly k keys reach ``sure``. Two turns of three guess, the third one parts what
    is left in three.
    """
    sure, above = low, count
    if count > k:
        sure, above = top + 1, tl.zeros([], tl.int32)
        reaching, turn = count, tl.zeros([], tl.int32)
        while (sure - low > 1) & (above < k):
            one, two = _thresholds(low, sure)
            near, far = _guessed(low, sure, reaching, above, k)
            guess = turn % 3 < 2
            one, two = tl.where(guess, near, one), tl.where(guess, far, two)
            first, second = _reaching(keys, one, two)
            reaching = tl.where(second > k, second, tl.where(first > k, first, reaching))
            low, sure, above = _narrowed(low, sure, above, one, two, first, second, k)
            turn += 1
    return sure, above


@triton.jit
def columns_of(values, start, width, KEYS: tl.constexpr, TURNS: tl.constexpr):
    """Values ``start ...`` as TURNS rows of KEYS, of which each column has one maximum in
    `bound_of`. ``width`` of the values, and no fewer, can be read.

    Not masked by how many count: the load need not wait for that, and takes several at once.
    """
    place = start + tl.arange(0, TURNS)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    return tl.load(values + place, mask=place < width, other=float("-inf")), place


@triton.jit
def bound_of(columns, values, count, width, k, KEYS: tl.constexpr, TURNS: tl.constexpr):
    """A key that at least k of the first ``count`` values reach, and no more than half as many
    again of KEYS maxima of them; and the highest key. 1 where there are no more than k maxima.

    Every KEYS-th of the values are one maximum's, so that high ones that lie together count apart.
    ``columns`` are the first `columns_of` the values.
    """
    best, place = columns
    best = tl.max(tl.where(place < count, best, float("-inf")), 0)
    for start in range(TURNS * KEYS, count, TURNS * KEYS):
        more, place = columns_of(values, start, width, KEYS, TURNS)
        best = tl.maximum(best, tl.max(tl.where(place < count, more, float("-inf")), 0))
    keys = ordered(best)
    top, low = tl.max(keys), tl.full([], 1, tl.uint32)
    if count > k:
        sure, reaching = top + 1, tl.full([], KEYS, tl.int32)  # or fewer
        low = tl.min(tl.where(keys > 0, keys, 0xFFFFFFFF).to(tl.uint32))
        while (sure - low > 1) & (reaching > k + k // 2):
            one, two = _thresholds(low, sure)
            first, second = _reaching(keys, one, two)
            sure = tl.where(first < k, one, tl.where(second < k, two, sure))
            reaching = tl.where(second >= k, second, tl.where(first >= k, first, reaching))
            low = tl.where(second >= k, two, tl.where(first >= k, one, low))
        if reaching == KEYS:  # low is the least
            low = tl.where(tl.sum((keys > 0).to(tl.int32)) < k, 1, low).to(tl.uint32)
    return low, top


@triton.jit
def kth_key(
    values,
    groups,
    count,
    length,
    bound,
    top,
    k,
    GROUP: tl.constexpr,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """`search_between` among values in memory, of which at least k reach ``bound``, or it is 1, and
    none is more than ``top``.

    Keys that fit a chunk are read once; more are read every turn.
    """
    if count <= CHUNK:
        keys, _ = keys_of(values, groups, 0, count, length, GROUP, GATHER, CHUNK, VECTOR)
        there = tl.sum((keys > 0).to(tl.int32))
        least = tl.min(tl.where(keys > 0, keys, 0xFFFFFFFF).to(tl.uint32))
        sure, above = search_between(keys, least, tl.max(keys), there, k)
    else:
        low, sure, above = bound - 1, top + 1, tl.zeros([], tl.int32)
        while (sure - low > 1) & (above < k):
            one, two = _thresholds(low, sure)
            first, second = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
            for start in range(0, count, CHUNK):
                keys, _ = keys_of(
                    values, groups, start, count, length, GROUP, GATHER, CHUNK, VECTOR
                )
                more, of_them = _reaching(keys, one, two)
                first, second = first + more, second + of_them
            low, sure, above = _narrowed(low, sure, above, one, two, first, second, k)
    return sure, above


@triton.jit
def scatter(target, places, values, mask):
    """Each value to its place.

    Both as one int64, which may be taken in any order, so that no thread waits for another's.
    """
    pairs = tl.where(mask, (places.to(tl.int64) << 32) | values.to(tl.int64), -1)
    pairs = tl.ravel(pairs, can_reorder=True)
    tl.store(target + (pairs >> 32), (pairs & 0xFFFFFFFF).to(tl.int32), mask=pairs >= 0)


@triton.jit
def _emit(ids, key, index, sure, ties_wanted, taken, ties):
    """Write those of some candidates, in ascending order, that are chosen; -> how many certain ones
    and ties there were so far.

    A key of at least ``sure`` is certain; one of ``sure - 1`` is a tie, of which the first
    ``ties_wanted`` are chosen.
    """
    certain, tie = (key >= sure).to(tl.int32), ((key == sure - 1) & (key > 0)).to(tl.int32)
    # both counts in one sum: a chunk has fewer than 2^15
    before, more = sums_before(certain + (tie << 16))
    earlier_ties = ties + (before >> 16)
    take = (certain > 0) | ((tie > 0) & (earlier_ties < ties_wanted))
    scatter(ids, taken + (before & 0xFFFF) + tl.minimum(earlier_ties, ties_wanted), index, take)
    return taken + (more & 0xFFFF), ties + (more >> 16)


@triton.jit
def list_groups(
    maxima, groups, bound, count, GROUP: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr
):
    """The groups whose maxima reach ``bound``, in ascending order; -> how many."""
    kept = tl.zeros([], tl.int32)
    for start in range(0, count, CHUNK):
        key, group = keys_of(maxima, groups, start, count, count, GROUP, False, CHUNK, VECTOR)
        keep = (key >= bound).to(tl.int32)
        before, more = sums_before(keep)
        scatter(groups, kept + before, group, keep > 0)
        kept += more
    return kept


@triton.jit
def choose(
    scores,
    groups,
    count,
    length,
    bound,
    top,
    ids,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Choose among ``count`` scores: all, or of the listed groups where GATHER; see `kth_key`."""
    sure, above = kth_key(
        scores, groups, count, length, bound, top, K, GROUP, GATHER, CHUNK, VECTOR
    )
    taken, ties = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, count, CHUNK):
        key, index = keys_of(scores, groups, start, count, length, GROUP, GATHER, CHUNK, VECTOR)
        taken, ties = _emit(ids, key, index, sure, K - above, taken, ties)
    _fill(ids, taken + tl.minimum(ties, K - above), K, K_PADDED)


@triton.jit
def _fill(ids, taken, K: tl.constexpr, K_PADDED: tl.constexpr):
    """-1 behind the ``taken`` ids."""
    place = tl.arange(0, K_PADDED)
    tl.store(ids + place, -1, mask=(place >= taken) & (place < K))


@triton.jit
def held_of(
    found,
    aside,
    counts,
    section,
    SECTIONS: tl.constexpr,
    SECTIONS_PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    HELD: tl.constexpr,
):
    """What all sections set aside, about HELD / SECTIONS each of its PLACES: keys [HELD], 0 where
    there is none, and the sections that they are of; of ``section`` alone keys and ids, and which
    of them are any.
    """
    EACH: tl.constexpr = HELD // SECTIONS // 4 * 4  # loads take four
    # no fewer, and a power of two
    OWN: tl.constexpr = HELD // (SECTIONS if SECTIONS == SECTIONS_PADDED else SECTIONS_PADDED // 2)
    at, own = tl.arange(0, HELD), tl.arange(0, OWN)
    of, place = at // EACH, at % EACH
    score = tl.load(found + of * PLACES + place, mask=of < SECTIONS, other=0)
    own_score = tl.load(found + section * PLACES + own, mask=own < EACH, other=0)
    own_id = tl.load(aside + section * PLACES + own, mask=own < EACH, other=0)
    own_there = own < tl.minimum(tl.load(counts + section), EACH)
    there = place < tl.load(counts + of, mask=of < SECTIONS, other=0)
    key = tl.where(there, ordered(score.to(tl.float32, bitcast=True)), 0)
    key, own_key = key.to(tl.uint32), ordered(own_score.to(tl.float32, bitcast=True))
    return key, of, own_key, own_id, own_there


@triton.jit
def choose_of_section(held, section, total, bound, top, ids, K: tl.constexpr):
    """Search among what is held, ``total`` many; write those that are chosen of one section."""
    key, of, own_key, own_id, own_there = held
    sure, above = search_between(key, bound, top, total, K)
    # certain ones, and ties from the 16th bit on
    both = (key >= sure).to(tl.int32) + (((key == sure - 1) & (key >= bound)).to(tl.int32) << 16)
    before = tl.sum(tl.where(of < section, both, 0))
    certain = own_there & (own_key >= sure)
    tie = own_there & (own_key == sure - 1)
    both = certain.to(tl.int32) + (tie.to(tl.int32) << 16)
    before += tl.cumsum(both, 0) - both
    ties = before >> 16
    slot = (before & 0xFFFF) + tl.minimum(ties, K - above)
    scatter(ids, slot, own_id, certain | (tie & (ties < K - above)))
