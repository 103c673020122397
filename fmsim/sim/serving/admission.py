"""Who may enter a server: room in GPU memory and on the host, an engine's own limit, and, if asked
for, room on the link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import simpy

from fmsim.geometry import Geometry
from fmsim.hw.memory import MemorySystem
from fmsim.hw.spec import Hardware
from fmsim.sim.serving import spec
from fmsim.sim.serving.batch import ServedRequest, mean_step_s
from fmsim.sim.serving.demand import Demand

GPU, HOST, BATCH, LINK = "GPU memory", "host memory", "batch limit", "PCIe"


def server_hardware(hw: Hardware, options: spec.Server) -> Hardware:
    """The hardware as the engine uses it: one shared mirror has the whole host, and a slow copy
    path caps the link.
    """
    changes = {}
    if options.mirror == "shared":
        for name in ("host_bytes", "host_reserve_bytes"):
            figure = getattr(hw, name)
            changes[name] = figure and figure.model_copy(update={"value": figure.value * hw.n_gpus})
    if options.recall_bytes_per_s:
        rate = min(options.recall_bytes_per_s, hw.link.bandwidth_bytes_per_s.value)
        bandwidth = hw.link.bandwidth_bytes_per_s.model_copy(update={"value": rate})
        changes["link"] = hw.link.model_copy(update={"bandwidth_bytes_per_s": bandwidth})
    return hw.model_copy(update=changes)


class Admission:
    """A queue, first come, first served, and what those that were admitted hold."""

    def __init__(
        self,
        memory: MemorySystem,
        hw: Hardware,
        geometry: Geometry,
        demand: Demand,
        options: spec.Server,
    ) -> None:
        self.memory, self.hw, self.geometry, self.demand, self.options = (
            memory,
            hw,
            geometry,
            demand,
            options,
        )
        self.queue: deque[ServedRequest] = deque()
        self.admitted: dict[int, ServedRequest] = {}  # by number
        self.waits_for: str | None = None  # what the head of the queue could not get
        self._link_verdict: tuple[tuple[int, ...], bool] = (
            (),
            True,
        )  # for these requests by number

    def never_fits(self, request: ServedRequest) -> str | None:
        """The memory that `request` would not fit even alone, or None."""
        return next(
            (kind for kind, pool, n_bytes in self._needs(request) if n_bytes > pool.capacity), None
        )

    def head_can_enter(self) -> bool:
        return bool(self.queue) and self.lacks(self.queue[0]) is None

    def enter(self) -> Iterator[ServedRequest]:
        """Admit from the queue's head on, until one has to wait."""
        self.waits_for = None
        while self.queue:
            self.waits_for = self.lacks(self.queue[0])
            if self.waits_for:
                return
            request = self.queue.popleft()
            self.admitted[request.number] = request
            for _, pool, n_bytes in self._needs(request):
                if n_bytes:
                    pool.get(n_bytes)
            yield request

    def release(self, request: ServedRequest) -> None:
        """Give back what `request` held."""
        del self.admitted[request.number]
        for _, pool, n_bytes in self._needs(request):
            if n_bytes:
                pool.put(n_bytes)

    def lacks(self, request: ServedRequest) -> str | None:
        """What `request` cannot get now, or None."""
        if self.options.max_batch and len(self.admitted) >= self.options.max_batch:
            return BATCH
        short = next(
            (kind for kind, pool, n_bytes in self._needs(request) if n_bytes > pool.level), None
        )
        if short is None and self.options.admit_by_link and not self._link_has_room(request):
            return LINK
        return short

    def _link_has_room(self, request: ServedRequest) -> bool:
        """With `request` beside those admitted, all recalls still fit into the time of their
        windows.
        """
        together = [*self.admitted.values(), request]
        if len(together) == 1 or not self.demand.recalls:
            return True
        numbers = tuple(each.number for each in together)
        if (
            self._link_verdict[0] != numbers
        ):  # asked at every span, while the same ones are admitted
            bytes_per_step = sum(
                self.demand.recall_bytes_per_step(each.prompt_tokens) for each in together
            )
            tokens = np.array([each.prompt_tokens for each in together])
            time_s = mean_step_s(self.hw, self.geometry, self.demand, tokens)
            self._link_verdict = (
                numbers,
                bytes_per_step <= self.memory.to_gpu.bytes_per_s * time_s,
            )
        return self._link_verdict[1]

    def _needs(self, request: ServedRequest) -> list[tuple[str, simpy.Container, int]]:
        return [
            (GPU, self.memory.hbm, request.pools.gpu_bytes),
            (HOST, self.memory.host, request.pools.mirror),
        ]
