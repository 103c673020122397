"""`fmsim exec --weights synthetic`: a preset's whole model with random weights, accesses from a
trace.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from fmsim.cli.extras import require
from fmsim.cli.given import device_given, policy_given
from fmsim.errors import FmsimError
from fmsim.units import bytes_of

CLOSE = 0.1  # how far a trace's context may be from the one asked for


def show(
    policy: str,
    override: list[str],
    model: str,
    context: int,
    batch: int,
    steps: int,
    trace: Path | None,
    kv_budget: str | None,
    as_json: bool,
    device: str | None,
    seed: int,
) -> None:
    """Run, and print the table or one JSON object."""
    require("model", "exec")
    import torch

    from fmsim import trace as traces
    from fmsim.cli.progress import token_bar
    from fmsim.exec.runs import synthetic as synthetic_run
    from fmsim.geometry import deepseek_v4_named
    from fmsim.replay.replayer import Replayer
    from fmsim.report.tables import measured
    from fmsim.sim.footprint import ModelMemory, allocation, spread

    geometry = deepseek_v4_named(model)
    device = device_given(device, torch.cuda.is_available())
    path = _trace(trace, context)
    found = traces.read(path)
    replayer = Replayer(found, memory=ModelMemory(geometry), max_steps=steps)
    layer_map = spread(found.n_layers, geometry.n_csa)
    chosen = policy_given(policy, override)
    ledger = replayer.run(chosen)
    request_bytes = allocation(ledger, geometry).total
    if kv_budget is not None:
        batch = synthetic_run.batch_that_fits(_bytes(kv_budget), request_bytes)
    weights, n_experts = synthetic_run.weights_for(geometry, device, batch * request_bytes, seed)
    with token_bar(replayer.n_steps * batch) as advance:
        run = synthetic_run.run(
            chosen.name,
            lambda: policy_given(policy, override),
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
    if as_json:
        typer.echo(json.dumps(report))
    else:
        measured.show(report, [])


def _trace(path: Path | None, context: int) -> Path:
    """The trace asked for, or the one of about that context in traces/."""
    if path is not None:
        return path
    names = {32_768: "nano-32k-needles", 131_072: "nano-128k-needles", 512_000: "nano-500k-needles"}
    nearest = min(names, key=lambda tokens: abs(tokens - context))
    if abs(nearest - context) > CLOSE * context:
        raise FmsimError(
            f"--context {context}: no shipped trace has about as many tokens"
            f" ({', '.join(map(str, names))}); give --trace FILE"
        )
    found = Path("traces") / f"{names[nearest]}.safetensors"
    if not found.exists():
        raise FmsimError(
            f"{found}: no such file here; give --trace FILE, or run in fmsim's own folder"
        )
    return found


def _bytes(text: str) -> int:
    found = bytes_of(text)
    if found is None:
        raise FmsimError(f"--kv-budget {text}: write bytes, such as 16GiB")
    return found
