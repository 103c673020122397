"""What one layer of a model keeps of a context: the unit from which all byte arithmetic follows."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["sparse", "dense", "window"]


class LayerSpec(BaseModel):
    """One layer's cache, and what it reads of it.

    - ``sparse``: an indexer picks ``topk`` of the entries. These are what a policy pages.
    - ``dense``: the layer reads all of its entries at every step. They stay on the GPU.
    - ``window``: the layer sees its sliding window only.

    Sizes are in bytes. An entry is what is selected as one: ``entry_tokens`` tokens of the text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    entry_tokens: int = Field(0, ge=0)  # 0 in a window layer
    entry_bytes: int = Field(0, ge=0)  # 0 where the layer reads the KV of layer `kv_of`
    key_bytes: int = Field(0, ge=0)  # index key of one entry; 0 where it has none of its own
    topk: int = Field(0, ge=0)  # entries that a sparse layer's step attends to
    rows: int = Field(1, ge=1)  # KV rows of an entry: 1 where it is pooled, more in a block
    shares: int | None = Field(None, ge=0)  # the earlier layer whose selection it uses
    kv_of: int | None = Field(None, ge=0)  # the earlier layer whose KV it reads
    kv_heads: int = Field(1, ge=1)  # 1: a latent of all heads; every tensor-parallel GPU holds it
    window_tokens: int = Field(0, ge=0)
    window_bytes: int = Field(0, ge=0)  # of one token in the sliding window

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "window":
            if self.entry_tokens or self.entry_bytes or self.key_bytes or self.topk:
                raise ValueError("a window layer has no entries; leave out entry_tokens and sizes")
            return self
        if not self.entry_tokens:
            raise ValueError(f"a {self.kind} layer needs entry_tokens")
        if (self.entry_bytes > 0) == (self.kv_of is not None):
            raise ValueError("give entry_bytes, or kv_of where it reads another layer's KV")
        if (self.kind == "sparse") != (self.topk > 0):
            raise ValueError("a sparse layer needs topk, and no other has one")
        return self

    @property
    def pages(self) -> bool:
        """It stores entries that a policy may move."""
        return self.kind == "sparse" and self.entry_bytes > 0

    def bytes_per_token(self) -> float:
        """What one more token of context adds: entries and index keys. The window does not grow."""
        return (self.entry_bytes + self.key_bytes) / (self.entry_tokens or 1)


def check_references(layers: tuple[LayerSpec, ...]) -> None:
    """Raise ValueError where a layer shares with one that cannot be shared with."""
    for number, layer in enumerate(layers):
        for name in ("shares", "kv_of"):
            source = getattr(layer, name)
            if source is None:
                continue
            if source >= number:
                raise ValueError(f"layer {number}: {name} is {source}, not an earlier layer")
            if getattr(layers[source], name) is not None:
                raise ValueError(f"layer {number}: {name} is {source}, which has none of its own")
