"""The requests that decode side by side, and what they ask for in their next steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import simpy

from fmsim.geometry import Geometry
from fmsim.hw.spec import Hardware
from fmsim.sim.serving.demand import Demand, Pools
from fmsim.sim.step_cost import Spread, mixed_step_costs


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
    refused: str | None = None  # the memory that it could never fit
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    prefill_left: list[tuple[int, float]] = field(
        default_factory=list
    )  # (tokens, seconds) of chunks, the next one last
    recall: simpy.Event | None = None  # of its next window


@dataclass(frozen=True)
class Load:
    """What a batch asks for in its next n steps."""

    tokens: Spread  # [n] context
    scored: Spread  # [n] entries scored in a CSA layer
    recalled_bytes: np.ndarray  # [n] for windows that begin at the step
    indexer_scored: np.ndarray  # [n] entries scored by the memory indexer
    miss_bytes: np.ndarray  # [n, G] in each layer of a group, all requests together


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
    [(name, np.int64) for name in ("offset", "position", "context", "left")]
    + [(name, np.float64) for name in ("growth", "ratio", "missing")]
)


class RunningBatch:
    """Requests and, beside them, their state as one array."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.requests: list[ServedRequest] = []
        self._state = np.zeros(0, dtype=_STATE)

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: ServedRequest) -> None:
        demand, prompt = self.demand, request.prompt_tokens
        missing = float(not demand.fits_whole(prompt, request.output_tokens))
        row = (
            request.offset,
            request.offset,
            prompt + 1,
            request.steps,
            demand.growth(prompt),
            demand.length_ratio(prompt),
            missing,
        )
        self.requests.append(request)
        self._state = np.append(self._state, np.array([row], dtype=_STATE))

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
        state = self._state[places]
        grown = state["growth"] * state["missing"]
        own = (
            demand.recall_bytes[demand.at(state["position"])]
            * grown
            * (state["position"] > state["offset"])
        )  # the first set is there
        following = (
            demand.recall_bytes[demand.at(state["position"] + demand.cadence)]
            * grown
            * (state["left"] > demand.cadence)
        )
        return [
            WindowStart(self.requests[i], float(a), float(b))
            for i, a, b in zip(places, own, following)
        ]

    def load(self, n_steps: int) -> Load:
        """Sums over the batch for each of the next `n_steps`; at most `quiet_steps`."""
        demand, state, steps = self.demand, self._state, np.arange(n_steps)
        position = state["position"][:, None] + steps
        at = demand.at(position)
        tokens = state["context"][:, None] + steps
        scored = entries = tokens // demand.geometry.csa_rate
        if demand.keys_tiered:
            scored = np.minimum(demand.resident[at] * state["growth"][:, None], entries)
        recalled = np.where(position > state["offset"][:, None], demand.recall_bytes[at], 0.0)
        return Load(
            tokens=_spread(tokens),
            scored=_spread(scored),
            recalled_bytes=(state["growth"] * state["missing"]) @ recalled,
            indexer_scored=state["ratio"] @ demand.indexer_scored[at],
            miss_bytes=(
                np.einsum("b,bng->ng", state["missing"], demand.miss_bytes[at])
                if demand.misses
                else np.zeros((n_steps, 1))
            ),
        )

    def advance(self, steps: int, first_s: float) -> list[ServedRequest]:
        """Move on; returns the requests that are done.

        `first_s`: when the first of these steps ended.
        """
        for request in self.requests:
            if request.first_token_s is None:
                request.first_token_s = first_s
        state = self._state
        state["position"] += steps
        state["context"] += steps
        state["left"] -= steps
        stay = state["left"] > 0
        if stay.all():
            return []
        done = [request for request, stays in zip(self.requests, stay) if not stays]
        self.requests = [request for request, stays in zip(self.requests, stay) if stays]
        self._state = state[stay]
        return done


def _spread(values: np.ndarray) -> Spread:
    return Spread(values.sum(axis=0), values.max(axis=0))


def mean_step_s(hw: Hardware, geometry: Geometry, demand: Demand, tokens: np.ndarray) -> float:
    """Compute time of a decode step of requests with these contexts [B], at the ledger's mean
    resident set.
    """
    scored = entries = tokens // geometry.csa_rate
    if demand.keys_tiered:
        scored = np.minimum(
            demand.resident.mean() * np.array([demand.growth(int(n)) for n in tokens]), entries
        )
    costs = mixed_step_costs(
        hw, geometry, len(tokens), _spread(tokens[:, None]), _spread(scored[:, None])
    )
    return float(costs.total_s(geometry.n_csa)[0])
