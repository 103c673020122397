"""Byte arithmetic that holds for every family: it sums over a model's layers.

Two accountings of a request's KV cache are used, and always named:

- *logical*: entries and index keys only, a policy's share of them taken from the full cache. It is
  the accounting of FlashMemory (arXiv 2606.09079), and the one that its footprint column follows.
- *on the GPU*: what an engine allocates there (`fmsim.sim.footprint`): slots, every entry of the
  dense layers, the sliding windows, and the index keys that still have to be scored.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from fmsim.errors import FmsimError
from fmsim.geometry.layers import LayerSpec


class Geometry(ABC):
    """A model as the simulator sees it: its layers, and what a token computes.

    Names keep DeepSeek-V4's words where they mean more: ``csa`` stands for the layers that select
    among entries of their own and can be paged (all layers of DeepSeek-V3.2), ``hca`` for those
    that attend to all of theirs. Subclasses give `layers` and the figures below.
    """

    if TYPE_CHECKING:  # subclasses make fields or properties of these
        name: str
        family: str  # as a table names it
        hidden_size: int
        n_heads: int
        head_dim: int  # mean width of a head's key and value in the cache
        index_n_heads: int
        index_head_dim: int
        dense_mlps: int  # layers without routed experts
        table_bytes: float  # of tables that tokens look up; GPUs share them out
        vocabulary: int  # of the embedding; 0: not said, and counted with what multiplies
        max_positions: int | None  # the longest context that the model knows; None: not said

        @property
        def expert_parameters(self) -> int:
            """Parameters of the routed experts."""

        @property
        def shared_parameters(self) -> int:
            """Everything that every token uses."""

        @property
        def csa_rate(self) -> int | float:
            """Tokens an entry of a layer that pages; the mean, where layers differ."""

        @property
        def hca_rate(self) -> int:
            """Tokens an entry of a dense layer."""

        @property
        def kv_entry_bytes(self) -> int:
            """One entry of a layer that pages."""

        @property
        def index_key_bytes(self) -> int:
            """One index key."""

        @property
        def index_topk(self) -> int:
            """Entries that a step attends to in each layer that pages."""

        @property
        def window_tokens(self) -> int:
            """Tokens of the largest sliding window; 0 where there is none."""

    @property
    @abstractmethod
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer, from the first."""

    @property
    @abstractmethod
    def active_parameters(self) -> int:
        """Parameters that one token uses."""

    @abstractmethod
    def weight_bytes(self, n_gpus: int) -> float:
        """Weights on each of ``n_gpus`` tensor-parallel GPUs."""

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def _paged(self) -> list[LayerSpec]:
        return [layer for layer in self.layers if layer.pages]

    @cached_property
    def _rates(self) -> Counter[int]:
        """How many layers that page have entries of so many tokens."""
        return Counter(layer.entry_tokens for layer in self._paged)

    @cached_property
    def _dense(self) -> Counter[tuple[int, int]]:
        """How many dense layers there are of each (tokens an entry, bytes an entry)."""
        found = [layer for layer in self.layers if layer.kind == "dense"]
        return Counter((layer.entry_tokens, layer.entry_bytes) for layer in found)

    @cached_property
    def _sparse(self) -> Counter[tuple[int, int]]:
        """The same of the layers that page; bytes are those of an entry and its index key."""
        sizes = ((one.entry_tokens, one.entry_bytes + one.key_bytes) for one in self._paged)
        return Counter(sizes)

    @cached_property
    def n_csa(self) -> int:
        """Layers whose entries can be paged."""
        return len(self._paged)

    @cached_property
    def n_selecting(self) -> int:
        """Layers that attend to selected entries, their own or an earlier layer's."""
        return sum(layer.kind == "sparse" for layer in self.layers)

    @cached_property
    def n_keyed(self) -> int:
        """Of these, the layers that have index keys of their own."""
        return sum(layer.key_bytes > 0 for layer in self._paged)

    @cached_property
    def n_hca(self) -> int:
        """Layers that attend to all their entries."""
        return sum(layer.kind == "dense" for layer in self.layers)

    @cached_property
    def n_sliding(self) -> int:
        """Layers that have a sliding window and nothing else."""
        return sum(layer.kind == "window" for layer in self.layers)

    @overload
    def csa_entries(self, tokens: int) -> int: ...

    @overload
    def csa_entries(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def csa_entries(self, tokens: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        """Entries that one layer that pages has closed after ``tokens`` tokens, an int or an array;
        the mean over them, where they differ.
        """
        return sum(n * (tokens // rate) for rate, n in self._rates.items()) // self.n_csa

    def hca_entries(self, tokens: int) -> int:
        return tokens // self.hca_rate

    @cached_property
    def dense_bytes_per_token(self) -> float:
        """What a token adds in one dense layer; the mean over them, 0 where there are none."""
        total = sum(n * size / rate for (rate, size), n in self._dense.items())
        return total / max(1, self.n_hca)

    def dense_bytes(self, tokens: int) -> int:
        """The entries of all dense layers."""
        return sum(n * (tokens // rate) * size for (rate, size), n in self._dense.items())

    def full_kv_bytes(self, tokens: int) -> int:
        """Logical bytes of the whole cache of one request: all entries and index keys.

        The sliding windows are left out, as in the paper: they do not grow with the context.
        """
        return self.host_kv_bytes(tokens) + self.dense_bytes(tokens)

    def full_gpu_bytes(self, tokens: int) -> int:
        """What an engine allocates for the full cache of one request: a slot for every entry, its
        index keys, and the windows.
        """
        return self.full_kv_bytes(tokens) + self.window_bytes

    def host_kv_bytes(self, tokens: int) -> int:
        """Bytes of the host's mirror of one request: every entry that pages, with its index key."""
        return sum(n * (tokens // rate) * size for (rate, size), n in self._sparse.items())

    @cached_property
    def paged_bytes_per_token(self) -> float:
        """What a token adds in all layers that page, index keys included."""
        return sum(n * size / rate for (rate, size), n in self._sparse.items())

    @cached_property
    def window_bytes(self) -> int:
        """The sliding windows of all layers, full."""
        return sum(layer.window_tokens * layer.window_bytes for layer in self.layers)

    def slot_bytes(self, granularity: int, with_keys: bool = False) -> int:
        """Bytes that one layer's slot of ``granularity`` entries moves over the link; ``with_keys``
        where index keys are tiered (their mean, where not every layer has its own).
        """
        key_bytes = -(-self.index_key_bytes * self.n_keyed // self.n_csa) if with_keys else 0
        return granularity * (self.kv_entry_bytes + key_bytes)

    @cached_property
    def selections_of_a_store(self) -> float:
        """How many selections a step makes among one layer's entries: 1, or more where layers with
        selections of their own read that layer's KV; the mean over layers that page.
        """
        pairs = {
            (
                number if layer.kv_of is None else layer.kv_of,
                number if layer.shares is None else layer.shares,
            )
            for number, layer in enumerate(self.layers)
            if layer.kind == "sparse"
        }
        return len(pairs) / self.n_csa

    def selection_map(self) -> tuple[int, ...]:
        """For each layer that pages, the number of its selection; layers that share one have the
        same.
        """
        own: dict[int, int] = {}
        found = []
        for number, layer in enumerate(self.layers):
            if not layer.pages:
                continue
            source = number if layer.shares is None else layer.shares
            found.append(own.setdefault(source, len(own)))
        return tuple(found)

    def bytes_per_token(self) -> float:
        """What one token of context adds to the whole cache, index keys included."""
        return sum(layer.bytes_per_token() for layer in self.layers)

    def kv_parts(self, tensor_parallel: int) -> int:
        """Parts into which ``tensor_parallel`` GPUs split a request's KV: 1 where it is a latent of
        all heads, which every GPU holds whole; KV heads can be shared out.
        """
        return min(tensor_parallel, min(layer.kv_heads for layer in self.layers))

    def check_replayable(self) -> None:  # noqa: B027 - most families are
        """Raise FmsimError where one trace cannot drive all layers that page."""

    def on_gpu(self, tensor_parallel: int) -> Geometry:
        """What one of ``tensor_parallel`` GPUs keeps of a request. Index keys are not split."""
        return self

    @property
    def split_flops_per_token(self) -> float:
        """Operations of projections and experts on one token: 2 a parameter that multiplies it,
        which the embedding's do not.
        """
        return 2.0 * (self.active_parameters - self.vocabulary * self.hidden_size)

    @cached_property
    def _attended(self) -> Counter[tuple[str, int, int, int]]:
        """How many layers attend to entries of (kind, tokens an entry, top-k, rows an entry)."""
        found = [one for one in self.layers if one.kind != "window"]
        return Counter((one.kind, one.entry_tokens, one.topk, one.rows) for one in found)

    @cached_property
    def n_indexing(self) -> int:
        """Layers that run an indexer of their own."""
        return sum(layer.kind == "sparse" and layer.shares is None for layer in self.layers)

    def attention_flops_per_token(
        self,
        tokens: NDArray[np.float64] | float,
        scored_entries: NDArray[np.float64] | float,
        speedup: float = 1.0,
    ) -> NDArray[np.float64] | float:
        """Operations of one token's attention at a context of ``tokens``: over top-k, window and
        dense entries, and the indexer over ``scored_entries`` entries of each layer that runs one,
        whose products count 1 / ``speedup``.
        """
        per_entry = 4 * self.n_heads * self.head_dim  # q.k and p.v
        attended: Any = sum(layer.window_tokens for layer in self.layers)
        for (kind, rate, topk, rows), count in self._attended.items():
            entries = tokens / rate
            seen = np.minimum(topk, entries) if kind == "sparse" else entries
            attended = attended + count * seen * rows
        per_score = self.index_n_heads * (2 * self.index_head_dim + 2) / speedup
        scoring = self.n_indexing * scored_entries * per_score
        found: NDArray[np.float64] | float = attended * per_entry + scoring
        return found

    def flops_per_token(self, tokens: int, scored_entries: int) -> float:
        """Operations of one decode step of one request at a context of ``tokens``."""
        attention = self.attention_flops_per_token(tokens, scored_entries)
        return float(self.split_flops_per_token + attention)

    def beyond_positions(self) -> Self:
        """The same model, taken to read contexts of any length."""
        found = copy.copy(self)
        object.__setattr__(found, "max_positions", None)
        return found

    def check_context(self, tokens: int, what: str) -> None:
        """Raise FmsimError where ``what`` is longer than the positions that the model knows."""
        if self.max_positions is not None and tokens > self.max_positions:
            raise FmsimError(
                f"{what}: {tokens:,} tokens, but {self.name} knows {self.max_positions:,}"
                " positions; shorten it, or say --beyond-positions"
            )
