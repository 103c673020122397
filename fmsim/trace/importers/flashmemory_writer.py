"""Traces as FlashMemory's training dumps, in the format that `fmsim.trace.importers.flashmemory`
reads.

Needs torch, for the names it pickles.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmsim.files import write_bytes, write_text
from fmsim.trace.format import Trace
from fmsim.trace.importers import tensor_pickle
from fmsim.trace.importers.flashmemory import HEADER_KEY, METADATA_FILE, Votes


def write_document(
    folder: Path, number: int, trace: Trace, votes: Iterator[Votes], voters: int
) -> Path:
    """Write ``trace`` as ``doc_{number}.pkl`` and a line of the folder's metadata.

    ``votes`` are each decode step's, of ``voters`` layers.

    Row 0 is the prompt's last token, whose labels no trace has; row t > 0 is decode step t - 1. A
    trace holds a hidden state a window, so rows that are no multiple of tau hold NaN: train with
    ``--sample-interval`` tau. Needs torch.
    """
    rows = [Votes(np.empty(0, np.int32), np.empty(0, np.int32)), *votes]
    header = trace.header
    counts = np.cumsum([0] + [len(row.ids) for row in rows])
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    assert trace.hidden is not None and trace.index_keys is not None
    scales = np.broadcast_to(np.asarray(trace.index_key_scales, "<f4"), trace.index_keys.shape[:2])
    for row, layer in enumerate(trace.keyed):
        csa = trace.csa_numbers[layer]
        hidden = np.full((len(rows), trace.hidden.shape[2]), np.nan, np.float32)
        hidden[:: header.tau][: trace.n_windows] = np.asarray(trace.hidden[:, layer], np.float32)
        scale_bytes = np.ascontiguousarray(scales[row])[:, None].view(np.uint8)
        tensors[f"hidden_layer_{csa}"] = ("BFloat16Storage", _bfloat16(hidden))
        tensors[f"positions_layer_{csa}"] = (
            "LongStorage",
            header.prompt_tokens - 1 + np.arange(len(rows), dtype="<i8"),
        )
        tensors[f"compk_layer_{csa}"] = (
            "ByteStorage",
            np.concatenate([trace.index_keys[row], scale_bytes], axis=1),
        )
    tensors["label_indices"] = (
        "IntStorage",
        np.concatenate([row.ids for row in rows]).astype("<i4"),
    )
    tensors["label_scores"] = (
        "IntStorage",
        np.concatenate([row.layers for row in rows]).astype("<i4"),
    )
    tensors["label_pointers"] = ("IntStorage", counts.astype("<i4"))
    path = folder / f"doc_{number:05d}.pkl"
    write_bytes(path, [_pickled(tensors)])
    geometry = header.geometry | {"csa_numbers": trace.csa_numbers, "label_layers": voters}
    line = {
        "doc_index": number,
        "filename": path.name,
        "n_prompt_blocks": trace.prompt_entries,
        "n_decode_tokens": len(rows),
        "n_total_labels": int(counts[-1]),
        "target_csa_layers": trace.csa_numbers,
        HEADER_KEY: (
            header.model_copy(update={"geometry": geometry}).model_dump(exclude={"content_sha256"})
        ),
    }
    _add_line(folder / METADATA_FILE, line)
    return path


def _add_line(path: Path, line: dict[str, Any]) -> None:
    """Put a document's line in the place of an older one."""
    lines = (
        [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )
    lines = [other for other in lines if other.get("filename") != line["filename"]] + [line]
    write_text(path, "".join(json.dumps(item) + "\n" for item in lines))


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper half of its bits, uint16, rounded to nearest, ties to even; NaN stays
    NaN.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


class _Tensor(NamedTuple):
    kind: str  # the torch storage's name
    array: np.ndarray


class _Storage(NamedTuple):
    kind: str
    data: bytes
    elements: int


def _pickled(tensors: dict[str, tuple[str, np.ndarray]]) -> bytes:
    """What `pickle.dump` writes of a dict of torch tensors, but for the storages' keys: torch makes
    these of memory addresses.
    """
    stream = io.BytesIO()
    _TensorPickler(stream, protocol=4).dump(
        {key: _Tensor(*value) for key, value in tensors.items()}
    )
    return stream.getvalue()


class _TensorPickler(pickle.Pickler):
    """Pickles a `_Tensor` as the torch tensor of it."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if isinstance(value, _Tensor):
            array = np.ascontiguousarray(value.array)
            stride = tuple(step // array.itemsize for step in array.strides)
            storage = _Storage(value.kind, array.tobytes(), array.size)
            return torch._utils._rebuild_tensor_v2, (
                storage,
                0,
                array.shape,
                stride,
                False,
                OrderedDict(),
            )
        if isinstance(value, _Storage):
            return torch.storage._load_from_bytes, (_saved_storage(value),)
        return NotImplemented


def _saved_storage(storage: _Storage) -> bytes:
    """One storage as torch.save's older format has it, which pickled storages use."""
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return (
                ("storage", getattr(torch, storage.kind), "0", "cpu", storage.elements, None)
                if value is storage
                else None
            )

    stream = io.BytesIO()
    system = {
        "protocol_version": tensor_pickle.LEGACY_VERSION,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    for part in (tensor_pickle.LEGACY_MAGIC, tensor_pickle.LEGACY_VERSION, system, storage, ["0"]):
        Pickler(stream, protocol=2).dump(part)
    return stream.getvalue() + storage.elements.to_bytes(8, "little") + storage.data
