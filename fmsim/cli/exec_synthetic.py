"""`fmsim exec --weights synthetic`: a preset's whole model with random weights, accesses from a
trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fmsim.cli.extras import require
from fmsim.cli.given import device_given, policy_given
from fmsim.errors import FmsimError
from fmsim.experiments.workers import parallel
from fmsim.scenario import shipped
from fmsim.units import bytes_of

if TYPE_CHECKING:
    from fmsim.exec.model.exchange import Exchange

Measured = tuple[dict[str, Any], list[Any]]
CLOSE = 0.1  # how far a trace's context may be from the one asked for


@dataclass(frozen=True)
class AskedRun:
    """Options of the command; another process can be told of them."""

    policy: str
    override: list[str]
    model: str
    context: int
    batch: int
    gpus: int
    steps: int
    trace: Path | None
    kv_budget: str | None
    device: str | None
    seed: int
    quiet: bool


def measure(asked: AskedRun) -> Measured:
    """Decode; -> the report, and no text, which such a model does not make."""
    return _decode(asked, _device(asked))


def measure_on_gpus(
    asked: AskedRun, lost: Callable[[int, str], Measured] | None, timeout_s: float | None
) -> Measured:
    """The same on several GPUs, in a process each; `lost` and ``timeout_s`` as
    `parallel.as_they_end` has them. What can be refused before is.
    """
    device = _device(asked)
    from fmsim.cli.progress import bar
    from fmsim.exec.runs.synthetic import own_requests

    _trace(asked.trace, asked.context)
    if asked.kv_budget is None:
        own_requests(asked.batch, asked.gpus)
    with (
        TemporaryDirectory() as folder,
        bar("decoding", 100, "%", asked.quiet) as show,
    ):
        *_, found = parallel.as_they_end(
            partial(_decode_rank, asked, device, Path(folder) / "meeting"),
            range(asked.gpus),
            asked.gpus,
            "spawn",
            lost,
            timeout_s,
            told=lambda rank, share: show("decoding", 100 * share, 100),
            announced=True,
        )
    return found


def _device(asked: AskedRun) -> str:
    require("model", "exec")
    import torch

    device = device_given(asked.device, torch.cuda.is_available())
    if device == "cuda" and torch.cuda.device_count() < asked.gpus:
        raise FmsimError(
            f"--gpus {asked.gpus}: torch finds {torch.cuda.device_count()} CUDA devices here; give"
            " no more, or --device cpu for as many processes"
        )
    return device


def _decode_rank(asked: AskedRun, device: str, meeting: Path, rank: int) -> Measured:
    from fmsim.exec.model.exchange import joined

    with joined(meeting, rank, asked.gpus, device) as exchange:
        return _decode(asked, device, exchange)


def _decode(asked: AskedRun, device: str, exchange: Exchange | None = None) -> Measured:
    """In this process, alone or as one of several ranks."""
    from fmsim import trace as traces
    from fmsim.cli.progress import bar, token_bar
    from fmsim.exec.runs import synthetic as synthetic_run
    from fmsim.geometry import deepseek_v4_named
    from fmsim.replay.replayer import Replayer
    from fmsim.sim.footprint import ModelMemory, allocation, spread

    geometry = deepseek_v4_named(asked.model)
    path = _trace(asked.trace, asked.context)
    found = traces.read(path)
    replayer = Replayer(found, memory=ModelMemory(geometry), max_steps=asked.steps)
    layer_map = spread(found.n_layers, geometry.n_csa)
    chosen = policy_given(asked.policy, asked.override)
    parallel.begin()
    ledger = replayer.run(chosen)
    request_bytes = allocation(ledger, geometry).total
    batch, seed = asked.batch, asked.seed
    if asked.kv_budget is not None:
        budget_bytes = _bytes(asked.kv_budget)
        batch = asked.gpus * synthetic_run.batch_that_fits(budget_bytes, request_bytes)
    kv_bytes = synthetic_run.own_requests(batch, asked.gpus) * request_bytes
    quiet = asked.quiet or exchange is not None
    with bar("filling the layers with random weights", quiet=quiet):
        weights, n_experts = synthetic_run.weights_for(geometry, device, kv_bytes, seed, exchange)
    steps = count(1)
    with token_bar(replayer.n_steps * batch, quiet) as advance:

        def decoded(done: int) -> None:
            advance(done * batch)
            parallel.tell(next(steps) / replayer.n_steps)

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
            decoded,
            exchange,
        )
    report = synthetic_run.report(
        [run], replayer, geometry, layer_map, n_experts, device, path.name, asked.gpus
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
