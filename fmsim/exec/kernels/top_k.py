"""The k entries of highest score, exactly, as ascending ids: the selection of a CSA layer.

Ties are broken by the lowest id, so the set is the same on every machine. A program holds a
sequence's candidates in its registers and searches the k-th of their keys by counting how many
reach a threshold, three thresholds a turn. It takes no host synchronisation, so a CUDA graph may
hold it.

Pre-selection: with the maximum of every 32 scores (`index_scores` gives it), what k maxima reach is
a lower bound of the k-th largest score. A few times k maxima of more scores each give one that is
nearly as high, so the bound is sought among those. Groups below it are never read: of 262,144
scores some 16,384 are. Of those the ones that reach the bound are set aside, for they are seldom
more than twice k, and the search goes on among them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmsim.exec.kernels import arrivals, tuning
from fmsim.exec.kernels.index_score import GROUP
from fmsim.exec.kernels.kth_key import bound_of, keys_of, kth_key, ordered, search, sums_before
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)

COUNT_BITS = 21  # of one count; three lie in an int64


def top_k(scores: Tensor, lengths: Tensor, k: int, maxima: Tensor | None = None) -> Tensor:
    """int32 [B, k]: ascending ids of the k highest of each row's first ``lengths[b]`` scores; -1 at
    the end where fewer qualify.

    ``scores`` float32 [B, N], N < 2^21, without nan; -inf never qualifies. ``lengths`` int32 [B],
    on the device. ``maxima`` float32 [B, ceil(N / 32)] saves a reading of the scores and changes
    nothing.
    """
    run = top_k_triton if runs_compiled(scores) else top_k_reference
    return run(scores, lengths, k, maxima)


def top_k_reference(
    scores: Tensor, lengths: Tensor, k: int, maxima: Tensor | None = None
) -> Tensor:
    ids = torch.arange(scores.shape[1], device=scores.device)
    known = scores.masked_fill(ids >= lengths[:, None], float("-inf"))
    best = known.sort(dim=1, descending=True, stable=True)
    chosen = best.indices[:, :k].masked_fill(best.values[:, :k] == float("-inf"), scores.shape[1])
    chosen = (
        torch.nn.functional.pad(chosen, (0, k - chosen.shape[1]), value=scores.shape[1])
        .sort(1)
        .values
    )
    return chosen.masked_fill(chosen == scores.shape[1], -1).to(torch.int32)


def top_k_triton(scores, lengths, k, maxima=None, tune: tuning.TopKTuning | None = None) -> Tensor:
    tune = tune or tuning.TOP_K
    batch, entries = scores.shape
    if batch > arrivals.MOST:  # each row has a number of its own; a long prompt's queries are more
        turns = (slice(first, first + arrivals.MOST) for first in range(0, batch, arrivals.MOST))
        return torch.cat(
            [
                top_k_triton(
                    scores[turn], lengths[turn], k, None if maxima is None else maxima[turn], tune
                )
                for turn in turns
            ]
        )
    assert entries < 2**COUNT_BITS, "counts of three thresholds share an int64"
    assert tune.chunk < 2**15, "counts of a chunk's certain ones and its ties share an int32"
    assert tune.finalists <= 2**11, "a finalist's place, its id and its key share an int64"
    ids = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    chunk, n_groups = min(tune.chunk, max(next_power_of_2(entries), GROUP)), cdiv(entries, GROUP)
    preselect = entries > chunk
    if preselect and maxima is None:
        maxima = torch.empty(batch, n_groups, device=scores.device)
        _group_maxima[(batch, cdiv(n_groups, tune.maxima_groups))](
            scores,
            maxima,
            lengths,
            scores.stride(0),
            maxima.stride(0),
            GROUP=GROUP,
            BLOCK=tune.maxima_groups,
        )
    groups = torch.empty_like(maxima, dtype=torch.int32) if preselect else ids
    sections = 1
    if preselect:
        most = min(tune.sections, tune.programs // batch, cdiv(n_groups, tune.section_groups))
        sections = max(1, most)
    finalists = torch.empty(
        batch, sections, tune.finalists if preselect else 1, dtype=torch.int64, device=scores.device
    )
    section_bits = (tune.sections - 1).bit_length()
    found = torch.empty(batch, 1 << section_bits, dtype=torch.int32, device=scores.device)
    maxima = maxima if preselect else scores
    _top_k[(batch, sections)](
        scores,
        maxima,
        groups,
        finalists,
        found,
        arrivals.arrivals(scores.device) if preselect else ids,
        lengths,
        ids,
        scores.stride(0),
        maxima.stride(0),
        groups.stride(0),
        K=k,
        K_PADDED=next_power_of_2(k),
        GROUP=GROUP,
        PRESELECT=preselect,
        COUNT_BITS=COUNT_BITS,
        CHUNK=chunk,
        MAXIMA_CHUNK=min(tune.chunk, max(next_power_of_2(n_groups), GROUP)),
        BOUND_KEYS=tune.bound_keys * next_power_of_2(k),
        SECTION_GROUPS=tune.section_groups,
        SECTION_BITS=section_bits,
        FINALISTS=tune.finalists,
        MANY=tune.many_finalists,
        VECTOR=math.gcd(scores.stride(0), 4),
        MAXIMA_VECTOR=math.gcd(maxima.stride(0), 4),
        num_warps=tune.warps if preselect else tune.whole_warps,
        **overlapped(scores),
    )
    return ids


@triton.jit
def _group_maxima(
    scores, maxima, lengths, scores_stride, maxima_stride, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the maxima of a block of one sequence's groups."""
    b = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    length = tl.load(lengths + b)
    score = tl.load(scores + b * scores_stride + entry, mask=entry < length, other=float("-inf"))
    tl.store(maxima + b * maxima_stride + group, tl.max(score, 1), mask=group * GROUP < length)


@triton.jit
def _scatter(target, places, values, mask):
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
    _scatter(ids, taken + (before & 0xFFFF) + tl.minimum(earlier_ties, ties_wanted), index, take)
    return taken + (more & 0xFFFF), ties + (more >> 16)


@triton.jit
def _set_aside(
    scores,
    maxima,
    finalists,
    bound,
    first,
    last,
    length,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
    FINALISTS: tl.constexpr,
):
    """Keys and ids of the scores that reach ``bound`` in the groups ``first`` to ``last``, GROUPS
    at a time, in ascending order of ids; -> how many.

    Those that find no place are lost.
    """
    found = tl.zeros([], tl.int32)
    for start in range(first, last, GROUPS):
        group = start + tl.arange(0, GROUPS)
        best = tl.load(maxima + group, mask=group < last, other=float("-inf"))
        reaches = (ordered(best) >= bound) & (group < last)
        index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        there = reaches[:, None] & (index // VECTOR * VECTOR < length)
        key = ordered(tl.load(scores + index, mask=there, other=float("-inf")))
        keep = ((key >= bound) & (index < length)).to(tl.int32)
        before, more = sums_before(keep)
        place = found + before
        # all bits are set where there is none, and in no other
        packed = (place.to(tl.int64) << 53) | (index.to(tl.int64) << 32) | key.to(tl.int64)
        packed = tl.ravel(tl.where((keep > 0) & (place < FINALISTS), packed, -1), can_reorder=True)
        tl.store(finalists + ((packed >> 53) & 0x7FF), packed, mask=packed != -1)
        found += more
    return found


@triton.jit
def _choose_finalists(
    finalists,
    ends,
    total,
    ids,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    SECTION_BITS: tl.constexpr,
    FINALISTS: tl.constexpr,
    HELD: tl.constexpr,
    COUNT_BITS: tl.constexpr,
):
    """Choose among what all sections set aside, HELD at most in ``total``; ``ends`` [sections]
    point to how many there are up to a section's end.
    """
    place = tl.arange(0, HELD // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    section = tl.zeros_like(place)  # how many end before a place, bit by bit
    for bit in tl.static_range(SECTION_BITS):
        more = section + (1 << (SECTION_BITS - 1 - bit))
        end = tl.load(ends + more - 1, mask=place < total, other=0)
        section = tl.where(end <= place, more, section)
    start = tl.load(ends + section - 1, mask=(section > 0) & (place < total), other=0)
    packed = tl.load(
        finalists + section * FINALISTS + place - start,
        mask=place < total,
        other=0,
        cache_modifier=".cg",
    )
    key, index = (packed & 0xFFFFFFFF).to(tl.uint32), ((packed >> 32) & 0x1FFFFF).to(tl.int32)
    sure, above = search(key, K, COUNT_BITS)
    none = tl.zeros([], tl.int32)
    taken, ties = _emit(ids, key, index, sure, K - above, none, none)
    _fill(ids, taken + tl.minimum(ties, K - above), K, K_PADDED)


@triton.jit
def _top_k(
    scores,
    maxima,
    groups,
    finalists,
    found,
    arrived,
    lengths,
    ids,
    scores_stride,
    maxima_stride,
    groups_stride,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    PRESELECT: tl.constexpr,
    COUNT_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    MAXIMA_CHUNK: tl.constexpr,
    BOUND_KEYS: tl.constexpr,
    SECTION_GROUPS: tl.constexpr,
    SECTION_BITS: tl.constexpr,
    FINALISTS: tl.constexpr,
    MANY: tl.constexpr,
    VECTOR: tl.constexpr,
    MAXIMA_VECTOR: tl.constexpr,
):
    """One program: a section of a sequence's groups, all of which have the same bound. The last one
    of a sequence chooses among what all have set aside.
    """
    after_previous()
    b, section, sections = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    scores, ids = scores + b * scores_stride, ids + b * K
    length = tl.load(lengths + b)
    if PRESELECT:
        maxima, groups = maxima + b * maxima_stride, groups + b * groups_stride
        finalists, found = finalists + b * sections * FINALISTS, found + b * (1 << SECTION_BITS)
        n_groups = tl.cdiv(length, GROUP)
        bound = bound_of(maxima, n_groups, K, BOUND_KEYS, COUNT_BITS)
        share = tl.cdiv(n_groups, sections * SECTION_GROUPS) * SECTION_GROUPS
        count = _set_aside(
            scores,
            maxima,
            finalists + section * FINALISTS,
            bound,
            section * share,
            tl.minimum((section + 1) * share, n_groups),
            length,
            GROUP,
            SECTION_GROUPS,
            VECTOR,
            FINALISTS,
        )
        tl.store(found + section, count)
        tl.debug_barrier()  # all threads' finalists are there before one of them says so
        before = tl.atomic_add(arrived + b, 1, sem="acq_rel")
        if before == sections - 1:
            tl.store(arrived + b, 0)
            lane = tl.arange(0, 1 << SECTION_BITS)
            counts = tl.load(found + lane, mask=lane < sections, other=0, cache_modifier=".cg")
            total, most = tl.sum(counts), tl.max(counts)
            tl.store(found + lane, tl.cumsum(counts, 0))
            tl.debug_barrier()  # other threads read them
            if total <= FINALISTS:
                _choose_finalists(
                    finalists,
                    found,
                    total,
                    ids,
                    K,
                    K_PADDED,
                    GROUP,
                    SECTION_BITS,
                    FINALISTS,
                    FINALISTS,
                    COUNT_BITS,
                )
            elif (total <= MANY) & (most <= FINALISTS):
                _choose_finalists(
                    finalists,
                    found,
                    total,
                    ids,
                    K,
                    K_PADDED,
                    GROUP,
                    SECTION_BITS,
                    FINALISTS,
                    MANY,
                    COUNT_BITS,
                )
            else:
                kept = _list_groups(
                    maxima, groups, bound, n_groups, GROUP, MAXIMA_CHUNK, MAXIMA_VECTOR
                )
                tl.debug_barrier()  # the list is read back by other threads than wrote it
                _choose(
                    scores,
                    groups,
                    kept * GROUP,
                    length,
                    ids,
                    K,
                    K_PADDED,
                    GROUP,
                    True,
                    CHUNK,
                    VECTOR,
                    COUNT_BITS,
                )
    else:
        _choose(
            scores,
            groups,
            length,
            length,
            ids,
            K,
            K_PADDED,
            GROUP,
            False,
            CHUNK,
            VECTOR,
            COUNT_BITS,
        )


@triton.jit
def _list_groups(
    maxima, groups, bound, count, GROUP: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr
):
    """The groups whose maxima reach ``bound``, in ascending order; -> how many."""
    kept = tl.zeros([], tl.int32)
    for start in range(0, count, CHUNK):
        key, group = keys_of(maxima, groups, start, count, count, GROUP, False, CHUNK, VECTOR)
        keep = (key >= bound).to(tl.int32)
        before, more = sums_before(keep)
        _scatter(groups, kept + before, group, keep > 0)
        kept += more
    return kept


@triton.jit
def _choose(
    scores,
    groups,
    count,
    length,
    ids,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    COUNT_BITS: tl.constexpr,
):
    """Choose among ``count`` scores: all, or of the listed groups where GATHER."""
    sure, above = kth_key(
        scores, groups, count, length, K, GROUP, GATHER, CHUNK, VECTOR, COUNT_BITS
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
