"""The engine's side of `fmsim validate`: its keeper in torch and its tiered cache, driven by what a trace says was selected.

No model runs: a trace of one model's layers drives another geometry's by a layer map, and what is to be shown is that pages move as
the replay says, byte for byte. The mirror holds random bytes; every page that a step attends to is compared with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import array_api_compat.torch as xp
import numpy as np
import torch

from fmsim.errors import FmsimError
from fmsim.exec.kernels.layout import KEY, LATENT, Layout
from fmsim.exec.tiered import RequestSize, TieredCache
from fmsim.geometry import Geometry
from fmsim.keeper import Accesses, Keeper
from fmsim.ledger import Ledger
from fmsim.policies.base import Policy
from fmsim.replay import Replayer, context_in
from fmsim.tally import Tally


@dataclass(frozen=True)
class Outcome:
    """`slots` int32 [T, G, S] at each step's end. `allocated_bytes`: slots, keys and what no policy changes; staging apart."""

    ledger: Ledger
    slots: np.ndarray
    h2d_bytes: int
    allocated_bytes: int
    staging_bytes: int
    step_s: np.ndarray  # [T], measured: moves and bookkeeping, without a model's compute


class DrivenDecode:
    """`policy` on the trace of `replayer`, moving the bytes of `geometry`'s CSA layers; layer j follows group `groups[j]`.

    `keyed_layers` of them keep all their index keys on the GPU; the others' keys lie with their entries. With `check` every page
    attended to is compared with the mirror's.
    """

    def __init__(
        self, replayer: Replayer, policy: Policy, geometry: Geometry, groups: Sequence[int], keyed_layers: int, device: str = "cpu", check: bool = True
    ):
        params = policy.params
        self.replayer, self.geometry, self.groups, self.check = replayer, geometry, [int(group) for group in groups], check
        self.device = torch.device(device)
        self.paged = replayer.paged(params.granularity, params.scope == "shared")
        ctx = replayer.context(policy, self.paged)
        self.keeper = Keeper(policy, context_in(ctx, xp, self.device))
        self.keeper.start()
        self.tally = Tally(self.keeper, replayer.n_steps)
        full = ctx.n_slots >= ctx.n_pages
        staged = 0 if full or params.on_miss == "mask" else min(self.paged.pages.shape[2], ctx.n_pages)
        comes_back = not full and (params.on_miss != "mask" or params.cadence > 1)
        entry, key = layouts(geometry)

        def tiers(layout: Layout, layers: int) -> TieredCache:
            size = RequestSize(ctx.n_pages, ctx.n_slots, staged)
            return TieredCache(layout, layers, params.granularity, [size], self.device, mirrored=comes_back)

        self.entries = tiers(entry, geometry.n_csa)
        self.keys = tiers(key, geometry.n_csa - keyed_layers)
        tokens = replayer.header.prompt_tokens + replayer.n_steps
        pinned_bytes = geometry.gpu_kv_bytes(tokens, 0, keyed_layers * geometry.csa_entries(tokens))
        self.fixed = torch.zeros(pinned_bytes, dtype=torch.uint8, device=self.device)  # windows, HCA entries, the other index keys
        # each tier with the group of each of its layers
        self.parts = [(tiers, torch.tensor(of, device=self.device)) for tiers, of in ((self.entries, self.groups), (self.keys, self.groups[keyed_layers:])) if of]
        self._fill()

    def run(self) -> Outcome:
        """All steps of the trace."""
        slots, step_s, hit, attended = [], [], np.zeros(self.paged.pages.shape, bool), np.zeros(self.paged.pages.shape, bool)
        for step in range(self.replayer.n_steps):
            start_s = time.perf_counter()
            outcome = self._step(step)
            step_s.append(time.perf_counter() - start_s)
            hit[step], attended[step] = outcome.hit.cpu(), (outcome.hit | outcome.fetched).cpu()
            slots.append(self.keeper.residency.slots.cpu().numpy().copy())
        by_entry = (self.paged.by_entry(flag, self.replayer.n_layers) for flag in (hit, attended))
        tiers = (self.entries, self.keys)
        return Outcome(
            ledger=self.tally.ledger(self.replayer.ids, self.replayer.mass, *by_entry, self.replayer.golden),
            slots=np.stack(slots),
            h2d_bytes=sum(int(t.recalled_pages + t.staged_pages) * t.page_bytes for t in tiers),
            allocated_bytes=sum(t.slot_bytes for t in tiers) + self.fixed.untyped_storage().nbytes(),
            staging_bytes=sum(t.pool_bytes - t.slot_bytes for t in tiers),
            step_s=np.array(step_s),
        )

    def _step(self, step: int):
        written, recalled = self.tally.begin(step, self.replayer.entries[step])
        if recalled is not None:
            for tiers, groups in self.parts:
                tiers.recall(recalled.pages[groups], recalled.slots[groups])
        if written is not None:
            self._write(written)
        use = Accesses(*(torch.from_numpy(np.array(part[step])).to(self.device) for part in (self.paged.pages, self.paged.count, self.paged.mass)))
        table = self.keeper.residency.table
        blocks = [tiers.blocks(0, table[groups]) for tiers, groups in self.parts]
        missing = (use.pages >= 0) & (self.keeper.residency.lookup(use.pages) < 0)
        fetched = self.keeper.to_fetch(use, missing)
        if self.entries.stage_pages:
            for (tiers, groups), block in zip(self.parts, blocks):
                for layer, group in enumerate(groups):
                    tiers.stage(layer, use.pages[group][None].long(), fetched[group][None], block[layer : layer + 1])
        if self.check and self.entries.mirrored:
            self._compare(step, torch.where(missing & ~fetched, -1, use.pages), blocks)
        outcome = self.tally.access(step, use)
        if outcome.moves is not None and self.entries.stage_pages:
            for (tiers, groups), block in zip(self.parts, blocks):
                tiers.settle(outcome.moves.pages[groups], outcome.moves.slots[groups], block[:, None])
        return outcome

    def _fill(self) -> None:
        """Random bytes in the mirror, and in the slots what the prefill leaves there; not traffic."""
        generator = torch.Generator().manual_seed(self.replayer.header.seed)
        for tiers in (self.entries, self.keys):
            tiers.mirror.random_(0, 256, generator=generator)
        pages = self.keeper.residency.slots
        places = torch.arange(pages.shape[1], device=self.device)
        self._uncounted(pages.clamp(min=0).long(), torch.where(pages < 0, -1, places))

    def _write(self, written) -> None:
        """Pages that begin: their entries come from the GPU, so their bytes go straight into slot and mirror, which has them already."""
        self._uncounted(written.pages, written.slots)

    def _uncounted(self, pages: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy from the mirror into slots, both [G, m], what no link would carry."""
        for tiers, groups in self.parts:
            before = tiers.recalled_pages.clone()
            tiers.recall(pages[groups], slots[groups])
            tiers.recalled_pages.copy_(before)

    def _compare(self, step: int, pages: torch.Tensor, blocks: list[torch.Tensor]) -> None:
        for (tiers, groups), block in zip(self.parts, blocks):
            for layer, group in enumerate(groups):
                attended = pages[group][pages[group] >= 0].long()
                held, kept = tiers.pool[layer][block[layer][attended].long()], tiers.mirror[layer][attended.to(tiers.mirror.device)]
                if not torch.equal(held.cpu(), kept):
                    raise FmsimError(f"policy {self.keeper.policy.name}, step {step}, layer {layer}: a page on the GPU differs from the mirror's: a bug in fmsim")


def layouts(geometry: Geometry) -> tuple[Layout, Layout]:
    """How `geometry`'s entries and index keys lie: V4's own 584 and 132 bytes, or as many bytes as its byte arithmetic says."""
    entry = LATENT if geometry.kv_entry_bytes == LATENT.entry_bytes else Layout("plain", geometry.kv_entry_bytes, geometry.kv_entry_bytes, 0)
    key = KEY if geometry.index_key_bytes == KEY.entry_bytes else Layout("plain", geometry.index_key_bytes, geometry.index_key_bytes, 0)
    return entry, key


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
