"""Memory indexer checkpoints: FlashMemory's joint files (.safetensors, .pt) and fmsim's own, which
add a header.

Keys are ``retrievers.l{N}.{wq_a.weight, q_norm_weight, wq_b.weight, weights_proj.weight}``, N
counting CSA layers from 0. A published file says nothing more, and is taken for
DeepSeek-V4-Flash's; fmsim's own files add the metadata key ``fmsim_indexer``, a JSON object of
rotation, recommended threshold and how the file was trained, and perhaps
``retrievers.l{N}.served_proj.weight`` (`Checkpoint.served`).
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fmsim.errors import FmsimError
from fmsim.files import replacing
from fmsim.files.inputs import check_regular
from fmsim.indexer.scorer import PUBLISHED, LayerWeights, ScorerConfig, Yarn

METADATA_KEY = "fmsim_indexer"
PART_OF_KEY = {
    "wq_a.weight": "wq_a",
    "q_norm_weight": "q_norm",
    "wq_b.weight": "wq_b",
    "weights_proj.weight": "weights_proj",
}
MOST_BYTES = 4 * 2**30  # published ones have 50 MB
SERVED = "served_proj.weight"
KEY = re.compile(r"retrievers\.l(\d+)\.(.+)")
SHIPPED = Path(__file__).parents[1] / "nano" / "model" / "indexer.safetensors"
FORESIGHT = SHIPPED.with_name("foresight.safetensors")  # its heads are weighed for each layer


@dataclass(frozen=True)
class Checkpoint:
    """Retrievers by CSA layer (counted from 0), and what to do with them.

    ``threshold`` is the score (after the sigmoid) recommended for a resident set, None where the
    file states none; ``training`` is free-form; ``metadata`` holds the file's other metadata, kept
    when it is written again. ``served``: by scored layer, float32 [model's CSA layers, heads,
    hidden_size], the weights of its heads for each layer that attends; only `foresight` goes by it.
    """

    layers: dict[int, LayerWeights]
    config: ScorerConfig
    threshold: float | None = None
    training: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    served: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        return next(iter(self.layers.values())).hidden_size

    @property
    def head_dim(self) -> int:
        return next(iter(self.layers.values())).head_dim

    def check_fits(
        self, layers: Sequence[int], hidden_size: int, head_dim: int, source: str
    ) -> None:
        """Raise FmsimError unless the retrievers can score states and keys of these widths and CSA
        layers, numbered from 0.
        """
        if not set(self.layers) <= set(layers):
            raise FmsimError(
                f"{source}: has the CSA layers {list(layers)}, but the indexer scores CSA layers"
                f" {sorted(self.layers)}"
            )
        for name, ours, theirs in (
            ("hidden_size", self.hidden_size, hidden_size),
            ("head_dim", self.head_dim, head_dim),
        ):
            if ours != theirs:
                raise FmsimError(
                    f"{source}: its {name} is {theirs}, but the indexer checkpoint's is {ours}; "
                    "give a checkpoint trained on this model's traces (fmsim indexer train)"
                )


def load(path: str | os.PathLike) -> Checkpoint:
    """Read a .safetensors or .pt (weights only) checkpoint; raises FmsimError naming the file and
    what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise FmsimError(
            f"{path}: no such indexer checkpoint; train one with `fmsim indexer train TRACE..."
            f" --out {path}`"
        )
    tensors, metadata = (_read_pt if path.suffix == ".pt" else _read_safetensors)(path)
    layers, served = _layers(path, tensors)
    own = metadata.pop(METADATA_KEY, None)
    if own is None:
        return Checkpoint(layers, PUBLISHED, metadata=metadata, served=served)
    try:
        header = json.loads(own)
        config = header["scorer"]
        config = ScorerConfig(
            **(config | {"yarn": Yarn(**config["yarn"]) if config["yarn"] else None})
        )
        known = header["threshold"], header["training"]
        return Checkpoint(layers, config, *known, metadata, served)
    except (ValueError, KeyError, TypeError) as error:
        raise FmsimError(
            f"{path}: metadata {METADATA_KEY!r} is not a memory indexer's: {error!r}"
        ) from None


def save(checkpoint: Checkpoint, path: str | os.PathLike) -> None:
    """Write .safetensors or .pt, whole or not at all.

    A published checkpoint comes out as it came in: same keys, bits, metadata.

    A .pt is a state dict alone, without the ``freqs_cis`` that FlashMemory's trainer leaves in it
    and its loaders skip; FmsimError where the checkpoint says more than that can hold.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise FmsimError(f"{path}: indexer checkpoints are written as .safetensors or .pt")
    metadata = dict(checkpoint.metadata)
    published = (checkpoint.config, checkpoint.threshold, checkpoint.training) == (
        PUBLISHED,
        None,
        {},
    )
    if not published:
        header = {
            "scorer": asdict(checkpoint.config),
            "threshold": checkpoint.threshold,
            "training": checkpoint.training,
        }
        metadata[METADATA_KEY] = json.dumps(header)
    if path.suffix == ".pt" and not published:
        raise FmsimError(
            f"{path}: a .pt cannot hold this checkpoint's rotation, threshold and training; give a"
            " .safetensors file"
        )
    tensors = {
        f"retrievers.l{layer}.{key}": np.ascontiguousarray(getattr(weights, part))
        for layer, weights in checkpoint.layers.items()
        for key, part in PART_OF_KEY.items()
    }
    tensors |= {
        f"retrievers.l{layer}.{SERVED}": np.ascontiguousarray(weights)
        for layer, weights in checkpoint.served.items()
    }
    with replacing(path) as beside:
        if path.suffix == ".pt":
            _write_pt(tensors, beside)
        else:
            save_file(tensors, beside, metadata=metadata or None)


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    check_regular(path, MOST_BYTES)
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name).copy() for name in names}
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, TypeError) as error:
        raise FmsimError(
            f"{path}: not a readable .safetensors indexer checkpoint: {error}"
        ) from None


def _read_pt(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import torch

    n_bytes = check_regular(path, MOST_BYTES)
    try:
        if zipfile.is_zipfile(path):
            _check_members(path, n_bytes)
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {key: tensor for key, tensor in state.items() if not key.endswith("freqs_cis")}
        if sum(tensor.nbytes for tensor in tensors.values()) > n_bytes:
            raise ValueError("its tensors say that they are larger than the file")
        return {key: tensor.numpy() for key, tensor in tensors.items()}, {}
    except (
        Exception
    ) as error:  # torch names no common class for what a damaged or foreign pickle raises
        raise FmsimError(
            f"{path}: not a state dict of tensors: {str(error).splitlines()[0]}"
        ) from None


def _check_members(path: Path, n_bytes: int) -> None:
    """Refuse members that would inflate, before any is read; torch.save only stores."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > n_bytes:
        raise ValueError("its members are compressed or overlap, which torch.save never does")


def _write_pt(tensors: dict[str, np.ndarray], path: Path) -> None:
    import torch

    torch.save({key: torch.from_numpy(tensor) for key, tensor in tensors.items()}, path)


def _layers(
    path: Path, tensors: dict[str, np.ndarray]
) -> tuple[dict[int, LayerWeights], dict[int, np.ndarray]]:
    """Retrievers and served weights, by layer."""
    parts: dict[int, dict[str, np.ndarray]] = {}
    served: dict[int, np.ndarray] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or match[2] not in (*PART_OF_KEY, SERVED):
            raise FmsimError(f"{path}: {key!r} is not a memory indexer's tensor")
        if tensor.dtype != np.float32:
            raise FmsimError(f"{path}: {key!r} is {tensor.dtype}; indexer weights are float32")
        if match[2] == SERVED:
            served[int(match[1])] = tensor
        else:
            parts.setdefault(int(match[1]), {})[PART_OF_KEY[match[2]]] = tensor
    if not parts:
        raise FmsimError(f"{path}: holds no retrievers")
    layers = {}
    for layer in sorted(parts):
        missing = [key for key, part in PART_OF_KEY.items() if part not in parts[layer]]
        if missing:
            raise FmsimError(f"{path}: retrievers.l{layer} lacks {', '.join(missing)}")
        layers[layer] = LayerWeights(**parts[layer])
        _check_shapes(path, layer, layers[layer], layers[min(layers)])
    if served:
        _check_served(path, layers, served)
    return layers, served


def _check_served(
    path: Path, layers: dict[int, LayerWeights], served: dict[int, np.ndarray]
) -> None:
    counts = {len(weights) for weights in served.values()}
    fits = served.keys() == layers.keys() and len(counts) == 1
    for layer, weights in served.items():
        fits = fits and weights.shape[1:] == layers[layer].weights_proj.shape
    if not fits:
        shapes = {f"l{layer}": list(weights.shape) for layer, weights in served.items()}
        raise FmsimError(
            f"{path}: {SERVED} must serve as many layers in every retriever, with its heads and"
            f" hidden_size: {shapes}"
        )


def _check_shapes(path: Path, layer: int, weights: LayerWeights, first: LayerWeights) -> None:
    rank, hidden = weights.wq_a.shape if weights.wq_a.ndim == 2 else (-1, -1)
    heads = len(weights.weights_proj)
    fits = weights.q_norm.shape == (rank,) and weights.weights_proj.shape == (heads, hidden)
    fits = (
        fits
        and weights.wq_b.ndim == 2
        and weights.wq_b.shape[1] == rank
        and weights.wq_b.shape[0] % heads == 0
    )
    if not fits:
        shapes = {part: list(value.shape) for part, value in weights._asdict().items()}
        raise FmsimError(f"{path}: shapes of retrievers.l{layer} do not fit together: {shapes}")
    if (weights.hidden_size, weights.head_dim) != (first.hidden_size, first.head_dim):
        raise FmsimError(f"{path}: retrievers.l{layer} has other widths than the layers before it")
