"""The experts of few tokens: those that each token chose, and the shared one, which is one more
that all choose.

A decode step is as fast as it reads weights. A *pair* is a token and one of its experts. Pairs are
sorted by expert, one launch, and cut into tiles of one expert each, so that an expert's weights are
read once for all its tokens; a single token needs no sorting. Two launches do the products, each
program some rows of one expert's weights for one tile: the gated inner values, then each pair's
output. A last one adds up each token's pairs in the order in which it chose them, so the same
inputs give the same bytes.

The weights are the left operand: their rows, many, fill the matrix units, and tokens, few, are the
columns. Float8 weights (`weights`) become float16 there, which holds them exactly and costs one
instruction a pair where bfloat16 costs two slow ones more; bfloat16 activations of ordinary size
fit it too. What 128 columns add up to gets their block's scale in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.experts.products import first_scales, products_of
from fmsim.exec.kernels.experts.tiles import OwnPairs, expert_of, is_here, pairs_of, tiles_of
from fmsim.exec.kernels.lang import (
    INTERPRETED,
    after_previous,
    cdiv,
    let_next_begin,
    overlapped,
    runs_compiled,
    tl,
    triton,
    wait_for_previous,
)
from fmsim.exec.kernels.weights import BLOCK


def takes(tokens: Tensor, routed: nn.Module) -> bool:
    """Whether the kernels are the way for ``tokens`` [N, D]: on a GPU, without gradients, few, or
    through float8 weights, which nothing else there reads without asking the host.
    """
    few = len(tokens) <= tuning.MOST_EXPERT_TOKENS or routed.down_scale is not None
    return not torch.is_grad_enabled() and runs_compiled(tokens) and few


def mixture_of_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    routed: nn.Module,
    shared: nn.Module,
    part: OwnPairs | None = None,
) -> Tensor:
    """x [N, D], chosen int64 and weights float32 [N, top_k], the experts (`model.Experts`) and the
    shared one (`model.SwiGLU`) -> [N, D] in the type of x: float32 or bfloat16.

    Their weights are of that type, or float8 with scales; the shared one's may be of another. With
    ``part``, ``routed`` are some of the experts, and the result is what its pairs add up to.
    """
    run = mixture_of_experts_triton if takes(x, routed) else mixture_of_experts_reference
    return run(x, chosen, weights, routed, shared, part=part)


def leaves_shares(x: Tensor, routed: nn.Module, shared: nn.Module) -> bool:
    """Whether `expert_shares` takes ``x`` [N, D]: few tokens, whose shares are read again for each
    stream that they are added to.
    """
    return takes(x, routed) and len(x) <= tuning.FEW_ROWS and _alike(routed, shared)


def expert_shares(x: Tensor, chosen: Tensor, routed: nn.Module, shared: nn.Module) -> Tensor:
    """As `mixture_of_experts`, but for its sum: float32 [N, top_k + 1, D], the shared expert's
    last, which has no weight.
    """
    return _each_share(x, chosen, routed, shared, _tuning(x, routed))


def mixture_of_experts_reference(x, chosen, weights, routed, shared, part=None) -> Tensor:
    if part is None:
        return routed(x, chosen, weights) + shared(x)
    chosen = chosen - part.first_expert
    here = (chosen >= 0) & (chosen < len(routed.down_proj))
    out = routed(x, torch.where(here, chosen, 0), torch.where(here, weights, 0.0))
    return _with_shared(out, x, shared, part)


def _with_shared(out: Tensor, x: Tensor, shared: nn.Module, part: OwnPairs) -> Tensor:
    """``out`` with the shared expert's of the part's tokens."""
    own = slice(part.first_token, part.first_token + part.tokens)
    out[own] += shared(x[own])
    return out


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


class _Weights(NamedTuple):
    """Of the shared expert, or where it is another launch's of the routed ones, which nothing then
    reads.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_scale: Tensor
    up_scale: Tensor
    down_scale: Tensor


def mixture_of_experts_triton(
    x,
    chosen,
    weights,
    routed,
    shared,
    tune: tuning.ExpertsTuning | None = None,
    part: OwnPairs | None = None,
) -> Tensor:
    if len(x) > (most := tuning.MOST_EXPERT_TOKENS):
        runs = zip(*(of.split(most) for of in (x, chosen, weights)), strict=True)
        outs = []
        for number, run in enumerate(runs):
            of_run = part and part.of_tokens(number * most, len(run[0]))
            outs.append(mixture_of_experts_triton(*run, routed, shared, tune, of_run))
        return torch.cat(outs)
    if shared is not None and not _alike(routed, shared):
        out = mixture_of_experts_triton(x, chosen, weights, routed, None, tune, part)
        return _with_shared(out, x, shared, part or OwnPairs(0, 0, len(x)))
    tune = tune or _tuning(x, routed)
    parts = _each_share(x, chosen, routed, shared, tune, part)
    (tokens, slots, hidden), top_k = parts.shape, chosen.shape[1]
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    _sum_pairs[(tokens, cdiv(hidden, tune.sum_columns))](
        parts,
        chosen.contiguous(),
        weights.contiguous(),
        out,
        *(part or OwnPairs(0, 0, tokens)),
        EXPERTS=len(routed.down_proj),
        TOP_K=top_k,
        SLOTS=slots,
        HIDDEN=hidden,
        PARTIAL=part is not None,
        BLOCK=tune.sum_columns,
        num_warps=4,
        **overlapped(x),
    )
    return out


def _tuning(x: Tensor, routed: nn.Module) -> tuning.ExpertsTuning:
    return tuning.experts(len(x), x.dtype, scaled=routed.down_scale is not None)


def _each_share(
    x: Tensor,
    chosen: Tensor,
    routed: nn.Module,
    shared: nn.Module | None,
    tune: tuning.ExpertsTuning,
    part: OwnPairs | None = None,
) -> Tensor:
    """float32 [N, slots, D]: the output of each of a token's experts that is here, without its
    weight.
    """
    x, chosen = x.contiguous(), chosen.contiguous()
    (tokens, top_k), (count, hidden, width) = chosen.shape, routed.down_proj.shape
    slots, scaled, of_shared = (
        top_k + (shared is not None),
        routed.down_scale is not None,
        _shared_weights(routed, shared),
    )
    tiles = tiles_of(chosen, slots, count, tune, part)
    gate_scale, down_scale = (
        (routed.gate_up_scale, routed.down_scale)
        if scaled
        else (routed.gate_up_proj, routed.down_proj)
    )
    matrix_type = torch.float16 if scaled and x.dtype == torch.bfloat16 else x.dtype
    if tokens > tuning.FEW_ROWS:  # once, and not by every program that reads them
        x = x.to(matrix_type)
    inner = torch.empty(tokens * slots, width, dtype=matrix_type, device=x.device)
    parts = torch.empty(tokens, slots, hidden, dtype=torch.float32, device=x.device)
    same = dict(
        EXPERTS=count,
        TOP_K=top_k,
        SLOTS=slots,
        HIDDEN=hidden,
        WIDTH=width,
        TILE=tiles.size,
        SORTED=tokens > 1 or part is not None,
        SHARED=shared is not None,
        SCALED=BLOCK if scaled else 0,
        BLOCK_DEPTH=min(tune.block_depth, BLOCK) if scaled else tune.block_depth,
        STAGES=tune.stages,
        WIDEN=INTERPRETED,
        num_warps=tune.warps,
        **overlapped(x),
    )
    _gate_up[(tiles.count, cdiv(2 * width, tune.gate_rows))](
        x,
        chosen,
        tiles.schedule,
        tiles.count,
        routed.gate_up_proj,
        gate_scale,
        of_shared.gate,
        of_shared.up,
        of_shared.gate_scale,
        of_shared.up_scale,
        inner,
        routed.limit,
        ROWS=tune.gate_rows,
        **same,
    )
    _down[(tiles.count, cdiv(hidden, tune.down_rows))](
        inner,
        chosen,
        tiles.schedule,
        tiles.count,
        routed.down_proj,
        down_scale,
        of_shared.down,
        of_shared.down_scale,
        parts,
        ROWS=tune.down_rows,
        **same,
    )
    return parts


def _alike(routed: nn.Module, shared: nn.Module) -> bool:
    """Whether one launch can read the weights of both."""
    linear = shared.down_proj
    return linear.weight.dtype == routed.down_proj.dtype and (
        getattr(linear, "scale", None) is None
    ) == (routed.down_scale is None)


def _shared_weights(routed: nn.Module, shared: nn.Module | None) -> _Weights:
    if shared is None:
        return _Weights(*(routed.down_proj,) * 6)
    linears = shared.gate_proj, shared.up_proj, shared.down_proj
    weights = [linear.weight for linear in linears]
    scales = weights if routed.down_scale is None else [linear.scale for linear in linears]
    return _Weights(*weights, *scales)


@triton.jit
def _gate_up(
    x,
    chosen,
    schedule,
    tiles,
    gate_up,
    scale,
    shared_gate,
    shared_up,
    shared_gate_scale,
    shared_up_scale,
    inner,
    limit,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SORTED: tl.constexpr,
    SHARED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: ROWS / 2 inner channels of one tile's pairs.

    Rows of the gate and rows of what it gates lie alternately. A single token's shared expert is
    known before the launch that it waits for, and x was made before that: it waits only to write.
    The next launch begins late: its programs would take the places that are free first, and leave
    the others' memory idle.
    """
    if SORTED or tl.program_id(0) < TOP_K:
        wait_for_previous()
    expert = expert_of(chosen, schedule, EXPERTS, TOP_K, SORTED)
    if expert >= 0:
        pair, known = pairs_of(schedule, tiles, TILE, SORTED)
        HALF: tl.constexpr = ROWS // 2
        row = tl.arange(0, ROWS)
        channel, up = tl.program_id(1) * HALF + row // 2, row % 2
        stacked = expert.to(tl.int64) * 2 * WIDTH + up * WIDTH + channel
        weights = gate_up + stacked * HIDDEN
        scales = weights
        if SHARED:
            weights = tl.where(
                expert == EXPERTS,
                tl.where(up == 1, shared_up, shared_gate) + channel * HIDDEN,
                weights,
            )
        if SCALED:
            scales = first_scales(scale, expert, up * WIDTH + channel, 2 * WIDTH, HIDDEN, SCALED)
            if SHARED:
                of_shared = first_scales(
                    tl.where(up == 1, shared_up_scale, shared_gate_scale),
                    0,
                    channel,
                    WIDTH,
                    HIDDEN,
                    SCALED,
                )
                scales = tl.where(expert == EXPERTS, of_shared, scales)
        tokens = x + pair // SLOTS * HIDDEN
        both = products_of(
            weights,
            scales,
            tokens,
            channel < WIDTH,
            known,
            HIDDEN,
            ROWS,
            TILE,
            SCALED,
            BLOCK_DEPTH,
            STAGES,
            WIDEN,
        )
        let_next_begin()
        gate, up = tl.split(tl.permute(tl.reshape(both, [HALF, 2, TILE]), [0, 2, 1]))
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(
            tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL),
            limit,
            propagate_nan=tl.PropagateNan.ALL,
        )
        channel = tl.program_id(1) * HALF + tl.arange(0, HALF)
        if not SORTED:
            wait_for_previous()
        places = inner + pair[None, :] * WIDTH + channel[:, None]
        tl.store(
            places,
            (gate * tl.sigmoid(gate) * up).to(inner.dtype.element_ty),
            mask=known[None, :] & (channel < WIDTH)[:, None],
        )


@triton.jit
def _down(
    inner,
    chosen,
    schedule,
    tiles,
    down,
    scale,
    shared_down,
    shared_scale,
    parts,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SORTED: tl.constexpr,
    SHARED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: ROWS output channels of one tile's pairs.

    Which experts these are was known before the launch that it waits for.
    """
    expert = expert_of(chosen, schedule, EXPERTS, TOP_K, SORTED)
    if expert >= 0:
        pair, known = pairs_of(schedule, tiles, TILE, SORTED)
        channel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        weights = down + (expert.to(tl.int64) * HIDDEN + channel) * WIDTH
        scales = weights
        if SHARED:
            weights = tl.where(expert == EXPERTS, shared_down + channel * WIDTH, weights)
        if SCALED:
            scales = first_scales(scale, expert, channel, HIDDEN, WIDTH, SCALED)
            if SHARED:
                scales = tl.where(
                    expert == EXPERTS,
                    first_scales(shared_scale, 0, channel, HIDDEN, WIDTH, SCALED),
                    scales,
                )
        after_previous()
        values = inner + pair * WIDTH
        out = products_of(
            weights,
            scales,
            values,
            channel < HIDDEN,
            known,
            WIDTH,
            ROWS,
            TILE,
            SCALED,
            BLOCK_DEPTH,
            STAGES,
            WIDEN,
        )
        tl.store(
            parts + pair[None, :] * HIDDEN + channel[:, None],
            out,
            mask=known[None, :] & (channel < HIDDEN)[:, None],
        )


@triton.jit
def _sum_pairs(
    parts,
    chosen,
    weights,
    out,
    first_expert,
    first_token,
    own_tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: some channels of one token, where PARTIAL over its pairs that are here."""
    after_previous()
    token, channel = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < HIDDEN
    summed = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(SLOTS):
        known = inside
        if PARTIAL:
            expert = tl.load(chosen + token * TOP_K + slot, mask=slot < TOP_K, other=0).to(tl.int32)
            known &= is_here(
                expert, token, slot, first_expert, first_token, own_tokens, EXPERTS, TOP_K
            )
        part = tl.load(parts + (token * SLOTS + slot) * HIDDEN + channel, mask=known, other=0.0)
        if slot < TOP_K:
            part = part * tl.load(weights + token * TOP_K + slot)
        summed += part
    tl.store(out + token * HIDDEN + channel, summed.to(out.dtype.element_ty), mask=inside)
