"""The byte arithmetic of a decode whose entries and keys are kept as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from transformers import DeepseekV4Config

from fmsim.geometry import DeepseekV4Geometry, from_config


@dataclass(frozen=True)
class Unscaled(DeepseekV4Geometry):
    """The model with `value_bytes` for each number of an entry or an index key, and no scales."""

    value_bytes: int = 4

    @property
    def kv_entry_bytes(self) -> int:
        return self.head_dim * self.value_bytes

    @property
    def index_key_bytes(self) -> int:
        return self.index_head_dim * self.value_bytes


def unscaled(config: DeepseekV4Config, dtype: torch.dtype) -> Unscaled:
    """The geometry of a model of `config` that keeps numbers of `dtype`."""
    geometry = from_config(config.to_dict())
    shape = {field.name: getattr(geometry, field.name) for field in fields(geometry)}
    return Unscaled(**shape, value_bytes=dtype.itemsize)
