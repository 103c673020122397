"""The k entries of highest score, exactly, as ascending ids: the selection of a CSA layer.

Ties are broken by the lowest id, so the set is the same on every machine. A program holds a
sequence's candidates in its registers and searches the k-th of their keys by counting how many
reach a threshold, two thresholds a turn. It takes no host synchronisation, so a CUDA graph may hold
it.

Pre-selection: with the maximum of every 32 scores (`index_scores` gives it), what k maxima reach is
a lower bound of the k-th largest score. A few times k maxima of more scores each give one that is
nearly as high, so the bound is sought among those; where groups are too few, among scores. Groups
below it are never read: of 262,144 scores some 21,000 are.

A first launch parts a sequence's groups in sections. A program each finds the bound and sets aside
what reaches it, seldom more than twice k. A small section's scores are all read meanwhile; of a
larger one the groups that reach the bound are. In the second launch each section's program searches
among all that was set aside, and writes what is chosen of its own. Programs have few warps, for a
turn of a search is a sum over all threads, and takes longer the more warps there are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)
from fmsim.exec.kernels.selection.index_score import GROUP
from fmsim.exec.kernels.selection.kth_key import (
    INFINITE,
    bound_of,
    choose,
    choose_of_section,
    columns_of,
    held_of,
    list_groups,
    scatter,
    sums_before,
    value_of,
)


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
    if batch > tune.most_rows:  # a long prompt's queries
        turns = (slice(first, first + tune.most_rows) for first in range(0, batch, tune.most_rows))
        return torch.cat(
            [
                top_k_triton(
                    scores[turn], lengths[turn], k, None if maxima is None else maxima[turn], tune
                )
                for turn in turns
            ]
        )
    ids = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    if batch == 0:
        return ids
    k_padded, n_groups = next_power_of_2(k), cdiv(entries, GROUP)
    sizes = {
        "K": k,
        "K_PADDED": k_padded,
        "GROUP": GROUP,
        "VECTOR": math.gcd(scores.stride(0), 4),
    }
    if entries <= tune.whole:
        _choose_among_all[(batch,)](
            scores,
            lengths,
            ids,
            scores.stride(0),
            **sizes,
            CHUNK=max(next_power_of_2(entries), GROUP),
            num_warps=tune.whole_warps,
            **overlapped(scores),
        )
        return ids
    bound_keys = tune.bound_keys * k_padded
    assert tune.sections <= 64, "how many have too many has 7 bits"
    assert tune.held >= 4 * tune.sections, "a section's places are fours"
    assert max(tune.whole, tune.chunk, tune.many_held, bound_keys) < 2**15, "a count has 16 bits"
    if maxima is None:
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
    programs = tune.programs_of_few if batch <= tune.few_rows else tune.programs
    sections = max(programs // batch, tune.fewest_sections if batch <= programs else 1)
    sections = max(1, min(sections, tune.sections, n_groups // tune.fewest_groups))
    share, few = next_power_of_2(cdiv(n_groups, sections)), tune.few_groups * k_padded
    at_once = min(tune.few_at_once if n_groups <= few else tune.groups_at_once, share)
    too_few = few if sections >= tune.many_sections else k_padded
    groups = torch.empty(batch, n_groups, dtype=torch.int32, device=scores.device)
    # of each section its share of places; of the scores their bits
    found, aside = (
        torch.empty(batch, tune.many_held, dtype=torch.int32, device=scores.device)
        for _ in range(2)
    )
    counts = torch.empty(batch, sections, dtype=torch.int32, device=scores.device)
    bounds = torch.empty(batch, 2, dtype=torch.int32, device=scores.device)
    _set_aside[(batch, sections)](
        scores,
        maxima,
        lengths,
        found,
        aside,
        counts,
        bounds,
        ids,
        groups,
        entries,
        n_groups,
        scores.stride(0),
        maxima.stride(0),
        groups.stride(0),
        **sizes,
        BOUND_KEYS=bound_keys,
        BOUND_TURNS=min(tune.bound_turns, next_power_of_2(cdiv(n_groups, bound_keys))),
        FEW=too_few,
        FEW_TURNS=min(tune.bound_turns, next_power_of_2(cdiv(too_few * GROUP, bound_keys))),
        GROUPS=at_once,
        LISTED=max(GROUP, min(tune.listed_groups, share)) if share > at_once else 0,
        SECTIONS=sections,
        PLACES=tune.many_held // sections // 4 * 4,
        num_warps=tune.warps,
        **overlapped(scores),
    )
    _choose_among_few[(batch, sections)](
        scores,
        maxima,
        lengths,
        found,
        aside,
        counts,
        bounds,
        ids,
        groups,
        scores.stride(0),
        maxima.stride(0),
        groups.stride(0),
        **sizes,
        SECTIONS=sections,
        SECTIONS_PADDED=next_power_of_2(sections),
        HELD=tune.held,
        SOME=tune.some_held,
        MANY=tune.many_held,
        CHUNK=tune.chunk,
        MAXIMA_VECTOR=math.gcd(maxima.stride(0), 4),
        num_warps=tune.last_warps,
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
def _choose_among_all(
    scores,
    lengths,
    ids,
    scores_stride,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: a sequence, whose scores it holds."""
    after_previous()
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + b)
    scores, ids = scores + b * scores_stride, ids + b * K
    bound, top = tl.full([], 1, tl.uint32), tl.full([], INFINITE, tl.uint32)
    choose(scores, ids, length, length, bound, top, ids, K, K_PADDED, GROUP, False, CHUNK, VECTOR)


@triton.jit
def _lay_aside(score, index, end, least, found, aside, count, PLACES: tl.constexpr):
    """Behind the ``count`` so far, those of some scores, in ascending order of ``index``, that are
    no less than ``least`` and lie before ``end``, and their ids; -> how many there are then.
    """
    keep = ((score >= least) & (index < end)).to(tl.int32)
    before, more = sums_before(keep)
    place = count + before
    kept = (keep > 0) & (place < PLACES)
    scatter(found, place, score.to(tl.uint32, bitcast=True), kept)
    scatter(aside, place, index, kept)
    return count + more


@triton.jit
def _listed_scores(
    scores,
    groups,
    first,
    start,
    reaching,
    length,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The scores [GROUPS, GROUP] of listed groups ``start ...``, and their ids; -inf where there is
    none.
    """
    place = start + tl.arange(0, GROUPS)
    there = place < reaching
    group = first + tl.load(groups + place, mask=there, other=0)
    index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = there[:, None] & (index // VECTOR * VECTOR < length)
    return tl.load(scores + index, mask=there, other=float("-inf")), index


@triton.jit
def _set_aside(
    scores,
    maxima,
    lengths,
    found,
    aside,
    counts,
    bounds,
    ids,
    groups,
    n_scores,
    n_maxima,
    scores_stride,
    maxima_stride,
    groups_stride,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    BOUND_KEYS: tl.constexpr,
    BOUND_TURNS: tl.constexpr,
    FEW: tl.constexpr,
    FEW_TURNS: tl.constexpr,
    GROUPS: tl.constexpr,
    LISTED: tl.constexpr,
    SECTIONS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One program: the scores and their ids that reach the bound in a section of a sequence's
    groups, GROUPS at a time, in ascending order of ids. The groups that reach it are listed first,
    LISTED at a time, where the section may have more than GROUPS.

    A section has PLACES; those that find none are counted, and lost. ``bounds`` takes the bound and
    the highest key, ``ids`` -1 everywhere, for what is not chosen.
    """
    after_previous()
    b, section = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scores, maxima = scores + b * scores_stride, maxima + b * maxima_stride
    columns = columns_of(maxima, 0, n_maxima, BOUND_KEYS, BOUND_TURNS)
    length = tl.load(lengths + b)
    n_groups = tl.cdiv(length, GROUP)
    share = tl.cdiv(n_groups, SECTIONS)
    first, last = section * share, tl.minimum((section + 1) * share, n_groups)
    own, count = (b * SECTIONS + section) * PLACES, tl.zeros([], tl.int32)
    lane, slot = tl.arange(0, GROUP)[None, :], tl.arange(0, GROUPS)
    if LISTED == 0:  # beside the search of the bound
        index = (first + slot)[:, None] * GROUP + lane
        end = tl.minimum(length, last * GROUP)
        score = tl.load(scores + index, mask=index // VECTOR * VECTOR < end, other=float("-inf"))
    if n_groups > FEW:
        bound, top = bound_of(columns, maxima, n_groups, n_maxima, K, BOUND_KEYS, BOUND_TURNS)
    else:  # too few maxima
        few = columns_of(scores, 0, n_scores, BOUND_KEYS, FEW_TURNS)
        bound, top = bound_of(few, scores, length, n_scores, K, BOUND_KEYS, FEW_TURNS)
    found, aside, least = found + own, aside + own, value_of(bound)
    if LISTED == 0:
        count = _lay_aside(score, index, end, least, found, aside, count, PLACES)
    else:
        groups += b * groups_stride + first
        reaching = list_groups(maxima + first, groups, bound, last - first, GROUP, LISTED, 1)
        tl.debug_barrier()  # the list is read back by other threads than wrote it
        # the next ones are on the way while these are laid aside
        next_score, next_index = _listed_scores(
            scores, groups, first, 0, reaching, length, GROUP, GROUPS, VECTOR
        )
        for start in range(0, reaching, GROUPS):
            score, index = next_score, next_index
            next_score, next_index = _listed_scores(
                scores, groups, first, start + GROUPS, reaching, length, GROUP, GROUPS, VECTOR
            )
            count = _lay_aside(score, index, length, least, found, aside, count, PLACES)
    tl.store(counts + b * SECTIONS + section, count)
    if section == 0:
        tl.store(bounds + 2 * b, bound.to(tl.int32, bitcast=True))
        tl.store(bounds + 2 * b + 1, top.to(tl.int32, bitcast=True))
        place = tl.arange(0, K_PADDED)
        tl.store(ids + b * K + place, -1, mask=place < K)


@triton.jit
def _choose_among_few(
    scores,
    maxima,
    lengths,
    found,
    aside,
    counts,
    bounds,
    ids,
    groups,
    scores_stride,
    maxima_stride,
    groups_stride,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    SECTIONS: tl.constexpr,
    SECTIONS_PADDED: tl.constexpr,
    HELD: tl.constexpr,
    SOME: tl.constexpr,
    MANY: tl.constexpr,
    CHUNK: tl.constexpr,
    MAXIMA_VECTOR: tl.constexpr,
):
    """One program: a section of a sequence, of which it holds what all sections set aside. Where
    one had more than its places, the first section's program alone, among all scores of the groups
    that reach the bound.
    """
    after_previous()
    b, section = tl.program_id(0).to(tl.int64), tl.program_id(1)
    counts, ids = counts + b * SECTIONS, ids + b * K
    PLACES: tl.constexpr = MANY // SECTIONS // 4 * 4
    found, aside = found + b * SECTIONS * PLACES, aside + b * SECTIONS * PLACES
    # read before it is known whether they are all
    held = held_of(found, aside, counts, section, SECTIONS, SECTIONS_PADDED, PLACES, HELD)
    bound = tl.load(bounds + 2 * b).to(tl.uint32, bitcast=True)
    top = tl.load(bounds + 2 * b + 1).to(tl.uint32, bitcast=True)
    each = tl.arange(0, SECTIONS_PADDED)
    each = tl.load(counts + each, mask=each < SECTIONS, other=0)
    # how many there are, and from the 24th bit on how many sections have more than are held
    total = tl.sum(
        tl.minimum(each, PLACES + 1) + ((each > HELD // SECTIONS // 4 * 4).to(tl.int32) << 24)
    )
    if total < 1 << 24:
        choose_of_section(held, section, total, bound, top, ids, K)
    elif tl.max(each) <= SOME // SECTIONS // 4 * 4:
        some = held_of(found, aside, counts, section, SECTIONS, SECTIONS_PADDED, PLACES, SOME)
        choose_of_section(some, section, total & 0xFFFFFF, bound, top, ids, K)
    elif tl.max(each) <= PLACES:
        more = held_of(found, aside, counts, section, SECTIONS, SECTIONS_PADDED, PLACES, MANY)
        choose_of_section(more, section, total & 0xFFFFFF, bound, top, ids, K)
    elif section == 0:
        length = tl.load(lengths + b)
        scores, maxima = scores + b * scores_stride, maxima + b * maxima_stride
        groups += b * groups_stride
        kept = list_groups(
            maxima, groups, bound, tl.cdiv(length, GROUP), GROUP, CHUNK, MAXIMA_VECTOR
        )
        tl.debug_barrier()  # the list is read back by other threads than wrote it
        count = kept * GROUP
        choose(
            scores, groups, count, length, bound, top, ids, K, K_PADDED, GROUP, True, CHUNK, VECTOR
        )
