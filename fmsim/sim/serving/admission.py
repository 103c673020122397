"""Who may enter a server: room in GPU memory and on the host, an engine's own limit, and, if asked
for, room on the link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import simpy

from fmsim.errors import FmsimError
from fmsim.hw.memory import MemorySystem, give, take
from fmsim.hw.spec import Hardware
from fmsim.sim.serving import spec
from fmsim.sim.serving.batch import ServedRequest, mean_step_s
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.prefix import NOTHING_FOUND, BlockTier, FoundBlocks, PrefixStore
from fmsim.sim.step_cost import StepModel

GPU, HOST, BATCH, LINK, SLO = "GPU memory", "host memory", "batch limit", "PCIe", "time a token"
NVME = "NVMe"
POSITIONS = "the model's positions"


def server_hardware(hw: Hardware, options: spec.Server) -> Hardware:
    """The hardware as the engine uses it: one shared mirror has the host memory and the drives of
    all GPUs of its rank, a slow copy path caps the link, and drives are there only if asked for.

    Raises FmsimError where they are asked for and the preset has none.
    """
    changes: dict[str, Any] = {}
    if not options.nvme:
        changes |= {"nvme_bytes": None, "nvme_bytes_per_s": None}
    elif hw.nvme_bytes is None or hw.nvme_bytes_per_s is None:
        raise FmsimError(
            f"server.nvme: {hw.name} names no drives; give hardware_figures.nvme_bytes and"
            " hardware_figures.nvme_bytes_per_s"
        )
    if options.mirror == "shared":
        shared = ["host_bytes", "host_reserve_bytes"]
        for name in shared + ["nvme_bytes", "nvme_bytes_per_s"] * options.nvme:
            figure = getattr(hw, name)
            changes[name] = figure.model_copy(update={"value": figure.value * hw.placed.tp})
    if options.recall_bytes_per_s:
        rate = min(options.recall_bytes_per_s, hw.link.bandwidth_bytes_per_s.value)
        bandwidth = hw.link.bandwidth_bytes_per_s.model_copy(update={"value": rate})
        changes["link"] = hw.link.model_copy(update={"bandwidth_bytes_per_s": bandwidth})
    return hw.model_copy(update=changes)


class Admission:
    """A queue, first come, first served, and what those that were admitted hold, on which rank."""

    def __init__(
        self,
        ranks: list[MemorySystem],
        model: StepModel,
        demand: Demand,
        options: spec.Server,
        slo: spec.Slo,
        stores: Sequence[PrefixStore] = (),
    ) -> None:
        """`stores`: of each rank, where prefixes are reused."""
        self.ranks = ranks
        self.stores = stores
        self.model = model
        self.demand = demand
        self.options = options
        self.slo = slo
        self.queue: deque[ServedRequest] = deque()
        self.admitted: dict[int, ServedRequest] = {}  # by number
        self._held = [0] * len(ranks)  # of them, on each rank
        self._head: tuple[int, float] | None = None  # that waited last: its number, since when
        self.hybrid = options.residency == "hybrid" and demand.may_be_whole
        self.shrunk: list[ServedRequest] = []  # since the server last looked
        self.waits_for: str | None = None  # what the head of the queue could not get
        self._host_wall = HOST if model.hw.nvme_bytes is None else NVME
        self._parts = model.hw.placed.cp  # GPUs that share out a request's KV
        # of a block on each GPU, and in a mirror
        self._block_bytes = self._mirror_block_bytes = 0.0
        if stores:
            tokens, geometry = stores[0].block_tokens, model.geometry
            self._block_bytes = geometry.full_kv_bytes(tokens) / self._parts
            self._mirror_block_bytes = geometry.host_kv_bytes(tokens) / self._parts
        # for these requests by number, asked at every span while the same ones are admitted
        self._verdicts: dict[str, tuple[tuple[int, ...], bool]] = {}

    def never_fits(self, request: ServedRequest) -> str | None:
        """The memory that `request` would not fit even alone, or None."""
        gpu_bytes, host_bytes = self._needs(request, NOTHING_FOUND)
        memory = self.ranks[0]
        if gpu_bytes > memory.hbm.capacity:
            return GPU
        below = memory.nvme.capacity if memory.nvme is not None else 0.0
        return self._host_wall if host_bytes > memory.host.capacity + below else None

    def head_can_enter(self) -> bool:
        return bool(self.queue) and self._place(self.queue[0])[0] is not None

    def enter(self, now_s: float) -> Iterator[ServedRequest]:
        """Admit from the queue's head on, until one has to wait."""
        kind, self.waits_for = self.waits_for, None
        while self.queue:
            rank, self.waits_for = self._place(self.queue[0])
            if rank is None:
                if self._head is None or self._head[0] != self.queue[0].number:
                    self._head = self.queue[0].number, now_s
                return
            request = self.queue.popleft()
            since_s = now_s
            if kind and self._head is not None and self._head[0] == request.number:
                since_s = self._head[1]
                request.waits_s[kind] = now_s - since_s
            request.waits_s["queue"] = since_s - request.arrival_s
            request.admitted_s = now_s
            request.rank = rank
            self.admitted[request.number] = request
            self._held[rank] += 1
            self._take(request)
            yield request

    def _take(self, request: ServedRequest) -> None:
        """What it needs of its rank's memory; blocks make room for it."""
        rank = request.rank
        request.found = self._found(request, rank)
        tiers: tuple[BlockTier | None, BlockTier | None] = (None, None)
        if self.stores:
            store = self.stores[rank]
            store.pin(request.found, request.pinned)
            tiers = (store.gpu, store.host)
        gpu_bytes, host_bytes = self._needs(request, request.found)
        memory = self.ranks[rank]
        if self.hybrid:
            self._shrink_until(rank, gpu_bytes, besides=request)
        if tiers[1] is not None:
            tiers[1].make_room(host_bytes)
        if memory.nvme is not None:
            request.nvme_bytes = max(0.0, host_bytes - float(memory.host.level))
            host_bytes -= request.nvme_bytes
            if request.nvme_bytes > 0:
                if self.stores:
                    below = self.stores[rank].nvme
                    assert below is not None
                    below.make_room(request.nvme_bytes)
                take(memory.nvme, request.nvme_bytes)
        for pool, tier, n_bytes in zip(self._pools(rank), tiers, (gpu_bytes, host_bytes)):
            if tier is not None:
                tier.make_room(n_bytes)
            take(pool, n_bytes)
        request.gpu_bytes, request.host_bytes = gpu_bytes, host_bytes
        if self.hybrid:
            request.whole = True
            pressed = max(request.pools.gpu_bytes / self._parts, memory.hbm.capacity // 10)
            self._shrink_until(rank, pressed, besides=request)

    def _shrink_until(self, rank: int, n_bytes: float, besides: ServedRequest | None) -> None:
        """Whole requests, the oldest first, keep their slots alone until so much is free."""
        pool = self.ranks[rank].hbm
        for request in [*self.admitted.values()]:
            if pool.level >= n_bytes:
                return
            if request.whole and request.rank == rank and request is not besides:
                request.whole = False
                give(pool, self._beyond_slots(request))
                request.gpu_bytes -= self._beyond_slots(request)
                self.shrunk.append(request)

    def _beyond_slots(self, request: ServedRequest) -> float:
        """What a whole request has on each GPU more than its slots and all else of its policy."""
        whole = self.demand.whole_bytes(request.prompt_tokens, request.output_tokens)
        return max(0.0, (whole - request.pools.gpu_bytes) / self._parts)

    def release(self, request: ServedRequest) -> None:
        """Give back what `request` held."""
        del self.admitted[request.number]
        self._held[request.rank] -= 1
        held = (request.gpu_bytes, request.host_bytes)
        for pool, n_bytes in zip(self._pools(request.rank), held):
            give(pool, n_bytes)
        nvme = self.ranks[request.rank].nvme
        if nvme is not None:
            give(nvme, request.nvme_bytes)
        if self.stores:
            self.stores[request.rank].unpin(request.pinned)

    def spilled_share(self, rank: int) -> float:
        """Of the mirrors of a rank's requests, what lies on NVMe."""
        own = [each for each in self.admitted.values() if each.rank == rank]
        spilled = sum(each.nvme_bytes for each in own)
        return spilled / sum(each.pools.mirror / self._parts for each in own) if spilled else 0.0

    def _found(self, request: ServedRequest, rank: int) -> FoundBlocks:
        """Whole blocks of its prompt that the rank has."""
        if not self.stores or not request.asked.blocks:
            return NOTHING_FOUND
        store = self.stores[rank]
        whole = request.prompt_tokens // store.block_tokens
        return store.find(request.asked.blocks[:whole])

    def _place(self, request: ServedRequest) -> tuple[int | None, str | None]:
        """The rank with room for one more that has the fewest requests, those first that have half
        of its prompt; or what is lacking on the first.
        """
        if self.options.max_batch and len(self.admitted) >= self.options.max_batch:
            return None, BATCH
        lacking = None
        for rank in self._in_order(request):
            short = self._lacks(request, rank)
            if short is None:
                return rank, None
            lacking = lacking or short
        return None, lacking

    def _in_order(self, request: ServedRequest) -> list[int]:
        if len(self.ranks) == 1:
            return [0]
        has_half = [False] * len(self.ranks)
        if self.stores and request.asked.blocks:
            half = request.prompt_tokens / self.stores[0].block_tokens / 2
            has_half = [
                self._found(request, rank).n_blocks >= half for rank in range(len(self.ranks))
            ]
        return sorted(
            range(len(self.ranks)), key=lambda rank: (not has_half[rank], self._held[rank])
        )

    def _lacks(self, request: ServedRequest, rank: int) -> str | None:
        """What `request` cannot get on a rank now, or None."""
        found = self._found(request, rank)
        kinds = (GPU, self._host_wall)
        needs = zip(kinds, self._needs(request, found), self._room(rank, found))
        short = next((kind for kind, n_bytes, room in needs if n_bytes > room), None)
        if short is not None or not self.admitted:
            return short
        if self.options.admit_by_link and not self._holds(LINK, request, rank):
            return LINK
        if self.options.admit_by_slo and not self._holds(SLO, request, rank):
            return SLO
        return None

    def _holds(self, what: str, request: ServedRequest, rank: int) -> bool:
        """With `request` on `rank` beside those admitted: all recalls fit into the time of their
        windows (LINK), or a step with its waits keeps the time a token that is asked (SLO).
        """
        together = [*self.admitted.values(), request]
        numbers = (*(each.number for each in together), rank)
        known = self._verdicts.get(what)
        if known is None or known[0] != numbers:
            self._verdicts[what] = known = numbers, self._verdict(what, together, rank)
        return known[1]

    def _verdict(self, what: str, together: list[ServedRequest], rank: int) -> bool:
        tokens = np.array([each.prompt_tokens + each.output_tokens for each in together])
        ranks = np.array([each.rank for each in together[:-1]] + [rank])
        compute_s = mean_step_s(self.model, self.demand, tokens, ranks)
        of_rank = [each for each, own in zip(together, ranks) if own == rank]
        recalled = sum(self.demand.recall_bytes_per_step(each.prompt_tokens) for each in of_rank)
        link_s = recalled / self._parts / self.ranks[rank].to_gpu.bytes_per_s
        if what == LINK:
            return link_s <= compute_s
        stall_s = self.demand.mean_stall_s(
            self.ranks[rank].hw, [(each.prompt_tokens, each.output_tokens) for each in of_rank]
        )
        step_s = max(compute_s + stall_s, link_s + stall_s)
        return step_s / self.demand.tokens_per_step <= self.slo.tpot_s

    def _needs(self, request: ServedRequest, found: FoundBlocks) -> tuple[float, float]:
        """Bytes on each GPU and on the host, beside blocks that are there."""
        gpu_bytes = request.pools.gpu_bytes / self._parts
        host_bytes = request.pools.mirror / self._parts
        if self.hybrid:  # it comes whole, and others make room for it
            gpu_bytes += self._beyond_slots(request)
        if found.gpu:
            gpu_bytes -= len(found.gpu) * self._block_bytes
        if host_bytes and found.host:
            host_bytes -= len(found.host) * self._mirror_block_bytes
        return gpu_bytes, host_bytes

    def _pools(self, rank: int) -> tuple[simpy.Container, simpy.Container]:
        return self.ranks[rank].hbm, self.ranks[rank].host

    def _room(self, rank: int, found: FoundBlocks) -> tuple[float, float]:
        """Bytes that a request may have: free, or held by blocks that it does not use."""
        gpu, host = (float(pool.level) for pool in self._pools(rank))
        if self.hybrid:
            whole = (each for each in self.admitted.values() if each.whole and each.rank == rank)
            gpu += sum(self._beyond_slots(each) for each in whole)
        if self.stores:
            store = self.stores[rank]
            if store.gpu is not None:
                gpu = store.gpu.room(found.gpu)
            host = store.host.room(found.host)
            if store.nvme is not None:
                host += store.nvme.room(found.nvme)
            return gpu, host
        nvme = self.ranks[rank].nvme
        return gpu, host if nvme is None else host + float(nvme.level)
