"""What a server's requests share, in SimPy: GPU and host memory as capacities, the link in both
directions, the GPU's compute.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

import simpy

from fmsim.errors import DoesNotFit
from fmsim.geometry import Geometry
from fmsim.hw.spec import Hardware
from fmsim.units import gib

NOTHING = 1e-9  # bytes of a memory that has none: SimPy's containers hold something


@dataclass
class _Flow:
    left_bytes: float
    limit: float  # bytes/s that this transfer could reach alone
    done: simpy.Event
    rate: float = field(default=0.0)


def _limit(flow: _Flow) -> float:
    return flow.limit


class FairLink:
    """One direction of a link: concurrent transfers share its bandwidth max-min fairly, none above
    its own limit.

    A transfer that cannot use its share (a gather of small rows) leaves the rest to the others. No
    bytes are lost and the rates never add up to more than the bandwidth, so a link is never
    credited twice.
    """

    def __init__(self, env: simpy.Environment, bytes_per_s: float) -> None:
        self.env, self.bytes_per_s = env, bytes_per_s
        self.moved_bytes = 0.0
        self._flows: list[_Flow] = []  # the most limited first
        self._since_s = 0.0
        self._version = 0  # a timer set before the last change of the flows is void

    @property
    def idle(self) -> bool:
        return not self._flows

    @property
    def rates(self) -> list[float]:
        """Bytes/s of each transfer now under way."""
        return [flow.rate for flow in self._flows]

    def transfer(self, n_bytes: float, limit: float = float("inf")) -> simpy.Event:
        """An event that succeeds when `n_bytes` have passed. `limit` in bytes/s."""
        done = self.env.event()
        if n_bytes <= 0:
            return done.succeed()
        self._advance()
        bisect.insort(self._flows, _Flow(n_bytes, limit, done), key=_limit)
        self._share()
        return done

    def _advance(self) -> None:
        """Book what has passed since the last change."""
        elapsed_s, self._since_s = self.env.now - self._since_s, self.env.now
        for flow in self._flows:
            passed = min(flow.left_bytes, flow.rate * elapsed_s)
            flow.left_bytes -= passed
            self.moved_bytes += passed

    def _share(self) -> None:
        """Max-min fair rates: the most limited first, each at most an equal part of what is left.

        Then wait for the next end.
        """
        spare = self.bytes_per_s
        n_left = len(self._flows)
        next_end_s = math.inf
        for flow in self._flows:
            fair = spare / n_left
            flow.rate = flow.limit if flow.limit < fair else fair
            spare -= flow.rate
            n_left -= 1
            end_s = flow.left_bytes / flow.rate
            if end_s < next_end_s:
                next_end_s = end_s
        self._version += 1
        if self._flows:
            version = self._version
            self.env.timeout(next_end_s).callbacks.append(lambda _: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        shortest_s = min(flow.left_bytes / flow.rate for flow in self._flows)
        self._advance()
        # Rounding, of the bytes or of a clock that has run for long, may leave a bit of the flow
        # that the timer was set for, or of one equal to it. It must end now: a timer shorter than
        # the clock's resolution would never let it.
        short_s = 1e-9 * shortest_s + 4 * math.ulp(self.env.now)
        ended = [flow for flow in self._flows if flow.left_bytes <= flow.rate * short_s + 1e-6]
        for flow in ended:
            self.moved_bytes += flow.left_bytes
            self._flows.remove(flow)
            flow.done.succeed()
        self._share()


def take(pool: simpy.Container, n_bytes: float) -> None:
    """Out of a pool that has them: sums of bytes may be off by their rounding, which would leave a
    container waiting.
    """
    n_bytes = min(n_bytes, float(pool.level))
    if n_bytes > 0:
        pool.get(n_bytes)


def give(pool: simpy.Container, n_bytes: float) -> None:
    """Back into the pool that they came from."""
    n_bytes = min(n_bytes, float(pool.capacity - pool.level))
    if n_bytes > 0:
        pool.put(n_bytes)


class MemorySystem:
    """One GPU of a server with its share of host memory: the GPUs of a rank hold the same, or,
    under context parallelism, equal parts.

    Sizes in bytes; both pools start empty of KV. Raises FmsimError where weights leave no pool.
    """

    def __init__(self, env: simpy.Environment, hw: Hardware, geometry: Geometry) -> None:
        self.hw = hw
        pool_bytes = hw.kv_pool_bytes(geometry)
        self.hbm = simpy.Container(env, capacity=pool_bytes, init=pool_bytes)
        host_bytes = max(hw.host_bytes_per_gpu, NOTHING)
        self.host = simpy.Container(env, capacity=host_bytes, init=host_bytes)
        nvme_bytes = hw.nvme_bytes_per_gpu
        self.nvme = simpy.Container(env, nvme_bytes, nvme_bytes) if nvme_bytes else None
        self.from_nvme = FairLink(env, hw.nvme_rate_per_gpu)  # to the host
        self.to_gpu = FairLink(env, hw.link.bandwidth_bytes_per_s.value)
        self.to_host = FairLink(env, hw.link.bandwidth_bytes_per_s.value)
        self.compute = simpy.Resource(env, capacity=1)

    def take(self, gpu_bytes: float, host_bytes: float, what: str) -> None:
        """Allocate now. Raises DoesNotFit with the figure that is short."""
        pools = ((self.hbm, gpu_bytes, "GPU memory"), (self.host, host_bytes, "host memory"))
        for pool, n_bytes, kind in pools:
            if n_bytes > pool.level:
                raise DoesNotFit(
                    f"{what} needs {gib(n_bytes)} of {kind},"
                    f" {gib(n_bytes - pool.level)} more than the {gib(pool.level)}"
                    f" that {self.hw.title} has left for KV; lower the batch or the budget"
                )
        for pool, n_bytes, _ in pools:
            if n_bytes > 0:
                pool.get(n_bytes)
