"""Triton where it is installed, and Gluon, the language below it that comes with it; elsewhere
(macOS, Windows) stand-ins, with which the kernels' files import and their references run.

``TRITON_INTERPRET=1``, set before the first import, makes Triton run its kernels on the CPU: how
the tests run without a GPU.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.language.target_info import cuda_capability_geq

    HAS_TRITON, INTERPRETED = True, triton.knobs.runtime.interpret
except ModuleNotFoundError:
    triton = SimpleNamespace(jit=lambda function=None, **how: function or triton.jit)
    tl = SimpleNamespace(constexpr=int)
    HAS_TRITON, INTERPRETED = False, False

try:  # experimental: another release may have moved or renamed any of them
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:
    gluon = SimpleNamespace(jit=lambda function=None, **how: function or gluon.jit)
    gl = SimpleNamespace(constexpr=int)
    mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = TensorDescriptor = None

COMPILED = tl.constexpr(not INTERPRETED)


def runs_compiled(tensor: Tensor) -> bool:
    """Whether a kernel's function takes Triton for this tensor, and not the torch reference."""
    return HAS_TRITON and tensor.is_cuda


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of an H100, where a kernel is only compiled."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _overlaps(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlapped(tensor: Tensor) -> dict[str, bool]:
    """Options of a launch that may begin while the launch before it in its stream ends
    (programmatic dependent launch, from Hopper on). Its kernel calls `after_previous` before it
    touches what others write, or writes a new tensor: that one's memory may be what a temporary of
    the launch before had, which is freed before it is read.
    """
    return {"launch_pdl": True} if tensor.is_cuda and _overlaps(tensor.device) else {}


@triton.jit
def wait_for_previous():
    """Until the launch before this one in its stream is done and its writes are seen."""
    if COMPILED and cuda_capability_geq(9, 0):
        gdc_wait()


@triton.jit
def let_next_begin():
    """The next launch may begin when all programs of this one have come here, or are done."""
    if COMPILED and cuda_capability_geq(9, 0):
        gdc_launch_dependents()


@triton.jit
def after_previous():
    """Wait until the launch before this one is done and seen, then let the next one begin.

    What a kernel does before this runs beside the launch before it. All launches earlier than that
    one are done by then, unless it runs alongside another or lets the next begin at once: elsewhere
    a kernel begins only when the one before it has passed its own wait.
    """
    wait_for_previous()
    let_next_begin()


@triton.jit
def after_previous_with_next():
    """As `after_previous`, but the next launch may begin at once: one that reads many weights does
    so beside two others. What it reads before its own wait may be no launch's output: others than
    this one's predecessor may still be running too. `tests/exec/decode/test_launch_order.py` walks
    a step's launches for one that would.
    """
    let_next_begin()
    wait_for_previous()
