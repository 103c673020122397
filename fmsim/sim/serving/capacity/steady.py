"""Equal requests that decode side by side for long: the time of a step, and what the link has to
carry meanwhile.

No queue, no events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fmsim.geometry import Geometry
from fmsim.hw.spec import Hardware
from fmsim.sim.serving.demand import Demand
from fmsim.sim.step_cost import StepModel, memory_indexer_s
from fmsim.sim.transfer_cost import NVME_LATENCY_S, GatherCurve, nvme_read_bytes


@dataclass(frozen=True)
class Steady:
    """Means of a decode step of `batch` requests."""

    batch: int
    compute_s: float
    stall_s: float  # for misses
    link_s: float  # that the link is busy, with misses and recalls
    nvme_s: float = 0.0  # that the drives are, of which misses' part is in the stall
    tokens_per_step: float = 1.0  # of each request

    @property
    def step_s(self) -> float:
        """Recalls run beside decode; where they take longer than it, decode waits for the rest."""
        return max(self.compute_s + self.stall_s, self.link_s, self.nvme_s)

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.token_s

    @property
    def token_s(self) -> float:
        """Mean time a token of a request."""
        return self.step_s / self.tokens_per_step

    @property
    def wait_share(self) -> float:
        return 1 - self.compute_s / self.step_s


class SteadyState:
    """Of requests of `tokens` context under one policy."""

    def __init__(
        self,
        engine: Hardware,
        geometry: Geometry,
        demand: Demand,
        tokens: int,
        output_tokens: int,
        model: StepModel | None = None,
    ) -> None:
        """`engine`: see `server_hardware`; `model`: its step times, where a caller has them."""
        self.engine, self.geometry, self.demand, self.tokens = engine, geometry, demand, tokens
        self._output = output_tokens
        self.model = model or StepModel(engine, geometry)
        self._misses = demand.misses and not demand.fits_whole(tokens, output_tokens)
        self._known: dict[int, Steady] = {}

    @cached_property
    def _recall_bytes(self) -> float:
        return self.demand.recall_bytes_per_step(self.tokens)

    @cached_property
    def _mirror_bytes(self) -> int:
        return self.demand.pools(self.tokens - self._output, self._output).mirror

    @cached_property
    def _entries(self) -> tuple[float, Any]:
        """Of one request and layer: what the native indexer scores, and a memory indexer."""
        demand = self.demand
        scored: float = self.geometry.csa_entries(self.tokens)
        if demand.keys_tiered:
            scored = min(demand.resident.mean() * demand.growth(self.tokens), scored)
        return scored, demand.indexer_scored.mean() * demand.length_ratio(self.tokens)

    @cached_property
    def _gather(self) -> GatherCurve:
        return GatherCurve(self.engine.link)

    def at(self, batch: int) -> Steady:
        """`batch` requests on the server."""
        if batch not in self._known:
            self._known[batch] = self._at(batch)
        return self._known[batch]

    def _at(self, batch: int) -> Steady:
        demand, placed = self.demand, self.engine.placed
        on_gpu = placed.ranked(batch) / placed.cp  # requests' bytes, on the busiest rank's
        stall_s = miss_bytes = 0.0
        if self._misses:
            layers = demand.group_layers
            missed, weights = demand.miss_counts
            each_s = self._gather.seconds(demand.row_bytes, on_gpu * missed) @ layers
            stall_s = float(each_s @ weights)
            miss_bytes = float((on_gpu * missed @ layers) @ weights)
        recall_bytes = on_gpu * self._recall_bytes
        scored, by_indexer = self._entries
        costs = self.model.equal(batch, np.array([self.tokens]), np.array([scored]))
        compute_s = float(
            costs.total_s(self.geometry.n_selecting)[0]
            + memory_indexer_s(self.engine, self.geometry, on_gpu * by_indexer)
        )
        compute_s += (recall_bytes + miss_bytes) / self.engine.hbm_bytes_per_s.value
        link_s = stall_s + recall_bytes / self.engine.link.bandwidth_bytes_per_s.value
        missed_s, recalled_s = self._from_nvme_s(on_gpu, miss_bytes, recall_bytes)
        return Steady(
            batch,
            compute_s,
            stall_s + missed_s,
            link_s,
            missed_s + recalled_s,
            demand.tokens_per_step,
        )

    def _from_nvme_s(
        self, on_gpu: float, miss_bytes: float, recall_bytes: float
    ) -> tuple[float, float]:
        """Reading what of a step's misses and recalls lies on NVMe: the share of the mirrors that
        host memory has no room for, taken to be asked as often as the rest.
        """
        mirrors = on_gpu * self._mirror_bytes
        share = max(0.0, 1 - self.engine.host_bytes_per_gpu / mirrors) if mirrors else 0.0
        rate = self.engine.nvme_rate_per_gpu
        if not share or not rate:
            return 0.0, 0.0
        row_bytes = self.demand.row_bytes
        seconds = share * nvme_read_bytes(row_bytes) / row_bytes / rate
        layers = float(self.demand.group_layers.sum()) if miss_bytes else 0.0
        return layers * NVME_LATENCY_S + seconds * miss_bytes, seconds * recall_bytes

    def largest(self, holds: Callable[[Steady], bool], most: int) -> int:
        """The largest batch up to `most` for which `holds`, which is true up to some batch and
        false beyond; 0 if for none.
        """
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(self.at(middle)) else (low, middle - 1)
        return low
