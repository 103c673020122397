"""A model on a server without a trace: footprints, walls and the full cache's time.

What needs selections is left out, and the report says why.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fmsim.errors import DoesNotFit, FmsimError
from fmsim.experiments.plan import Ask, prompt_tokens
from fmsim.experiments.results.folder import SCHEMA_VERSION
from fmsim.experiments.run import about_deployment
from fmsim.geometry import Geometry, geometry_named
from fmsim.hw import Hardware
from fmsim.sim.serving.banner import request_limits
from fmsim.sim.serving.capacity.behaviour import BEHAVIOURS, Behaviour
from fmsim.sim.serving.capacity.plan import CapacityQuestion
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.spec import Server

# Columns of `fmsim run` that only selections can fill, for policies other than the full cache.
NEED_SELECTIONS = (
    "decode_tokens_per_s",
    "step_s",
    "stall_ratio",
    "h2d_bytes",
    "hit_rate",
    "misses",
    "mass_kept",
    "entry_recall",
    "set_overlap",
)


def run_untraced(model: str, hw: Hardware, ask: Ask, batch: int = 1) -> dict[str, Any]:
    """The report of `fmsim run` without a trace.

    `footprints` has a row a policy: bytes of one request on one GPU and on the host, and how many
    requests each memory takes on one server. The full cache's row has its speed with `batch`
    requests, and the compute wall at `ask.tpot_s`. Raises FmsimError for whatever the user can
    mend.
    """
    geometry = geometry_named(model)
    if ask.beyond_positions:
        geometry = geometry.beyond_positions()
    ask = replace(ask, tokens=prompt_tokens(ask, geometry, "--context"))
    held = geometry.on_gpu(hw.placed.tp)
    hw.kv_pool_bytes(held)
    rows = [_row(each, held, hw, ask) for each in BEHAVIOURS]
    full = _question(BEHAVIOURS[0], held, hw, ask)
    if batch > rows[0]["max_requests"]:
        raise DoesNotFit(
            f"{geometry.name} on {hw.title}, {hw.placed.title}: {batch} requests of"
            f" {ask.tokens + ask.output_tokens:,} tokens with their full caches do not fit,"
            f" {rows[0]['max_requests']} do; take a smaller batch"
        )
    untimed = {}
    try:
        steady = full.state().at(batch)
        rows[0] |= {
            "walls": full.walls(),
            "decode_tokens_per_s": steady.tokens_per_s,
            "step_s": steady.step_s,
        }
    except FmsimError as error:  # a model or a deployment that nobody timed
        untimed = {"untimed": str(error)}
    return {
        "scenario": {
            "name": geometry.name,
            "schema_version": SCHEMA_VERSION,
            "model": {
                "name": geometry.name,
                "family": geometry.family,
                "layers": geometry.n_layers,
                "paged_layers": geometry.n_csa,
            },
            "hardware": {
                "name": hw.name,
                "title": hw.title,
                **about_deployment(hw, held, geometry.kv_parts(hw.placed.tp)),
            },
            "context_tokens": ask.tokens,
            "output_tokens": ask.output_tokens,
            "tpot_slo_s": ask.tpot_s,
            "batch": batch,
            "absent": {"columns": list(NEED_SELECTIONS), "reason": _reason(geometry), **untimed},
        },
        "footprints": rows,
    }


def _question(each: Behaviour, held: Geometry, hw: Hardware, ask: Ask) -> CapacityQuestion:
    demand = Demand(each.ledger(held), held)
    return CapacityQuestion(hw, held, demand, Server(), ask.tokens, ask.output_tokens, ask.tpot_s)


def _row(each: Behaviour, held: Geometry, hw: Hardware, ask: Ask) -> dict[str, Any]:
    demand = Demand(each.ledger(held), held)
    pools = demand.pools(ask.tokens, ask.output_tokens)
    walls = request_limits(hw, held, demand, Server(), ask.tokens, ask.output_tokens)
    bound = min(walls, key=lambda kind: walls[kind])
    return {
        "policy": each.policy,
        "gpu_bytes": pools.gpu_bytes,
        "gpu_ratio": pools.gpu_bytes / held.full_gpu_bytes(ask.tokens + ask.output_tokens),
        "host_bytes": pools.mirror,
        "max_requests": walls[bound],
        "max_requests_bound": bound,
        "walls": walls,
    }


def _reason(geometry: Geometry) -> str:
    """Why columns are absent, and what would fill them."""
    asks = f"published shares stand in for them in `fmsim plan --model {geometry.name}`"
    rates = {layer.entry_tokens for layer in geometry.layers if layer.pages}
    if len(rates) > 1:
        return (
            f"{geometry.name} selects entries of {' and '.join(map(str, sorted(rates)))} tokens,"
            f" and a trace has entries of one length; {asks}"
        )
    return (
        f"no trace says what a {geometry.family} model selected; give one"
        " (docs/how-to/capture-from-an-engine.md), or"
        f" {asks}"
    )
