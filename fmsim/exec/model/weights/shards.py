"""The weight files of a model directory: which tensor stands in which shard."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fmsim.errors import FmsimError
from fmsim.exec.kernels.weights import BLOCK
from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, read_json

FP8_BLOCK = (BLOCK, BLOCK)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """The weights of a directory by their stored ``names``, read one at a time.

    Where there is an index it says which shard holds a tensor; what stands in another shard under
    the same name, or in none of its names, is stale and not read. Raises FmsimError where a file is
    not readable, or lacks what the index says of it.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.where = tensor_places(directory)
        self.files = {}
        path = directory
        try:
            for path in sorted(set(self.where.values())):
                self.files[path] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        there = {path: set(file.keys()) for path, file in self.files.items()}
        for name, path in self.where.items():
            if name not in there[path]:
                raise FmsimError(
                    f"{directory / INDEX}: says that {path.name} holds {name}, which it does not;"
                    " copy the directory again"
                )
        scales = {scale for name in self.where for scale in scale_names(name)}
        self.names = [name for name in self.where if name not in scales]
        self.block = _fp8_block(directory)

    def read(self, name: str) -> torch.Tensor:
        path = self.where[name]
        try:
            return self.files[path].get_tensor(name)
        except SafetensorError as error:
            raise _unreadable(path, error) from error

    def stored_dtype(self, name: str) -> str:
        """As safetensors names it, such as F8_E4M3."""
        return self.files[self.where[name]].get_slice(name).get_dtype()

    def has_scale(self, name: str) -> bool:
        return self._scale_name(name) is not None

    def scale_of(self, name: str) -> torch.Tensor | None:
        found = self._scale_name(name)
        return None if found is None else self.read(found)

    def _scale_name(self, name: str) -> str | None:
        return next((scale for scale in scale_names(name) if scale in self.where), None)


def scale_names(name: str) -> tuple[str, ...]:
    """Where the scales of a weight may be: transformers' name for them, and the official
    release's.
    """
    official = (name.removesuffix("weight") + "scale",) if name.endswith(".weight") else ()
    return (name + "_scale_inv", *official)


def tensor_places(directory: Path) -> dict[str, Path]:
    """The file of each stored tensor: by the index, or all of the single file."""
    places = _indexed(directory)
    if places is not None:
        return places
    path = _there(directory, SINGLE)
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(list(file.keys()), path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors shards of a directory: those its index names, or the single file."""
    places = _indexed(directory)
    if places is None:
        return [_there(directory, SINGLE)]
    return sorted(set(places.values()))


def _indexed(directory: Path) -> dict[str, Path] | None:
    """The index's places; None where there is no index."""
    path = directory / INDEX
    if not path.exists():
        return None
    try:
        found = read_json(path, MOST_BYTES_OF_RESULTS)
        places = found["weight_map"]
        sound = places and all(
            isinstance(file, str) and re.fullmatch(r"[\w.\-]+\.safetensors", file)
            for file in places.values()
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise FmsimError(
            f"{path}: is no index of weights: it must have a weight_map from tensors to"
            " .safetensors files of this directory; copy it again"
        )
    return {name: _there(directory, file) for name, file in places.items()}


def _there(directory: Path, name: str) -> Path:
    if not (directory / name).exists():
        raise FmsimError(
            f"{directory / name}: no such file; the directory's weights are incomplete"
        )
    return directory / name


def _unreadable(path: Path, error: Exception) -> FmsimError:
    return FmsimError(f"{path}: not a readable safetensors file ({error}); copy it again")


def _fp8_block(directory: Path) -> tuple[int, int]:
    path = directory / "config.json"
    quantised = read_json(path).get("quantization_config") or {}
    return tuple(quantised.get("weight_block_size") or FP8_BLOCK)
