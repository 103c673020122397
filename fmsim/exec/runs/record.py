"""Record what a DeepSeek-V4 model attends to while it answers: a model and streams of turns in,
traces out.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fmsim.errors import FmsimError
from fmsim.exec.decode.prompt import PROMPT_QUERIES, PromptWatcher, to_numpy
from fmsim.exec.decode.request import Request
from fmsim.exec.decode.session import Session
from fmsim.exec.model.cache import Access
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA
from fmsim.exec.model.weights.shards import weight_files
from fmsim.exec.runs.stream import Stream, exact
from fmsim.geometry.deepseek_v4 import FAMILY
from fmsim.trace import TAU, CacheLayout, ModelInfo, Trace, TraceHeader, TraceRecorder


def record(
    model: DeepseekV4,
    streams: Sequence[Stream],
    *,
    name: str,
    seed: int,
    sha256: str | None = None,
    prompt_text: str = "",
    tau: int = TAU,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Trace]:
    """A trace of each of ``streams``, which share one prompt: it is read once, and each decode
    starts from its state.

    Greedy tokens are judged against the answers they should give (``header.quality``). ``progress``
    is told of tokens.
    """
    prompt = [int(token) for token in streams[0].prompt]
    header = trace_header(
        model, len(prompt), name=name, seed=seed, sha256=sha256, prompt_text=prompt_text, tau=tau
    )
    shared = PromptWatcher(len(prompt), header.prompt_mass_queries, header.entry_tokens)
    longest = len(prompt) + max(stream.steps for stream in streams)
    session = Session(model, longest, shared, shared.first)
    session.read(prompt, progress)
    for stream in streams:
        decode = copy.copy(session)
        decode.cache = copy.deepcopy(session.cache)
        yield _decode(
            decode, shared, stream, header.model_copy(update={"prompt_kind": stream.kind}), progress
        )


def _decode(
    session: Session, prompt: PromptWatcher, stream: Stream, header: TraceHeader, progress
) -> Trace:
    config = session.model.config
    recorder = TraceRecorder(header, stream.steps, config.layer_types.count(CSA), config.index_topk)
    _hand_over(prompt, recorder)
    session.observer = DecodeWatcher(recorder)
    tokens, forced, verdicts = list(map(int, stream.prompt)), [], []
    for turn in stream.turns:
        session.read(turn.forced, progress)
        answer = session.generate(turn.generate, progress)
        tokens += [*turn.forced, *answer]
        forced += [True] * len(turn.forced) + [False] * turn.generate
        if turn.answer and turn.generate:
            verdicts.append(exact(turn.answer, answer))
    for layer, keys in enumerate(_index_keys(session)):
        recorder.index_keys(layer, keys)
    quality = {"asked": len(verdicts), "exact": sum(verdicts)} if verdicts else {}
    return recorder.finish(tokens, forced).with_header(quality=quality)


def _hand_over(prompt: PromptWatcher, recorder: TraceRecorder) -> None:
    for layer, state in prompt.hidden.items():
        recorder.hidden(0, layer, state)
        recorder.prompt_mass(layer, prompt.mass[layer])


def trace_header(
    model: DeepseekV4,
    prompt_tokens: int,
    *,
    name: str,
    seed: int,
    sha256: str | None,
    prompt_text: str = "",
    kind: str = "text",
    tau: int = TAU,
) -> TraceHeader:
    """The header of a trace that is about to be recorded from `model`."""
    return TraceHeader(
        geometry=geometry(model),
        entry_tokens=model.config.compress_rates[CSA],
        topk=model.config.index_topk,
        layout=CacheLayout(family=FAMILY),
        model=ModelInfo(
            name=name, sha256=sha256, dtype=str(model.lm_head.weight.dtype).removeprefix("torch.")
        ),
        source="deepseek_v4",
        prompt_kind=kind,
        prompt_text=prompt_text,
        prompt_tokens=prompt_tokens,
        prompt_mass_queries=min(PROMPT_QUERIES, prompt_tokens),
        seed=seed,
        tau=tau,
        device=torch.cuda.get_device_name() if model.lm_head.weight.is_cuda else "cpu",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def trace_of(request: Request, header: TraceHeader, forced: Sequence[bool]) -> Trace:
    """What `request` selected among all entries in the steps so far, under whatever policy it ran.

    `forced` is by step.

    Raises FmsimError where that is not known, since index keys were tiered.
    """
    if request.unmeasured:
        raise FmsimError(
            f"what CSA layers {request.unmeasured} select among all entries was not measured;"
            ' decode with index_keys="all" to record a trace'
        )
    steps = request.step
    recorder = TraceRecorder(header, steps, request.layers, request.topk)
    keys = request.keys_of((header.prompt_tokens + steps) // request.rate)
    for layer in range(request.layers):
        near = to_numpy(request.near_mass[:, layer])
        recorder.step(
            0,
            layer,
            request.wanted[:, layer].cpu().numpy(),
            to_numpy(request.mass[:, layer]),
            near[:, 0],
            near[:, 1],
        )
        recorder.prompt_mass(layer, request.prompt.mass[layer])
        recorder.index_keys(layer, to_numpy(keys[layer]))
        for window in range(-(-steps // header.tau)):
            recorder.hidden(window, layer, to_numpy(request.hidden[header.tau * window][layer]))
    return recorder.finish([*request.prompt.tokens, *request.tokens], list(forced))


class DecodeWatcher:
    """Observes the decode: passes accesses, and the states that the later windows begin with, on to
    a recorder.
    """

    def __init__(self, recorder: TraceRecorder):
        self.recorder, self.steps = recorder, recorder.steps
        self.prompt_tokens, self.tau = recorder.header.prompt_tokens, recorder.header.tau

    def __call__(self, start: int, tokens: int, accesses: list[Access]) -> None:
        first = start - self.prompt_tokens
        for layer, access in enumerate(accesses):
            self.recorder.step(first, layer, *(to_numpy(part[0]) for part in access[:4]))
            for step in range(first, first + tokens):  # window w begins after step tau * w - 1
                if (step + 1) % self.tau == 0 and step + 1 < self.steps:
                    self.recorder.hidden(
                        (step + 1) // self.tau, layer, to_numpy(access.hidden[0, step - first])
                    )


def _index_keys(session: Session) -> list:
    states = [layer.index for layer in session.cache.layers if layer.index is not None]
    return [to_numpy(state.entries[0, : state.closed]) for state in states]


def geometry(model: DeepseekV4) -> dict:
    """The trace header's description of the model: what a replay or a memory indexer needs of its
    config.
    """
    config = model.config
    rope = config.rope_parameters["compress"]
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "layer_types": list(config.layer_types),
        "csa_layers": [n for n, kind in enumerate(config.layer_types) if kind == CSA],
        "compress_rates": dict(config.compress_rates),
        "window": config.sliding_window,
        "n_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "index_topk": config.index_topk,
        "index_n_heads": config.index_n_heads,
        "index_head_dim": config.index_head_dim,
        "rope_dims": int(config.head_dim * rope["partial_rotary_factor"]),
        "compress_rope": {k: v for k, v in rope.items() if k != "partial_rotary_factor"},
    }


def weights_digest(directory: Path) -> str:
    """sha256 over a model directory's weight files, in order."""
    digest = hashlib.sha256()
    for path in weight_files(directory):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
