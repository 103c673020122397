"""The requests that decode side by side, and what they ask for in their next steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import simpy

from fmsim.sim.serving.demand import Demand, Pools
from fmsim.sim.step_cost import Spread, StepCosts, StepModel


@dataclass
class ServedRequest:
    """One request on its way. Times in seconds; None until they come."""

    number: int
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


# position: ledger steps from the ledger's start, windows that repeat counted again; context:
# tokens, the next step's included; left: steps; missing: 0 for a request that the budget holds
# whole, else 1
_STATE = np.dtype(
    [(name, np.int64) for name in ("rank", "offset", "position", "context", "left")]
    + [(name, np.float64) for name in ("growth", "ratio", "missing")]
)


class RunningBatch:
    """Requests and, beside them, their state as one array."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.requests: list[ServedRequest] = []
        self.changes = 0  # how often a request joined or left
        self.steps = 0  # that it went on, in all
        self._fresh: list[ServedRequest] = []  # without a first token
        self._state = np.zeros(0, dtype=_STATE)

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: ServedRequest) -> None:
        demand, prompt = self.demand, request.prompt_tokens
        missing = float(not demand.fits_whole(prompt, request.output_tokens))
        row = (
            request.rank,
            request.offset,
            request.offset,
            prompt + 1,
            request.steps,
            demand.growth(prompt),
            demand.length_ratio(prompt),
            missing,
        )
        self.changes += 1
        self.requests.append(request)
        if request.first_token_s is None:
            self._fresh.append(request)
        self._state = np.append(self._state, np.array([row], dtype=_STATE))

    @property
    def least_left(self) -> int:
        """Steps until the first request is done."""
        return int(self._state["left"].min())

    def quiet_steps(self) -> int:
        """Steps until a request is done or, where windows matter, begins one."""
        state, cadence = self._state, self.demand.cadence
        left = int(state["left"].min())
        return (
            min(left, int((cadence - state["position"] % cadence).min()))
            if self.demand.recalls
            else left
        )

    def window_starts(self) -> list[WindowStart]:
        """The requests for which a window begins at the next step."""
        demand = self.demand
        places = np.flatnonzero(self._state["position"] % demand.cadence == 0)
        return [
            self._window_start(self.requests[place], self._state[place])
            for place in places.tolist()
        ]

    def _window_start(self, request: ServedRequest, state: np.void) -> WindowStart:
        demand, cadence = self.demand, self.demand.cadence
        position = int(state["position"])
        grown = float(state["growth"] * state["missing"])
        own = following = 0.0
        if position > request.offset:  # the first set is there
            own = demand.recalled_at(position) * grown
        if state["left"] > cadence:
            following = demand.recalled_at(position + cadence) * grown
        return WindowStart(request, own, following)

    def load(self, n_steps: int) -> Load:
        """Sums over the batch for each of the next `n_steps`; at most `least_left`."""
        demand, state, steps = self.demand, self._state, np.arange(n_steps)
        position = state["position"][:, None] + steps
        at = demand.at(position)
        tokens = state["context"][:, None] + steps
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
        state = self._state
        state["position"] += steps
        state["context"] += steps
        state["left"] -= steps
        stay = state["left"] > 0
        if stay.all():
            return []
        self.changes += 1
        done = [request for request, stays in zip(self.requests, stay) if not stays]
        self.requests = [request for request, stays in zip(self.requests, stay) if stays]
        self._state = state[stay]
        return done


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
