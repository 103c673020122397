"""The requests that decode side by side, and what they ask for in their next steps."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np
import simpy

from fmsim.sim.serving.demand import Demand, Pools
from fmsim.sim.serving.prefix import NOTHING_FOUND, FoundBlocks, Pinned
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.step_cost import Spread, StepCosts, StepModel


@dataclass
class ServedRequest:
    """One request on its way. Times in seconds; None until they come."""

    number: int
    asked: Arrival
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    offset: int  # ledger step at which it begins
    steps: int  # decode steps it needs
    pools: Pools
    rank: int = 0  # whose GPUs hold it
    refused: str | None = None  # the memory, or the model's positions, that it could never fit
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    prefill_left: list[tuple[int, float]] = field(
        default_factory=list
    )  # (tokens, seconds) of chunks, the next one last
    recall: simpy.Event | None = None  # of its next window
    prefix: simpy.Event | None = None  # what was there has come to the GPU
    found: FoundBlocks = NOTHING_FOUND  # of its prompt's blocks, when it was admitted
    reused_tokens: int = 0  # of its prompt, that were there
    gpu_bytes: float = 0.0  # that it holds itself on each GPU of its rank, and on the host
    host_bytes: float = 0.0
    nvme_bytes: float = 0.0  # of its mirror, on NVMe
    whole: bool = False  # all its entries are on the GPU, under hybrid residency
    pinned: Pinned = field(default_factory=Pinned)
    waits_s: dict[str, float] = field(default_factory=dict)  # by name, before its first token
    joined_stall_s: float = 0.0  # the server's stalls when it joined the batch
    stall_s: float = 0.0  # that it went through, misses' and late recalls' together


@dataclass(frozen=True)
class Load:
    """What a batch asks for in its next n steps, on each rank that has any request of it."""

    ranks: list[int]  # [R] their numbers
    requests: list[int]  # [R] of them
    tokens: list[Spread]  # [R] of [n] context
    scored: list[Spread]  # [R] of [n] entries scored in a CSA layer
    recalled_bytes: np.ndarray  # [R, n] for windows that begin at the step
    indexer_scored: np.ndarray  # [R, n] entries scored by the memory indexer
    miss_bytes: np.ndarray  # [R, n, G] in each layer of a group, all requests together

    def costs(self, model: StepModel) -> StepCosts:
        """Of the steps: in every layer the busiest rank's."""
        batch = sum(self.requests)
        each = [
            model.mixed(requests, tokens, scored, batch)
            for requests, tokens, scored in zip(self.requests, self.tokens, self.scored)
        ]
        return StepCosts(
            csa_s=np.maximum.reduce([costs.csa_s for costs in each]),
            rest_s=np.maximum.reduce([costs.rest_s for costs in each]),
        )


@dataclass(frozen=True)
class WindowStart:
    """A request at a decision: what its window needed from the host, and what the next one will."""

    request: ServedRequest
    own_bytes: float
    next_bytes: float


# Of each request. `position` (ledger steps from the ledger's start, windows that repeat counted
# again) is less the batch's own count of steps,
# which goes on for all alike; `end` is that count when it is done. missing: 0 for a request that
# the budget holds whole, else 1.
_STATE = np.dtype(
    [(name, np.int64) for name in ("rank", "offset", "position", "context", "joined", "end")]
    + [(name, np.float64) for name in ("growth", "ratio", "missing")]
)


@dataclass(frozen=True, eq=False)
class _Running:
    """A request and its row of the state, as plain numbers."""

    request: ServedRequest
    position: int
    end: int
    grown: float  # what its ledger's recalls are multiplied by


class RunningBatch:
    """Requests and, beside them, their state as one array, which changes only when one joins or
    leaves.
    """

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.changes = 0  # how often a request joined or left
        self.steps = 0  # that it went on, in all
        self._running: list[_Running] = []
        self._fresh: list[ServedRequest] = []  # without a first token
        self._state = np.zeros(0, dtype=_STATE)
        self._first_end = 0  # of the running ones
        # those whose windows begin when `steps` modulo the cadence is the key, and the keys' order
        self._by_phase: dict[int, list[_Running]] = {}
        self._phases: list[int] = []

    def __len__(self) -> int:
        return len(self._running)

    @property
    def requests(self) -> list[ServedRequest]:
        return [running.request for running in self._running]

    def add(self, request: ServedRequest) -> None:
        demand, prompt = self.demand, request.prompt_tokens
        fits = request.whole or demand.fits_whole(prompt, request.output_tokens)
        missing = float(not fits)
        growth = demand.growth(prompt)
        position = request.offset - self.steps
        end = self.steps + request.steps
        row = (
            request.rank,
            request.offset,
            position,
            prompt + 1,
            self.steps,
            end,
            growth,
            demand.length_ratio(prompt),
            missing,
        )
        running = _Running(request, position, end, growth * missing)
        self._running.append(running)
        self._by_phase.setdefault(self._phase(running), []).append(running)
        if request.first_token_s is None:
            self._fresh.append(request)
        grown = np.empty(len(self._state) + 1, dtype=_STATE)
        grown[:-1] = self._state
        grown[-1] = row
        self._state = grown
        self._changed()

    def shrink(self, request: ServedRequest) -> None:
        """A request that had all its entries on the GPU has its slots from now on; one that is not
        in the batch begins so.
        """
        for place, running in enumerate(self._running):
            if running.request is request:
                prompt, output = request.prompt_tokens, request.output_tokens
                self._state["missing"][place] = not self.demand.fits_whole(prompt, output)
                self.changes += 1

    def _phase(self, running: _Running) -> int:
        return -running.position % self.demand.cadence

    def _changed(self) -> None:
        self.changes += 1
        self._first_end = int(self._state["end"].min()) if self._running else 0
        self._phases = sorted(self._by_phase)

    @property
    def least_left(self) -> int:
        """Steps until the first request is done."""
        return self._first_end - self.steps

    def quiet_steps(self) -> int:
        """Steps until a request is done or, where windows matter, begins one."""
        if not self.demand.recalls:
            return self.least_left
        cadence, now = self.demand.cadence, self.steps % self.demand.cadence
        following = bisect.bisect_right(self._phases, now)
        if following < len(self._phases):
            next_window = self._phases[following] - now
        else:
            next_window = self._phases[0] + cadence - now
        return min(self.least_left, next_window)

    def window_starts(self) -> list[WindowStart]:
        """The requests for which a window begins at the next step."""
        now = self.steps % self.demand.cadence
        return [self._window_start(running) for running in self._by_phase.get(now, ())]

    def _window_start(self, running: _Running) -> WindowStart:
        demand, cadence = self.demand, self.demand.cadence
        position = running.position + self.steps
        own = following = 0.0
        if position > running.request.offset:  # the first set is there
            own = demand.recalled_at(position) * running.grown
        if running.end - self.steps > cadence:
            following = demand.recalled_at(position + cadence) * running.grown
        return WindowStart(running.request, own, following)

    def load(self, n_steps: int) -> Load:
        """Sums over the batch for each of the next `n_steps`; at most `least_left`."""
        demand, state = self.demand, self._state
        steps = self.steps + np.arange(n_steps)
        position = state["position"][:, None] + steps
        at = demand.at(position)
        gone = steps - state["joined"][:, None]
        if demand.tokens_per_step != 1:
            gone = (gone * demand.tokens_per_step).astype(np.int64)
        tokens = state["context"][:, None] + gone
        scored = entries = demand.geometry.csa_entries(tokens)
        if demand.keys_tiered:
            scored = np.minimum(demand.resident[at] * state["growth"][:, None], entries)
        recalled = np.where(position > state["offset"][:, None], demand.recall_bytes[at], 0.0)
        recalled *= (state["growth"] * state["missing"])[:, None]
        indexed = state["ratio"][:, None] * demand.indexer_scored[at]
        ranks = np.unique(state["rank"])
        of_rank = [slice(None)] if len(ranks) == 1 else [state["rank"] == rank for rank in ranks]
        missed = np.zeros((len(ranks), n_steps, 1))
        if demand.misses:
            missed = np.stack(
                [
                    np.einsum("b,bng->ng", state["missing"][own], demand.miss_bytes[at[own]])
                    for own in of_rank
                ]
            )
        return Load(
            ranks=ranks.tolist(),
            requests=[len(state[own]) for own in of_rank],
            tokens=[_spread(tokens[own]) for own in of_rank],
            scored=[_spread(scored[own]) for own in of_rank],
            recalled_bytes=np.stack([recalled[own].sum(axis=0) for own in of_rank]),
            indexer_scored=np.stack([indexed[own].sum(axis=0) for own in of_rank]),
            miss_bytes=missed,
        )

    def advance(self, steps: int, first_s: float) -> list[ServedRequest]:
        """Move on; returns the requests that are done.

        `first_s`: when the first of these steps ended.
        """
        for request in self._fresh:
            request.first_token_s = first_s
        self._fresh.clear()
        self.steps += steps
        if self.steps < self._first_end:
            return []
        done = [running for running in self._running if running.end <= self.steps]
        self._running = [running for running in self._running if running.end > self.steps]
        for running in done:
            phase = self._phase(running)
            self._by_phase[phase].remove(running)
            if not self._by_phase[phase]:
                del self._by_phase[phase]
        self._state = self._state[self._state["end"] > self.steps]
        self._changed()
        return [running.request for running in done]


def _spread(values: np.ndarray) -> Spread:
    return Spread(values.sum(axis=0), values.max(axis=0))


def mean_step_s(model: StepModel, demand: Demand, tokens: np.ndarray, rank: np.ndarray) -> float:
    """Compute time of a decode step of requests with these contexts [B] on these ranks [B], at the
    ledger's mean resident set.
    """
    scored = entries = demand.geometry.csa_entries(tokens)
    if demand.keys_tiered:
        growth = np.array([demand.growth(int(n)) for n in tokens])
        scored = np.minimum(demand.resident.mean() * growth, entries)
    totals = []
    for number in np.unique(rank):
        own = rank == number
        costs = model.mixed(
            int(own.sum()), _spread(tokens[own, None]), _spread(scored[own, None]), len(tokens)
        )
        totals.append(float(costs.total_s(demand.geometry.n_selecting)[0]))
    return max(totals)
