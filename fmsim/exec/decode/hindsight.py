"""The future of a decode, as far as another decode of the same prompt tells it: what the oracle is
given in an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fmsim.replay.paging import PagedFuture, page_trace

if TYPE_CHECKING:
    from fmsim.exec.decode.request import Request


class Hindsight:
    """`fmsim.policies.base.Future` as torch arrays: what `decoded` selected, by pages.

    Its text may differ from what is to be decoded.
    """

    def __init__(self, decoded: Request, granularity: int, shared: bool, n_pages: int):
        ids, mass = (
            np.ascontiguousarray(part.cpu().numpy()) for part in (decoded.wanted, decoded.mass)
        )
        self.future = PagedFuture(page_trace(ids, mass, granularity, shared, n_pages))
        self.never, self.device = self.future.never, decoded.device

    def window(self, step: int, horizon: int) -> tuple[Tensor, Tensor]:
        mass, used = self.future.window(step, horizon)
        return torch.from_numpy(mass).to(self.device), torch.from_numpy(used).to(self.device)

    def first_use(self) -> Tensor:
        return torch.from_numpy(self.future.first_use()).to(self.device)

    def next_use(self, step: int) -> Tensor:
        return torch.from_numpy(self.future.next_use(step)).to(self.device)
