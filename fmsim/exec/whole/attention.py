"""Attention with gradients, whose memory does not grow with the square of the length.

On a GPU the kernels beside this do it; elsewhere the same functions are written in plain torch,
which holds whole matrices of logits and serves tests. Shapes: B sequences, S queries, H heads, C
head size, E entries, K chosen entries of a query. ``visible`` int32 [B, S] says how many of the
keys a query may see, the latest ones where there is a reach.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import cdiv, next_power_of_2
from fmsim.exec.model.kinds import MASKED
from fmsim.exec.whole import device
from fmsim.exec.whole.kernels import attention as kernels

RANGE_ROWS, RANGE_COLUMNS = 128, 64
CHOSEN_COLUMNS = 64
SHARE_ROWS, SHARE_COLUMNS = 64, 128


def attend(
    q: Tensor, kv: Tensor, window: int, sinks: Tensor, entries: Tensor | None = None,
    visible: Tensor | None = None, ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention of q [B, S, H, C] over its window of kv [B, S, C], each head's sink, and
    entries.

    Of ``entries`` [B, E, C] a query sees the first ``visible`` or, with ``ids`` int32 [B, S, K],
    those chosen for it (-1 for none). -> output [B, S, H, C] in the type of q, and, without
    gradient, the logarithm of the softmax's sum over window and sink alone, float32 [B, S, H].
    """
    if kv.dtype != q.dtype or (entries is not None and entries.dtype != q.dtype):
        raise TypeError(f"queries are {q.dtype}, keys {kv.dtype}; both must be of one type")
    with device.exactly(q):
        return _Attend.apply(q, kv, sinks, entries, visible, ids, window)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, sinks, entries, visible, ids, window):
        q, kv = q.contiguous(), kv.contiguous()
        own = _own_positions(q)
        out, lse = _range(q, kv, own, window, sinks, None)
        near = lse
        if entries is not None:
            entries = entries.contiguous()
            if ids is not None:
                out, lse = _chosen(q, entries, ids, out, lse)
            else:
                out, lse = _range(q, entries, visible, 0, None, (out, lse))
        ctx.window = window
        result = out.to(q.dtype)
        ctx.save_for_backward(q, kv, sinks, entries, visible, ids, result, lse)
        ctx.mark_non_differentiable(near)
        return result, near

    @staticmethod
    def backward(ctx, grad, _):
        with device.exactly(grad):
            return _attend_grads(ctx, grad)


def _attend_grads(ctx, grad):
    """Gradients of `_Attend`'s inputs."""
    q, kv, sinks, entries, visible, ids, out, lse = ctx.saved_tensors
    grad = grad.to(q.dtype).contiguous()
    delta = (grad.float() * out.float()).sum(-1)
    grad_q, grad_kv = _range_grads(q, kv, _own_positions(q), ctx.window, lse, delta, grad, None)
    grad_entries = None
    if entries is not None:
        if ids is not None:
            grad_q, grad_entries = _chosen_grads(q, entries, ids, lse, delta, grad, grad_q)
        else:
            grad_q, grad_entries = _range_grads(q, entries, visible, 0, lse, delta, grad, grad_q)
        grad_entries = grad_entries.to(entries.dtype)
    grad_sinks = -((sinks.float() - lse).exp() * delta).sum((0, 1)).to(sinks.dtype)
    return grad_q.to(q.dtype), grad_kv.to(kv.dtype), grad_sinks, grad_entries, None, None, None


def _own_positions(q: Tensor) -> Tensor:
    """Of the window: a query sees up to its own key. int32 [B, S]."""
    order = torch.arange(1, q.shape[1] + 1, dtype=torch.int32, device=q.device)
    return order.expand(q.shape[:2]).contiguous()


def _range(q, keys, visible, reach, sinks, before) -> tuple[Tensor, Tensor]:
    """Output and lse (float32), begun with ``sinks``, or gone on from those ``before``."""
    if not device.runs_kernels(q):
        return _merge(q, *_range_logits(q, keys, visible, reach), keys, sinks, before)
    batch, tokens, heads, size = q.shape
    out, lse = before or (q.new_empty(q.shape, dtype=torch.float32), None)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if lse is None else lse.clone()
    kernels.range_forward[(cdiv(tokens * heads, RANGE_ROWS), batch)](
        q, keys, visible, sinks if before is None else lse, out, lse, size**-0.5, tokens,
        keys.shape[1], HEADS=heads, SIZE=size, REACH=reach, FIRST=before is None,
        ROWS=RANGE_ROWS, COLUMNS=RANGE_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out, lse


def _range_grads(q, keys, visible, reach, lse, delta, grad, before) -> tuple[Tensor, Tensor]:
    """float32 gradients of q (``before`` added, where there is one) and of the keys."""
    if not device.runs_kernels(q):
        logits, seen = _range_logits(q, keys, visible, reach)
        grad_q, onto = _dense_grads(q, keys, logits, seen, lse, delta, grad)
        return grad_q if before is None else grad_q + before, onto
    batch, tokens, heads, size = q.shape
    grad_q = before if before is not None else q.new_empty(q.shape, dtype=torch.float32)
    grad_keys = torch.zeros_like(keys, dtype=torch.float32)
    kernels.range_backward[(cdiv(tokens * heads, RANGE_ROWS), batch)](
        q, keys, visible, lse, delta, grad, grad_q, grad_keys, size**-0.5, tokens, keys.shape[1],
        HEADS=heads, SIZE=size, REACH=reach, FIRST=before is None, ROWS=RANGE_ROWS,
        COLUMNS=RANGE_COLUMNS, num_warps=8,
    )  # fmt: skip
    return grad_q, grad_keys


def _chosen(q, entries, ids, out, lse) -> tuple[Tensor, Tensor]:
    if not device.runs_kernels(q):
        keys = _gathered(entries, ids)
        logits = torch.einsum("bshc,bskc->bshk", q.float(), keys) * q.shape[-1] ** -0.5
        seen = (ids >= 0)[:, :, None].expand_as(logits)
        return _merge(q, logits, seen, keys, None, (out, lse))
    batch, tokens, heads, size = q.shape
    lse = lse.clone()
    kernels.chosen_forward[(tokens, batch)](
        q, entries, ids, out, lse, size**-0.5, tokens, entries.shape[1], HEADS=heads, SIZE=size,
        TOP_K=ids.shape[2], ROWS=max(16, next_power_of_2(heads)), COLUMNS=CHOSEN_COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out, lse


def _chosen_grads(q, entries, ids, lse, delta, grad, grad_q) -> tuple[Tensor, Tensor]:
    """``grad_q`` with what the chosen entries add to it, and their own gradient; float32."""
    onto = torch.zeros_like(entries, dtype=torch.float32)
    if not device.runs_kernels(q):
        keys = _gathered(entries, ids)
        logits = torch.einsum("bshc,bskc->bshk", q.float(), keys) * q.shape[-1] ** -0.5
        weight = (logits - lse[..., None]).exp().masked_fill((ids < 0)[:, :, None], 0.0)
        change = torch.einsum("bshc,bskc->bshk", grad.float(), keys) - delta[..., None]
        change = weight * change * q.shape[-1] ** -0.5
        each = torch.einsum("bshk,bshc->bskc", change, q.float())
        each = each + torch.einsum("bshk,bshc->bskc", weight, grad.float())
        places = ids.clamp(min=0).long().flatten(1)[..., None].expand(-1, -1, q.shape[-1])
        onto.scatter_add_(1, places, each.flatten(1, 2))
        return grad_q + torch.einsum("bshk,bskc->bshc", change, keys), onto
    batch, tokens, heads, size = q.shape
    kernels.chosen_backward[(tokens, batch)](
        q, entries, ids, lse, delta, grad, grad_q, onto, size**-0.5, tokens, entries.shape[1],
        HEADS=heads, SIZE=size, TOP_K=ids.shape[2], ROWS=max(16, next_power_of_2(heads)),
        COLUMNS=CHOSEN_COLUMNS, num_warps=4,
    )  # fmt: skip
    return grad_q, onto


def _gathered(entries: Tensor, ids: Tensor) -> Tensor:
    """float32 [B, S, K, C]; whatever for an id of -1."""
    rows = torch.arange(len(entries), device=entries.device)[:, None, None]
    return entries[rows, ids.clamp(min=0).long()].float()


def _range_logits(q, keys, visible, reach) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("bshc,bec->bshe", q.float(), keys.float()) * q.shape[-1] ** -0.5
    number, end = torch.arange(keys.shape[1], device=q.device), visible[..., None]
    seen = number < end
    if reach:
        seen = seen & (number >= end - reach)
    return logits, seen[:, :, None].expand_as(logits)


def _merge(q, logits, seen, keys, sinks, before) -> tuple[Tensor, Tensor]:
    """One softmax over what was before (or the sinks) and the keys [B, E, C] or [B, S, K, C]."""
    logits = logits.masked_fill(~seen, MASKED)
    past = sinks.float().expand(q.shape[:3]) if before is None else before[1]
    lse = torch.logaddexp(past, logits.logsumexp(-1))
    weight = (logits - lse[..., None]).exp()
    pattern = "bshe,bec->bshc" if keys.dim() == 3 else "bshe,bsec->bshc"
    out = torch.einsum(pattern, weight, keys.float())
    if before is not None:
        out = out + before[0] * (past - lse).exp()[..., None]
    return out, lse


def _dense_grads(q, keys, logits, seen, lse, delta, grad) -> tuple[Tensor, Tensor]:
    weight = (logits - lse[..., None]).exp().masked_fill(~seen, 0.0)
    change = torch.einsum("bshc,bec->bshe", grad.float(), keys.float()) - delta[..., None]
    change = weight * change * q.shape[-1] ** -0.5
    onto = torch.einsum("bshe,bshc->bec", change, q.float())
    onto = onto + torch.einsum("bshe,bshc->bec", weight, grad.float())
    return torch.einsum("bshe,bec->bshc", change, keys.float()), onto


@torch.no_grad()
def attention_over_entries(q: Tensor, entries: Tensor, visible: Tensor, near: Tensor) -> Tensor:
    """The share of each query's softmax that every visible entry would have: float32 [B, S, E], a
    mean over heads.

    q [B, S, H, C], entries [B, E, C]; ``near`` [B, S, H] is `attend`'s sum over window and sink.
    """
    batch, tokens, heads, size = q.shape
    count, q, entries = entries.shape[1], q.contiguous(), entries.contiguous()
    if not device.runs_kernels(q):
        with device.exactly(q):
            logits, seen = _range_logits(q, entries, visible, 0)
        logits = logits.masked_fill(~seen, MASKED)
        lse = torch.logaddexp(near, logits.logsumexp(-1))
        return (logits - lse[..., None]).exp().mean(2)
    before = torch.zeros(q.shape, dtype=torch.float32, device=q.device), near.contiguous()
    _, lse = _range(q, entries, visible, 0, None, before)
    weights = q.new_empty(batch, tokens, count, dtype=torch.float32)
    grid = cdiv(tokens, SHARE_ROWS), cdiv(count, SHARE_COLUMNS), batch
    kernels.mean_weights[grid](
        q, entries, visible, lse, weights, size**-0.5, tokens, count, HEADS=heads, SIZE=size,
        ROWS=SHARE_ROWS, COLUMNS=SHARE_COLUMNS, num_warps=4,
    )  # fmt: skip
    return weights
