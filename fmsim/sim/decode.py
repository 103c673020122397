"""Time: a ledger's moves on a memory system.

One decode of a batch of equal requests, simulated with SimPy.

Events stand only where something is shared or waited for: a recall in flight, a miss beside it, the
window's write-back. A step that shares nothing is one timeout of a summed length.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import simpy

from fmsim.geometry import Geometry
from fmsim.hw.memory import MemorySystem
from fmsim.hw.modules import calibrated_table
from fmsim.hw.spec import Hardware
from fmsim.replay.ledger import Ledger
from fmsim.sim.engine_cost import EngineCosts
from fmsim.sim.footprint import Footprint, footprint
from fmsim.sim.step_cost import StepModel, memory_indexer_s
from fmsim.sim.timeline import SimulatedTimeline, Transfer
from fmsim.sim.transfer_cost import GatherCurve


def simulate(
    ledger: Ledger,
    geometry: Geometry,
    hw: Hardware,
    layer_map: Sequence[int] | None = None,
    batch: int = 1,
    one_text: bool = False,
) -> SimulatedTimeline:
    """Run the decode that `ledger` describes, `batch` times side by side on the server's ranks, on
    one GPU of the busiest rank of `hw`.

    `layer_map` says which of the ledger's layers drives each CSA layer of the
    model; see `footprint.spread`. With `one_text` all requests read one mirror, as those of an
    engine that a trace drives; a server's have texts of their own. Raises FmsimError, with the
    figure that is short, when weights, KV or the host's mirror do not fit.
    """
    place = footprint(ledger, geometry, layer_map)
    env = simpy.Environment()
    memory = MemorySystem(env, hw, geometry)
    on_gpu = hw.placed.ranked(batch) / hw.placed.cp
    memory.take(
        on_gpu * float(place.allocated.total),
        on_gpu * float(place.host_bytes),
        f"policy {ledger.policy}, batch {batch}:",
    )
    decode = _Decode(env, memory, ledger, geometry, place, batch, one_text)
    env.run(env.process(decode.run()))
    return SimulatedTimeline(
        policy=ledger.policy,
        hardware=hw.name,
        model=geometry.name,
        batch=batch,
        start_s=decode.start_s,
        end_s=decode.end_s,
        stall_s=decode.stall_s,
        recall_wait_s=decode.recall_wait_s,
        h2d_bytes=decode.demand_bytes.sum(axis=1) + decode.recall_bytes,
        d2h_bytes=decode.write_back_bytes,
        kv_bytes=place.logical_bytes,
        transfers=tuple(decode.transfers),
    )


class _Decode:
    """The processes of one decode: its steps, the recalls that run beside them, and the write-back
    of new entries.
    """

    def __init__(
        self,
        env: simpy.Environment,
        memory: MemorySystem,
        ledger: Ledger,
        geometry: Geometry,
        place: Footprint,
        batch: int,
        one_text: bool,
    ) -> None:
        self.env, self.memory, self.n_steps, self.cadence = (
            env,
            memory,
            ledger.n_steps,
            ledger.cadence,
        )
        self.gather = GatherCurve(memory.hw.link)
        self.row_bytes = geometry.slot_bytes(ledger.granularity, with_keys=place.keys_tiered)
        on_gpu = memory.hw.placed.ranked(batch) / memory.hw.placed.cp  # requests' bytes
        # [T, n_csa]: what each model layer's misses move; a shared slot holds every layer's entries
        self.demand_bytes = (
            ledger.demand_loads[:, place.groups].astype(np.float64) * self.row_bytes * on_gpu
        )
        recalls = ledger.lookahead_loads[:, place.groups].astype(np.float64)
        page_bytes = self.row_bytes * on_gpu
        self.recall_bytes = recalls.sum(axis=1) * page_bytes
        self.write_back_bytes = self._write_back(ledger.tau, geometry, place, on_gpu)
        steps = StepModel(memory.hw, geometry)
        costs = steps.equal(batch, place.tokens, place.scored_entries)
        indexer_s = on_gpu * memory_indexer_s(memory.hw, geometry, ledger.scored)
        # recalled bytes take their part of HBM bandwidth
        missed_bytes, hbm = self.demand_bytes.sum(axis=1), memory.hw.hbm_bytes_per_s.value
        self.rest_s = costs.rest_s + indexer_s + (missed_bytes + self.recall_bytes) / hbm
        self.csa_s, self.n_selecting = costs.csa_s, geometry.n_selecting
        # [T, n_csa]: what a layer waits for its misses where the link is theirs alone
        self.miss_s = self.gather.seconds(self.row_bytes, self.demand_bytes)
        # [T] bytes that come before their decision, and how fast beside a decode
        self.ahead_bytes = self.recall_bytes if ledger.decides_ahead else 0 * self.recall_bytes
        late_bytes = self.recall_bytes - self.ahead_bytes
        # [T] s that a step waits for the rest, where nothing else is on the link
        self.late_s = self.gather.seconds(self.row_bytes, late_bytes)
        self.beside_bytes_per_s = float("inf")
        self.beside_slower = 0.0
        table = None if memory.hw.kernel_tables else calibrated_table(memory.hw, geometry)
        if table is not None and table.engine is not None:
            engine = EngineCosts(
                table.engine,
                ledger,
                geometry,
                place,
                self.gather,
                on_gpu,
                steps.before_selecting_s(batch),
                one_text,
            )
            self.miss_s = engine.miss_s()
            spare = np.array(ledger.ahead_slots or [0] * ledger.n_groups)[place.groups]
            ahead = np.minimum(recalls, spare)
            self.ahead_bytes = ahead.sum(axis=1) * page_bytes
            # Recalled bytes come beside steps. What was missed and is kept, or came ahead, goes
            # from spare pages to its slots: read, and written.
            kept_bytes = engine.kept_pages()[:, place.groups].sum(axis=1) * page_bytes
            if on_gpu > 1 and self.cadence > 1:
                indexer_s = _in_turns(indexer_s, self.cadence)
            in_step_s = 2 * kept_bytes / hbm + engine.settled_s(ahead.sum(axis=1) * on_gpu, hbm)
            self.rest_s = costs.rest_s + indexer_s + engine.step_s() + in_step_s
            late_pages = (recalls - ahead).sum(axis=1) * on_gpu
            compute_s = self.rest_s + self.n_selecting * self.csa_s
            longer_s = engine.late_s(late_pages, compute_s)
            self.late_s = np.where(late_pages > 0, longer_s, 0.0)
            self.rest_s = self.rest_s + longer_s - self.late_s  # of the steps that follow
            self.beside_bytes_per_s = table.engine.beside_bytes_per_s
            self.beside_slower = table.engine.beside_slower
        # What is not known one window before cannot be recalled before the decision.
        self.overlaps = ledger.decides_ahead
        self.recalls = bool(ledger.lookahead_loads.any())
        # The prefill left the first window's set on the GPU.
        self.recall: simpy.Event = env.timeout(0)
        self.start_s, self.end_s = np.zeros(self.n_steps), np.zeros(self.n_steps)
        self.stall_s, self.recall_wait_s = np.zeros(self.n_steps), np.zeros(self.n_steps)
        self.transfers: list[Transfer] = []

    def _write_back(
        self, tau: int, geometry: Geometry, place: Footprint, on_gpu: float
    ) -> np.ndarray:
        """[T] bytes: once a window, the entries that closed in it go to the host's mirror, where
        there is one.
        """
        n_bytes = np.zeros(self.n_steps)
        if place.host_bytes:
            mirrored = np.array(
                [geometry.host_kv_bytes(int(n)) for n in place.tokens[::tau]], dtype=np.float64
            )
            n_bytes[tau::tau] = on_gpu * np.diff(mirrored)
        return n_bytes

    def run(self) -> Generator[simpy.Event, Any, None]:
        """All steps, one after another."""
        for step in range(self.n_steps):
            self.start_s[step] = self.env.now
            if self.write_back_bytes[step]:
                self._booked(
                    "write_back",
                    step,
                    self.memory.to_host.transfer(self.write_back_bytes[step]),
                    self.write_back_bytes[step],
                )
            if self.recalls and step % self.cadence == 0:
                yield self.recall
                late_bytes = self.recall_bytes[step] - self.ahead_bytes[step]
                if late_bytes > 0:
                    yield self._booked(
                        "recall", step, self.env.timeout(self.late_s[step]), late_bytes
                    )
                self.recall_wait_s[step] = self.env.now - self.start_s[step]
                later = step + self.cadence
                if self.overlaps and later < self.n_steps:
                    self.recall = self._recall(
                        later, self.ahead_bytes[later], self.beside_bytes_per_s
                    )
            with self.memory.compute.request() as turn:
                yield turn
                yield from self._step(step)
            self.end_s[step] = self.env.now

    def _recall(self, step: int, n_bytes: float, limit: float) -> simpy.Event:
        """Start to load `n_bytes` that the decision at `step` recalls, at `limit` bytes/s at most;
        the event is its end.
        """
        if n_bytes <= 0:
            return self.env.timeout(0)
        return self._booked("recall", step, self.env.process(self._gather(n_bytes, limit)), n_bytes)

    def _booked(self, kind: str, step: int, done: simpy.Event, n_bytes: float) -> simpy.Event:
        """`done`, which ends a transfer that starts now."""
        start_s = self.env.now
        done.callbacks.append(lambda _: self._book(kind, step, start_s, self.env.now, n_bytes))
        return done

    def _book(self, kind: str, step: int, start_s: float, end_s: float, n_bytes: float) -> None:
        self.transfers.append(Transfer(kind, step, float(start_s), float(end_s), float(n_bytes)))

    def _gather(
        self, n_bytes: float, limit: float = float("inf")
    ) -> Generator[simpy.Event, Any, None]:
        """One gather: its fixed cost, then its bytes at a rate that rows, the link and `limit`
        allow.
        """
        fixed_s = float(self.gather.fixed_s(self.row_bytes))
        moving_s = float(self.gather.seconds(self.row_bytes, n_bytes)) - fixed_s
        yield self.env.timeout(fixed_s)
        yield self.memory.to_gpu.transfer(n_bytes, limit=min(limit, n_bytes / moving_s))

    def _step(self, step: int) -> Generator[simpy.Event, Any, None]:
        """Compute one step; a layer with misses waits for them before its attention."""
        compute_s = self.rest_s[step] + self.n_selecting * self.csa_s[step]
        if not self.recall.triggered:
            compute_s *= 1 + self.beside_slower
        missed = np.flatnonzero(self.demand_bytes[step])
        if not len(missed):
            yield self.env.timeout(compute_s)
        elif self.recall.triggered:  # the link is this step's own, so its waits add up
            self.stall_s[step] = self.miss_s[step, missed].sum()
            self._book(
                "misses",
                step,
                self.env.now,
                self.env.now + self.stall_s[step],
                self.demand_bytes[step].sum(),
            )
            yield self.env.timeout(compute_s + self.stall_s[step])
        else:
            yield from self._contended_step(step, missed, compute_s)

    def _contended_step(
        self, step: int, missed: np.ndarray, compute_s: float
    ) -> Generator[simpy.Event, Any, None]:
        """Misses that share the link with a recall, layer by layer."""
        for layer in missed:
            before_s = self.env.now
            yield from self._gather(self.demand_bytes[step, layer])
            self.stall_s[step] += self.env.now - before_s
            self._book("misses", step, before_s, self.env.now, self.demand_bytes[step, layer])
            yield self.env.timeout(compute_s / len(missed))


def _in_turns(decided_s: np.ndarray, cadence: int) -> np.ndarray:
    """[T]: what many requests do in turns between two decisions, `decided_s` [T] in all."""
    number = np.arange(len(decided_s))
    after = number % cadence
    return np.where(after > 0, decided_s[number - after] / max(1, cadence - 1), 0.0)
