"""What a decode token attends to, and the partial results that attention's kernels make of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels.layout import Layout


class Rows(NamedTuple):
    """What a token attends to.

    ``window`` uint8 [B, page bytes]: a sequence's last W tokens, each sequence's one page of W
    entries, in any order, of which the first ``window_lengths[b]`` (int32 [B]) exist. ``pool``
    uint8 [pages, page bytes] and ``table`` int32 [B, max pages] as in `index_scores`; ``ids`` int32
    [B, K] the selected entries, -1 for none. An entry whose page is missing is left out. All of one
    ``layout``, LATENT or plain.
    """

    layout: Layout
    window: Tensor
    window_lengths: Tensor
    pool: Tensor
    table: Tensor
    ids: Tensor

    @property
    def window_rows(self) -> int:
        """W."""
        return self.layout.per_page(self.window)

    @property
    def count(self) -> int:
        """W + K."""
        return self.window_rows + self.ids.shape[1]


class Parts(NamedTuple):
    """Of each split of the rows: ``values`` float32 [B, splits, H, C] attended to, ``sums`` float32
    [B, splits, H] the logarithm of what its exponentials add up to, -inf where no row is known;
    ``logits`` float32 [B, H, W + K] where wanted, -inf of what is not known.
    """

    values: Tensor
    sums: Tensor
    logits: Tensor | None

    @classmethod
    def new(cls, queries: Tensor, splits: int, rows: Rows, want_logits: bool) -> Parts:
        batch, heads, size = queries.shape
        float32 = {"dtype": torch.float32, "device": queries.device}
        values, sums = (
            torch.empty(batch, splits, heads, size, **float32),
            torch.empty(batch, splits, heads, **float32),
        )
        return cls(
            values, sums, torch.empty(batch, heads, rows.count, **float32) if want_logits else None
        )


def matrix_type(layout: Layout) -> torch.dtype:
    """What entries are multiplied as; queries of this type need no conversion."""
    return torch.float32 if layout.dtype == torch.float32 else torch.float16
