"""What a trace is: its header, its arrays, and which of them a file must hold in which shape
(docs/reference/trace-format.md).

Axes: T decode steps, L CSA layers, Q of them with index keys, K selected entries, E entries at the
end of the trace, W windows of tau steps, H hidden width, D index key width, N = prompt_tokens + T.
Decode step t reads the token at position prompt_tokens + t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from fmsim.trace import float8
from fmsim.trace.packed import PackedColumn

FORMAT_VERSION: Final = 2  # of a trace that is not packed
PACKED_VERSION: Final = 3
LATER_KEYS = {
    2: ("entry_tokens", "topk", "layout", "prompt_history"),
    3: ("packed_shape", "keyed", "context_sha256"),
}  # by the version that they came with
METADATA_KEY = "fmsim_trace"  # the safetensors metadata entry that holds the header
TAU = 64  # steps of a window, at whose start a lookahead policy decides (arXiv 2606.09079)
ENTRY_TOKENS = 4  # tokens an entry of DeepSeek-V4 and of every trace of version 1
LABELS = "flashmemory_labels"  # the source of a trace whose rows are golden labels, not accesses
PADDING = 65535  # an entry id of this, in files whose ids are uint16, is no entry
# entries whose ids differ in their low 16 bits: a longer trace stores these, and how many of a row
# stand in each block
BLOCK = 65536


class ModelInfo(BaseModel):
    """The model that was watched.

    ``sha256`` is over its weight files, None where they were not hashed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str | None = None
    dtype: str


class CacheLayout(BaseModel):
    """How the watched model keeps KV: what a reader needs to simulate the same model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str  # as `fmsim model list` names it
    entry_bytes: int | None = Field(None, ge=1)
    key_bytes: int | None = Field(None, ge=0)
    # for each of the model's layers that page, the trace's layer that holds its selection; shorter
    # traces than models come of layers that share one
    selections: tuple[int, ...] = ()


class TraceHeader(BaseModel):
    """What a trace was recorded from, and how.

    ``entry_tokens``, ``topk``, ``layout`` and ``prompt_history`` came with version 2;
    ``packed_shape``, ``keyed`` and ``context_sha256`` with version 3.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1, 2, 3] = FORMAT_VERSION
    entry_tokens: int = Field(ENTRY_TOKENS, ge=1)  # tokens of the text in one entry
    topk: int | None = Field(None, ge=1)  # what the model selects at most, a step and layer
    layout: CacheLayout | None = None
    # what `prompt_mass` sums: attention mass, or how often the prompt's queries selected an entry
    prompt_history: Literal["mass", "count"] = "mass"
    geometry: dict[str, Any]
    model: ModelInfo
    source: str = Field(min_length=1, max_length=64)  # one word for who recorded it, and how
    prompt_kind: str
    prompt_text: str = ""  # what the text is, where it comes from, its licence
    prompt_tokens: int = Field(ge=1)
    prompt_mass_queries: int = Field(
        0, ge=0, le=65504
    )  # last prompt queries summed in `prompt_mass`; float16 holds no more
    seed: int
    tau: int = Field(TAU, ge=1)
    quality: dict[str, Any] = {}  # how well the model answered, e.g. {"asked": 20, "exact": 19}
    device: str
    created: str  # ISO 8601
    # T, L, K of packed ids; set by the writer
    packed_shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    # the trace's layers that have index keys, from 0, ascending; None for all of them
    keyed: tuple[int, ...] | None = None
    # of the file beside this one that holds what traces of one prompt share; set by the writer
    context_sha256: str | None = None
    content_sha256: str | None = (
        None  # of the header without this key, then the tensors' bytes; set by the writer
    )

    @model_serializer(mode="wrap")
    def _without_later_keys(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A header of an older version keeps its bytes, and so its digest."""
        found: dict[str, Any] = plain(self)
        for version, keys in LATER_KEYS.items():
            if self.format_version < version:
                for key in keys:
                    found.pop(key, None)
        return found


class TensorSpec(NamedTuple):
    """A tensor of the file: stored types (the first is preferred), one letter an axis, and whether
    it may be missing.
    """

    dtypes: tuple[str, ...]
    axes: str
    optional: bool = False


FILE_ONLY = ("entry_blocks", "entry_ends", "mass_ends")  # how the file holds another tensor
MASSES = ("mass", "window_mass", "sink_mass")  # all there or none
TENSORS = {
    "entry_ids": TensorSpec(("uint16", "int32", "uint8"), "TLK"),  # uint8 where it is packed
    "entry_blocks": TensorSpec(("uint16",), "TLB", optional=True),
    "entry_ends": TensorSpec(("int32",), "C", optional=True),
    "mass": TensorSpec(("float16", "uint8"), "TLK", optional=True),
    "mass_ends": TensorSpec(("int32",), "C", optional=True),
    "window_mass": TensorSpec(("float16",), "TL", optional=True),
    "sink_mass": TensorSpec(("float16",), "TL", optional=True),
    "token_ids": TensorSpec(("uint16", "int32"), "N", optional=True),
    "forced": TensorSpec(("bool",), "T"),
    "hidden": TensorSpec(("float16",), "WLH", optional=True),
    "index_keys": TensorSpec(("uint8",), "QED", optional=True),
    "index_key_scales": TensorSpec(("float32",), "QS", optional=True),
    "prompt_mass": TensorSpec(("float16",), "LE", optional=True),
}


@dataclass(frozen=True, eq=False)
class Column:
    """A tensor left in its file: indexing it reads and decodes just that part, ``np.asarray`` all
    of it.
    """

    stored: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def ndim(self) -> int:
        return self.stored.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.decode(self.stored[:0]).dtype

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.decode(self.stored[key])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        decoded = self.decode(self.stored)
        return decoded if dtype is None else decoded.astype(dtype, copy=False)


@dataclass(frozen=True, eq=False)
class BlockedIds(Column):
    """Entry ids left in their file as low 16 bits and counts by block (`decode_blocked_ids`);
    indexed by step and layer.
    """

    blocks: np.ndarray  # uint16 [T, L, B]

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        return decode_blocked_ids(self.stored[key[:2]], self.blocks[key[:2]])[(..., *key[2:])]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)


Array = np.ndarray | Column | PackedColumn


@dataclass(frozen=True, eq=False)
class Trace:
    """One decode, as the CSA layers saw it.

    Arrays are numpy, or `Column` where they are read from a file.

    - entry_ids, int32 [T, L, K]: selected entries, ascending in a row; padding, -1, at its end.
    - mass, float32 [T, L, K]: softmax probability on the entry, mean over heads; 0 on padding.
      This and the next two are None where attention was not captured.
    - window_mass, float32 [T, L]: the same on the sliding window's tokens.
    - sink_mass, float32 [T, L]: the same on the attention sink.
    - token_ids, int32 [N]: the prompt, then each step's input token; or None.
    - forced, bool [T]: the step's input token was given, not generated.
    - hidden, float32 [W, L, H]: the layer's attention input at position
      prompt_tokens + tau * w - 1; or None.
    - index_keys, uint8 [Q, E, D], of the layers `keyed`: float8 e4m3fn codes, RoPE already
      applied; `keys` decodes them; or None.
    - index_key_scales, float32 [Q, E or 1].
    - prompt_mass, float32 [L, E]: what `header.prompt_history` says, summed over the last
      `header.prompt_mass_queries` prompt tokens; or None.

    Mass of entries, window and sink sum to 1 where the model is a DeepSeek-V4. In a dense_pooled
    trace the sum is below 1 by what fell on entries beyond the top k. Where `holds_labels`, rows
    are golden labels and mass is no mass. ``path`` is the file, for messages.
    """

    header: TraceHeader
    entry_ids: Array
    mass: Array | None
    window_mass: Array | None
    sink_mass: Array | None
    token_ids: np.ndarray | None
    forced: np.ndarray
    hidden: Array | None = None
    index_keys: np.ndarray | None = None
    index_key_scales: np.ndarray | None = None
    prompt_mass: Array | None = None
    path: Path | None = None

    @property
    def n_steps(self) -> int:
        return self.entry_ids.shape[0]

    @property
    def n_layers(self) -> int:
        return self.entry_ids.shape[1]

    @property
    def topk(self) -> int:
        """K, the width of a row."""
        return self.entry_ids.shape[2]

    @property
    def holds_labels(self) -> bool:
        """Rows are the entries golden at a step, the same in all layers, and mass the share of the
        model's CSA layers that chose each.
        """
        return self.header.source == LABELS

    @property
    def has_mass(self) -> bool:
        """Whether it says how much attention a selected entry got. Engines' captures do not."""
        return self.mass is not None

    @property
    def csa_numbers(self) -> list[int]:
        """The number, from 0, of each of the trace's layers among the model's CSA layers."""
        return self.header.geometry.get("csa_numbers") or list(range(self.n_layers))

    @property
    def keyed(self) -> list[int]:
        """The trace's layers that index keys are of, from 0."""
        return list(range(self.n_layers) if self.header.keyed is None else self.header.keyed)

    @property
    def n_windows(self) -> int:
        return -(-self.n_steps // self.header.tau)

    @property
    def prompt_entries(self) -> int:
        """Entries that the prompt alone closes."""
        return self.header.prompt_tokens // self.header.entry_tokens

    @property
    def total_entries(self) -> int:
        """E: entries closed by the end of the trace."""
        return (self.header.prompt_tokens + self.n_steps) // self.header.entry_tokens

    def n_entries(self, step: int) -> int:
        """Entries visible to the token of decode step ``step``; an entry closes with its last
        token.
        """
        return (self.header.prompt_tokens + step + 1) // self.header.entry_tokens

    def keys(self, entries: int | None = None) -> NDArray[np.float32]:
        """Index keys of the first ``entries`` entries (all by default), decoded: float32 [Q,
        entries, D], a row for each of `keyed`.
        """
        assert self.index_keys is not None and self.index_key_scales is not None
        codes, scales = self.index_keys[:, :entries], self.index_key_scales[:, :entries]
        decoded: NDArray[np.float32] = float8.decode(codes) * scales[:, :, None]
        return decoded

    def with_header(self, **changes: Any) -> Trace:
        """The same trace with header fields replaced."""
        return replace(self, header=self.header.model_copy(update=changes))


def decode_ids(stored: np.ndarray) -> np.ndarray:
    """Stored entry ids of a trace without blocks -> int32 with -1 for padding."""
    if stored.dtype == np.int32:
        return stored
    ids = stored.astype(np.int32)
    ids[stored == PADDING] = -1
    return ids


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """int32 ids below PADDING, -1 for padding -> uint16."""
    return np.where(ids < 0, PADDING, ids).astype(np.uint16)


def encode_blocked_ids(ids: np.ndarray, total_entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [..., K] of ascending int32 ids, padding -1 last -> their low 16 bits, uint16, and how
    many stand in each block of 65,536 entries, uint16 [..., B].

    Half the bytes of int32, and exact: the ids of a row ascend, so counts tell the rest.
    """
    block = np.where(ids < 0, -1, ids // BLOCK)[..., None]
    return ids.astype(np.uint16), (block == np.arange(n_blocks(total_entries))).sum(-2).astype(
        np.uint16
    )


def decode_blocked_ids(low: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """What `encode_blocked_ids` made -> int32 ids, -1 where a row has fewer."""
    ends = np.cumsum(blocks, axis=-1, dtype=np.int64)[..., None, :]
    block = (np.arange(low.shape[-1])[:, None] >= ends).sum(-1)
    return np.where(block == blocks.shape[-1], -1, low + BLOCK * block).astype(np.int32)


def n_blocks(total_entries: int) -> int:
    """B: blocks of 65,536 entries."""
    return -(-total_entries // BLOCK)


def to_int32(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.int32)


def encode_tokens(tokens: np.ndarray) -> np.ndarray:
    """int32 token ids -> uint16 where all of them fit."""
    return np.asarray(tokens, np.uint16 if np.max(tokens) <= np.iinfo(np.uint16).max else np.int32)


def to_float32(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.float32)
