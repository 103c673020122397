"""Write a trace: one safetensors file, all or nothing, the same bytes for the same trace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.files import write_bytes
from fmsim.trace.check import validate
from fmsim.trace.format import (
    METADATA_KEY,
    PADDING,
    TENSORS,
    Trace,
    TraceHeader,
    encode_blocked_ids,
    encode_ids,
    encode_tokens,
)

SAFETENSORS_NAMES = {
    "int32": "I32",
    "float32": "F32",
    "uint16": "U16",
    "float16": "F16",
    "uint8": "U8",
    "bool": "BOOL",
}


def write(path: str | Path, trace: Trace) -> None:
    """Validate ``trace`` and write it to ``path``, replacing a file of that name only when the new
    one is complete.

    Raises FmsimError where the trace is unsound or the place cannot be written.
    """
    path = Path(path)
    validate(trace)
    tensors = encode_tensors(trace)
    buffers = [array.data for array in tensors.values()]
    header = trace.header.model_copy(
        update={"content_sha256": content_sha256(trace.header, tensors, buffers)}
    )
    try:
        write_bytes(path, [_file_head(header, tensors), *buffers])
    except OSError as error:
        raise FmsimError(
            f"{path}: cannot write the trace: {error.strerror}; give another --out or free the"
            " place"
        ) from error


def encode_tensors(trace: Trace) -> dict[str, np.ndarray]:
    """Tensors as they are stored, in the file's order: widest types first, so that each is aligned
    in the file.
    """
    tensors = {}
    for name, spec in TENSORS.items():
        values = getattr(trace, name, None)  # entry_blocks is a matter of the file alone
        if values is not None and name not in ("entry_ids", "token_ids"):
            tensors[name] = np.ascontiguousarray(np.asarray(values, spec.dtypes[0]))
    ids = np.asarray(trace.entry_ids)
    if trace.total_entries > PADDING:
        tensors["entry_ids"], tensors["entry_blocks"] = encode_blocked_ids(ids, trace.total_entries)
    else:
        tensors["entry_ids"] = encode_ids(ids)
    if trace.token_ids is not None:
        tensors["token_ids"] = encode_tokens(np.asarray(trace.token_ids))
    names = list(TENSORS)
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, names.index(item[0]))))


def content_sha256(
    header: TraceHeader,
    tensors: dict[str, np.ndarray],
    buffers: Iterable[memoryview],
) -> str:
    """Hex digest of the header without its own digest, the tensors' names, types and shapes, then
    their bytes; in file order.
    """
    digest = hashlib.sha256(
        header.model_copy(update={"content_sha256": None}).model_dump_json().encode()
    )
    digest.update(
        json.dumps(
            [[name, array.dtype.name, array.shape] for name, array in tensors.items()]
        ).encode()
    )
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def _file_head(header: TraceHeader, tensors: dict[str, np.ndarray]) -> bytes:
    """The 8 length bytes and the JSON of a safetensors file, padded with blanks so that the tensors
    start aligned.
    """
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: header.model_dump_json()}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        table[name] = {
            "dtype": SAFETENSORS_NAMES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
