"""Pairs of a token and one of its experts, sorted by expert and cut into tiles of one expert each.

So an expert's weights are read once for all its tokens. A single token needs no sorting.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    tl,
    triton,
)


class Tiles(NamedTuple):
    """Pairs in tiles of up to ``size``, ``count`` tiles at most; ``schedule`` says which, as
    `_schedule` writes it.
    """

    size: int
    count: int
    schedule: Tensor


class OwnPairs(NamedTuple):
    """The pairs that are computed here, where others are elsewhere: those of the experts that are
    here, of which the first is number ``first_expert`` among all; and the shared expert's of
    ``tokens`` tokens from ``first_token`` on.
    """

    first_expert: int
    first_token: int
    tokens: int

    def of_tokens(self, first: int, count: int) -> OwnPairs:
        """The same of ``count`` tokens from number ``first`` on, which are then the first."""
        start = min(max(self.first_token - first, 0), count)
        end = min(max(self.first_token + self.tokens - first, 0), count)
        return OwnPairs(self.first_expert, start, end - start)


def tiles_of(
    chosen: Tensor, slots: int, count: int, tune: tuning.ExpertsTuning, part: OwnPairs | None = None
) -> Tiles:
    """The tiles of ``chosen`` int64 [N, top_k] among ``count`` experts; ``slots`` counts the shared
    expert too, where there is one. With ``part`` its pairs alone are in them.

    A tile holds twice the pairs that an expert has on average, so that most experts' fit one.
    """
    tokens, top_k = chosen.shape
    routed = tokens * top_k
    if tokens == 1 and part is None:
        return Tiles(min(tune.token_tile, 16), slots, chosen)
    size = min(max(next_power_of_2(cdiv(2 * routed, count)), 16), tune.token_tile)
    experts = min(count, routed)
    n_tiles = experts + (routed - experts) // size + (slots - top_k) * cdiv(tokens, size)
    schedule = torch.empty(3 * n_tiles + tokens * slots, dtype=torch.int32, device=chosen.device)
    programs = count + slots - top_k
    _schedule[(programs,)](
        chosen,
        schedule,
        tokens * slots,
        n_tiles,
        *(part or OwnPairs(0, 0, tokens)),
        EXPERTS=count,
        TOP_K=top_k,
        SLOTS=slots,
        TILE=size,
        PAIRS_PADDED=next_power_of_2(tokens * slots),
        TILES_PADDED=next_power_of_2(n_tiles),
        BINS=next_power_of_2(count + 2),
        num_warps=4,
        **overlapped(chosen),
    )
    return Tiles(size, n_tiles, schedule)


@triton.jit
def _schedule(
    chosen,
    schedule,
    pairs,
    tiles,
    first_expert,
    first_token,
    own_tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program: the pairs of one expert, and its tiles. The shared expert is number EXPERTS, and
    a pair that is none of `OwnPairs` has number EXPERTS + 1, which no program has.

    ``schedule``: of each tile its expert (-1 for none), the place of its first pair in the sorted
    order, and how many it has, each [tiles]; then the pairs, token * SLOTS + slot, sorted by
    expert.
    """
    after_previous()
    own = tl.program_id(0)
    pair = tl.arange(0, PAIRS_PADDED)
    token, slot = pair // SLOTS, pair % SLOTS
    routed = (pair < pairs) & (slot < TOP_K)
    expert = tl.load(chosen + token * TOP_K + slot, mask=routed, other=0).to(tl.int32)
    here = is_here(expert, token, slot, first_expert, first_token, own_tokens, EXPERTS, TOP_K)
    expert = tl.where(slot < TOP_K, expert - first_expert, EXPERTS)
    expert = tl.where(here & (pair < pairs), expert, EXPERTS + 1)
    counts, number = tl.histogram(expert, BINS), tl.arange(0, BINS)
    first = tl.sum(tl.where(number < own, counts, 0), 0)
    first_tile = tl.sum(tl.where(number < own, (counts + TILE - 1) // TILE, 0), 0)
    mine = expert == own
    place = tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(schedule + 3 * tiles + first + place, pair, mask=mine)
    count, tile = tl.sum(mine.to(tl.int32), 0), tl.arange(0, TILES_PADDED)
    own_tiles = (count + TILE - 1) // TILE
    exists, at = tile < own_tiles, schedule + first_tile + tile
    tl.store(at, own, mask=exists)
    tl.store(at + tiles, first + tile * TILE, mask=exists)
    tl.store(at + 2 * tiles, tl.minimum(count - tile * TILE, TILE), mask=exists)
    if own == tl.num_programs(0) - 1:
        tl.store(at, -1, mask=(tile >= own_tiles) & (first_tile + tile < tiles))


@triton.jit
def is_here(
    expert,
    token,
    slot,
    first_expert,
    first_token,
    own_tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Whether a pair is one of `OwnPairs`; ``expert``: its routed one, of all."""
    routed = (expert >= first_expert) & (expert < first_expert + EXPERTS)
    shared = (token >= first_token) & (token < first_token + own_tokens)
    return tl.where(slot < TOP_K, routed, shared)


@triton.jit
def expert_of(chosen, schedule, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SORTED: tl.constexpr):
    """The expert of the program's tile, -1 where the tile is empty."""
    tile = tl.program_id(0)
    if SORTED:
        expert = tl.load(schedule + tile)
    else:
        expert = tl.load(chosen + tile, mask=tile < TOP_K, other=EXPERTS).to(tl.int32)
    return expert


@triton.jit
def pairs_of(schedule, tiles, TILE: tl.constexpr, SORTED: tl.constexpr):
    """The pairs [TILE] of the program's tile, and which of them exist."""
    tile, place = tl.program_id(0), tl.arange(0, TILE)
    if SORTED:
        known = place < tl.load(schedule + 2 * tiles + tile)
        pair = tl.load(
            schedule + 3 * tiles + tl.load(schedule + tiles + tile) + place, mask=known, other=0
        )
    else:
        known = place < 1
        pair = tile + place
    return pair, known
