"""What a decode token attends to, and the partial results that attention's kernels make of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import cdiv, tl, triton
from fmsim.exec.kernels.layout import Layout

MOST_SPLITS = 16
# of a block's time, about 3.5 us, that a part of 64 heads takes to be written and combined
PART_BLOCKS = 0.03


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

    Where the rows were not split ``values`` are the output itself, in the queries' type, and the
    ``sums`` have the sink in them: nothing is left to combine.
    """

    values: Tensor
    sums: Tensor
    logits: Tensor | None

    @classmethod
    def new(cls, queries: Tensor, splits: int, rows: Rows, want_logits: bool, out: Tensor) -> Parts:
        batch, heads, size = queries.shape
        float32 = {"dtype": torch.float32, "device": queries.device}
        values = out if splits == 1 else torch.empty(batch, splits, heads, size, **float32)
        sums = torch.empty(batch, splits, heads, **float32)
        logits = torch.empty(batch, heads, rows.count, **float32) if want_logits else None
        return cls(values, sums, logits)


def matrix_type(layout: Layout) -> torch.dtype:
    """What entries are multiplied as; queries of this type need no conversion."""
    return torch.float32 if layout.dtype == torch.float32 else torch.float16


def balanced_splits(blocks: int, runs: int, at_a_time: int) -> int:
    """In how many parts to cut each of the ``runs`` of ``blocks`` blocks: programs come in turns of
    ``at_a_time``, the last of them rarely full, and each part is written, and read to be combined.
    """

    def block_times(splits: int) -> float:
        return cdiv(runs * splits, at_a_time) * cdiv(blocks, splits) + PART_BLOCKS * runs * splits

    return min(range(1, min(blocks, MOST_SPLITS) + 1), key=block_times)


@triton.jit
def finished(highest, summed, sinks, head, HEADS: tl.constexpr, ALONE: tl.constexpr):
    """Of a program's heads, what its values are multiplied by, and the logarithm of their sums: by
    the highest logit and the sum of exponentials beside it, and where the program is ALONE with its
    rows the sink.
    """
    if ALONE:
        sink = tl.load(sinks + head, mask=head < HEADS, other=0.0).to(tl.float32)
        level = tl.maximum(highest, sink)
        fade = tl.exp(highest - level)
        summed = summed * fade + tl.exp(sink - level)
        return fade / summed, level + tl.log(summed)
    else:
        some = summed > 0
        summed = tl.where(some, summed, 1.0)
        return 1.0 / summed, tl.where(some, highest + tl.log(summed), float("-inf"))
