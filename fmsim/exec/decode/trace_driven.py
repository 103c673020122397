"""The engine's tiered cache, driven by what a trace says was selected: the engine's side of
`fmsim validate`.

A trace of one model's layers drives another geometry's by a layer map, and pages move as the replay
says, byte for byte. Without a model the mirror holds random bytes, and every page that a step
attends to is compared with it. With one of random weights (`fmsim.exec.decode.synthetic_decode`)
the same moves run beside, and within, whole decode steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.exec.decode.device_tiers import SharedTiers, StepTables, copy_uncounted
from fmsim.exec.kernels.layout import KEY, LATENT, Layout
from fmsim.exec.kv.home import Home
from fmsim.exec.kv.paired import PairedTiers
from fmsim.exec.kv.tiered import RequestSize
from fmsim.exec.measure.allocator import AllocatorMeter
from fmsim.exec.measure.step_clock import StepClock
from fmsim.geometry import Geometry
from fmsim.policies.base import LookaheadPolicy, Policy
from fmsim.replay.cache_manager import Served
from fmsim.replay.decode_loop import DecodeLoop
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.replay.trace_source import TraceSource


@dataclass(frozen=True)
class TraceDrivenRun:
    """What a trace-driven decode did. Bytes are of one request, seconds of a step."""

    ledger: Ledger
    slots: np.ndarray | None  # int32 [T, G, S] at each step's end, where they were watched
    h2d_bytes: int
    step_s: np.ndarray  # [T]
    recall_wait_s: np.ndarray  # [T]: of it, at a window's start


class BesideStep(Protocol):
    """What a step computes."""

    def prepare(self, step: int) -> None:
        """Read what the step needs of the residency."""

    def compute(self) -> None:
        """The rest, in which nobody looks at the residency. This step's tables, and what was
        prepared, are read behind `TraceDrivenDecode.wait_until_shown`.
        """


class TraceDrivenDecode:
    """`policy` on the trace of `replayer`, moving the bytes of `geometry`'s CSA layers; layer j
    follows group `groups[j]`.

    `keyed_layers` of them keep all their index keys on the GPU; the others' keys lie with their
    entries. `allocator` counts what is allocated for KV; `lists_bytes` are those of the lists of
    resident pages beside it. ``batch`` requests follow the trace in step, so one cache manager
    decides for all, and all share one mirror; each has slots of its own. Processes that give one
    ``shared_name`` share it too. With `watch` the slots of every step are kept, and every page
    attended to is compared with the mirror's.
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
        shared_name: str | None = None,
    ):
        self.replayer = replayer
        self.policy = policy
        self.geometry = geometry
        self.batch = batch
        self.watch = watch
        self.keyed_layers = keyed_layers
        self.device = torch.device(device)
        self.source = replayer.source(policy, xp, self.device)
        self.manager = self.source.manager
        ctx = self.manager.ctx
        selected = self.source.paged.pages.shape[2]
        size = RequestSize(
            pages=ctx.n_pages,
            slots=ctx.group_slots,
            staged=self.manager.needs.miss_slots,
            ahead=self.manager.needs.ahead_slots,
        )
        self._groups = [int(group) for group in groups]
        self.allocator = AllocatorMeter(self.device)
        with self.allocator.counted():
            self.tiers = PairedTiers(
                *layouts(geometry),
                self._groups,
                range(keyed_layers, geometry.n_csa),
                ctx.granularity,
                [size] * batch,
                self.device,
                mirrored=self.manager.needs.comes_back,
                one_text=True,
                shared_name=shared_name,
            )
            # with a model they are its own
            self.fixed = self._fixed() if watch else []
        self.lists_bytes = 0 if self.tiers.resident is None else self.tiers.resident.n_bytes
        self.allocator.leave_out(self.lists_bytes)
        self.tables = StepTables(self.tiers, ctx.n_groups, ctx.n_pages, batch)
        self.stages = self.tables.stages
        # a step that loads its misses was told where its pages are
        self._shown = self.tiers.entries.beside.event() if self.stages else None
        # by layer, [B, P + 1]
        self.blocks = [self.tables.blocks(layer, group) for layer, group in enumerate(self._groups)]
        # of this step [G, n], and which are loaded for it
        shape = (ctx.n_groups, selected)
        self.pages = torch.full(shape, -1, dtype=torch.int64, device=self.device)
        self.fetched = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.clock = StepClock(self.device)
        if watch:
            self._fill_mirrors()
        copy_uncounted(self.tiers, *self._first_set())

    def run(
        self,
        work: BesideStep | None = None,
        progress: Callable[[int], None] = lambda steps: None,
    ) -> TraceDrivenRun:
        """All steps of the trace.

        ``work`` is what a step does beside moves; it loads the misses itself, and has an
        indexer of its own, so the trace's scores before the first step.
        """
        if work is not None and isinstance(self.policy, LookaheadPolicy):
            cadence = self.policy.params.cadence
            self.policy.prepare(range(cadence, self.replayer.n_steps, cadence))
        tiers = SharedTiers(self.tiers, self.tables, copies=work is None)
        source = _StepSource(self, self.source, tiers, work)
        self.clock.stream = tiers.model_stream
        loop = DecodeLoop([self.source.book], source, tiers, self.clock)
        slots: list[np.ndarray] = []
        with tiers.beside_model():
            for step in range(self.replayer.n_steps):
                loop.advance()
                if self.watch:
                    slots.append(self.manager.residency.slots.cpu().numpy().copy())
                    self._compare(step, source.shown)
                progress(1)
        step_s, _, recall_wait_s, _ = self.clock.figures()
        return TraceDrivenRun(
            ledger=self.source.ledger(self.replayer),
            slots=np.stack(slots) if self.watch else None,
            h2d_bytes=int(self.tiers.moved_bytes()) // self.batch,
            step_s=step_s,
            recall_wait_s=recall_wait_s,
        )

    @property
    def gpu_bytes(self) -> int:
        """Of one request: all that was built for its KV, as the tensors' sizes say it."""
        fixed_bytes = sum(pool.nbytes for pool in self.fixed)
        return (self.tiers.pool_bytes + fixed_bytes) // self.batch

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

    def show(self) -> None:
        """What was launched so far is what `wait_until_shown` waits for."""
        self.tiers.entries.beside.record(self._shown)

    def wait_until_shown(self) -> None:
        """What comes after in a step's computation may read this step's tables."""
        self.tiers.entries.beside.wait(self._shown)

    def attended_to(self, pages: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of pages [G, n] (-1 = none), by cache: where they lie in its mirror, and the bytes that a
        step finds in the pool for them.
        """
        return [self._attended_to(part, pages) for part in range(len(self.tiers.caches))]

    def _fixed(self) -> list[Tensor]:
        """What no decision changes, as an engine allocates it, layer by layer: all index keys of
        the layers that keep theirs, dense entries, windows.
        """
        geometry = self.geometry
        tokens = self.replayer.header.prompt_tokens + self.replayer.n_steps
        pools = []

        def entries(count: int, entry_bytes: int) -> Tensor:
            layout = Layout("plain", entry_bytes, entry_bytes, 0)
            return Home.of_its_own(layout, self.batch, count, self.device).pool

        for _ in range(self.keyed_layers):
            pools.append(entries(geometry.csa_entries(tokens), geometry.index_key_bytes))
        for layer in geometry.layers:
            if layer.kind == "dense":
                pools.append(entries(tokens // layer.entry_tokens, layer.entry_bytes))
            window = layer.window_tokens * layer.window_bytes
            if window:
                pools.append(torch.zeros(self.batch, window, dtype=torch.uint8, device=self.device))
        return pools

    def _fill_mirrors(self) -> None:
        """Random bytes, by the fastest generator there is."""
        generator = np.random.Generator(np.random.SFC64(self.replayer.header.seed))
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        for cache in self.tiers.caches:
            for layer in cache.mirror.view(torch.int32).numpy():
                layer[:] = generator.integers(low, high, layer.shape, np.int32, endpoint=True)

    def _first_set(self) -> tuple[Tensor, Tensor]:
        """Pages and slots [G, S] of what the prefill leaves on the GPU."""
        pages = self.manager.residency.slots
        places = torch.arange(pages.shape[1], device=self.device)
        return pages.clamp(min=0).long(), torch.where(pages < 0, -1, places)

    def _attended_to(self, part: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """In every layer of a cache: the pages' numbers in the mirror's layers put end to end,
        int64 [m], and the rows that lie in the pool for them, int32 words [B, m, page bytes / 4].
        """
        cache, pages = self.tiers.caches[part], self.tiers.by_layer(pages, part)
        # [layers, B, P + 1]
        rows = self.tables.rows
        if not self.tables.by_layer:
            tables = self.tiers.by_layer(rows, part)
        else:
            tables = rows[list(self.tiers.tiered)] if part else rows
        starts = torch.tensor(cache.pool_start, device=self.device)
        layer, place = (pages >= 0).nonzero(as_tuple=True)
        page = pages[layer, place]
        rows = cache.storage.view(torch.int32)[starts[layer] + tables[layer, :, page].T]
        return layer * cache.mirror.shape[1] + page, rows

    def _compare(self, step: int, shown: Sequence[tuple[Tensor, Tensor]]) -> None:
        """What the last step attended to with the mirrors' bytes."""
        parts = (range(self.tiers.entries.layers), self.tiers.tiered)
        for cache, layers, (numbers, rows) in zip(self.tiers.caches, parts, shown):
            numbers, rows = numbers.cpu(), rows.cpu()
            kept = cache.mirror.view(torch.int32).flatten(0, 1)[numbers]
            if not torch.equal(rows, kept.expand_as(rows)):
                wrong = int(numbers[(rows != kept).any(2).any(0)][0])
                raise FmsimError(
                    f"policy {self.policy.name}, step {step}, layer"
                    f" {layers[wrong // cache.mirror.shape[1]]}: a page on the GPU differs from the"
                    " mirror's: a bug in fmsim"
                )


class _StepSource:
    """`fmsim.replay.decode_loop.AccessSource`: the trace's selection, attended to on the device.

    `shown` is what the last step attended to, by cache, where that is watched.
    """

    def __init__(
        self,
        decode: TraceDrivenDecode,
        trace: TraceSource,
        tiers: SharedTiers,
        work: BesideStep | None,
    ) -> None:
        self.decode = decode
        self.trace = trace
        self.tiers = tiers
        self.work = work
        self.shown: list[tuple[Tensor, Tensor]] = []
        self._seen = -1  # entries visible when those of the resident pages were counted

    def n_entries(self, request: int, step: int) -> int:
        return self.trace.n_entries(request, step)

    def serve(self, step: int) -> list[Served | None]:
        decode = self.decode
        served = self.trace.look_up(step)
        decode.pages.copy_(served.use.pages)
        decode.fetched.copy_(served.fetched)
        self._show_residents(step)
        if self.work is not None:
            self.work.prepare(step)
            self._compute_beside(self.work)
        elif decode.stages:
            for layer in range(decode.tiers.entries.layers):
                decode.stage(layer)
        if decode.watch and decode.tiers.mirrored:
            self.tiers.wait_for_model()
            attended = torch.where(served.attended, served.use.pages, -1)
            self.shown = decode.attended_to(attended.long())
        return [None if decode.manager.passive else served]

    def _compute_beside(self, work: BesideStep) -> None:
        """The model, on a GPU beside the bookkeeping where there are misses, which are known
        already. Its first layers need nothing of that; the others wait until it is shown.
        `SharedTiers.settle` waits for the model.
        """
        self.decode.show()
        stream = self.tiers.model_stream
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            work.compute()

    def _show_residents(self, step: int) -> None:
        """Block tables and lists of resident pages, where they changed."""
        decode, residency = self.decode, self.decode.manager.residency
        changed, self.tiers.changed = self.tiers.changed, False
        if changed or decode.stages:
            decode.tables.show(residency.table)
        resident, visible = decode.tiers.resident, self.n_entries(0, step)
        if self.work is None or resident is None:
            return
        if changed:
            resident.list(residency.slots)
        if changed or visible != self._seen:
            resident.see(visible)
            self._seen = visible


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
