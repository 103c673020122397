"""The feed-forward block: router, routed experts and the shared one.

Shapes: B sequences, S tokens of a call, N = B * S tokens, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.experts.mixture import (
    clamped_swiglu,
    expert_shares,
    leaves_shares,
    mixture_of_experts,
)
from fmsim.exec.kernels.experts.router import routed
from fmsim.exec.kernels.products.hyper_connection import Shares
from fmsim.exec.kernels.products.mixing import Due
from fmsim.exec.kernels.weights import dequantise
from fmsim.exec.model.projections import linear

FEW_EXPERTS = 8  # up to here, running every expert on every token beats sorting tokens by expert
GROUPED_MULTIPLE = 8  # bfloat16 rows of a grouped matrix product begin at multiples of 16 bytes


class SwiGLU(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.limit = config.swiglu_limit
        self.gate_proj = linear(config.hidden_size, config.moe_intermediate_size)
        self.up_proj = linear(config.hidden_size, config.moe_intermediate_size)
        self.down_proj = linear(config.moe_intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(clamped_swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Experts(nn.Module):
    """The routed ones.

    Of float8 weights [experts, out, in] ``gate_up_scale`` and ``down_scale`` are float32 [experts,
    ceil(out / 128), ceil(in / 128)].
    """

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        count, width = config.n_routed_experts, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, config.hidden_size, width))
        self.register_buffer("gate_up_scale", None)
        self.register_buffer("down_scale", None)

    def keep(self, own: slice) -> None:
        """Hold these alone, in memory of their own."""
        for name, weight in list(self.named_parameters()):
            kept = weight.detach()[own].clone()
            setattr(self, name, nn.Parameter(kept, requires_grad=weight.requires_grad))
        for name, scale in list(self.named_buffers()):
            setattr(self, name, scale[own].clone())

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], chosen int64 and weights float32 [N, top_k] -> [N, D].

        For any N, with gradients: a decode step on a GPU takes `mixture_of_experts`.
        """
        if self.down_scale is None and len(self.gate_up_proj) <= FEW_EXPERTS:
            return self._every_expert(x, chosen, weights)
        if x.dtype == self.down_proj.dtype == torch.bfloat16 and not any(
            size % GROUPED_MULTIPLE for size in self.down_proj.shape[1:]
        ):
            return self._grouped(x, chosen, weights)
        return self._one_by_one(x, chosen, weights)

    def _one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The reference: a loop over the experts that were chosen at all."""
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            gate_up, down = self._widened(expert, x.dtype)
            gate, up = F.linear(x[token], gate_up).chunk(2, -1)
            result = F.linear(clamped_swiglu(gate, up, self.limit), down)
            out.index_add_(0, token, (result * weights[token, slot, None]).to(out.dtype))
        return out

    def _widened(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """An expert's two matrices as they are, or of float8 ones as ``dtype``."""
        if self.down_scale is None:
            return self.gate_up_proj[expert], self.down_proj[expert]
        gate_up = (self.gate_up_proj[expert], self.gate_up_scale[expert])
        down = (self.down_proj[expert], self.down_scale[expert])
        return dequantise(*gate_up, dtype=dtype), dequantise(*down, dtype=dtype)

    def _grouped(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """One matrix product over all experts, of (token, slot) pairs sorted by expert; shapes
        depend on N alone.
        """
        experts, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(
            experts,
            torch.arange(len(self.gate_up_proj), device=x.device),
            right=True,
            out_int32=True,
        )
        gate, up = F.grouped_mm(
            x[order // chosen.shape[1]], self.gate_up_proj.transpose(1, 2), offs=ends
        ).chunk(2, -1)
        result = F.grouped_mm(
            clamped_swiglu(gate, up, self.limit), self.down_proj.transpose(1, 2), offs=ends
        )
        # float32, sorted by expert; back to the order of tokens
        shares = result * weights.flatten()[order, None]
        return (
            torch.empty_like(shares)
            .index_copy(0, order, shares)
            .unflatten(0, chosen.shape)
            .sum(1)
            .to(x.dtype)
        )

    def _every_expert(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        count = len(self.gate_up_proj)
        share = torch.zeros(len(x), count, device=x.device, dtype=weights.dtype).scatter_add(
            1, chosen, weights
        )
        gate, up = (
            F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (count, -1)).chunk(2, -1)
        )
        # [N, experts, width]
        inner = clamped_swiglu(gate, up, self.limit) * share[..., None].to(x.dtype)
        return inner.flatten(1) @ self.down_proj.transpose(1, 2).flatten(0, 1).to(x.dtype)


class Router(nn.Module):
    """Scores by sqrt(softplus); picks by score and balance bias, or, in the first layers, by the
    token's hash.
    """

    def __init__(self, config: DeepseekV4Config, hashed: bool):
        super().__init__()
        count = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.hashed = hashed
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size))
        self.due = Due()
        if hashed:
            self.register_buffer(
                "tid2eid", torch.zeros(config.vocab_size, self.top_k, dtype=torch.long)
            )
        else:
            self.register_buffer("e_score_correction_bias", torch.zeros(count))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D], tokens [N] -> chosen int64 and weights float32 [N, top_k]."""
        return routed(x, tokens, self)

    def choose(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softplus(logits.float()).sqrt()
        if self.hashed:
            chosen = self.tid2eid[tokens]
        else:
            chosen = (
                (scores + self.e_score_correction_bias).topk(self.top_k, -1, sorted=False).indices
            )
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling


class MoE(nn.Module):
    def __init__(self, config: DeepseekV4Config, hashed: bool):
        super().__init__()
        self.gate = Router(config, hashed)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D], tokens [B, S] -> output, and, where gradients are, each expert's share of
        the routed slots.
        """
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat, tokens.flatten())
        load = (
            F.one_hot(chosen, len(self.gate.weight)).float().mean((0, 1))
            if torch.is_grad_enabled()
            else None
        )
        return (
            mixture_of_experts(flat, chosen, weights, self.experts, self.shared_experts).view_as(x),
            load,
        )

    def decode(self, x: Tensor, tokens: Tensor) -> Tensor | Shares:
        """The output of x [B, S, D], tokens [B, S], of few tokens as shares that their streams add
        up.
        """
        flat = x.flatten(0, 1)
        if not leaves_shares(flat, self.experts, self.shared_experts):
            return self(x, tokens)[0]
        chosen, weights = self.gate(flat, tokens.flatten())
        return Shares(expert_shares(flat, chosen, self.experts, self.shared_experts), weights)
