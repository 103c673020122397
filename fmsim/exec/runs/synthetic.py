"""`fmsim exec --weights synthetic`: a trace, a preset geometry and a policy in; measured footprint
and times out, in the fields of `fmsim run`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import time_ns
from typing import Any

import numpy as np
import torch

from fmsim import __version__
from fmsim.errors import FmsimError
from fmsim.exec.decode.synthetic_decode import SyntheticStep
from fmsim.exec.decode.trace_driven import TraceDrivenDecode, TraceDrivenRun
from fmsim.exec.kv.memory import host_free_bytes
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.exchange import Exchange
from fmsim.exec.model.weights.synthetic import model_bytes, synthetic_model
from fmsim.exec.runs.live import MEASURED, device_name
from fmsim.geometry import Geometry
from fmsim.policies.base import Policy
from fmsim.replay.replayer import Replayer
from fmsim.sim import metrics
from fmsim.sim.footprint import footprint, keyed_layers
from fmsim.sim.timeline import Timeline
from fmsim.units import GIB, gib

SPARE_BYTES = 4 * GIB  # for activations, scores and the graph, beside weights and KV
# after the first decision that recalls: until then kernels are compiled, and the step is captured;
# left out of the times
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class SyntheticRun:
    """`policy` for ``batch`` requests of all ranks: what was allocated for one of them, and what
    `decode`, of this rank, measured.
    """

    label: str
    policy: Policy
    batch: int
    decode: TraceDrivenDecode
    outcome: TraceDrivenRun
    fixed_bytes: int  # index keys that are all kept, HCA entries, windows
    open_bytes: int  # open windows of compressors
    host_bytes: int

    @property
    def gpu_bytes(self) -> int:
        """Of one request: all but `open_bytes`."""
        return self.decode.slot_bytes + self.decode.spare_bytes + self.fixed_bytes

    @property
    def warm_up_steps(self) -> int:
        cadence = self.policy.params.cadence
        return min((cadence if cadence > 1 else 0) + WARM_UP_STEPS, len(self.outcome.step_s) // 2)

    def timeline(self) -> Timeline:
        """Of the steps after the warm-up."""
        step_s = self.outcome.step_s[self.warm_up_steps :]
        end_s = step_s.cumsum()
        none = np.full(len(step_s), np.nan)
        moved = np.full(len(step_s), self.outcome.h2d_bytes * self.batch / len(self.outcome.step_s))
        return Timeline(
            self.batch,
            end_s - step_s,
            end_s,
            none,
            self.outcome.recall_wait_s[self.warm_up_steps :],
            moved,
        )


def weights_for(
    geometry: Geometry, device: str, kv_bytes: int, seed: int, exchange: Exchange | None = None
) -> tuple[DeepseekV4, int]:
    """A model with as many experts as leave ``kv_bytes`` free on each GPU; -> it, and how many
    those are.
    """
    weight_bytes = free_weight_bytes(geometry, device, kv_bytes)
    return synthetic_model(geometry, device, weight_bytes, seed, exchange)


def free_weight_bytes(geometry: Geometry, device: str, kv_bytes: int) -> int:
    """What ``kv_bytes`` and a reserve leave of the device's free memory for weights; no more than
    the whole model takes.
    """
    free_bytes = torch.cuda.mem_get_info()[0] if device == "cuda" else host_free_bytes()
    whole_bytes = model_bytes(geometry, geometry.n_experts)
    return (
        whole_bytes if free_bytes is None else min(whole_bytes, free_bytes - kv_bytes - SPARE_BYTES)
    )


def run(
    label: str,
    make: Callable[[], Policy],
    replayer: Replayer,
    geometry: Geometry,
    layer_map: tuple[int, ...],
    model: DeepseekV4,
    device: str,
    batch: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda steps: None,
    exchange: Exchange | None = None,
) -> SyntheticRun:
    """Decode the whole trace with ``batch`` requests under one policy.

    Of several ranks, which call this together with parts of one model, each decodes its share of
    the requests. They have one mirror, and a step takes as long as the slowest's. Raises FmsimError
    where memory is short.
    """
    own, shared_name = batch, None
    if exchange is not None:
        own, shared_name = own_requests(batch, exchange.count), f"exec-{exchange.least(time_ns())}"
        seed += exchange.rank
    ledger = replayer.run(make())
    place = footprint(ledger, geometry, layer_map)
    with torch.inference_mode():
        policy = make()
        decode = TraceDrivenDecode(
            replayer,
            policy,
            geometry,
            place.groups,
            keyed_layers(ledger, geometry),
            device,
            batch=own,
            watch=False,
            shared_name=shared_name,
        )
        step = SyntheticStep(decode, model, layer_map, seed)
        if exchange is not None:
            exchange.least(0)  # the mirror is filled
        outcome = decode.run(step, progress)
    if exchange is not None:
        times = (outcome.step_s, outcome.recall_wait_s)
        step_s, recall_wait_s = exchange.greatest(np.stack(times))
        outcome = replace(outcome, step_s=step_s, recall_wait_s=recall_wait_s)
    found = SyntheticRun(
        label,
        policy,
        batch,
        decode,
        outcome,
        step.fixed_bytes,
        step.open_bytes,
        decode.tiers.mirror_bytes,
    )
    del step
    gc.collect()
    return found


def own_requests(batch: int, ranks: int) -> int:
    """Of each rank. Raises FmsimError where they are not as many."""
    if batch % ranks:
        raise FmsimError(
            f"--batch {batch}: --gpus {ranks} decode as many requests each; give a multiple of"
            f" {ranks}"
        )
    return batch // ranks


def report(
    runs: Sequence[SyntheticRun],
    replayer: Replayer,
    geometry: Geometry,
    layer_map: Sequence[int],
    n_experts: int,
    device: str,
    trace: str,
    gpus: int = 1,
) -> dict[str, Any]:
    """The object that `fmsim exec --weights synthetic --json` prints: `fmsim run`'s fields,
    measured.

    Bytes are of one request.
    """
    tokens = replayer.header.prompt_tokens + replayer.n_steps
    full_bytes = geometry.full_gpu_bytes(tokens)
    rows, details = [], {}
    for found in runs:
        ledger = found.outcome.ledger
        rows.append(
            {
                "policy": found.label,
                "gpu_bytes": found.gpu_bytes,
                "gpu_ratio": found.gpu_bytes / full_bytes,
                **metrics.kept(ledger, layer_map),
                **metrics.timed(found.timeline()),
                "max_requests": None,
                **metrics.hits(ledger, layer_map),
            }
        )
        details[found.label] = {
            "exact": metrics.exact(ledger),
            "params": found.policy.params.model_dump(mode="json"),
            "batch": found.batch,
            "slot_bytes": found.decode.slot_bytes,
            "fixed_bytes": found.fixed_bytes,
            "spare_bytes": found.decode.spare_bytes,
            "open_bytes": found.open_bytes,
            "host_kv_bytes": found.host_bytes,
            "pages": {
                key: int(getattr(ledger, key).sum())
                for key in ("lookahead_loads", "demand_loads", "written", "evicted")
            },
        }
    about = {
        "fmsim": __version__,
        "device": (f"{gpus} x " if gpus > 1 else "") + device_name(torch.device(device)),
        "dtype": "bfloat16",
        "model": {
            "name": (
                f"{geometry.name}, random {geometry.weight_type} weights, {n_experts} of"
                f" {geometry.n_experts} experts a layer"
            ),
            "csa_layers": geometry.n_csa,
            "layers": geometry.n_layers,
            "topk": geometry.index_topk,
            "experts": n_experts,
        },
        "prompt": {"text": f"the accesses of {trace}", "tokens": [replayer.header.prompt_tokens]},
        "layer_map": list(layer_map),
        "steps": replayer.n_steps,
        "warm_up_steps": runs[0].warm_up_steps,
        "batch": runs[0].batch,
        "gpus": gpus,
        "quality": {"asked": 0, "exact": 0},
        "details": details,
        "measured": MEASURED,
        "simulated": [],
    }
    return {"scenario": about, "policies": rows}


def batch_that_fits(kv_budget_bytes: int, request_bytes: int) -> int:
    """How many requests a budget of KV bytes holds. Raises FmsimError where it holds none."""
    if kv_budget_bytes < request_bytes:
        raise FmsimError(
            f"--kv-budget: one request takes {gib(request_bytes)},"
            f" {gib(request_bytes - kv_budget_bytes)} more than the budget's"
            f" {gib(kv_budget_bytes)}; raise it, or lower the policy's budget"
        )
    return kv_budget_bytes // request_bytes
