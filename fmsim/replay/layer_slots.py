"""A budget shared unevenly over layers: whole slots for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real

import numpy as np

from fmsim.errors import FmsimError, PolicyError, short


def divide(n_slots: int, shares: Sequence[float], n_pages: int, least: int) -> tuple[int, ...]:
    """Slots of each layer: together never more than `n_slots` a layer.

    Every layer first gets `least`. What is left is divided by `shares`, one number a layer. No
    layer gets more than `n_pages`: what it would have above goes to the others, by their shares.
    Rounded down; what that leaves goes, a slot each, to the layers that lost most by it, of equals
    to the first. Shares are taken as the exact numbers that they are, so every machine divides
    alike.
    """
    room = n_pages - least
    left = (n_slots - least) * len(shares)
    wanted = {layer: exact(share) for layer, share in enumerate(shares) if share > 0}
    slots = [least] * len(shares)
    while wanted:
        unit = left / sum(wanted.values())
        full = [layer for layer, share in wanted.items() if share * unit >= room]
        if not full:
            break
        for layer in full:
            slots[layer] += room
            left -= room
            del wanted[layer]
    if wanted:
        parts = {layer: share * unit for layer, share in wanted.items()}
        for layer, part in parts.items():
            slots[layer] += math.floor(part)
            left -= math.floor(part)
        by_loss = sorted(parts, key=lambda layer: math.floor(parts[layer]) - parts[layer])
        for layer in by_loss[:left]:
            slots[layer] += 1
    return tuple(slots)


def exact(share: float) -> Fraction:
    """The number that `share` is, Python's or one of numpy's."""
    return Fraction(share.item() if isinstance(share, np.generic) else share)


def check_shares(policy: str, shares: Sequence[float], n_layers: int, scope: str) -> None:
    """Raise FmsimError for a shared set, PolicyError for shares that divide nothing."""
    if scope == "shared":
        raise FmsimError(
            f"policy {policy}: shares its budget unevenly over layers, so each needs a resident set"
            " of its own; set scope: per_layer"
        )
    listed = isinstance(shares, Sequence) or (isinstance(shares, np.ndarray) and shares.ndim == 1)
    fits = (
        listed
        and len(shares) == n_layers
        and all(isinstance(share, Real) and 0 <= share < math.inf for share in shares)
    )
    if not fits or max(shares) <= 0:
        raise PolicyError(
            f"policy {policy}: layer_shares must give {n_layers} numbers, one a layer, none below"
            f" zero and one above it; it gave {short(shares)}"
        )
