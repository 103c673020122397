"""How many requests a server takes, what the wall is, what would move it, and from where on KV on
the host pays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fmsim.geometry import Geometry
from fmsim.hw.spec import LINK_FIGURE, Hardware, times_figure
from fmsim.sim.serving import spec
from fmsim.sim.serving.admission import LINK, NVME, server_hardware
from fmsim.sim.serving.banner import request_limits
from fmsim.sim.serving.capacity.steady import Steady, SteadyState
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.prefill import PrefillModel
from fmsim.sim.serving.summary import COMPUTE
from fmsim.sim.step_cost import StepModel

MOST_REQUESTS = 4096  # a wall beyond that is none
CONTEXTS = tuple(2**k for k in range(13, 21))  # 8K to 1M tokens, up to the model's positions


@dataclass(frozen=True)
class CapacityQuestion:
    """A server and the requests that it is asked for."""

    hw: Hardware
    geometry: Geometry
    demand: Demand
    options: spec.Server
    tokens: int  # of a prompt
    output_tokens: int
    tpot_s: float  # the longest mean time of a decode step that is acceptable
    ttft_s: float = float("inf")  # the longest time to a first token that is

    @cached_property
    def engine(self) -> Hardware:
        return server_hardware(self.hw, self.options)

    @cached_property
    def model(self) -> StepModel:
        return StepModel(self.engine, self.geometry, self.options.draft_tokens)

    def changed(self, **changes: Any) -> CapacityQuestion:
        """The same with other fields; step times are kept where the hardware's kernels are."""
        other = replace(self, **changes)
        if "hw" not in changes and "options" not in changes:
            other.__dict__["engine"] = self.engine
            other.__dict__["model"] = self.model
        return other

    def state(self) -> SteadyState:
        options = self.options
        return SteadyState(
            self.engine,
            self.geometry,
            self.demand.drafted(options.draft_tokens, options.acceptance),
            self.tokens + self.output_tokens,
            self.output_tokens,
            self.model,
        )

    def walls(self) -> dict[str, int]:
        """Requests at once that each resource of one server allows:

        - GPU memory, host memory: their pools over one request's bytes; batch limit: the engine's
          own;
        - PCIe: misses and recalls of a step take no longer than its computing, beyond which recalls
          are late and misses the larger part;
        - NVMe, where host memory spills to it: both pools together over one mirror, and reading
          what of a step's misses and recalls lies there takes no longer than its computing;
        - compute: a step, waiting included, keeps `tpot_s`.
        """
        state = self.state()
        walls = request_limits(
            self.engine, self.geometry, self.demand, self.options, self.tokens, self.output_tokens
        )
        if self.demand.misses or self.demand.recalls:
            walls[LINK] = state.largest(
                lambda steady: steady.link_s <= steady.compute_s, MOST_REQUESTS
            )
            if NVME in walls:
                reading = state.largest(
                    lambda steady: steady.nvme_s <= steady.compute_s, MOST_REQUESTS
                )
                walls[NVME] = min(walls[NVME], reading)
        walls[COMPUTE] = state.largest(lambda steady: steady.token_s <= self.tpot_s, MOST_REQUESTS)
        return walls

    def prompt_chunks_s(self) -> np.ndarray:
        """[n] seconds of each chunk of one prompt on one rank."""
        prefill = PrefillModel(self.engine, self.geometry)
        chunks = prefill.prompt(self.tokens, self.options.prefill_chunk_tokens)
        return np.array([seconds for _, seconds in chunks])


def goodput(question: CapacityQuestion) -> dict[str, Any]:
    """The most requests a second that keep both times asked for, by one server, at a steady load.

    With prompts prefilled on the same GPUs, a step in which any rank has a chunk takes that much
    longer on all, and ranks begin their prompts as they come, each by itself. A first token waits
    for the prompts before it on its rank (as in M/D/1) and for its own. `requests_per_s` is 0 where
    a prompt alone takes too long, or one request's tokens do.
    """
    walls = question.walls()
    most = min(MOST_REQUESTS, *(walls[kind] for kind in walls if kind != COMPUTE))
    state, chunk_s = question.state(), question.prompt_chunks_s()
    load = _Load(question, len(chunk_s), float(chunk_s.sum()))
    batch = state.largest(load.keeps, most)
    return {
        "requests_per_s": load.requests_per_s(state.at(batch)) if batch else 0.0,
        "batch": batch,
        "prompt_s": load.prompt_s,
    }


@dataclass(frozen=True)
class _Load:
    """A steady load: its prompts' chunks, and when."""

    question: CapacityQuestion
    n_chunks: int
    prompt_s: float  # of all chunks, alone

    @property
    def _beside(self) -> bool:
        return self.question.options.prefill == "chunked"

    def _busy(self, steady: Steady) -> float:
        """Share of steps in which one rank has a chunk."""
        ranks = self.question.engine.placed.dp
        steps = self.question.output_tokens / steady.tokens_per_step
        return steady.batch * self.n_chunks / (ranks * steps)

    def _token_s(self, steady: Steady) -> float:
        """Mean time a token."""
        if not self._beside:
            return steady.token_s
        busy = min(1.0, self._busy(steady))
        any_rank = 1 - (1 - busy) ** self.question.engine.placed.dp
        step_s = steady.step_s + any_rank * self.prompt_s / self.n_chunks
        return step_s / steady.tokens_per_step

    def requests_per_s(self, steady: Steady) -> float:
        return steady.batch / (self._token_s(steady) * self.question.output_tokens)

    def keeps(self, steady: Steady) -> bool:
        """Both times asked for."""
        if self._token_s(steady) > self.question.tpot_s:
            return False
        prefill = self.question.options.prefill
        if prefill == "done":
            return True
        if self._beside:
            busy = self._busy(steady)
            prompt_s = self.prompt_s + self.n_chunks * steady.step_s
        else:
            servers = self.question.options.prefill_servers
            busy = self.requests_per_s(steady) * self.prompt_s / servers
            prompt_s = self.prompt_s
        if busy >= 1:
            return False
        return prompt_s * (1 + busy / (2 * (1 - busy))) <= self.question.ttft_s


def plan(question: CapacityQuestion, full: Demand) -> dict[str, Any]:
    """`max_requests`, the wall by name (`max_requests_bound`), all `walls`, speed there, what each
    change would give, and the crossover against `full`. All of one server.
    """
    walls = question.walls()
    wall = min(walls, key=lambda kind: walls[kind])
    at_wall = question.state().at(max(1, walls[wall]))
    pools = question.demand.pools(question.tokens, question.output_tokens)
    return {
        "context_tokens": question.tokens,
        "output_tokens": question.output_tokens,
        "tpot_slo_s": question.tpot_s,
        "ttft_slo_s": None if math.isinf(question.ttft_s) else question.ttft_s,
        "max_requests": walls[wall],
        "max_requests_bound": wall,
        "walls": walls,
        "gpu_bytes": pools.gpu_bytes,
        "host_kv_bytes": pools.mirror,
        "speed": _speed(at_wall) if walls[wall] else None,
        "goodput": goodput(question),
        "moves": moves(question),
        "crossover": crossover(question, full),
    }


def _speed(steady: Steady) -> dict[str, float]:
    return {
        "batch": steady.batch,
        "tokens_per_s": steady.tokens_per_s,
        "step_s": steady.step_s,
        "wait_share": steady.wait_share,
    }


def moves(question: CapacityQuestion) -> list[dict[str, Any]]:
    """Each change by itself: the requests it allows, and the wall that is then met."""
    found = []
    for change, changed in _changes(question):
        walls = changed.walls()
        wall = min(walls, key=lambda kind: walls[kind])
        row: dict[str, Any] = {
            "change": change,
            "max_requests": walls[wall],
            "max_requests_bound": wall,
        }
        price = question.hw.nvme_usd_per_tb
        if "NVMe" in change and price is not None and question.hw.nvme_bytes is not None:
            row["usd"] = price.value * question.hw.nvme_bytes.value / 1e12
        found.append(row)
    return found


def _changes(question: CapacityQuestion) -> list[tuple[str, CapacityQuestion]]:
    hw, options = question.hw, question.options
    # A faster link helps an engine whose own copy path is slower only if that path gets faster with
    # it.
    copies = options.model_copy(
        update={"recall_bytes_per_s": options.recall_bytes_per_s and 2 * options.recall_bytes_per_s}
    )
    changes = [
        ("twice the GPU memory", question.changed(hw=times_figure(hw, "hbm_bytes", 2))),
        (
            "twice the link to the host",
            question.changed(
                hw=times_figure(hw, LINK_FIGURE, 2),
                options=copies,
            ),
        ),
        ("half the context", question.changed(tokens=question.tokens // 2)),
        ("twice the time a token", question.changed(tpot_s=2 * question.tpot_s)),
    ]
    if question.demand.mirrored:
        changes.insert(
            1,
            (
                "twice the host memory",
                question.changed(hw=times_figure(hw, "host_bytes", 2)),
            ),
        )
        if options.nvme:
            more = question.changed(hw=_more_drives(hw))
            changes.append(("twice the NVMe drives", more))
        elif hw.nvme_bytes is not None and hw.nvme_bytes_per_s is not None:
            spills = question.changed(options=options.model_copy(update={"nvme": True}))
            changes.append(("NVMe below host memory", spills))
        if options.mirror == "per_gpu" and hw.placed.tp > 1:
            shared = options.model_copy(update={"mirror": "shared"})
            changes.insert(2, ("one mirror that all GPUs share", question.changed(options=shared)))
    if options.max_batch:
        changes.append(
            (
                "no batch limit",
                question.changed(options=options.model_copy(update={"max_batch": None})),
            )
        )
    return changes


def _more_drives(hw: Hardware) -> Hardware:
    for name in ("nvme_bytes", "nvme_bytes_per_s"):
        hw = times_figure(hw, name, 2)
    return hw


def crossover(question: CapacityQuestion, full: Demand) -> dict[str, Any] | None:
    """Where the policy makes more tokens a second than the full cache does on the same GPUs; None
    for a policy that mirrors nothing.

    - `batch`: at this context, the smallest number of requests to serve at once (the full cache's
      GPU takes what fits and queues the rest);
    - `context_tokens`: with as many requests as each can take, the smallest context, to 1,024
      tokens; null where it never does up to 1M.
    """
    if not question.demand.mirrored:
        return None
    positions = question.geometry.max_positions or CONTEXTS[-1] + question.output_tokens
    most = positions - question.output_tokens
    contexts = [
        _compare(question.changed(tokens=min(tokens, most)), full)
        for tokens in CONTEXTS
        if tokens <= most + question.output_tokens
    ]
    return {
        "batch": _smallest_batch(question, full),
        "context_tokens": _smallest_context(question, full, contexts),
        "by_context": contexts,
    }


def _compare(question: CapacityQuestion, full: Demand) -> dict[str, Any]:
    """Both at the most requests that they take."""
    row: dict[str, Any] = {"context_tokens": question.tokens}
    for name, side in (("policy", question), ("full", question.changed(demand=full))):
        n_requests = min(side.walls().values())
        row |= {
            f"{name}_requests": n_requests,
            f"{name}_tokens_per_s": side.state().at(n_requests).tokens_per_s if n_requests else 0.0,
        }
    return row | {"pays": row["policy_tokens_per_s"] > row["full_tokens_per_s"]}


def _smallest_batch(question: CapacityQuestion, full: Demand) -> int | None:
    other = question.changed(demand=full)
    most, other_most = min(question.walls().values()), min(other.walls().values())
    state, other_state = question.state(), other.state()
    for batch in range(1, most + 1):
        in_full = min(batch, other_most)
        if not in_full or state.at(batch).tokens_per_s > other_state.at(in_full).tokens_per_s:
            return batch
    return None


def _smallest_context(
    question: CapacityQuestion, full: Demand, contexts: list[dict[str, Any]]
) -> int | None:
    paying = next((place for place, row in enumerate(contexts) if row["pays"]), None)
    if not paying:
        return int(contexts[0]["context_tokens"]) if paying == 0 else None
    low: int = contexts[paying - 1]["context_tokens"]
    high: int = contexts[paying]["context_tokens"]
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if _compare(question.changed(tokens=middle), full)["pays"]
            else (middle, high)
        )
    return high
