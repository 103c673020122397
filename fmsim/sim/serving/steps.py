"""Times of a server's coming decode steps, worked out for several at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmsim.sim.serving.batch import RunningBatch
from fmsim.sim.step_cost import StepModel, memory_indexer_s
from fmsim.sim.transfer_cost import NVME_LATENCY_S, GatherCurve, nvme_read_bytes

_STEPS_AHEAD = 32  # whose times are worked out at once


@dataclass(frozen=True)
class StepTimes:
    """Of n coming steps, on R ranks that decode."""

    ranks: list[int]  # [R] their numbers
    compute_s: np.ndarray  # [n]
    prefill_s: np.ndarray  # [n]
    stall_s: np.ndarray  # [R, n] for misses, on an idle link
    gathers: np.ndarray  # [R, n] that the misses take: one a layer which has any
    miss_bytes: np.ndarray  # [R, n] to each GPU

    def part(self, start: int, end: int, prefill_s: np.ndarray) -> StepTimes:
        """Some of them, with a prefill's chunks in them."""
        return StepTimes(
            self.ranks,
            self.compute_s[start:end],
            prefill_s,
            self.stall_s[:, start:end],
            self.gathers[:, start:end],
            self.miss_bytes[:, start:end],
        )


class DecodeTimes:
    """Of one batch, as it changes."""

    def __init__(
        self,
        batch: RunningBatch,
        model: StepModel,
        gather: GatherCurve,
        spilled_share: Callable[[int], float],
    ) -> None:
        """`spilled_share`: of a rank's mirrors, what lies on NVMe now."""
        self.spilled_share = spilled_share
        self.batch = batch
        self.model = model
        self.gather = gather
        self._parts = model.hw.placed.cp  # GPUs that share out a request's KV
        self._ahead: tuple[int, int, StepTimes] | None = None  # batch's changes, its step, times

    def ahead(self, n_steps: int, prefill_s: np.ndarray) -> StepTimes:
        """Of the batch's next steps. They are worked out for some steps ahead, and hold until the
        batch changes: a span ends at every window, a batch lives longer.
        """
        changes, steps = self.batch.changes, self.batch.steps
        known = self._ahead
        if (
            known is None
            or known[0] != changes
            or steps - known[1] + n_steps > len(known[2].compute_s)
        ):
            lasted = 0 if known is None else steps - known[1]  # as long as the last times held
            ahead = min(max(n_steps, min(2 * lasted + 1, _STEPS_AHEAD)), self.batch.least_left)
            known = self._ahead = changes, steps, self._worked_out(ahead)
        start = steps - known[1]
        return known[2].part(start, start + n_steps, prefill_s)

    def _from_nvme_s(
        self, ranks: list[int], gathers: np.ndarray, miss_bytes: np.ndarray
    ) -> NDArray[np.float64]:
        """[R, n] that misses take longer where part of the mirrors lies on NVMe, which is asked as
        often as host memory is: every layer's reads, before they go over the link.
        """
        rate = self.model.hw.nvme_rate_per_gpu
        shares = np.array([self.spilled_share(rank) for rank in ranks])[:, None]
        if not rate or not shares.any():
            return np.zeros_like(miss_bytes)
        row_bytes = self.batch.demand.row_bytes
        read_bytes = shares * miss_bytes / row_bytes * nvme_read_bytes(row_bytes)
        read_s: NDArray[np.float64] = gathers * (shares > 0) * NVME_LATENCY_S + read_bytes / rate
        return read_s

    def _worked_out(self, n_steps: int) -> StepTimes:
        load, layers = self.batch.load(n_steps), self.batch.demand.group_layers
        stall_s = gathers = miss_bytes = np.zeros((len(load.ranks), n_steps))
        if self.batch.demand.misses:
            on_gpu = load.miss_bytes / self._parts
            gathers = (on_gpu > 0).astype(np.float64) @ layers
            stall_s = self.gather.seconds(self.batch.demand.row_bytes, on_gpu) @ layers
            miss_bytes = on_gpu @ layers
            stall_s = stall_s + self._from_nvme_s(load.ranks, gathers, miss_bytes)
        compute_s = load.costs(self.model).total_s(self.model.geometry.n_selecting)
        beside_s = memory_indexer_s(
            self.model.hw, self.model.geometry, load.indexer_scored / self._parts
        )
        arriving = load.recalled_bytes / self._parts + miss_bytes
        beside_s = (
            beside_s + arriving / self.model.hw.hbm_bytes_per_s.value
        )  # they take part of HBM
        compute_s = compute_s + beside_s.max(axis=0)
        nothing = np.zeros(n_steps)
        return StepTimes(load.ranks, compute_s, nothing, stall_s, gathers, miss_bytes)
