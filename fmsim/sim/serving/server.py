"""One server and its requests, in SimPy: admission, continuous batching, prefill, recalls that
contend for the link, misses that stall.

Decode runs in spans of steps in which nothing changes: no request joins or leaves, no window
begins, no prompt is done. The steps of a span are summed in numpy and take one event; a newcomer
that can be admitted cuts a span short at the end of its step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy

from fmsim.geometry import Geometry
from fmsim.hw.memory import FairLink, MemorySystem
from fmsim.hw.spec import Hardware
from fmsim.sim.serving import spec
from fmsim.sim.serving.admission import POSITIONS, Admission, server_hardware
from fmsim.sim.serving.batch import RunningBatch, ServedRequest
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.links import RankLinks
from fmsim.sim.serving.log import Log
from fmsim.sim.serving.prefill import PrefillModel
from fmsim.sim.serving.prefix import PrefixStore, stores
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.steps import DecodeTimes, StepTimes
from fmsim.sim.serving.workload import RequestGenerator
from fmsim.sim.step_cost import StepModel
from fmsim.sim.transfer_cost import GatherCurve

Process = Generator[simpy.Event, Any, None]  # what SimPy runs: it yields what it waits for

_MOST_STEPS = 1024  # in one span, which bounds its arrays


class ServerRun:
    """Build, then `run()`, once."""

    def __init__(
        self,
        hw: Hardware,
        geometry: Geometry,
        demand: Demand,
        options: spec.Server,
        source: RequestGenerator,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        """`finished` is called as each request ends.

        Raises FmsimError when not even the weights fit.
        """
        self.finished = finished
        self.env = simpy.Environment()
        demand = demand.drafted(options.draft_tokens, options.acceptance)
        self.hw, self.geometry, self.demand = server_hardware(hw, options), geometry, demand
        self.options, self.source, self.log = options, source, Log()
        self.model = StepModel(self.hw, geometry, options.draft_tokens)
        self.prefill = PrefillModel(self.hw, geometry)
        self.ranks = [MemorySystem(self.env, self.hw, geometry) for _ in range(self.hw.placed.dp)]
        self._parts = self.hw.placed.cp  # GPUs that share out a request's KV
        self.networks = [
            FairLink(self.env, options.network_bytes_per_s) for _ in self.ranks
        ]  # to each GPU
        self.stores = self._stores()
        self.log.block_tokens = self.stores[0].block_tokens if self.stores else 0
        self.admission = Admission(
            self.ranks, self.model, demand, options, source.workload.slo, self.stores
        )
        # admitted, prompt not done, by rank; a rank does one at a time
        self.prefilling: list[deque[ServedRequest]] = [deque() for _ in self.ranks]
        # admitted and KV in place: to join at the next step
        self.ready: deque[ServedRequest] = deque()
        self.batch = RunningBatch(demand)
        gather, spilled_share = GatherCurve(self.hw.link), self.admission.spilled_share
        self.decode_times = DecodeTimes(self.batch, self.model, gather, spilled_share)
        self.links = RankLinks(self.env, self.ranks, gather, demand, self._parts, spilled_share)
        self._wake: simpy.Event | None = None  # what cuts the present wait short
        self._prefillers = simpy.Resource(self.env, options.prefill_servers)
        self._offsets = np.random.default_rng(
            [source.workload.seed, 1]
        )  # a stream of its own, so that lengths do not depend on it

    def _stores(self) -> list[PrefixStore]:
        """Of each rank, where the server reuses prefixes and any request has one."""
        chunked = self.options.prefill == "chunked"
        known = any(request.blocks for request in self.source.first)
        if not (self.options.reuse_prefixes and chunked and known):
            return []
        tokens = self.source.block_tokens
        block_bytes = self.geometry.full_kv_bytes(tokens) / self._parts
        return stores(self.ranks, block_bytes, tokens, on_gpu=self.demand.holds_all)

    def run(self) -> Log:
        """Serve all requests that arrive to their end."""
        self._sample()
        self.env.process(self._arrivals())
        self.env.process(self._serve())
        self.env.run()
        self._sample()
        return self.log

    # Requests come and go

    def _arrivals(self) -> Process:
        for arrival in self.source.first:
            if arrival.arrival_s > self.env.now:
                yield self.env.timeout(arrival.arrival_s - self.env.now)
            self._receive(arrival)

    def _receive(self, arrival: Arrival) -> None:
        request = ServedRequest(
            number=len(self.log.requests),
            asked=arrival,
            arrival_s=self.env.now,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            offset=int(self._offsets.choice(self.demand.offsets)),
            steps=math.ceil(self._decoded(arrival) / self.demand.tokens_per_step),
            pools=self.demand.pools(arrival.prompt_tokens, arrival.output_tokens),
        )
        self.log.requests.append(request)
        longest = arrival.prompt_tokens + arrival.output_tokens
        positions = self.geometry.max_positions
        if positions is not None and longest > positions:
            request.refused = POSITIONS
        else:
            request.refused = self.admission.never_fits(request)
        if request.refused:
            return
        if self.options.prefill == "separate":
            self.env.process(self._prefill_elsewhere(request))
        else:
            self._enqueue(request)

    def _decoded(self, arrival: Arrival) -> int:
        """Tokens that decode makes: a prefill makes the first one."""
        return arrival.output_tokens - (self.options.prefill != "done")

    def _prefill_elsewhere(self, request: ServedRequest) -> Process:
        with self._prefillers.request() as turn:
            yield turn
            yield self.env.timeout(sum(seconds for _, seconds in self._chunks(request)))
        self._enqueue(request)

    def _chunks(self, request: ServedRequest) -> list[tuple[int, float]]:
        return self.prefill.prompt(
            request.prompt_tokens, self.options.prefill_chunk_tokens, request.reused_tokens
        )

    def _enqueue(self, request: ServedRequest) -> None:
        self.admission.queue.append(request)
        self._call()

    def _call(self) -> None:
        """Cut the server's wait short if somebody can join."""
        if self._wake is not None and not self._wake.triggered and self._somebody_can_join():
            self._wake.succeed()

    def _somebody_can_join(self) -> bool:
        return bool(self.ready) or self.admission.head_can_enter()

    def _leave(self, request: ServedRequest) -> None:
        request.finished_s = self.env.now
        self.finished()
        request.stall_s = self.log.stalled_s - request.joined_stall_s
        if self.stores:
            self._keep(request, request.prompt_tokens + request.output_tokens)
        self.admission.release(request)
        following = self.source.after(self.env.now, request.asked)
        if following is None:
            return
        if following.arrival_s > self.env.now:
            self.env.process(self._comes_later(following))
        else:
            self._receive(following)

    def _comes_later(self, arrival: Arrival) -> Process:
        yield self.env.timeout(arrival.arrival_s - self.env.now)
        self._receive(arrival)

    def _admit(self) -> None:
        for request in self.admission.enter(self.env.now):
            self._start(request)
        for request in self.admission.shrunk:
            self.batch.shrink(request)
        self.admission.shrunk.clear()
        self.log.waits_for = self.admission.waits_for

    def _start(self, request: ServedRequest) -> None:
        """Bring an admitted request's KV into place."""
        if self.options.prefill == "done":
            self.ready.append(request)
        elif self.options.prefill == "separate":
            self.env.process(self._receive_kv(request))
        else:
            self._begin_prefill(request)

    def _begin_prefill(self, request: ServedRequest) -> None:
        """Of what is not there. What is on the host comes layer by layer beside the first chunk,
        whole: the rest of the prompt selects among all of it.
        """
        found = request.found
        if found.n_blocks:
            store = self.stores[request.rank]
            reused = found.n_blocks * store.block_tokens
            # the last token is computed all the same: its logits are wanted
            request.reused_tokens = min(reused, request.prompt_tokens - 1)
            n_blocks = len(found.host) + len(found.nvme)
            if n_blocks:
                memory, size = self.ranks[request.rank], store.host.block_bytes
                read = memory.from_nvme.transfer(len(found.nvme) * size)
                request.prefix = read & memory.to_gpu.transfer(n_blocks * size)
        request.prefill_left = self._chunks(request)[::-1]
        self.prefilling[request.rank].append(request)

    def _keep(self, request: ServedRequest, tokens: int) -> None:
        """Whole blocks of a request's first `tokens` become the store's, to be found by others."""
        store = self.stores[request.rank]
        blocks = request.asked.blocks[: tokens // store.block_tokens]
        pinned = request.pinned
        if store.gpu is not None:
            own_bytes = store.gpu.block_bytes
            request.gpu_bytes -= store.gpu.adopt_all(
                blocks, pinned.gpu, own_bytes, request.gpu_bytes
            )
            self.log.written_back_bytes += store.host.store(blocks) * store.host.block_bytes
            return
        own_bytes = self.geometry.host_kv_bytes(store.block_tokens) / self._parts
        request.host_bytes -= store.host.adopt_all(
            blocks, pinned.host, own_bytes, request.host_bytes
        )

    def _receive_kv(self, request: ServedRequest) -> Process:
        """The prompt's KV comes over the network, into the mirror where there is one; then the
        first resident set goes to the GPU.
        """
        kv_bytes = self.geometry.full_kv_bytes(request.prompt_tokens) + self.geometry.window_bytes
        yield self.networks[request.rank].transfer(kv_bytes / self._parts)
        if self.demand.mirrored:
            first_set = self.demand.first_set_bytes(request.prompt_tokens, request.output_tokens)
            yield self.links.recall(request.rank, first_set)
        self._prefilled(request)
        self._call()

    def _prefilled(self, request: ServedRequest) -> None:
        request.first_token_s = self.env.now
        if self.stores:
            self._keep(request, request.prompt_tokens)
        self.log.tokens += 1
        if self.options.residency == "hisparse" and self.demand.misses:
            self.env.process(self._write_all(request))
        else:
            self.ready.append(request)

    def _write_all(self, request: ServedRequest) -> Process:
        """The prompt's mirror is written before the first step that may miss."""
        n_bytes = self.geometry.host_kv_bytes(request.prompt_tokens) / self._parts
        yield self.ranks[request.rank].to_host.transfer(n_bytes)
        self.ready.append(request)
        self._call()

    # The server's loop

    def _serve(self) -> Process:
        while True:
            self._join()
            if self.batch or any(self.prefilling):
                yield from self._span()
            else:
                self._wake = self.env.event()
                yield self._wake
                self.log.pass_to(self.env.now, busy=False)
                self._sample()

    def _join(self) -> None:
        before = len(self.admission.admitted)
        self._admit()
        while self.ready:
            request = self.ready.popleft()
            request.joined_stall_s = self.log.stalled_s
            if request.steps:
                self.batch.add(request)
            else:  # its prefill made all it wanted
                self._leave(request)
                self._admit()
        if len(self.admission.admitted) != before:
            self._sample()

    def _span(self) -> Process:
        """As many steps as pass without a change."""
        if self.batch and self.demand.recalls:
            yield from self._begin_windows()
        contended = self.demand.misses and not self.links.idle
        times = self._step_times(1 if contended else self._steps_ahead())
        step_s = times.compute_s + times.prefill_s
        if contended:
            self.log.stall_s += yield from self.links.contended_stall(times)
        elif self.demand.misses:
            stall_s = times.stall_s.max(axis=0)
            step_s = step_s + stall_s
        ends_s = np.cumsum(step_s)
        start_s = self.env.now
        done = yield from self._pass(ends_s)
        yield from self._wait_for_prefixes()
        if self.demand.misses:
            missed_bytes = self._parts * float(times.miss_bytes[:, :done].sum())
            self.log.missed_entries += missed_bytes / self.demand.entry_bytes
        if self.demand.misses and not contended:
            for rank, n_bytes in zip(times.ranks, times.miss_bytes[:, :done].sum(axis=1)):
                self.ranks[rank].to_gpu.moved_bytes += float(n_bytes)
            self.log.stall_s += float(stall_s[:done].sum())
        if any(self.prefilling):
            self.log.prefill_s += float(times.prefill_s[:done].sum())
        self._book(done, start_s + float(ends_s[0]) if done > 1 else self.env.now)

    def _wait_for_prefixes(self) -> Process:
        """A step with a prompt's first chunk is not done before what was there has come."""
        before_s = self.env.now
        for request in self._prefilled_now():
            if request.prefix is not None:
                if not request.prefix.processed:
                    yield request.prefix
                    request.waits_s["prefix"] = self.env.now - before_s
                request.prefix = None
        self.log.prefix_wait_s += self.env.now - before_s

    def _pass(self, ends_s: np.ndarray) -> Generator[simpy.Event, Any, int]:
        """Let steps pass that end at `ends_s` from now; returns how many did before somebody came
        to join.
        """
        start_s, done = self.env.now, len(ends_s)
        if done > 1 and not self._somebody_can_join():
            self._wake = self.env.event()
            yield self.env.timeout(float(ends_s[-1])) | self._wake
            if self._wake.triggered:
                done = min(done, int(np.searchsorted(ends_s, self.env.now - start_s)) + 1)
            self._wake = None
        elif done > 1:
            done = 1
        yield self.env.timeout(max(0.0, start_s + float(ends_s[done - 1]) - self.env.now))
        return done

    def _steps_ahead(self) -> int:
        steps = self.batch.quiet_steps() if self.batch else _MOST_STEPS
        prefill = [
            len(request.prefill_left) if request.prefix is None else 1
            for request in self._prefilled_now()
        ]
        return min([steps, *prefill, _MOST_STEPS])

    def _prefilled_now(self) -> list[ServedRequest]:
        """The first of each rank."""
        return [requests[0] for requests in self.prefilling if requests]

    def _step_times(self, n_steps: int) -> StepTimes:
        chunk_s = np.zeros(n_steps)
        for request in self._prefilled_now():
            own_s = [seconds for _, seconds in request.prefill_left[: -n_steps - 1 : -1]]
            chunk_s = np.maximum(chunk_s, own_s)
        if not self.batch:
            nothing = np.zeros((1, n_steps))
            return StepTimes([0], nothing[0], chunk_s, nothing, nothing, nothing)
        return self.decode_times.ahead(n_steps, chunk_s)

    # The link

    def _begin_windows(self) -> Process:
        """Requests at a window's start wait for its recall, and the batch with them; then the next
        window's recall starts.
        """
        starts, before_s = self.batch.window_starts(), self.env.now
        if not self.demand.overlaps:
            for start in starts:
                start.request.recall = self.links.recall(start.request.rank, start.own_bytes)
        for start in starts:
            if start.request.recall is not None and not start.request.recall.processed:
                yield start.request.recall
            start.request.recall = None
            if self.demand.overlaps:
                start.request.recall = self.links.recall(start.request.rank, start.next_bytes)
        self.log.recall_wait_s += self.env.now - before_s

    # What came of a span

    def _book(self, done: int, first_s: float) -> None:
        """`done` steps have passed, the first of them at `first_s`."""
        selected = self.demand.positions * self.geometry.n_csa * self.geometry.index_topk
        self.log.selected_entries += len(self.batch) * done * selected
        mirrored = len(self.batch) * done * self.demand.tokens_per_step
        self.log.tokens += mirrored
        self.log.pass_to(self.env.now, busy=True)
        for request in self.batch.advance(done, first_s):
            # its last step makes what is wanted, and no more
            wanted = self._decoded(request.asked)
            self.log.tokens += wanted - request.steps * self.demand.tokens_per_step
            self._leave(request)
        for request in self._prefilled_now():
            mirrored += sum(tokens for tokens, _ in request.prefill_left[-done:])
            del request.prefill_left[-done:]
            if not request.prefill_left:
                self.prefilling[request.rank].popleft()
                self._prefilled(request)
        if self.demand.mirrored:
            self.log.written_back_bytes += mirrored * self.geometry.paged_bytes_per_token
        self._sample()

    def _sample(self) -> None:
        counts = len(self.batch), len(self.admission.admitted), len(self.admission.queue)
        self.log.sample(self.env.now, counts, self.ranks)
