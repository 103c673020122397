"""`fmsim exec`: a model, prompts and a policy in; answers and measured figures out, in the fields
of `fmsim run`'s report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fmsim import __version__
from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.kv.keys import Where
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.runs.record import trace_header, trace_of
from fmsim.exec.runs.stream import Stream, exact
from fmsim.policies.base import Policy
from fmsim.sim import metrics
from fmsim.trace import Trace

MEASURED = [
    "gpu_bytes",
    "gpu_ratio",
    "entry_recall",
    "entry_recall_per_step",
    "mass_kept",
    "set_overlap",
    "decode_tokens_per_s",
    "step_s",
    "h2d_bytes",
    "h2d_bytes_per_step",
    "stall_ratio",
    "hit_rate",
    "misses",
]


@dataclass
class Decoded:
    """One request's way: `answers` are (tokens asked, tokens answered, right or None where nothing
    is known to be).
    """

    forced: list[bool] = field(default_factory=list)
    answers: list[tuple[list[int], list[int], bool | None]] = field(default_factory=list)

    @property
    def quality(self) -> dict[str, int]:
        verdicts = [right for *_, right in self.answers if right is not None]
        return {"asked": len(verdicts), "exact": sum(verdicts)} if verdicts else {}


def read(
    model: DeepseekV4,
    streams: Sequence[Stream],
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Prompt]:
    """Read every stream's prompt: what decodes under any number of policies start from."""
    return [Prompt(model, stream.prompt, stream.steps, progress) for stream in streams]


def decode(
    prompts: Sequence[Prompt],
    streams: Sequence[Stream],
    policy: Policy,
    *,
    seed: int = 0,
    index_keys: Where = "all",
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Batch, list[Decoded]]:
    """Decode the streams, whose prompts are read, side by side under `policy`.

    `progress` is told of tokens.
    """
    batch = Batch(prompts, policy, seed=seed, index_keys=index_keys)
    decoded = [Decoded() for _ in streams]
    plans = [_plan(stream) for stream in streams]
    for given in zip(*plans):  # to the end of the shortest
        batch.step(given)
        progress(len(streams))
    for request, stream, plan, result in zip(batch.requests, streams, plans, decoded):
        _book(stream, plan[: request.step], request.tokens, result)
    return batch, decoded


def _plan(stream: Stream) -> list[int | None]:
    """What each step processes: a given token, or None for the model's own choice."""
    return [
        token
        for turn in stream.turns
        for token in [*map(int, turn.forced), *[None] * turn.generate]
    ]


def _book(
    stream: Stream, plan: Sequence[int | None], tokens: Sequence[int], result: Decoded
) -> None:
    """Which tokens were given, and the answers that came out whole."""
    result.forced = [token is not None for token in plan]
    end = 0
    for turn in stream.turns:
        start = end + len(turn.forced)
        end = start + turn.generate
        if turn.generate and end <= len(tokens):
            answer = list(tokens[start:end])
            result.answers.append(
                (list(turn.forced), answer, exact(turn.answer, answer) if turn.answer else None)
            )


def report(
    batch: Batch, decoded: Sequence[Decoded], label: str, name: str, prompt_text: str
) -> dict[str, Any]:
    """The object that `fmsim exec --json` prints: the fields of `fmsim run`, measured;
    `max_requests` is not, so null.

    `gpu_bytes` is what was allocated for one request (a mean over the batch), and `gpu_ratio` that
    over what keeping every page would allocate. `entry_recall` and `mass_kept` are over the
    CSA layers `measured_layers` of `details`: all but those whose index keys are tiered.
    """
    ledgers, n_requests = [request.ledger() for request in batch.requests], len(batch.requests)
    kept = [metrics.kept(ledger, range(ledger.n_layers)) for ledger in ledgers]
    figures = {key: _mean([row[key] for row in kept]) for key in kept[0]}
    hits = [metrics.hits(ledger, range(ledger.n_layers)) for ledger in ledgers]
    row = {
        "policy": label,
        "gpu_bytes": round(batch.gpu_kv_bytes / n_requests),
        "gpu_ratio": batch.gpu_kv_bytes / batch.full_kv_bytes,
        **figures,
        **metrics.timed(batch.timeline()),
        "max_requests": None,
        **{key: _mean([row[key] for row in hits]) for key in hits[0]},
    }
    details = {
        "exact": _all_of([metrics.exact(ledger) for ledger in ledgers]),
        "params": batch.policy.params.model_dump(mode="json"),
        "gpu_kv_bytes": batch.gpu_kv_bytes,
        "host_kv_bytes": batch.tiers.mirror_bytes,
        "slot_bytes": batch.tiers.slot_bytes,
        "spare_bytes": batch.tiers.pool_bytes - batch.tiers.slot_bytes,
        "fixed_bytes": batch.fixed_kv_bytes,
        "page_bytes": batch.tiers.entries.page_bytes,
        "index_keys": batch.keys.where,
        "measured_layers": list(batch.keys.kept),
        "pages": {
            key: int(sum(getattr(ledger, key).sum() for ledger in ledgers))
            for key in ("lookahead_loads", "demand_loads", "written", "evicted")
        },
    }
    quality = {
        key: sum(result.quality.get(key, 0) for result in decoded) for key in ("asked", "exact")
    }
    config = batch.model.config
    about = {
        "fmsim": __version__,
        "device": device_name(batch.device),
        "dtype": str(batch.logits.dtype).removeprefix("torch."),
        "model": {
            "name": name,
            "csa_layers": batch.requests[0].layers,
            "layers": config.num_hidden_layers,
            "topk": config.index_topk,
        },
        "prompt": {
            "text": prompt_text,
            "tokens": [len(request.prompt.tokens) for request in batch.requests],
        },
        "steps": batch.requests[0].step,
        "batch": n_requests,
        "quality": quality,
        "details": {label: details | {"quality": quality}},
        "measured": MEASURED,
        "simulated": [],
    }
    return {"scenario": about, "policies": [row]}


def together(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several decodes of the same prompts, each under its own label."""
    details = [report["scenario"]["details"] for report in reports]
    about = reports[0]["scenario"] | {
        "details": {label: of for part in details for label, of in part.items()}
    }
    qualities = [report["scenario"]["quality"] for report in reports]
    about["quality"] = {key: sum(one[key] for one in qualities) for key in qualities[0]}
    return {"scenario": about, "policies": [row for one in reports for row in one["policies"]]}


def recorded(
    batch: Batch,
    decoded: Sequence[Decoded],
    *,
    name: str,
    sha256: str,
    seed: int,
    prompt_text: str,
    kind: str,
) -> Trace:
    """The first request as a trace: what it selected among all entries at each step."""
    request = batch.requests[0]
    header = trace_header(
        batch.model,
        len(request.prompt.tokens),
        name=name,
        seed=seed,
        sha256=sha256,
        prompt_text=prompt_text,
        kind=kind,
    )
    return trace_of(request, header, decoded[0].forced[: request.step]).with_header(
        quality=decoded[0].quality
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _all_of(verdicts: list[bool | None]) -> bool | None:
    """None where one is not known and the others hold."""
    return False if False in verdicts else None if None in verdicts else True


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
