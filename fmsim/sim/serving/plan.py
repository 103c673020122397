"""How many requests a server takes, what the wall is, what would move it, and from where on KV on
the host pays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fmsim.geometry import Geometry
from fmsim.hw.spec import LINK_FIGURE, Figure, Hardware, replace_figure
from fmsim.sim.serving import spec
from fmsim.sim.serving.admission import LINK, server_hardware
from fmsim.sim.serving.banner import request_limits
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.steady import Steady, SteadyState
from fmsim.sim.serving.summary import COMPUTE

MOST_REQUESTS = 4096  # a wall beyond that is none
CONTEXTS = tuple(2**k for k in range(13, 21))  # 8K to 1M tokens


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

    def state(self) -> SteadyState:
        engine = server_hardware(self.hw, self.options)
        return SteadyState(
            engine, self.geometry, self.demand, self.tokens + self.output_tokens, self.output_tokens
        )

    def walls(self) -> dict[str, int]:
        """Requests at once that each resource allows:

        - GPU memory, host memory: their pools over one request's bytes; batch limit: the engine's
          own;
        - PCIe: misses and recalls of a step take no longer than its computing, beyond which recalls
          are late and misses the larger part;
        - compute: a step, waiting included, keeps `tpot_s`.
        """
        engine, state = server_hardware(self.hw, self.options), self.state()
        walls = request_limits(
            engine, self.geometry, self.demand, self.options, self.tokens, self.output_tokens
        )
        if self.demand.misses or self.demand.recalls:
            walls[LINK] = state.largest(
                lambda steady: steady.link_s <= steady.compute_s, MOST_REQUESTS
            )
        walls[COMPUTE] = state.largest(lambda steady: steady.step_s <= self.tpot_s, MOST_REQUESTS)
        return walls


def plan(question: CapacityQuestion, full: Demand) -> dict[str, Any]:
    """`requests`, the `wall` by name, all `walls`, speed there, what each change would give, and
    the crossover against `full`.
    """
    walls = question.walls()
    wall = min(walls, key=lambda kind: walls[kind])
    at_wall = question.state().at(max(1, walls[wall]))
    pools = question.demand.pools(question.tokens, question.output_tokens)
    return {
        "context_tokens": question.tokens,
        "output_tokens": question.output_tokens,
        "tpot_slo_s": question.tpot_s,
        "requests": walls[wall],
        "wall": wall,
        "walls": walls,
        "gpu_bytes": pools.gpu_bytes,
        "host_bytes": pools.mirror,
        "speed": _speed(at_wall) if walls[wall] else None,
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
        found.append({"change": change, "requests": walls[wall], "wall": wall})
    return found


def _changes(question: CapacityQuestion) -> list[tuple[str, CapacityQuestion]]:
    hw, options = question.hw, question.options
    # A faster link helps an engine whose own copy path is slower only if that path gets faster with
    # it.
    copies = options.model_copy(
        update={"recall_bytes_per_s": options.recall_bytes_per_s and 2 * options.recall_bytes_per_s}
    )
    changes = [
        ("twice the GPU memory", replace(question, hw=_doubled(hw, "hbm_bytes", hw.hbm_bytes))),
        (
            "twice the link to the host",
            replace(
                question,
                hw=_doubled(hw, LINK_FIGURE, hw.link.bandwidth_bytes_per_s),
                options=copies,
            ),
        ),
        ("half the context", replace(question, tokens=question.tokens // 2)),
        ("twice the time a token", replace(question, tpot_s=2 * question.tpot_s)),
    ]
    if question.demand.mirrored:
        changes.insert(
            1,
            (
                "twice the host memory",
                replace(question, hw=_doubled(hw, "host_bytes", hw.host_bytes)),
            ),
        )
        if options.mirror == "per_gpu" and hw.n_gpus > 1:
            shared = options.model_copy(update={"mirror": "shared"})
            changes.insert(2, ("one mirror that all GPUs share", replace(question, options=shared)))
    if options.max_batch:
        changes.append(
            (
                "no batch limit",
                replace(question, options=options.model_copy(update={"max_batch": None})),
            )
        )
    return changes


def _doubled(hw: Hardware, name: str, figure: Figure) -> Hardware:
    return replace_figure(hw, name, 2 * figure.value)


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
    contexts = [_compare(replace(question, tokens=tokens), full) for tokens in CONTEXTS]
    return {
        "batch": _smallest_batch(question, full),
        "context_tokens": _smallest_context(question, full, contexts),
        "by_context": contexts,
    }


def _compare(question: CapacityQuestion, full: Demand) -> dict[str, Any]:
    """Both at the most requests that they take."""
    row: dict[str, Any] = {"context_tokens": question.tokens}
    for name, side in (("policy", question), ("full", replace(question, demand=full))):
        n_requests = min(side.walls().values())
        row |= {
            f"{name}_requests": n_requests,
            f"{name}_tokens_per_s": side.state().at(n_requests).tokens_per_s if n_requests else 0.0,
        }
    return row | {"pays": row["policy_tokens_per_s"] > row["full_tokens_per_s"]}


def _smallest_batch(question: CapacityQuestion, full: Demand) -> int | None:
    other = replace(question, demand=full)
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
            if _compare(replace(question, tokens=middle), full)["pays"]
            else (middle, high)
        )
    return high
