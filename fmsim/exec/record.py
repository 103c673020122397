"""Record what a DeepSeek-V4 model attends to while it answers: a model and streams of turns in, traces out."""

from __future__ import annotations

import copy
import datetime
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fmsim.exec.loader import weight_files
from fmsim.exec.model import CSA, Access, DeepseekV4
from fmsim.exec.session import Session
from fmsim.nano.prompts import Stream, exact
from fmsim.trace import ENTRY_TOKENS, ModelInfo, Trace, TraceHeader, TraceRecorder

PROMPT_QUERIES = 1024  # the last queries of the prompt whose attention mass per entry is kept


def record(
    model: DeepseekV4,
    streams: Sequence[Stream],
    *,
    name: str,
    seed: int,
    sha256: str | None = None,
    prompt_text: str = "",
    tau: int = 64,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Trace]:
    """A trace of each of ``streams``, which share one prompt: it is read once, and each decode starts from its state.

    Greedy tokens are judged against the answers they should give (``header.quality``). ``progress`` is told of tokens.
    """
    prompt = [int(token) for token in streams[0].prompt]
    header = TraceHeader(
        geometry=geometry(model),
        model=ModelInfo(name=name, sha256=sha256, dtype=str(model.lm_head.weight.dtype).removeprefix("torch.")),
        source="deepseek_v4",
        prompt_kind=streams[0].kind,
        prompt_text=prompt_text,
        prompt_tokens=len(prompt),
        prompt_mass_queries=min(PROMPT_QUERIES, len(prompt)),
        seed=seed,
        tau=tau,
        device=torch.cuda.get_device_name() if model.lm_head.weight.is_cuda else "cpu",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    shared = PromptWatcher(header)
    session = Session(model, len(prompt) + max(stream.steps for stream in streams), shared)
    session.read(prompt, progress)
    for stream in streams:
        decode = copy.copy(session)
        decode.cache = copy.deepcopy(session.cache)
        yield _decode(decode, shared, stream, header.model_copy(update={"prompt_kind": stream.kind}), progress)


def _decode(session: Session, prompt: PromptWatcher, stream: Stream, header: TraceHeader, progress) -> Trace:
    config = session.model.config
    recorder = TraceRecorder(header, stream.steps, config.layer_types.count(CSA), config.index_topk)
    prompt.hand_over(recorder)
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


class PromptWatcher:
    """Observes the reading of a prompt: its last masses, and the state of its last token, with which window 0 begins."""

    def __init__(self, header: TraceHeader):
        self.first = header.prompt_tokens - header.prompt_mass_queries
        self.mass: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(header.prompt_tokens // ENTRY_TOKENS, np.float32))
        self.hidden: dict[int, np.ndarray] = {}

    def __call__(self, start: int, tokens: int, accesses: list[Access]) -> None:
        for layer, access in enumerate(accesses):
            self.hidden[layer] = _numpy(access.hidden[0, -1])
            if start + tokens > self.first:
                rows = slice(max(0, self.first - start), None)
                ids, mass = _numpy(access.ids[0, rows]), _numpy(access.mass[0, rows])
                np.add.at(self.mass[layer], ids[ids >= 0], mass[ids >= 0])

    def hand_over(self, recorder: TraceRecorder) -> None:
        for layer, state in self.hidden.items():
            recorder.hidden(0, layer, state)
            recorder.prompt_mass(layer, self.mass[layer])


class DecodeWatcher:
    """Observes the decode: passes accesses, and the states that the later windows begin with, on to a recorder."""

    def __init__(self, recorder: TraceRecorder):
        self.recorder, self.steps = recorder, recorder.steps
        self.prompt_tokens, self.tau = recorder.header.prompt_tokens, recorder.header.tau

    def __call__(self, start: int, tokens: int, accesses: list[Access]) -> None:
        first = start - self.prompt_tokens
        for layer, access in enumerate(accesses):
            self.recorder.step(first, layer, *(_numpy(part[0]) for part in access[:4]))
            for step in range(first, first + tokens):  # window w begins after step tau * w - 1
                if (step + 1) % self.tau == 0 and step + 1 < self.steps:
                    self.recorder.hidden((step + 1) // self.tau, layer, _numpy(access.hidden[0, step - first]))


def _numpy(tensor: torch.Tensor):
    return (tensor if tensor.dtype == torch.int64 else tensor.float()).cpu().numpy()


def _index_keys(session: Session) -> list:
    states = [layer.index for layer in session.cache.layers if layer.index is not None]
    return [_numpy(state.entries[0, : state.closed]) for state in states]


def geometry(model: DeepseekV4) -> dict:
    """The trace header's description of the model: what a replay or a memory indexer needs of its config."""
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
