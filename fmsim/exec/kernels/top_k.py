"""The k entries of highest score, exactly, as ascending ids: the selection of a CSA layer.

Ties are broken by the lowest id, so the set is the same on every machine. The kernel is a radix selection on the scores' bits,
eight at a time, and takes no host synchronisation, so a CUDA graph may hold it.

Pre-selection: with the maximum of every 32 scores (`index_scores` gives it), the k-th largest maximum is a lower bound of the
k-th largest score, since k scores reach it. Groups below it are never read: of 262,144 scores some 16,384 are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.index_score import GROUP
from fmsim.exec.kernels.lang import next_power_of_2, runs_compiled, tl, triton


def top_k(scores: Tensor, lengths: Tensor, k: int, maxima: Tensor | None = None) -> Tensor:
    """int32 [B, k]: ascending ids of the k highest of each row's first ``lengths[b]`` scores; -1 at the end where fewer qualify.

    ``scores`` float32 [B, N] without nan; -inf never qualifies. ``lengths`` int32 [B], on the device. ``maxima`` float32
    [B, ceil(N / 32)] makes it faster and changes nothing.
    """
    run = top_k_triton if runs_compiled(scores) else top_k_reference
    return run(scores, lengths, k, maxima)


def top_k_reference(scores: Tensor, lengths: Tensor, k: int, maxima: Tensor | None = None) -> Tensor:
    ids = torch.arange(scores.shape[1], device=scores.device)
    known = scores.masked_fill(ids >= lengths[:, None], float("-inf"))
    best = known.sort(dim=1, descending=True, stable=True)
    chosen = best.indices[:, :k].masked_fill(best.values[:, :k] == float("-inf"), scores.shape[1])
    chosen = torch.nn.functional.pad(chosen, (0, k - chosen.shape[1]), value=scores.shape[1]).sort(1).values
    return chosen.masked_fill(chosen == scores.shape[1], -1).to(torch.int32)


def top_k_triton(scores, lengths, k, maxima=None, tune=tuning.TOP_K) -> Tensor:
    batch, entries = scores.shape
    ids = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    preselect = maxima is not None
    groups = torch.empty_like(maxima, dtype=torch.int32) if preselect else ids
    maxima = maxima if preselect else scores
    _top_k[(batch,)](
        scores, maxima, groups, lengths, ids, scores.stride(0), maxima.stride(0), groups.stride(0),
        K=k, K_PADDED=next_power_of_2(k), GROUP=GROUP, PRESELECT=preselect,
        CHUNK=min(tune.chunk, max(next_power_of_2(entries), 32)), num_warps=tune.warps,
    )  # fmt: skip
    return ids


@triton.jit
def _ordered(values, groups, start, count, length, GROUP: tl.constexpr, GATHER: tl.constexpr, CHUNK: tl.constexpr):
    """Values ``start ...`` of ``count``, of the listed groups where GATHER: uint32 keys that order as they do, their ids, which exist."""
    place = start + tl.arange(0, CHUNK)
    exists = place < count
    index = place
    if GATHER:
        index = tl.load(groups + place // GROUP, mask=exists, other=0) * GROUP + place % GROUP
    exists = exists & (index < length)
    value = tl.load(values + index, mask=exists, other=float("-inf"))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)  # -0.0 is 0.0
    return bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32), index, exists


@triton.jit
def _kth_key(values, groups, count, length, k, GROUP: tl.constexpr, GATHER: tl.constexpr, CHUNK: tl.constexpr):
    """The k-th largest key, and how many lie above it. Needs k values at least."""
    key_so_far = tl.zeros([], tl.uint32)
    above = tl.zeros([], tl.int32)
    digits = tl.arange(0, 256)
    for turn in tl.static_range(4):
        shift = 24 - 8 * turn
        counts = tl.zeros([256], tl.int32)
        for start in range(0, count, CHUNK):
            key, _, exists = _ordered(values, groups, start, count, length, GROUP, GATHER, CHUNK)
            if turn > 0:
                exists = exists & ((key ^ key_so_far) >> (shift + 8) == 0)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=exists)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((at_least >= k - above).to(tl.int32), 0) - 1
        above += tl.sum(tl.where(digits > digit, counts, 0), 0)
        key_so_far = key_so_far | (digit.to(tl.uint32) << shift)
    return key_so_far, above


@triton.jit
def _top_k(
    scores, maxima, groups, lengths, ids, scores_stride, maxima_stride, groups_stride,
    K: tl.constexpr, K_PADDED: tl.constexpr, GROUP: tl.constexpr, PRESELECT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one sequence."""
    b = tl.program_id(0).to(tl.int64)
    scores, maxima, groups, ids = scores + b * scores_stride, maxima + b * maxima_stride, groups + b * groups_stride, ids + b * K
    length = tl.load(lengths + b)
    wanted = tl.minimum(length, K)
    count = length
    if PRESELECT:
        n_groups = tl.cdiv(length, GROUP)
        bound = tl.zeros([], tl.uint32)
        if n_groups > K:
            bound, _ = _kth_key(maxima, groups, n_groups, n_groups, K, GROUP, False, CHUNK)
        kept = tl.zeros([], tl.int32)
        for start in range(0, n_groups, CHUNK):
            key, group, exists = _ordered(maxima, groups, start, n_groups, n_groups, GROUP, False, CHUNK)
            keep = (exists & (key >= bound)).to(tl.int32)
            tl.store(groups + kept + tl.cumsum(keep, 0) - keep, group, mask=keep > 0)
            kept += tl.sum(keep, 0)
        tl.debug_barrier()  # the list is read back by other threads than wrote it
        count = kept * GROUP
    bound, above = _kth_key(scores, groups, count, length, wanted, GROUP, PRESELECT, CHUNK)
    ties_wanted = wanted - above
    taken, ties = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, count, CHUNK):
        key, index, exists = _ordered(scores, groups, start, count, length, GROUP, PRESELECT, CHUNK)
        tie = (exists & (key == bound)).to(tl.int32)
        early = ties + tl.cumsum(tie, 0) - tie < ties_wanted
        real = key > 0x007FFFFF  # the key of -inf
        take = (exists & real & ((key > bound) | ((tie > 0) & early))).to(tl.int32)
        tl.store(ids + taken + tl.cumsum(take, 0) - take, index, mask=take > 0)
        taken += tl.sum(take, 0)
        ties += tl.sum(tie, 0)
    place = tl.arange(0, K_PADDED)
    tl.store(ids + place, -1, mask=(place >= taken) & (place < K))
