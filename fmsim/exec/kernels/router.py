"""Which experts a token takes, and how much of each: all that follows the router's product, in one
launch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmsim.exec.kernels.lang import (
    after_previous,
    next_power_of_2,
    overlapped,
    runs_compiled,
    tl,
    triton,
)


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
    token, slot = tl.program_id(0).to(tl.int64), tl.arange(0, TOP_K_PADDED)
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
