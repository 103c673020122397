"""Index keys of one CSA layer of a batch, and its lightning indexer's scores: over all keys, or over those that lie beside resident entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.decode_attention import PER_PAGE, Home
from fmsim.exec.kernels.index_score import GROUP, Scores, index_scores, new_scores
from fmsim.exec.kernels.layout import Layout, read_entries, slots_of, write_entries
from fmsim.exec.model import index_scores_blocked
from fmsim.exec.tiered import TieredCache
from fmsim.policies.base import Policy

Where = Literal["all", "tiered"]  # on the GPU: all index keys, or in layers that no memory indexer scores those of resident entries


class LayerKeys:
    """What keys in either place have in common. `complete`: the keys of all entries are on the GPU; `homes` of new ones, to be scored in the first.

    ``buffers`` of `new_scores` are the layers' in common, one after another: all write as much of them, and never beyond a length.
    """

    complete: bool
    homes: list[Home]

    def __init__(self, layout: Layout, buffers: Scores):
        self.layout, self.buffers = layout, buffers
        self.batch, self.capacity = buffers.scores.shape

    def fill(self, request: int, keys: Tensor) -> None:
        """A prefill's keys [E, width]."""
        raise NotImplementedError

    def append(self, request: int, key: Tensor, index: Tensor) -> None:
        """A new key [1, width], number `index` int64 [1] (-1 = none)."""
        raise NotImplementedError

    def scores(self, queries: Tensor, weights: Tensor, lengths: Tensor) -> Scores:
        """queries [B, 1, heads, width], weights [B, 1, heads], lengths int32 [B] -> scores [B, capacity], -inf beyond the lengths and where a key is not here."""
        if self.layout.kind == "plain" and not queries.is_cuda:
            keys, absent = self._in_order()
            scores = index_scores_blocked(queries, weights, keys)[:, 0].float()
            scores.masked_fill_(absent | (torch.arange(self.capacity, device=scores.device) >= lengths[:, None]), float("-inf"))
            return Scores(scores, scores.unflatten(1, (-1, GROUP)).amax(2))
        pool, table = self.homes[0]
        return index_scores(queries[:, 0], weights[:, 0].float(), pool, self.layout, table, lengths, self.buffers)

    def _in_order(self) -> tuple[Tensor, Tensor | bool]:
        """Keys [B, capacity, width], and which of them are not here, bool [B, capacity]."""
        raise NotImplementedError


class AllKeys(LayerKeys):
    """All keys of a layer on the GPU, in pages of 64, as in the deployed engine."""

    complete = True

    def __init__(self, layout: Layout, buffers: Scores, device: torch.device):
        super().__init__(layout, buffers)
        self.homes = [Home.of_its_own(layout, self.batch, self.capacity, device)]
        self.pool = self.homes[0].pool

    def fill(self, request: int, keys: Tensor) -> None:
        self.append(request, keys, torch.arange(len(keys), device=self.pool.device))

    def append(self, request: int, key: Tensor, index: Tensor) -> None:
        write_entries(self.pool, self.layout, torch.where(index < 0, -1, request * self.capacity + index), key)

    def read(self, request: int, n_entries: int) -> Tensor:
        """float32 [n_entries, width]."""
        first = request * self.capacity
        return read_entries(self.pool, self.layout, torch.arange(first, first + n_entries, device=self.pool.device))

    def _in_order(self) -> tuple[Tensor, bool]:
        return self.pool.view(self.layout.dtype).view(self.batch, self.capacity, -1), False


class ResidentKeys(LayerKeys):
    """Keys beside their entries: layer ``number`` of ``tiers``, its resident pages by ``tables``, rows [P + 1] of each request's residency.

    ``blocks`` int32 [B, P + 1] are those of the entries' pager: a page of keys has the slot of its entries.
    """

    complete = False

    def __init__(self, tiers: TieredCache, number: int, tables: Sequence[Tensor], blocks: Tensor, buffers: Scores):
        super().__init__(tiers.layout, buffers)
        self.tiers, self.number, self.tables, self.blocks = tiers, number, tables, blocks
        self.homes = tiers.homes(number, blocks)

    def fill(self, request: int, keys: Tensor) -> None:
        self.tiers.fill(request, self.number, keys, self.tables[request])

    def append(self, request: int, key: Tensor, index: Tensor) -> None:
        self.tiers.append(request, self.number, key, index, self.tables[request])

    def _in_order(self) -> tuple[Tensor, Tensor]:
        (pool, table), granularity = self.homes[0], self.tiers.granularity
        ids = torch.arange(self.capacity, device=pool.device).clamp(max=table.shape[1] * granularity - 1)
        slots = slots_of(table, ids.expand(self.batch, -1), granularity)
        return read_entries(pool, self.layout, slots).to(self.layout.dtype), slots < 0


class KeysByLayer:
    """`LookaheadState.keys` where only some layers' are at hand: ``keys[layer]`` float32 [n, D]; `shape` (L, n, D) is that of all."""

    def __init__(self, kept: Mapping[int, AllKeys], layers: int, request: int, n_entries: int):
        self.kept, self.request, self.n_entries = kept, request, n_entries
        self.shape = (layers, n_entries, next(iter(kept.values())).layout.width)

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self.kept:
            raise FmsimError(f"CSA layer {layer}'s index keys lie with their entries, and only those of layers {sorted(self.kept)} can be scored; use --index-keys all")
        return self.kept[layer].read(self.request, self.n_entries)


def kept_layers(where: Where, policy: Policy, layers: int) -> list[int]:
    """The CSA layers, of ``layers``, that keep all their index keys on the GPU. Raises FmsimError for a policy that needs more than `tiered` keys."""
    if where == "all":
        return list(range(layers))
    name, on_miss, targets = policy.name, policy.params.on_miss, policy.target_layers()
    if on_miss != "mask":
        raise FmsimError(
            f"--index-keys tiered: policy {name} has on_miss {on_miss}, which chooses what to load by the scores of all index keys; "
            "give --set on_miss=mask, or --index-keys all"
        )
    if not targets:
        raise FmsimError(
            f"--index-keys tiered: policy {name} has no memory indexer, whose layers keep all their index keys, so nothing would tell what it loses; "
            "use lsa, or --index-keys all"
        )
    return [layer for layer in range(layers) if layer in targets]


def score_buffers(batch: int, entries: int, device: torch.device) -> Scores:
    """Room for ``entries`` scores of each request, in whole pages."""
    return new_scores(batch, -(-entries // PER_PAGE) * PER_PAGE, device)
