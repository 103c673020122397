"""Record a trace from transformers' DSA models (DeepSeek-V3.2, GLM-5) by their own indexer.

Hooks watch what each indexer returns and where the attention went; the model itself is untouched.
A layer that uses another's selection is no layer of the trace: `layout.selections` says whose
selection it has. All attention goes to selected tokens, so the masses of a step sum to 1.

The trace has the attention inputs at windows' starts and all index keys, so a memory indexer can be
trained on it, and lookahead policies run. Keys stand in the order of dims that fmsim's scorer
rotates queries in: rotated ones last, their pairs side by side. Products with queries in the same
order are the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmsim.errors import FmsimError
from fmsim.files.inputs import read_json
from fmsim.geometry import from_config
from fmsim.geometry.dsa import MODEL_TYPES
from fmsim.trace.format import CacheLayout, ModelInfo, Trace, TraceHeader
from fmsim.trace.importers.capture import PROMPT_QUERIES, watched
from fmsim.trace.recorder import TraceRecorder

CHUNK_TOKENS = 64  # of the prompt read at once: attention is [heads, 64, context] of one layer


class SelectionWatcher:
    """What the indexers of ``model`` selected and where attention went, of the last forward."""

    def __init__(self, model: Any) -> None:
        attentions = [layer.self_attn for layer in model.model.layers]
        self.attentions = [one for one in attentions if one.indexer is not None]
        self.states: dict[int, torch.Tensor] = {}  # by layer of the trace: [H], of the last token
        self.ids: dict[int, torch.Tensor] = {}  # by layer of the trace: [n, K]
        self.probs: dict[int, torch.Tensor] = {}  # [n, S], mean over heads

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are there inside, and gone afterwards."""
        hooks = []
        try:
            for number, attention in enumerate(self.attentions):
                hooks.append(attention.indexer.register_forward_hook(self._selected(number)))
                hooks.append(attention.register_forward_hook(self._attended(number)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _selected(self, number: int) -> Callable[..., None]:
        def keep(module: Any, given: Any, output: torch.Tensor) -> None:
            self.ids[number] = output[0]
            self.states[number] = given[0][0, -1]

        return keep

    def _attended(self, number: int) -> Callable[..., None]:
        def keep(module: Any, given: Any, output: tuple[torch.Tensor, ...]) -> None:
            self.probs[number] = output[1][0].float().mean(0)

        return keep


@torch.no_grad()
def record_dsa(
    model: Any,
    prompt: Sequence[int],
    steps: int,
    *,
    name: str,
    prompt_text: str,
    sha256: str | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Trace:
    """Read ``prompt`` with a causal LM and decode ``steps`` tokens greedily; tokens are ids.

    ``name`` and ``sha256`` say which weights, ``prompt_text`` which text. ``progress`` is told of
    tokens. Raises FmsimError for another model, or where it cannot read that many tokens.
    """
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise FmsimError(f"{name}: model_type is {config.model_type!r}, not {MODEL_TYPES}")
    longest = config.max_position_embeddings
    if not prompt or steps < 1 or len(prompt) + steps > longest:
        raise FmsimError(
            f"{name}: a prompt of {len(prompt)} tokens and {steps} steps; both must be 1 or more,"
            f" and {longest} together at most"
        )
    model.set_attn_implementation("eager")  # which alone says where the attention went
    watcher = SelectionWatcher(model)
    queries = min(PROMPT_QUERIES, len(prompt))
    header = _header(model, name, sha256, prompt_text, len(prompt), queries)
    recorder = TraceRecorder(header, steps, len(watcher.attentions), config.index_topk)
    tokens = list(prompt)
    cache: Any = None
    with watcher.watching():
        for first in range(0, len(prompt), CHUNK_TOKENS):
            part = prompt[first : first + CHUNK_TOKENS]
            output = _forward(model, part, cache)
            cache = output.past_key_values
            skip = max(0, len(prompt) - queries - first)
            for layer, probs in watcher.probs.items():
                if skip < len(part):
                    recorder.prompt_mass(layer, probs[skip:].sum(0).cpu().numpy())
            progress(len(part))
        for step in range(steps):
            if step % header.tau == 0:
                for layer, state in watcher.states.items():
                    recorder.hidden(step // header.tau, layer, state.float().cpu().numpy())
            tokens.append(int(output.logits[0, -1].argmax()))
            output = _forward(model, tokens[-1:], cache)
            _keep_step(recorder, step, watcher, len(tokens) - 1)
            progress(1)
    for layer, attention in enumerate(watcher.attentions):
        keys = cache.layers[attention.layer_idx].indexer_keys[0].float().cpu().numpy()
        recorder.index_keys(layer, scorable(keys, config.qk_rope_head_dim))
    return recorder.finish(np.array(tokens), np.zeros(steps, bool))


def scorable(keys: np.ndarray, rope_dims: int) -> np.ndarray:
    """Index keys [E, D] of a model's cache with their dims in the scorer's order: what is not
    rotated, then the rotated pairs side by side. The cache has a pair's parts in two halves of its
    first dims.
    """
    pairs = np.arange(rope_dims).reshape(2, rope_dims // 2).T.reshape(-1)
    return keys[:, np.concatenate([np.arange(rope_dims, keys.shape[1]), pairs])]


def _forward(model: Any, tokens: Sequence[int], cache: Any) -> Any:
    ids = torch.tensor([list(tokens)], device=model.device)
    return model(ids, past_key_values=cache, use_cache=True)


def _keep_step(
    recorder: TraceRecorder, step: int, watcher: SelectionWatcher, position: int
) -> None:
    """One decode step at ``position``; where few tokens are there the indexer names later ones."""
    for layer, selected in watcher.ids.items():
        ids = selected[-1].long()
        ids = ids[ids <= position]
        mass = watcher.probs[layer][-1][ids]
        recorder.step(step, layer, ids.cpu().numpy(), mass.cpu().numpy(), 0.0, 0.0)


def _header(
    model: Any, name: str, sha256: str | None, text: str, prompt_tokens: int, queries: int
) -> TraceHeader:
    config = model.config
    geometry = from_config(config.to_dict(), name)
    facts = watched(geometry)
    own = [n for n, layer in enumerate(geometry.layers) if layer.shares is None]
    return TraceHeader(
        geometry={
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "n_layers": geometry.n_layers,
            "csa_layers": own,
            "index_topk": facts.topk,
            "index_head_dim": config.index_head_dim,
            "rope_dims": config.qk_rope_head_dim,
            "compress_rope": dict(config.rope_parameters),
        },
        entry_tokens=1,
        topk=facts.topk,
        layout=CacheLayout(
            family=facts.family,
            entry_bytes=facts.entry_bytes,
            key_bytes=facts.key_bytes,
            selections=facts.selections,
        ),
        model=ModelInfo(name=name, sha256=sha256, dtype=str(model.dtype).removeprefix("torch.")),
        source="transformers_dsa",
        prompt_kind="text",
        prompt_text=text,
        prompt_tokens=prompt_tokens,
        prompt_mass_queries=queries,
        seed=0,
        device=str(model.device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def is_dsa(folder: Path) -> bool:
    """Whether the folder's config.json is of a model that `record_dsa` takes."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, FmsimError):
        return False  # whoever loads the model says what is wrong
    return isinstance(config, dict) and config.get("model_type") in MODEL_TYPES
