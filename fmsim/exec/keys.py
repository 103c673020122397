"""Index keys of a batch on the GPU: every CSA layer's, of all entries, since the lightning indexer scores them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmsim.exec.kernels.index_score import GROUP, Scores, index_scores, new_scores
from fmsim.exec.kernels.layout import Layout, read_entries, write_entries
from fmsim.exec.model import index_scores_blocked

PAGE_ENTRIES = 64  # keys lie in pages of 64, as in the deployed engine


class IndexKeys:
    """`layers` pools with room for ``capacities[b]`` keys of each request; one room size for all, so that scores are one array."""

    def __init__(self, layout: Layout, layers: int, capacities: Sequence[int], device: torch.device):
        self.layout, self.batch = layout, len(capacities)
        pages = -(-max(capacities) // PAGE_ENTRIES)
        self.capacity = pages * PAGE_ENTRIES
        page_bytes = PAGE_ENTRIES * layout.entry_bytes
        self.pool = torch.zeros(layers, self.batch * pages, page_bytes, dtype=torch.uint8, device=device)
        self.table = torch.arange(self.batch * pages, dtype=torch.int32, device=device).view(self.batch, pages)
        self.buffers = new_scores(self.batch, self.capacity, device)  # of a step's scores, one layer after another; never beyond a length

    @property
    def pool_bytes(self) -> int:
        return self.pool.untyped_storage().nbytes()

    def write(self, request: int, layer: int, index: Tensor, keys: Tensor) -> None:
        """Keys [n, width] as entries `index` int64 [n]; -1 is left out."""
        write_entries(self.pool[layer], self.layout, torch.where(index < 0, -1, request * self.capacity + index), keys)

    def read(self, request: int, layer: int, n_entries: int) -> Tensor:
        """float32 [n_entries, width]."""
        first = request * self.capacity
        return read_entries(self.pool[layer], self.layout, torch.arange(first, first + n_entries, device=self.pool.device))

    def scores(self, layer: int, queries: Tensor, weights: Tensor, lengths: Tensor) -> Scores:
        """queries [B, 1, heads, width], weights [B, 1, heads], lengths int32 [B] -> scores [B, capacity], -inf beyond the lengths."""
        if self.layout.kind == "plain" and not queries.is_cuda:
            keys = self.pool[layer].view(self.layout.dtype).view(self.batch, self.capacity, -1)
            scores = index_scores_blocked(queries, weights, keys)[:, 0].float()
            scores.masked_fill_(torch.arange(self.capacity, device=scores.device) >= lengths[:, None], float("-inf"))
            return Scores(scores, scores.unflatten(1, (-1, GROUP)).amax(2))
        return index_scores(queries[:, 0], weights[:, 0].float(), self.pool[layer], self.layout, self.table, lengths, self.buffers)
