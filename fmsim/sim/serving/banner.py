"""Where the memory goes before a request comes: bytes of each pool, requests that fit, and why not
more.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fmsim.geometry import Geometry
from fmsim.hw.spec import Hardware
from fmsim.sim.serving import spec
from fmsim.sim.serving.admission import BATCH, GPU, HOST, NVME, server_hardware
from fmsim.sim.serving.demand import Demand


def banner(
    hw: Hardware,
    geometry: Geometry,
    demand: Demand,
    options: spec.Server,
    prompt_tokens: int,
    output_tokens: int,
) -> dict[str, Any]:
    """For requests of this size: `request_bytes` of each pool, what each GPU and the host have, and
    `fits`, what binds by name.

    `request_bytes` are a whole request's: every GPU of its rank holds them, since V4 has one KV
    head, or, under context parallelism, its part.
    """
    demand = demand.drafted(options.draft_tokens, options.acceptance)
    pools = demand.pools(prompt_tokens, output_tokens)
    engine, weight_bytes = server_hardware(hw, options), hw.weight_bytes(geometry)
    limits = request_limits(engine, geometry, demand, options, prompt_tokens, output_tokens)
    bound = min(limits, key=lambda kind: limits[kind])
    return {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "hbm_bytes": {
            "all": hw.hbm_bytes.value,
            "weights": weight_bytes,
            "reserve": hw.reserve_bytes.value,
            "kv": hw.kv_pool_bytes(geometry),
        },
        "host_bytes": engine.host_bytes_per_gpu,
        "nvme_bytes": engine.nvme_bytes_per_gpu,
        "request_bytes": {
            **asdict(pools.gpu),
            "gpu": pools.gpu_bytes,
            "mirror": pools.mirror,
        },
        "limits": limits,
        "fits": limits[bound],
        "bound": bound,
    }


def request_limits(
    engine: Hardware,
    geometry: Geometry,
    demand: Demand,
    options: spec.Server,
    prompt_tokens: int,
    output_tokens: int,
) -> dict[str, int]:
    """How many requests of one size each memory, and the engine's own limit, allow at once on one
    server.

    `engine`: see `server_hardware`.
    """
    demand = demand.drafted(options.draft_tokens, options.acceptance)
    pools, placed = demand.pools(prompt_tokens, output_tokens), engine.placed
    pool_bytes = engine.kv_pool_bytes(geometry) * placed.cp
    gpu_bytes = whole_bytes = pools.gpu_bytes
    if options.residency == "hybrid" and demand.may_be_whole:
        whole_bytes = max(gpu_bytes, demand.whole_bytes(prompt_tokens, output_tokens))
    limits = {GPU: placed.dp * int(concurrency(pool_bytes, whole_bytes, gpu_bytes))}
    if pools.mirror:
        below = engine.nvme_bytes_per_gpu
        room = (engine.host_bytes_per_gpu + below) * placed.cp
        limits[NVME if below else HOST] = placed.dp * int(room // pools.mirror)
    if options.max_batch:
        limits[BATCH] = options.max_batch
    return limits


def concurrency(pool: float, admission: float, steady: float) -> float:
    """Requests that GPU memory of `pool` holds, each of which needs `admission` when it comes and
    `steady` for good: one may always be at its largest. In any one unit.

    This is vLLM 0.33's rule for its HiSparse cache (`get_hisparse_steady_state_concurrency`, in
    blocks), which takes the lesser of it and host blocks over a request's. Where the two are alike
    it is pool over bytes.
    """
    if pool < admission:
        return pool / admission
    return 1 + (pool - admission) / steady
