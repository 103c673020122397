"""A prompt that a model has read: what every decode after it starts from, however many there
are.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fmsim.errors import FmsimError
from fmsim.exec.decode.session import Session
from fmsim.exec.model.cache import Access, Cache, LayerCache
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA
from fmsim.trace import ENTRY_TOKENS

PROMPT_QUERIES = 1024  # the last queries of the prompt whose attention mass per entry is kept


class PromptWatcher:
    """Observes the reading of a prompt: its last masses, and the state of its last token, with
    which window 0 begins.
    """

    def __init__(self, prompt_tokens: int, queries: int, rate: int):
        self.first = prompt_tokens - queries
        self.mass: dict[int, np.ndarray] = defaultdict(
            lambda: np.zeros(prompt_tokens // rate, np.float32)
        )
        self.hidden: dict[int, np.ndarray] = {}

    def __call__(self, start: int, tokens: int, accesses: list[Access]) -> None:
        hidden = [access.hidden[0, -1] for access in accesses]
        ids: list[torch.Tensor] = []
        mass: list[torch.Tensor] = []
        if start + tokens > self.first:
            rows = slice(max(0, self.first - start), None)
            ids = [access.ids[0, rows] for access in accesses]
            mass = [access.mass[0, rows] for access in accesses]
        found = iter(on_host([*hidden, *ids, *mass]))
        self.hidden = {layer: next(found) for layer in range(len(hidden))}
        entries = [next(found) for _ in ids]
        for layer, (chosen, weight) in enumerate(zip(entries, found, strict=True)):
            np.add.at(self.mass[layer], chosen[chosen >= 0], weight[chosen >= 0])


class Prompt:
    """`tokens` read by `model`, with room for `max_steps` more.

    hidden float32 [L, H]: the CSA layers' attention input at the last token; mass float32 [L, E]:
    what the last PROMPT_QUERIES queries attended to, rounded as a trace rounds it.
    """

    def __init__(
        self,
        model: DeepseekV4,
        tokens: Sequence[int],
        max_steps: int,
        progress: Callable[[int], None] | None = None,
    ):
        self.tokens, self.max_steps = [int(token) for token in tokens], max_steps
        self.rate = model.config.compress_rates.get(CSA, ENTRY_TOKENS)
        queries = min(PROMPT_QUERIES, len(self.tokens))
        watcher = PromptWatcher(len(self.tokens), queries, self.rate)
        self._session = Session(model, len(self.tokens) + max_steps, watcher, watcher.first)
        self._session.read(self.tokens, progress)
        layers = range(model.config.layer_types.count(CSA))
        if not layers:
            raise FmsimError(
                "the model has no CSA layer, so there is nothing to page and no policy to decode"
                " under"
            )
        self.hidden = np.stack([watcher.hidden[layer] for layer in layers])
        self.mass = (
            np.stack([watcher.mass[layer] for layer in layers])
            .astype(np.float16)
            .astype(np.float32)
        )

    def extended(self, tokens: Sequence[int], max_steps: int) -> Prompt:
        """A prompt that goes on with ``tokens``, with room for ``max_steps`` after them, which this
        one's own room must hold.

        Its mass is this one's and that of the new queries. So a long context is read once, whatever
        is asked about it.
        """
        if len(tokens) + max_steps > self.max_steps:
            raise FmsimError(
                f"the prompt was read with room for {self.max_steps} tokens, {len(tokens)} and"
                f" {max_steps} steps were asked for"
            )
        longer = copy.copy(self)
        longer.tokens, longer.max_steps = [*self.tokens, *map(int, tokens)], max_steps
        watcher = PromptWatcher(len(longer.tokens), len(tokens), self.rate)
        longer._session = self.session()
        longer._session.observer = watcher
        longer._session.read(list(map(int, tokens)))
        layers = range(len(self.hidden))
        longer.hidden = np.stack([watcher.hidden[layer] for layer in layers])
        mass = np.stack([watcher.mass[layer] for layer in layers])
        mass[:, : self.mass.shape[1]] += self.mass
        longer.mass = mass.astype(np.float16).astype(np.float32)
        return longer

    @property
    def model(self) -> DeepseekV4:
        return self._session.model

    @property
    def cache(self) -> Cache:
        """What the prefill left; decodes copy from it."""
        return self._session.cache

    @property
    def csa_caches(self) -> list[LayerCache]:
        return [cache for cache in self.cache.layers if cache.index is not None]

    @property
    def logits(self) -> torch.Tensor:
        """Of the token after the prompt, [vocabulary]."""
        return self._session.logits

    def session(self) -> Session:
        """A session of its own that stands at the end of the prompt: a decode that keeps
        everything.
        """
        session = copy.copy(self._session)
        session.cache, session.observer = copy.deepcopy(self._session.cache), None
        return session


def on_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Each as `to_numpy` gives it; the host waits once, since processes may share a GPU."""
    copies = [
        (tensor if tensor.dtype == torch.int64 else tensor.float()).to("cpu", non_blocking=True)
        for tensor in tensors
    ]
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor if tensor.dtype == torch.int64 else tensor.float()).cpu().numpy()
