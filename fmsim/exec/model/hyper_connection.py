"""Hyper-connections: several residual streams into a block and back, and into the head.

Shapes: B sequences, S tokens of a call, D hidden size, R residual streams (``hc_mult``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.products.mixing import Due
from fmsim.exec.model.norm_rope import rms_normalise


def sinkhorn(mix: Tensor, iterations: int, eps: float) -> Tensor:
    """Positive matrices [..., R, R] made doubly stochastic: columns, then rows, in turn."""
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


class HyperConnection(nn.Module):
    """Manifold-constrained hyper-connection (section 2.2): R residual streams into a block and
    back.
    """

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        streams = config.hc_mult
        self.streams, self.iterations = streams, config.hc_sinkhorn_iters
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty((2 + streams) * streams, streams * config.hidden_size))
        self.base = nn.Parameter(torch.zeros((2 + streams) * streams))
        self.scale = nn.Parameter(torch.ones(3))
        self.due = Due()

    def enter(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, R, D] -> block input [B, S, D], write weights [B, S, R], mixing [B, S, R, R]."""
        count = self.streams
        mixes = F.linear(rms_normalise(streams.flatten(2).float(), self.norm_eps), self.fn.float())
        read, write, mix = mixes.split([count, count, count * count], -1)
        read_base, write_base, mix_base = self.base.split([count, count, count * count])
        read = torch.sigmoid(read * self.scale[0] + read_base) + self.eps
        write = 2 * torch.sigmoid(write * self.scale[1] + write_base)
        mix = (mix * self.scale[2] + mix_base).unflatten(-1, (count, count)).softmax(-1) + self.eps
        mix = sinkhorn(mix, self.iterations, self.eps)
        return (read[..., None] * streams).sum(2).to(streams.dtype), write, mix

    @staticmethod
    def leave(streams: Tensor, out: Tensor, write: Tensor, mix: Tensor) -> Tensor:
        # out stream k = sum_j mix[j, k] x_j
        mixed = (mix.to(streams.dtype)[..., None] * streams[:, :, :, None]).sum(2)
        return mixed + write.to(streams.dtype)[..., None] * out[:, :, None]


class HyperHead(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.hc_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.hc_base = nn.Parameter(torch.zeros(config.hc_mult))
        self.hc_scale = nn.Parameter(torch.ones(1))

    def forward(self, streams: Tensor) -> Tensor:
        mixes = F.linear(
            rms_normalise(streams.flatten(2).float(), self.norm_eps), self.hc_fn.float()
        )
        read = torch.sigmoid(mixes * self.hc_scale.float() + self.hc_base.float()) + self.eps
        return (read[..., None] * streams).sum(2).to(streams.dtype)
