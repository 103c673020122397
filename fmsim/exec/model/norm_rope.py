"""RMS norm, and rotary position embeddings (RoPE): the angles and the turning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * rms_normalise(x.float(), self.eps)).to(x.dtype)


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype)


def inverse_frequencies(config: DeepseekV4Config, kind: str) -> Tensor:
    """Angles per position of each rotated pair, float32 [rope_dims / 2], always on the CPU (a model
    is made on the meta device); ``kind`` is "main" or "compress".
    """
    parameters = config.rope_parameters[kind]
    with torch.device("cpu"):
        if parameters["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", layer_type=kind)[0]
        dims = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        return parameters["rope_theta"] ** -(torch.arange(0, dims, 2, dtype=torch.float) / dims)


def rotate(x: Tensor, angles: Tensor, inverse: bool = False) -> Tensor:
    """RoPE on the trailing dims of x [..., C], pairs interleaved; ``angles`` float32 [...,
    rope_dims / 2].
    """
    dims = 2 * angles.shape[-1]
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin = -sin
    even, odd = x[..., -dims::2].float(), x[..., 1 - dims :: 2].float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-dims], turned.to(x.dtype)), dim=-1)
