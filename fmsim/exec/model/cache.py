"""What the layers keep: the cache of chunked prefill, and the state of a decode step.

Shapes: B sequences, S tokens of a call, D hidden size, C head size, K selected entries, W window;
``rate`` tokens make one entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from fmsim.exec.kernels.norms.rounded_rows import Activations
from fmsim.exec.model.kinds import CSA, SLIDING


class Access(NamedTuple):
    """What one CSA layer attended to: the raw material of a trace.

    ``ids`` int64 [B, S, K] selected entries, ascending, -1 where fewer were visible; ``mass``
    float32 [B, S, K], ``window_mass`` and ``sink_mass`` float32 [B, S] are softmax probabilities,
    mean over heads, so the three sum to 1. ``hidden`` [B, S, D] is the layer's attention input.
    """

    ids: Tensor
    mass: Tensor
    window_mass: Tensor
    sink_mass: Tensor
    hidden: Tensor


@dataclass
class CompressorState:
    """Closed entries of one compressor, and the projections of the tokens that have not closed one
    yet.
    """

    entries: Tensor  # [B, capacity, C], the first `closed` of which are valid
    closed: int = 0
    open_kv: Tensor | None = None  # [B, n < rate, width]
    open_gate: Tensor | None = None
    # the last closed window's Ca series, [B, rate, C] (overlapping series only)
    prior_kv: Tensor | None = None
    prior_gate: Tensor | None = None


@dataclass
class LayerCache:
    window: Tensor | None = None  # rotated KV of the last W tokens, [B, W, C]
    kv: CompressorState | None = None
    index: CompressorState | None = None


@dataclass
class Cache:
    """State of B sequences of one common length, for up to ``max_tokens`` tokens."""

    layers: list[LayerCache]
    max_tokens: int
    length: int = 0

    @classmethod
    def allocate(
        cls, config: DeepseekV4Config, batch: int, max_tokens: int, device, dtype
    ) -> Cache:
        def state(kind: str, width: int) -> CompressorState:
            capacity = max_tokens // config.compress_rates[kind]
            return CompressorState(torch.zeros(batch, capacity, width, device=device, dtype=dtype))

        layers = []
        for kind in config.layer_types:
            layer = LayerCache()
            if kind != SLIDING:
                layer.kv = state(kind, config.head_dim)
            if kind == CSA:
                layer.index = state(kind, config.index_head_dim)
            layers.append(layer)
        return cls(layers, max_tokens)


@dataclass
class StepCompressor:
    """One compressor's open window as a decode step needs it: static, each of B sequences at a
    position of its own.
    """

    kv: Tensor  # [B, rate, width]: token p's projection at p % rate
    gate: Tensor  # the same, position bias added
    # kv and gate of the last closed window's Ca series, [B, rate, C]
    prior: tuple[Tensor, Tensor] | None


class Pager(Protocol):
    """Where a CSA layer's entries and index keys lie during decode, and which of them are attended
    to.
    """

    def append(self, entry: Tensor, key: Tensor, index: Tensor) -> None:
        """Keep what just closed: entry [B, C], key [B, index width], index int [B] its number, -1
        where none closed.
        """

    def select(self, queries: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> Tensor:
        """From the indexer's queries [B, 1, heads, width] and weights [B, 1, heads]: ids int32 [B,
        K] of the entries to attend to, -1 for none, out of the first ``visible`` [B].
        """

    def read(self, ids: Tensor) -> Tensor:
        """Entries [B, K, C]; whatever for an id of -1."""

    def attended(
        self, access: Access, masses_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        """What came of it.

        ``masses_of`` tells what other ids [B, K], with their entries [B, K, C], would have had.
        """


# a layer's attention over what it keeps: x [B, 1, D] at positions [B] -> output [B, 1, D]
Attend = Callable[[Activations, Tensor], Tensor]


@dataclass
class StepLayer:
    """What a layer keeps of B sequences of different lengths, for `Attention.decode`.

    Shapes never change.
    """

    window: Tensor  # rotated KV, [B, W, C]: token p at p % W
    kv: StepCompressor | None = None
    index: StepCompressor | None = None
    # of an HCA layer, [B, capacity + 1, C]; the last is written where nothing closes
    entries: Tensor | None = None
    pager: Pager | None = None  # of a CSA layer
