"""What the CSA layers of a batch select: the step under way in buffers that never move, and all
steps so far.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Selections:
    """Axes: T steps, L CSA layers, B requests, K places of a selection, H hidden size.

    On the device of the model.

    Of the step under way (a CUDA graph writes these): `wanted` int32 [L, B, K], the selection among
    all entries (-1 = none); `ids` int32, what is attended to; `hit` and `attended` bool, which of
    the wanted are resident, and are attended to; `mass` float32, the attention mass of the wanted,
    and `seen_mass` of `ids`; `near_mass` float32 [L, B, 2], on window and sink; `hidden` float32
    [L, B, H], the layers' attention input. Where only resident keys are scored, `wanted`, `hit`,
    `attended`, `mass` and `near_mass` are not known, and stay as they begin: nothing. `log` has
    `wanted`, `mass`, `hit`, `attended` and `near_mass` of each step, with a leading axis T;
    `tokens` int64 [T, B] what it processed. `step` counts them: the one that is under way, or
    that comes next.
    """

    LOGGED = ("wanted", "mass", "hit", "attended", "near_mass")

    def __init__(
        self, steps: int, layers: int, batch: int, topk: int, hidden: int, device: torch.device
    ):
        shape = (layers, batch, topk)
        self.wanted, self.ids = (
            torch.full(shape, -1, dtype=torch.int32, device=device) for _ in range(2)
        )
        self.hit, self.attended = (
            torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2)
        )
        self.mass, self.seen_mass = (torch.zeros(shape, device=device) for _ in range(2))
        self.near_mass, self.hidden = (
            torch.zeros(layers, batch, width, device=device) for width in (2, hidden)
        )
        self.tokens = torch.zeros(steps, batch, dtype=torch.int64, device=device)
        self.step = 0
        self.log: dict[str, Tensor] = {}
        for name in self.LOGGED:
            now = getattr(self, name)
            self.log[name] = now.new_zeros(steps, *now.shape)

    def book(self, layer: int, wanted: Tensor, hit: Tensor, attended: Tensor, ids: Tensor) -> None:
        """A layer's selection: all [B, K]."""
        for now, value in (
            (self.wanted, wanted),
            (self.hit, hit),
            (self.attended, attended),
            (self.ids, ids),
        ):
            now[layer].copy_(value)

    def book_masses(
        self, layer: int, seen: Tensor, wanted: tuple[Tensor, Tensor, Tensor] | None, hidden: Tensor
    ) -> None:
        """Mass [B, K] of what was attended to; (entries [B, K], window [B], sink [B]) of the
        selection among all, where it is known; hidden [B, H].
        """
        self.seen_mass[layer].copy_(rounded(seen))
        self.hidden[layer].copy_(hidden)
        if wanted is not None:
            self.mass[layer].copy_(rounded(wanted[0]))
            self.near_mass[layer].copy_(torch.stack(wanted[1:], 1))

    def keep(self) -> None:
        """All layers have attended in the step under way: log it."""
        for name, log in self.log.items():
            log[self.step].copy_(getattr(self, name))
        self.step += 1


def rounded(mass: Tensor) -> Tensor:
    """float32 as a trace keeps it: in float16. So a replay of this decode's trace sees the same."""
    return mass.half().float()
