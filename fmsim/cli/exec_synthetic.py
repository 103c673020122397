"""`fmsim exec --weights synthetic`: a preset's whole model with random weights, accesses from a
trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmsim.cli.extras import require
from fmsim.cli.given import device_given, policy_given
from fmsim.errors import FmsimError
from fmsim.scenario import shipped
from fmsim.units import bytes_of

CLOSE = 0.1  # how far a trace's context may be from the one asked for


@dataclass(frozen=True)
class AskedRun:
    """Options of the command; another process can be told of them."""

    policy: str
    override: list[str]
    model: str
    context: int
    batch: int
    steps: int
    trace: Path | None
    kv_budget: str | None
    device: str | None
    seed: int
    quiet: bool


def measure(asked: AskedRun) -> tuple[dict[str, Any], list[Any]]:
    """Decode; -> the report, and no text, which such a model does not make."""
    require("model", "exec")
    import torch

    from fmsim import trace as traces
    from fmsim.cli.progress import token_bar
    from fmsim.exec.runs import synthetic as synthetic_run
    from fmsim.geometry import deepseek_v4_named
    from fmsim.replay.replayer import Replayer
    from fmsim.sim.footprint import ModelMemory, allocation, spread

    geometry = deepseek_v4_named(asked.model)
    device = device_given(asked.device, torch.cuda.is_available())
    path = _trace(asked.trace, asked.context)
    found = traces.read(path)
    replayer = Replayer(found, memory=ModelMemory(geometry), max_steps=asked.steps)
    layer_map = spread(found.n_layers, geometry.n_csa)
    chosen = policy_given(asked.policy, asked.override)
    ledger = replayer.run(chosen)
    request_bytes = allocation(ledger, geometry).total
    batch, seed = asked.batch, asked.seed
    if asked.kv_budget is not None:
        batch = synthetic_run.batch_that_fits(_bytes(asked.kv_budget), request_bytes)
    weights, n_experts = synthetic_run.weights_for(geometry, device, batch * request_bytes, seed)
    with token_bar(replayer.n_steps * batch, asked.quiet) as advance:
        run = synthetic_run.run(
            chosen.name,
            lambda: policy_given(asked.policy, asked.override),
            replayer,
            geometry,
            layer_map,
            weights,
            device,
            batch,
            seed,
            lambda done: advance(done * batch),
        )
    report = synthetic_run.report(
        [run], replayer, geometry, layer_map, n_experts, device, path.name
    )
    return report, [[]]


def _trace(path: Path | None, context: int) -> Path:
    """The trace asked for, or the one of about that context that fmsim carries."""
    if path is not None:
        return path
    names = {32_768: "nano-32k-needles", 131_072: "nano-128k-needles", 512_000: "nano-500k-needles"}
    nearest = min(names, key=lambda tokens: abs(tokens - context))
    if abs(nearest - context) > CLOSE * context:
        raise FmsimError(
            f"--context {context}: no shipped trace has about as many tokens"
            f" ({', '.join(map(str, names))}); give --trace FILE"
        )
    return shipped.TRACES / f"{names[nearest]}.safetensors"


def _bytes(text: str) -> int:
    found = bytes_of(text)
    if found is None:
        raise FmsimError(f"--kv-budget {text}: write bytes, such as 16GiB")
    return found
