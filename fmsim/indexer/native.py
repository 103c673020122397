"""A DeepSeek-V4 model's own lightning indexers, read from its directory without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmsim.errors import FmsimError
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import LayerWeights, ScorerConfig
from fmsim.trace import float8

# by transformers' names and by the release's
NATIVE = {
    "wq_a": ("self_attn.q_a_proj.weight", "attn.wq_a.weight"),
    "q_norm": ("self_attn.q_a_norm.weight", "attn.q_norm.weight"),
    "wq_b": ("self_attn.compressor.indexer.q_b_proj.weight", "attn.indexer.wq_b.weight"),
    "weights_proj": (
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
        "attn.indexer.weights_proj.weight",
    ),
}
PUBLISHED_BLOCK = [128, 128]  # rows and columns that share a scale, where the config is silent


def of_model(folder: str | os.PathLike[str]) -> Checkpoint:
    """The lightning indexers of a DeepSeek-V4 model in float32, bfloat16 or float8 with scales of
    blocks: the same network, with the model's own weights.

    `folder` holds config.json and .safetensors files. Raises FmsimError for another model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kinds = config["layer_types"]
        csa = [n for n, kind in enumerate(kinds) if kind == "compressed_sparse_attention"]
        rope = config["rope_parameters"]["compress"]
        geometry = {"rope_dims": config["qk_rope_head_dim"], "compress_rope": rope}
        quantisation = config.get("quantization_config") or {}
        block = quantisation.get("weight_block_size", PUBLISHED_BLOCK)
        stored = dict(_stored(folder))
        layers = {
            number: LayerWeights(
                **{
                    part: _floats(stored, [f"model.layers.{layer}.{name}" for name in names], block)
                    for part, names in NATIVE.items()
                }
            )
            for number, layer in enumerate(csa)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FmsimError(
            f"{folder}: not a DeepSeek-V4 model's folder with config.json and .safetensors files in"
            f" float8, bfloat16 or float32: {error!r}"
        ) from None
    if not layers:
        raise FmsimError(f"{folder}: the model has no CSA layers")
    scorer = ScorerConfig.from_geometry(geometry)
    return Checkpoint(layers, replace(scorer, norm_eps=config.get("rms_norm_eps", 1e-6)))


class _Stored(NamedTuple):
    """Where a tensor lies: its file, the first byte and one past the last, type and shape."""

    path: Path
    begin: int
    end: int
    dtype: str
    shape: list[int]


def _stored(folder: Path) -> Iterator[tuple[str, _Stored]]:
    """Every tensor of the folder's files, which an index names if there is one."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.exists():
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / name for name in found.values()})
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                yield name, _Stored(path, begin, end, entry["dtype"], entry["shape"])


def _floats(stored: dict[str, _Stored], names: list[str], block: list[int]) -> np.ndarray:
    """The tensor under one of ``names`` as float32, float8 times its blocks' scales."""
    name = next((name for name in names if name in stored), names[0])
    values = _values(stored[name])
    if stored[name].dtype != "F8_E4M3":
        return values
    scales = _values(stored[f"{name}_scale_inv"])
    wide = scales.repeat(block[0], 0).repeat(block[1], 1)
    return values * wide[: values.shape[0], : values.shape[1]]


def _values(place: _Stored) -> np.ndarray:
    """One tensor as float32; numpy has no bfloat16, whose bits are a float32's upper half."""
    with place.path.open("rb") as file:
        file.seek(place.begin)
        raw = file.read(place.end - place.begin)
    if place.dtype == "BF16":
        flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif place.dtype == "F32":
        flat = np.frombuffer(raw, "<f4")
    elif place.dtype == "F8_E4M3":
        flat = float8.decode(np.frombuffer(raw, np.uint8))
    else:
        raise ValueError(f"weights in {place.dtype}")
    return flat.reshape(place.shape)
