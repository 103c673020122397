"""The prompt's attention as a first history, for policies that keep one."""

from __future__ import annotations

from typing import Any

from fmsim.errors import FmsimError
from fmsim.policies.base import Array, Context

FLOAT_BITS = 31  # of a float32 that is not negative


def attention(ctx: Context, policy: str) -> Array:
    """float32 [G, P]: attention of the prompt's last queries to each page.

    Raises FmsimError where the trace does not hold it.
    """
    if ctx.prompt_mass is None:
        raise FmsimError(
            f"policy {policy}: the trace holds no attention of the prompt (prompt_mass); use a"
            " trace that does, or another policy or parameter"
        )
    return ctx.prompt_mass


def ranks(ctx: Context, policy: str, bits: int) -> Array:
    """int64 [G, P] in [0, 2**bits): a number that grows with `attention`, in steps of 1 part in
    2**(bits - 8) or less.
    """
    xp: Any = ctx.xp
    mass = xp.asarray(attention(ctx, policy), dtype=xp.float32, copy=True)
    return xp.astype(mass.view(xp.int32), xp.int64) >> (FLOAT_BITS - bits)
