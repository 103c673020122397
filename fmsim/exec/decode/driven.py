"""The engine's keeper in torch and its tiered cache, driven by what a trace says was selected: the
engine's side of `fmsim validate`.

A trace of one model's layers drives another geometry's by a layer map, and pages move as the replay
says, byte for byte. Without a model the mirror holds random bytes, and every page that a step
attends to is compared with it. With one of random weights (`fmsim.exec.decode.synthetic_decode`)
the same moves run beside, and within, whole decode steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.kernels.layout import KEY, LATENT, Layout
from fmsim.exec.kv.paired import PairedTiers
from fmsim.exec.kv.tiered import AHEAD, RequestSize
from fmsim.exec.measure.step_clock import StepClock
from fmsim.geometry import Geometry
from fmsim.policies.base import LookaheadPolicy, Policy
from fmsim.replay.cache_manager import Accesses, Keeper
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer, context_in
from fmsim.replay.tally import Tally


@dataclass(frozen=True)
class Outcome:
    """`slots` int32 [T, G, S] at each step's end, where they were watched.

    Bytes are of one request, seconds of a step.
    """

    ledger: Ledger
    slots: np.ndarray | None
    h2d_bytes: int
    step_s: np.ndarray  # [T]
    recall_wait_s: np.ndarray  # [T]: of it, at a window's start


class DrivenDecode:
    """`policy` on the trace of `replayer`, moving the bytes of `geometry`'s CSA layers; layer j
    follows group `groups[j]`.

    `keyed_layers` of them keep all their index keys on the GPU; the others' keys lie with their
    entries. ``batch`` requests follow the trace in step, so one keeper decides for all, and all
    share one mirror; each has slots of its own. With `watch` the slots of every step are kept, and
    every page attended to is compared with the mirror's.
    """

    def __init__(
        self,
        replayer: Replayer,
        policy: Policy,
        geometry: Geometry,
        groups: Sequence[int],
        keyed_layers: int,
        device: str = "cpu",
        *,
        batch: int = 1,
        watch: bool = True,
    ):
        params = policy.params
        self.replayer, self.policy, self.geometry, self.batch, self.watch = (
            replayer,
            policy,
            geometry,
            batch,
            watch,
        )
        self.keyed_layers, self.device = keyed_layers, torch.device(device)
        shared = params.scope == "shared"
        self.paged = replayer.paged(params.granularity, shared)
        ctx = replayer.context(policy, self.paged)
        self.keeper = Keeper(policy, context_in(ctx, xp, self.device))
        self.keeper.start()
        self.tally = Tally(self.keeper, replayer.n_steps)
        full = self.keeper.keeps_all
        staged = (
            0 if full or params.on_miss == "mask" else min(self.paged.pages.shape[2], ctx.n_pages)
        )
        comes_back = not full and (params.on_miss != "mask" or params.cadence > 1)
        ahead = -(-ctx.n_slots // AHEAD) if comes_back and policy.decides_ahead else 0
        size = RequestSize(ctx.n_pages, ctx.n_slots, staged, ahead)
        groups = [int(group) for group in groups]
        tiered = range(keyed_layers, geometry.n_csa)
        self.tiers = PairedTiers(
            *layouts(geometry),
            groups,
            tiered,
            params.granularity,
            [size] * batch,
            self.device,
            mirrored=comes_back,
            one_text=True,
        )
        self._groups, self.stages = groups, staged > 0
        # Pool pages of this step: of each group, int32 [G, B, P + 1], or, where layers load what
        # they miss, of each layer.
        rows = geometry.n_csa if staged else ctx.n_groups
        self._tables = torch.full(
            (rows, batch, ctx.n_pages + 1), -1, dtype=torch.int32, device=self.device
        )
        self.blocks = [
            self._tables[layer if staged else group] for layer, group in enumerate(groups)
        ]  # by layer, [B, P + 1]
        self._uses = [
            self._there(part) for part in (self.paged.pages, self.paged.count, self.paged.mass)
        ]
        shape = self.paged.pages.shape
        self.pages = torch.full(
            shape[1:], -1, dtype=torch.int64, device=self.device
        )  # of this step [G, n], and which are loaded for it
        self.fetched = torch.zeros(shape[1:], dtype=torch.bool, device=self.device)
        self._hit, self._attended = (
            torch.zeros(shape, dtype=torch.bool, device=self.device) for _ in range(2)
        )
        self._slots: list[np.ndarray] = []
        self._shown: list[
            tuple[Tensor, Tensor]
        ] = []  # of the last step, by part: what was attended to, where that is watched
        self._listed = -1  # entries visible when the resident pages were listed
        self.clock = StepClock(self.device)
        tokens = replayer.header.prompt_tokens + replayer.n_steps
        fixed_bytes = (
            geometry.gpu_kv_bytes(tokens, 0, keyed_layers * geometry.csa_entries(tokens))
            if watch
            else 0
        )
        self.fixed = torch.zeros(
            fixed_bytes, dtype=torch.uint8, device=self.device
        )  # in the place of windows, HCA entries, the other index keys
        self._fill_slots(ctx)

    def run(
        self,
        compute: Callable[[int], None] | None = None,
        progress: Callable[[int], None] = lambda steps: None,
    ) -> Outcome:
        """All steps of the trace.

        ``compute(step)`` is what a step does beside moves; it loads the misses itself, and has an
        indexer of its own, so the trace's scores before the first step.
        """
        if compute is not None and isinstance(self.policy, LookaheadPolicy):
            cadence = self.policy.params.cadence
            self.policy.prepare(range(cadence, self.replayer.n_steps, cadence))
        for step in range(self.replayer.n_steps):
            with self.clock.step(self.tiers.moved_bytes):
                self._step(step, compute)
            if self.watch:
                self._slots.append(self.keeper.residency.slots.cpu().numpy().copy())
                self._compare(step)
            progress(1)
        by_entry = (
            self.paged.by_entry(flag.cpu().numpy(), self.replayer.n_layers)
            for flag in (self._hit, self._attended)
        )
        step_s, _, recall_wait_s, _ = self.clock.figures()
        return Outcome(
            ledger=self.tally.ledger(
                self.replayer.ids, self.replayer.mass, *by_entry, self.replayer.golden
            ),
            slots=np.stack(self._slots) if self.watch else None,
            h2d_bytes=int(self.tiers.moved_bytes()) // self.batch,
            step_s=step_s,
            recall_wait_s=recall_wait_s,
        )

    @property
    def slot_bytes(self) -> int:
        """Of one request: what its slots take, in both tiers."""
        return self.tiers.slot_bytes // self.batch

    @property
    def spare_bytes(self) -> int:
        """Of one request: pages for misses and for what is recalled ahead."""
        return (self.tiers.pool_bytes - self.tiers.slot_bytes) // self.batch

    def group(self, layer: int) -> int:
        """The residency's group that a CSA layer follows."""
        return self._groups[layer]

    def stage(self, layer: int) -> None:
        """Load this step's misses of a layer, of every request."""
        group = self.group(layer)
        pages, fetched = (of[group].expand(self.batch, -1) for of in (self.pages, self.fetched))
        self.tiers.entries.stage(layer, pages, fetched, self.blocks[layer])

    def _step(self, step: int, compute: Callable[[int], None] | None) -> None:
        with self.clock.recall():
            changed = self._decide(step, moved_by_copies=compute is None) or step == 0
        use = Accesses(*(part[step] for part in self._uses))
        missing = (use.pages >= 0) & (self.keeper.residency.lookup(use.pages) < 0)
        self.pages.copy_(use.pages)
        self.fetched.copy_(self.keeper.to_fetch(use, missing))
        if changed or self.stages:
            table = self.keeper.residency.table
            self.tiers.entries.blocks_of_all(
                self.tiers.by_layer(table) if self.stages else table, self._tables
            )
        visible = int(self.replayer.entries[step])
        if (
            compute is not None
            and self.tiers.resident is not None
            and (changed or visible != self._listed)
        ):
            self.tiers.resident.list(self.keeper.residency.slots, visible)
            self._listed = visible
        if compute is not None:
            compute(step)
        elif self.stages:
            for layer in range(self.tiers.entries.layers):
                self.stage(layer)
        attended = torch.where(missing & ~self.fetched, -1, use.pages)
        self._hit[step], self._attended[step] = (use.pages >= 0) & ~missing, attended >= 0
        if self.watch and self.tiers.mirrored:
            self._shown = [
                self._attended_to(part, attended.long()) for part in range(len(self.tiers.caches))
            ]
        if self.keeper.passive:
            self.tally.rest(step)
            return
        outcome = self.tally.settle(step, use, self.fetched)
        if outcome.moves is not None and self.stages:
            self.tiers.settle(
                outcome.moves.pages, outcome.moves.slots, self._tables, all_staged=True
            )

    def _decide(self, step: int, moved_by_copies: bool) -> bool:
        """What begins, what a decision recalls, and what the next one will; -> whether a page may
        have got or lost a slot.
        """
        written, recalled = self.tally.begin(step, self.replayer.entries[step])
        if recalled is not None:
            self.tiers.recall(recalled.pages, recalled.slots)
        if (
            written is not None and moved_by_copies
        ):  # entries come from the GPU: into slot and mirror, which has these bytes already
            self._uncounted(written.pages, written.slots)
        most, then = self.tiers.entries.sizes[0].ahead, step + self.policy.params.cadence
        if most and step % self.policy.params.cadence == 0 and then < self.replayer.n_steps:
            foreseen = self.keeper.foresee(then, int(self.replayer.entries[then]), most)
            if foreseen is not None:
                self.tiers.recall_ahead(foreseen)
        return written is not None or recalled is not None

    def _fill_slots(self, ctx) -> None:
        """Random bytes in the mirror, and in the slots what the prefill leaves there; not
        traffic.
        """
        if self.watch:
            generator = np.random.Generator(
                np.random.SFC64(self.replayer.header.seed)
            )  # the fastest there is
            for cache in self.tiers.caches:
                for layer in cache.mirror.view(torch.int32).numpy():
                    layer[:] = generator.integers(
                        np.iinfo(np.int32).min,
                        np.iinfo(np.int32).max,
                        layer.shape,
                        np.int32,
                        endpoint=True,
                    )
        pages = self.keeper.residency.slots
        places = torch.arange(pages.shape[1], device=self.device)
        self._uncounted(pages.clamp(min=0).long(), torch.where(pages < 0, -1, places))

    def _uncounted(self, pages: Tensor, slots: Tensor) -> None:
        """Copy from the mirror into slots, both [G, m], what no link would carry."""
        before = [cache.recalled_pages.clone() for cache in self.tiers.caches]
        self.tiers.fetch(pages, slots)
        for cache, count in zip(self.tiers.caches, before, strict=True):
            cache.recalled_pages.copy_(count)

    def _attended_to(self, part: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Of the pages of each group [G, n], -1 for none, in every layer of a cache: their numbers
        in the mirror's layers put end to end, int64 [m], and the rows that lie in the pool for
        them, int32 words [B, m, page bytes / 4].
        """
        cache, pages = self.tiers.caches[part], self.tiers.by_layer(pages, part)
        tables = (
            self._tables if self.stages else self.tiers.by_layer(self._tables, part)
        )  # [layers, B, P + 1]; where misses are staged no keys are tiered
        layer, place = (pages >= 0).nonzero(as_tuple=True)
        page = pages[layer, place]
        rows = cache.pool.view(torch.int32).flatten(0, 1)[
            layer * cache.pool.shape[1] + tables[layer, :, page].T
        ]
        return layer * cache.mirror.shape[1] + page, rows

    def _compare(self, step: int) -> None:
        """What the last step attended to with the mirrors' bytes."""
        for cache, layers, (numbers, rows) in zip(
            self.tiers.caches, (range(self.tiers.entries.layers), self.tiers.tiered), self._shown
        ):
            numbers, rows = numbers.cpu(), rows.cpu()
            kept = cache.mirror.view(torch.int32).flatten(0, 1)[numbers]
            if not torch.equal(rows, kept.expand_as(rows)):
                layer = layers[
                    int(numbers[(rows != kept).any(2).any(0)][0]) // cache.mirror.shape[1]
                ]
                raise FmsimError(
                    f"policy {self.policy.name}, step {step}, layer {layer}: a page on the GPU"
                    " differs from the mirror's: a bug in fmsim"
                )

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)


def layouts(geometry: Geometry) -> tuple[Layout, Layout]:
    """How `geometry`'s entries and index keys lie: V4's own 584 and 132 bytes, or as many bytes as
    its byte arithmetic says.
    """
    entry = (
        LATENT
        if geometry.kv_entry_bytes == LATENT.entry_bytes
        else Layout("plain", geometry.kv_entry_bytes, geometry.kv_entry_bytes, 0)
    )
    key = (
        KEY
        if geometry.index_key_bytes == KEY.entry_bytes
        else Layout("plain", geometry.index_key_bytes, geometry.index_key_bytes, 0)
    )
    return entry, key


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
