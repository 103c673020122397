"""Triton where it is installed; elsewhere (macOS, Windows) stand-ins, with which the kernels' files
import and their references run.

``TRITON_INTERPRET=1``, set before the first import, makes Triton run kernels on the CPU: how the
tests run without a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON, INTERPRETED = True, triton.knobs.runtime.interpret
except ModuleNotFoundError:
    triton = SimpleNamespace(jit=lambda function=None, **how: function or triton.jit)
    tl = SimpleNamespace(constexpr=int)
    HAS_TRITON, INTERPRETED = False, False


def runs_compiled(tensor: Tensor) -> bool:
    """Whether a kernel's function takes Triton for this tensor, and not the torch reference."""
    return HAS_TRITON and tensor.is_cuda


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
