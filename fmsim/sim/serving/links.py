"""What crosses the links of a server's ranks: recalls, and misses beside them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import simpy

from fmsim.hw.memory import MemorySystem
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.steps import StepTimes
from fmsim.sim.transfer_cost import GatherCurve, nvme_read_bytes


class RankLinks:
    """One link a rank, whose `parts` GPUs share out a request's KV and gather at once.

    `spilled_share`: of what a rank's host holds, the part that lies on NVMe.
    """

    def __init__(
        self,
        env: simpy.Environment,
        ranks: Sequence[MemorySystem],
        gather: GatherCurve,
        demand: Demand,
        parts: int,
        spilled_share: Callable[[int], float],
    ) -> None:
        self.env = env
        self.ranks = ranks
        self.gather = gather
        self.demand = demand
        self.parts = parts
        self.spilled_share = spilled_share

    @property
    def idle(self) -> bool:
        return all(rank.to_gpu.idle for rank in self.ranks)

    def recall(self, rank: int, request_bytes: float) -> simpy.Event:
        """Start one gather on each GPU of a rank, at most as fast as it would be alone; what lies
        on NVMe is read meanwhile.
        """
        n_bytes = request_bytes / self.parts
        row_bytes = self.demand.row_bytes
        alone_s = self.gather.one_s(row_bytes, n_bytes)
        memory = self.ranks[rank]
        gathered = memory.to_gpu.transfer(
            n_bytes, limit=n_bytes / alone_s if alone_s else float("inf")
        )
        spilled = self.spilled_share(rank) if memory.nvme is not None else 0.0
        if not spilled:
            return gathered
        rows = spilled * n_bytes / row_bytes
        return gathered & memory.from_nvme.transfer(rows * nvme_read_bytes(row_bytes))

    def contended_stall(self, times: StepTimes) -> Generator[simpy.Event, Any, float]:
        """One step's misses beside recalls under way, on every rank: the gathers' fixed costs, then
        their bytes.

        Returns how long it took.
        """
        before_s = self.env.now
        waits = [
            self.env.process(self._misses(times, place))
            for place in np.flatnonzero(times.miss_bytes[:, 0]).tolist()
        ]
        if waits:
            yield self.env.all_of(waits)
        return self.env.now - before_s

    def _misses(self, times: StepTimes, place: int) -> Generator[simpy.Event, Any, None]:
        n_bytes = float(times.miss_bytes[place, 0])
        fixed_s = float(self.gather.fixed_s(self.demand.row_bytes)) * float(times.gathers[place, 0])
        yield self.env.timeout(fixed_s)
        moving_s = float(times.stall_s[place, 0]) - fixed_s
        link = self.ranks[times.ranks[place]].to_gpu
        yield link.transfer(n_bytes, limit=n_bytes / moving_s)
