"""Index keys of a batch, and the lightning indexer's scores of them: all on the GPU, or in some
layers those beside resident entries alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.kernels.layout import Layout, read_entries, slots_of, write_entries
from fmsim.exec.kernels.selection.index_score import GROUP, Scores, index_scores, new_scores
from fmsim.exec.kernels.selection.top_k import top_k as best
from fmsim.exec.kv.home import PER_PAGE, Home
from fmsim.exec.kv.resident import ResidentPages
from fmsim.exec.kv.tiered import TieredCache
from fmsim.exec.model.indexer import index_scores_blocked
from fmsim.policies.base import Policy

# On the GPU: all index keys, or in layers that no memory indexer scores those of resident entries.
Where = Literal["all", "tiered"]


class KeptKeys:
    """Index keys of the layers that keep all theirs on the GPU: ``kept[layer]``.

    There is room for ``capacities[b]`` keys of each request. The other layers are `tiered`. Raises
    FmsimError for a policy that needs more than ``where`` keeps.
    """

    def __init__(
        self,
        where: Where,
        policy: Policy,
        layout: Layout,
        layers: int,
        capacities: Sequence[int],
        device: torch.device,
    ):
        if where == "tiered":
            check_tiered(policy)
        targets = range(layers) if where == "all" else policy.target_layers()
        self.where = where
        self.layout = layout
        self.layers = layers
        capacity = cdiv(max(1, *capacities), PER_PAGE) * PER_PAGE
        self.buffers = new_scores(len(capacities), capacity, device)
        self.kept = {
            layer: AllKeys(layout, self.buffers, device)
            for layer in range(layers)
            if layer in targets
        }
        self.tiered = [layer for layer in range(layers) if layer not in self.kept]

    def first(self, request: int, n_entries: int) -> Tensor | KeysByLayer:
        """float32 [L, n_entries, width], or where some are tiered the others' by layer."""
        if self.tiered:
            return KeysByLayer(self, request, n_entries)
        return torch.stack([keys.read(request, n_entries) for keys in self.kept.values()])

    @property
    def kept_bytes(self) -> int:
        """What these layers' keys take of GPU memory."""
        return sum(keys.pool.untyped_storage().nbytes() for keys in self.kept.values())


class LayerKeys:
    """What keys in either place have in common.

    `complete`: the keys of all entries are on the GPU; `homes` of new ones, to be scored in the
    first.

    ``buffers`` of `new_scores` are the layers' in common, one after another: all write as much of
    them, and never beyond a length.
    """

    complete: bool
    homes: list[Home]

    def __init__(self, layout: Layout, buffers: Scores):
        self.layout, self.buffers = layout, buffers
        self.batch, self.capacity = buffers.scores.shape

    def fill(self, request: int, keys: Tensor) -> None:
        """A prefill's keys [E, width]."""
        raise NotImplementedError  # abstract: either place defines it

    def append(self, request: int, key: Tensor, index: Tensor) -> None:
        """A new key [1, width], number `index` int64 [1] (-1 = none)."""
        raise NotImplementedError  # abstract: either place defines it

    def wait(self) -> None:
        """What a decision recalled of them is here for what comes after."""

    def scores(self, queries: Tensor, weights: Tensor, lengths: Tensor) -> Scores:
        """queries [B, 1, heads, width], weights [B, 1, heads], lengths int32 [B] -> scores [B,
        capacity], -inf beyond the lengths and where a key is not here.
        """
        if self.layout.kind == "plain" and not queries.is_cuda:
            keys, absent = self._in_order()
            scores = index_scores_blocked(queries, weights, keys)[:, 0].float()
            scores.masked_fill_(
                absent | (torch.arange(self.capacity, device=scores.device) >= lengths[:, None]),
                float("-inf"),
            )
            return Scores(scores, scores.unflatten(1, (-1, GROUP)).amax(2))
        pool, table = self.homes[0]
        return index_scores(
            queries[:, 0], weights[:, 0].float(), pool, self.layout, table, lengths, self.buffers
        )

    def _in_order(self) -> tuple[Tensor, Tensor | bool]:
        """Keys [B, capacity, width], and which of them are not here, bool [B, capacity]."""
        raise NotImplementedError  # abstract: either place defines it


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
        write_entries(
            self.pool, self.layout, torch.where(index < 0, -1, request * self.capacity + index), key
        )

    def read(self, request: int, n_entries: int) -> Tensor:
        """float32 [n_entries, width]."""
        first = request * self.capacity
        return read_entries(
            self.pool, self.layout, torch.arange(first, first + n_entries, device=self.pool.device)
        )

    def _in_order(self) -> tuple[Tensor, bool]:
        return self.pool.view(self.layout.dtype).view(self.batch, self.capacity, -1), False


class ResidentKeys(LayerKeys):
    """Keys beside their entries: layer ``number`` of ``tiers``, its resident pages by ``tables``,
    rows [P + 1] of each request's residency.

    ``blocks`` int32 [B, P + 1] are those of the entries' pager: a page of keys has the slot of its
    entries. ``resident`` lists the pages that are here, the layer's as its ``group``.
    """

    complete = False

    def __init__(
        self,
        tiers: TieredCache,
        number: int,
        tables: Sequence[Tensor],
        blocks: Tensor,
        buffers: Scores,
        resident: ResidentPages,
        group: int,
    ):
        super().__init__(tiers.layout, buffers)
        self.resident, self.group = resident, group
        self.tiers, self.number, self.tables, self.blocks = tiers, number, tables, blocks
        self.homes = tiers.homes(number, blocks)

    def fill(self, request: int, keys: Tensor) -> None:
        self.tiers.fill(request, self.number, keys, self.tables[request])

    def append(self, request: int, key: Tensor, index: Tensor) -> None:
        self.tiers.append(request, self.number, key, index, self.tables[request])

    def wait(self) -> None:
        self.tiers.wait_for(self.number)

    def best(self, queries: Tensor, weights: Tensor, lengths: Tensor, top_k: int) -> Tensor:
        """Of the resident entries among the first ``lengths`` [B], the ids of the best: int32 [B,
        top_k], ascending, -1 where there are fewer.
        """
        if queries.is_cuda:
            return self.resident.best(
                self.group,
                queries[:, 0],
                weights[:, 0].float(),
                self.homes[0].pool,
                self.layout,
                top_k,
            )
        scores = self.scores(queries, weights, lengths)
        return best(scores.scores, lengths, top_k, scores.maxima)

    def _in_order(self) -> tuple[Tensor, Tensor]:
        (pool, table), granularity = self.homes[0], self.tiers.granularity
        ids = torch.arange(self.capacity, device=pool.device).clamp(
            max=table.shape[1] * granularity - 1
        )
        slots = slots_of(table, ids.expand(self.batch, -1), granularity)
        return read_entries(pool, self.layout, slots).to(self.layout.dtype), slots < 0


class KeysByLayer:
    """`LookaheadState.keys` where only some layers' are at hand: ``keys[layer]`` float32 [n, D];
    `shape` (L, n, D) is that of all.
    """

    def __init__(self, keys: KeptKeys, request: int, n_entries: int):
        self.kept, self.request, self.n_entries = keys.kept, request, n_entries
        self.shape = (keys.layers, n_entries, keys.layout.width)

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self.kept:
            raise FmsimError(
                f"CSA layer {layer} keeps the index keys of resident entries alone, and those of"
                f" layers {list(self.kept)} are all there; use --index-keys all"
            )
        return self.kept[layer].read(self.request, self.n_entries)


def check_tiered(policy: Policy) -> None:
    """Raise FmsimError where `policy` needs more than tiered keys."""
    name, on_miss = policy.name, policy.params.on_miss
    if on_miss != "mask":
        raise FmsimError(
            f"--index-keys tiered: policy {name} has on_miss {on_miss}, which chooses what to load"
            " by the scores of all index keys; give --set on_miss=mask, or --index-keys all"
        )
    if not policy.target_layers():
        raise FmsimError(
            f"--index-keys tiered: policy {name} has no memory indexer, whose layers keep all their"
            " index keys, so nothing would tell what is lost; give --policy lsa, or"
            " --index-keys all"
        )
