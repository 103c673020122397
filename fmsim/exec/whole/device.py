"""Which way a tensor's work is done: by Triton's kernels or by plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import HAS_TRITON, INTERPRETED


def runs_kernels(tensor: Tensor) -> bool:
    """Whether a tensor's work is done by Triton's kernels: on a GPU, or where Triton interprets
    them.
    """
    return HAS_TRITON and (tensor.is_cuda or INTERPRETED)


def exactly(tensor: Tensor) -> torch.autocast:
    """No autocast: what is written here says itself which products are in which type."""
    return torch.autocast(tensor.device.type, enabled=False)
