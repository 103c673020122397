"""Whole decode steps of a model with random weights under a policy that a trace drives: footprints
and times at a published model's size.

The model (`fmsim.exec.model.weights.synthetic`) runs every layer, scores its index keys and
selects, in the published layouts of 584 and 132 bytes. Since random weights attend to nothing in
particular, what it selects is dropped, and the trace's own selection is attended to, through the
block tables that the policy's residency keeps: so recalls and misses are real traffic of the real
policy on real attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmsim.exec.decode.step_state import decode_attentions, graph_after_one
from fmsim.exec.decode.trace_driven import TraceDrivenDecode, layouts
from fmsim.exec.kernels.attention.rows import Rows
from fmsim.exec.kernels.attention.sparse_attention import Masses
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kernels.selection.greedy import likeliest
from fmsim.exec.kernels.selection.index_score import Scores, index_scores, new_scores
from fmsim.exec.kernels.selection.memory_score import memory_scores
from fmsim.exec.kernels.selection.top_k import top_k as best
from fmsim.exec.kv.home import Home
from fmsim.exec.measure.kernel_cases import fill_entries
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.cache import Attend
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.geometry.memory_indexer import PUBLISHED_HEADS


class TracePager:
    """`fmsim.exec.decode.decode_attention.EntryPager` of CSA layer `layer`: what a trace selected,
    where a policy keeps it.
    """

    def __init__(self, step: SyntheticStep, layer: int):
        decode = step.decode
        self.step, self.decode, self.layer, self.trace_layer = (
            step,
            decode,
            layer,
            step.layer_map[layer],
        )
        self.blocks = decode.blocks[layer]
        self.wants_masses = decode.policy.observes and decode.policy.needs_mass
        self.homes = decode.tiers.entries.homes(layer, self.blocks)
        self.stages = decode.stages
        self.loads = self.stages and decode.policy.params.on_miss == "fetch"
        self.recalls = decode.policy.params.cadence > 1 or decode.policy.prefetches
        self.brings = self.recalls and not self.stages
        self.keeps_keys = layer < decode.keyed_layers
        if self.keeps_keys:
            self.key_homes = [Home(step.keys.pool[layer], step.keys.table)]
        else:
            self.key_homes = decode.tiers.keys.homes(layer - decode.keyed_layers, self.blocks)

    def choose(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> None:
        if self.recalls and not self.keeps_keys:
            self.decode.tiers.keys.wait_for(self.layer - self.decode.keyed_layers)
        if self.recalls and not self.brings:
            self.decode.tiers.wait_for(self.layer)
        (pool, table), of, resident = (
            self.key_homes[0],
            (queries[:, 0], weights[:, 0].float()),
            self.decode.tiers.resident,
        )
        if resident is None:
            scores = index_scores(*of, pool, self.step.key, table, visible, self.step.scores)
            best(scores.scores, visible, top_k, scores.maxima)
        else:
            resident.best(
                self.decode.group(self.layer), *of, pool, self.step.key, top_k, kept=self.keeps_keys
            )

    def bring(self) -> Tensor:
        given = self.step.given[self.trace_layer]
        if self.brings:
            self.decode.tiers.entries.bring(self.layer, given, self.blocks)
        elif self.stages:
            self.decode.stage(self.layer)
        return given

    def reports(
        self, q: Tensor, rows: Rows, masses: Masses | None, x: Tensor, attention: Attention
    ) -> None:
        """A trace's masses are known."""


@dataclass(frozen=True)
class _AllKeys:
    """Index keys of the layers that keep all theirs: a pool a layer, [layers, pages, page bytes],
    and one table int32 [B, pages].
    """

    pool: Tensor
    table: Tensor


class SyntheticStep:
    """What a step of `decode` computes: call it with the step's number.

    Made before `decode` runs, and with it on one device.
    """

    def __init__(
        self,
        decode: TraceDrivenDecode,
        model: DeepseekV4,
        layer_map: tuple[int, ...],
        seed: int = 0,
    ):
        self.decode, self.model, self.layer_map = decode, model, layer_map
        latent, self.key = layouts(decode.geometry)
        device, batch = decode.device, decode.batch
        self.first_token, self.longest = (
            decode.replayer.header.prompt_tokens,
            decode.replayer.header.prompt_tokens + decode.replayer.n_steps,
        )
        entries, resident = decode.geometry.csa_entries(self.longest), decode.tiers.resident
        if resident is None:
            home = Home.of_its_own(self.key, batch, entries, device)
        else:  # in pages as the residency's, so that those of what is resident can be found
            home = Home.of_its_own(
                self.key,
                batch,
                resident.n_pages * resident.granularity,
                device,
                resident.granularity,
            )
        self.keys = _AllKeys(
            home.pool.expand(decode.keyed_layers, *home.pool.shape).contiguous(), home.table
        )
        self.scores = new_scores(batch, home.table.shape[1] * self.key.per_page(home.pool), device)
        self._selected = torch.from_numpy(decode.replayer.ids.copy()).to(device)  # int32 [T, L, K]
        layers, width = self._selected.shape[1:]
        self.given = torch.full(
            (layers, batch, width), -1, dtype=torch.int32, device=device
        )  # of the trace's layers: what this step attends to
        pagers = [TracePager(self, layer) for layer in range(decode.geometry.n_csa)]
        self.attends = decode_attentions(model, batch, self.longest, latent, self.key, pagers)
        # the first CSA layer waits for what is shown
        first = next(n for n, attend in enumerate(self.attends) if attend.pager is not None)
        self._attend_shown: list[Attend] = list(self.attends)
        self._attend_shown[first] = self._when_shown(self.attends[first])
        self._fill(latent, seed)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._positions = torch.full((batch,), self.first_token, dtype=torch.int32, device=device)
        self.logits = torch.zeros(
            batch, model.config.vocab_size, device=device, dtype=model.lm_head.weight.dtype
        )
        self._step = 0
        self._forward = graph_after_one(self._compute) if device.type == "cuda" else self._compute
        self._indexer = torch.randn(
            decode.keyed_layers, batch, PUBLISHED_HEADS, self.key.width, device=device
        ).to(torch.float8_e4m3fn)  # as the released engine scores

    def __call__(self, step: int) -> None:
        self.prepare(step)
        self.compute()

    @torch.inference_mode()
    def prepare(self, step: int) -> None:
        """What the trace selected in the step, where it is here or will be loaded."""
        self.given.copy_(self._there(self._selected[step])[:, None])
        self._step = step

    @torch.inference_mode()
    def compute(self) -> None:
        """All layers, in which nobody looks at the residency."""
        self._positions.fill_(self.first_token + self._step)
        if self.decode.keyed_layers < self.decode.geometry.n_csa and len(self._indexer):
            requests = self._in_turn()
            if requests.stop > requests.start:
                self._score_memory(requests)
        self._forward()

    @property
    def fixed_bytes(self) -> int:
        """Of one request: index keys that are all kept, HCA entries and windows."""
        return (
            self.keys.pool.nbytes + sum(attend.cache_bytes for attend in self.attends)
        ) // self.decode.batch

    @property
    def open_bytes(self) -> int:
        """Of one request: the compressors' open windows, which the geometry's arithmetic leaves
        out.
        """
        return (
            sum(tensor.nbytes for attend in self.attends for tensor in attend.open_windows)
            // self.decode.batch
        )

    def _compute(self) -> None:
        self.logits.copy_(self.model.decode(self._tokens, self._positions, self._attend_shown))
        self._tokens.copy_(likeliest(self.logits))

    def _when_shown(self, attend: Attend) -> Attend:
        def attended(x: Tensor, positions: Tensor) -> Tensor:
            self.decode.wait_until_shown()
            return attend(x, positions)

        return attended

    def _there(self, ids: Tensor) -> Tensor:
        """Of entries int32 [L, K] those whose page is resident, or fetched in this step, and -1 for
        the others.
        """
        decode, residency = self.decode, self.decode.manager.residency
        if decode.manager.needs.keeps_all:
            return ids
        there = residency.table >= 0
        decode.manager.ctx.put(there, torch.where(decode.fetched, decode.pages, -1), True)
        there[:, -1] = False
        page = torch.where(ids < 0, -1, ids // decode.tiers.entries.granularity)
        return torch.where(decode.manager.ctx.read(there, page), ids, -1)

    def _in_turn(self) -> slice:
        """Requests whose memory indexer scores in this step: one's at a decision, and many in turns
        between two, as `DecodeLoop` foresees for them.
        """
        cadence, batch = self.decode.policy.params.cadence, self.decode.batch
        after = self._step % cadence
        if cadence == 1:
            return slice(0, 0)
        if batch == 1 or not after:
            return slice(0, int(batch == 1 and not after))
        first, last = (-(-turn * batch // (cadence - 1)) for turn in (after - 1, after))
        return slice(first, last)

    def _score_memory(self, requests: slice) -> None:
        """A memory indexer of the published size over the layers that keep all keys: for its time;
        the trace's decides.
        """
        queries = self._indexer[:, requests].contiguous()
        memory_scores(
            queries,
            queries[..., 0].float(),
            list(self.keys.pool),
            self.key,
            [self.keys.table[requests]] * len(queries),
            self._positions[requests] // 4,
            out=Scores(*(part[: queries.shape[1]] for part in self.scores)),  # nobody reads them
        )

    def _fill(self, latent: Layout, seed: int) -> None:
        """Entries and keys of made-up content, all finite."""
        torch.manual_seed(seed)
        caches = self.decode.tiers.caches
        pools = [(cache.storage, cache.layout) for cache in caches] + [
            (self.keys.pool.flatten(0, 1), self.key)
        ]
        pools += [(attend.window, latent) for attend in self.attends] + [
            (attend.hca.pool, latent) for attend in self.attends if attend.hca is not None
        ]
        for pool, layout in pools:
            fill_entries(pool, layout)
        for cache in caches:
            filled = cache.layers if cache.mirrored and cache.made_mirror else 0
            for layer in range(filled):  # made on the device, which is faster at it
                cache.mirror[layer].copy_(
                    fill_entries(
                        torch.empty_like(cache.mirror[layer], device=self.decode.device),
                        cache.layout,
                    )
                )
