"""Write a trace: one safetensors file, all or nothing, the same bytes for the same trace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.files import write_bytes
from fmsim.trace.check import validate
from fmsim.trace.format import (
    METADATA_KEY,
    PACKED_VERSION,
    PADDING,
    TENSORS,
    Trace,
    TraceHeader,
    encode_blocked_ids,
    encode_ids,
    encode_tokens,
)
from fmsim.trace.packed import pack, pack_ids, pack_masses
from fmsim.trace.shared import CONTEXT_KEY, context_path, with_one_context

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
    one is complete. Of version 3 it is packed.

    Raises FmsimError where the trace is unsound or the place cannot be written.
    """
    validate(trace)
    _write(Path(path), trace, None)


def write_shared(paths: Sequence[Path], traces: Sequence[Trace]) -> Path:
    """Write ``traces`` of one prompt, packed, and what they share beside them, once; -> the path of
    that.

    All ``paths`` are in one folder. Raises FmsimError as `write` does, and where the traces are not
    of one prompt.
    """
    versioned = [trace.with_header(format_version=PACKED_VERSION) for trace in traces]
    context, whole = with_one_context(versioned)
    for trace in whole:
        validate(trace)
    tensors = {
        name: np.ascontiguousarray(np.asarray(values, TENSORS[name].dtypes[0]))
        for name, values in vars(context).items()
        if values is not None and name != "token_ids"
    }
    if context.token_ids is not None:
        tensors["token_ids"] = encode_tokens(context.token_ids)
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    head = _file_head({CONTEXT_KEY: "1"}, tensors)
    parts: list[bytes | memoryview] = [head, *(array.data for array in tensors.values())]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    place = context_path(paths[0], digest)
    _write_parts(place, parts)
    for path, trace in zip(paths, whole, strict=True):
        _write(path, trace, digest)
    return place


def _write(path: Path, trace: Trace, context: str | None) -> None:
    packed = trace.header.format_version >= PACKED_VERSION
    header = trace.header.model_copy(
        update={
            "packed_shape": trace.entry_ids.shape if packed else None,
            "context_sha256": context,
            "content_sha256": None,
        }
    )
    tensors = encode_tensors(replace(trace, header=header))
    buffers = [array.data for array in tensors.values()]
    digest = content_sha256(header, tensors, buffers)
    header = header.model_copy(update={"content_sha256": digest})
    metadata = {METADATA_KEY: header.model_dump_json()}
    _write_parts(path, [_file_head(metadata, tensors), *buffers])


def _write_parts(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    try:
        write_bytes(path, parts)
    except OSError as error:
        raise FmsimError(
            f"{path}: cannot write the trace: {error.strerror}; give another --out or free the"
            " place"
        ) from error


def encode_tensors(trace: Trace) -> dict[str, np.ndarray]:
    """Tensors as they are stored, in the file's order: widest types first, so that each is aligned
    in the file. Without those of the prompt where the header names a context.
    """
    shared = trace.header.context_sha256 is not None
    first = {"index_keys": trace.prompt_entries, "token_ids": trace.header.prompt_tokens}
    tensors = {}
    for name, spec in TENSORS.items():
        values = getattr(trace, name, None)
        if values is None or name in ("entry_ids", "token_ids"):
            continue
        if shared and name in ("index_key_scales", "prompt_mass"):
            continue
        whole = np.asarray(values, spec.dtypes[0])
        if shared and name == "index_keys":
            whole = whole[:, first[name] :]
        tensors[name] = np.ascontiguousarray(whole)
    tensors |= _encoded_rows(trace, tensors.pop("mass", None))
    if trace.token_ids is not None:
        tokens = np.asarray(trace.token_ids)
        tensors["token_ids"] = encode_tokens(tokens[first["token_ids"] :] if shared else tokens)
    names = list(TENSORS)
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, names.index(item[0]))))


def _encoded_rows(trace: Trace, mass: np.ndarray | None) -> dict[str, np.ndarray]:
    """Entry ids, and masses float16, as the header's version has them."""
    ids = np.asarray(trace.entry_ids)
    found = {} if mass is None else {"mass": mass}
    if trace.header.packed_shape is not None:
        found["entry_ids"], found["entry_ends"] = pack(ids, pack_ids)
        if mass is not None:
            found["mass"], found["mass_ends"] = pack(mass, pack_masses)
    elif trace.total_entries > PADDING:
        found["entry_ids"], found["entry_blocks"] = encode_blocked_ids(ids, trace.total_entries)
    else:
        found["entry_ids"] = encode_ids(ids)
    return found


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


def _file_head(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> bytes:
    """The 8 length bytes and the JSON of a safetensors file, padded with blanks so that the tensors
    start aligned.
    """
    table: dict[str, Any] = {"__metadata__": metadata}
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
