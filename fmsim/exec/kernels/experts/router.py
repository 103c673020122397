"""Which experts a token takes, and how much of each: all that follows the router's product, in one
launch; of one token with that product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmsim.exec.kernels import arrivals, tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)
from fmsim.exec.kernels.products import one_row
from fmsim.exec.kernels.products.mixing import gates_beside
from fmsim.exec.kernels.products.one_row import rows_of
from fmsim.exec.kernels.weights import BLOCK


def routed(x: Tensor, tokens: Tensor, router: nn.Module) -> tuple[Tensor, Tensor]:
    """As `route`, of the rows x [N, D] that the router's weight is multiplied by."""
    if one_row.takes(x, router.weight):
        return routed_triton(x, tokens, router)
    return route(one_row.product(x, router.weight), tokens, router)


def routed_reference(x, tokens, router) -> tuple[Tensor, Tensor]:
    return router.choose(one_row.one_row_reference(x, router.weight), tokens)


def routed_triton(x, tokens, router, tune: tuning.OneRowTuning = tuning.ONE_ROW):
    """Of one row: the last program of its product makes the choice."""
    (count, inputs), top_k = router.weight.shape, router.top_k
    blocks = next_power_of_2(cdiv(inputs, BLOCK))
    rows = min(max(1, tune.block_bytes // (blocks * BLOCK * router.weight.itemsize)), BLOCK)
    assert x.is_contiguous() and router.weight.is_contiguous()
    logits = torch.empty(1, count, dtype=x.dtype, device=x.device)
    chosen = torch.empty(1, top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(1, top_k, dtype=torch.float32, device=x.device)
    extra = router.due.take(x)
    _routed[(cdiv(count, rows) + extra.programs,)](
        x,
        router.weight,
        logits,
        arrivals.arrivals(x.device),
        tokens,
        router.tid2eid if router.hashed else router.e_score_correction_bias,
        chosen,
        weights,
        router.scaling,
        extra.tensors,
        EXPERTS=count,
        EXPERTS_PADDED=next_power_of_2(count),
        INPUTS=inputs,
        BLOCK=BLOCK,
        ROWS=rows,
        BLOCKS=blocks,
        TOP_K=top_k,
        TOP_K_PADDED=next_power_of_2(top_k),
        HASHED=router.hashed,
        GATES=extra.sizes,
        num_warps=tune.warps,
        **overlapped(x),
    )
    return chosen, weights


def route(logits: Tensor, tokens: Tensor, router: nn.Module) -> tuple[Tensor, Tensor]:
    """``logits`` [N, experts] of a `model.Router`, ``tokens`` int64 [N] their ids -> chosen int64
    and weights float32 [N, top_k].

    In no particular order; among equal scores any may be taken. No gradient comes of the kernel, so
    training takes the reference.
    """
    run = route_triton if runs_compiled(logits) and not torch.is_grad_enabled() else route_reference
    return run(logits, tokens, router)


def route_reference(logits, tokens, router) -> tuple[Tensor, Tensor]:
    return router.choose(logits, tokens)


def route_triton(logits, tokens, router) -> tuple[Tensor, Tensor]:
    logits, tokens = logits.contiguous(), tokens.contiguous()
    of, top_k, count = len(logits), router.top_k, logits.shape[1]
    chosen = torch.empty(of, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(of, top_k, dtype=torch.float32, device=logits.device)
    _route[(of,)](
        logits,
        tokens,
        router.tid2eid if router.hashed else router.e_score_correction_bias,
        chosen,
        weights,
        router.scaling,
        EXPERTS=count,
        EXPERTS_PADDED=next_power_of_2(count),
        TOP_K=top_k,
        TOP_K_PADDED=next_power_of_2(top_k),
        HASHED=router.hashed,
        num_warps=1,
        **overlapped(logits),
    )
    return chosen, weights


@triton.jit
def _score(logit):
    """sqrt(log(1 + e^logit)), exact to the last bits also where 1 + e^logit rounds to 1."""
    logit = logit.to(tl.float32)
    power = tl.exp(tl.minimum(logit, 20.0, propagate_nan=tl.PropagateNan.ALL))
    plus = 1.0 + power
    rounded = tl.where(plus == 1.0, 1.0, plus - 1.0)
    logarithm = tl.where(plus == 1.0, power, tl.log(plus) * (power / rounded))
    return tl.sqrt(tl.where(logit > 20.0, logit, logarithm))


@triton.jit
def _route(
    logits,
    tokens,
    given,
    chosen_out,
    weights_out,
    scaling,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    HASHED: tl.constexpr,
):
    """One program: one token.

    ``given``: the experts of each token's id where HASHED, otherwise what is added to scores for
    the choice.
    """
    after_previous()
    token = tl.program_id(0).to(tl.int64)
    _choose(
        logits,
        tokens,
        given,
        chosen_out,
        weights_out,
        scaling,
        token,
        EXPERTS,
        EXPERTS_PADDED,
        TOP_K,
        TOP_K_PADDED,
        HASHED,
    )


@triton.jit
def _routed(
    x,
    weight,
    logits,
    arrived,
    tokens,
    given,
    chosen_out,
    weights_out,
    scaling,
    gates,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    HASHED: tl.constexpr,
    GATES: tl.constexpr,
):
    """One program: some experts' logits; the last of them to end makes the choice. One before them
    for GATES.
    """
    number = tl.program_id(0)
    if GATES is not None:
        number -= 1
    if number < 0:
        if GATES is not None:
            gates_beside(gates, GATES)
    else:
        rows_of(
            number,
            x,
            weight,
            weight,
            x,
            logits,
            0.0,
            EXPERTS,
            INPUTS,
            EXPERTS,
            0,
            BLOCK,
            ROWS,
            BLOCKS,
            NORM=False,
            ALONGSIDE=False,
        )
        tl.debug_barrier()  # all threads' logits are there before one of them says so
        last = (EXPERTS + ROWS - 1) // ROWS - 1
        if tl.atomic_add(arrived, 1, sem="acq_rel") == last:
            _choose(
                logits,
                tokens,
                given,
                chosen_out,
                weights_out,
                scaling,
                0,
                EXPERTS,
                EXPERTS_PADDED,
                TOP_K,
                TOP_K_PADDED,
                HASHED,
            )
            tl.store(arrived, 0)  # as it was


@triton.jit
def _choose(
    logits,
    tokens,
    given,
    chosen_out,
    weights_out,
    scaling,
    token,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    HASHED: tl.constexpr,
):
    """Of the ``token``-th, from its ``logits``; arguments as of `_route`."""
    slot = tl.arange(0, TOP_K_PADDED)
    logits, exists = logits + token * EXPERTS, slot < TOP_K
    if HASHED:
        chosen = tl.load(given + tl.load(tokens + token) * TOP_K + slot, mask=exists, other=0).to(
            tl.int32
        )
    else:
        expert, chosen = tl.arange(0, EXPERTS_PADDED), tl.zeros([TOP_K_PADDED], tl.int32)
        inside = expert < EXPERTS
        rank = _score(tl.load(logits + expert, mask=inside, other=0.0)) + tl.load(
            given + expert, mask=inside, other=0.0
        ).to(tl.float32)
        rank = tl.where(rank == rank, rank, float("inf"))  # nan is the greatest, as torch has it
        rank = tl.where(inside, rank, float("-inf"))
        for number in tl.static_range(TOP_K):
            best = tl.argmax(rank, 0)
            chosen = tl.where(slot == number, best, chosen)
            rank = tl.where(expert == best, float("-inf"), rank)
    weight = tl.where(exists, _score(tl.load(logits + chosen, mask=exists, other=0.0)), 0.0)
    weight = weight / (tl.sum(weight, 0) + 1e-20) * scaling
    tl.store(chosen_out + token * TOP_K + slot, chosen.to(tl.int64), mask=exists)
    tl.store(weights_out + token * TOP_K + slot, weight, mask=exists)
