"""Read a trace by mapping its file into memory: opening reads the header, indexing a column reads
that part.

The safetensors layout (8 length bytes, a JSON header, then the tensors) is parsed here, so that
every way in which a file can be wrong is told from every other, and nothing but numpy is needed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from fmsim.errors import FmsimError, shown
from fmsim.files import strict_json
from fmsim.files.inputs import check_regular, reason
from fmsim.trace import verified
from fmsim.trace.check import check_structure, fail, validate
from fmsim.trace.format import (
    FORMAT_VERSION,
    METADATA_KEY,
    PADDING,
    TENSORS,
    BlockedIds,
    Column,
    Trace,
    TraceHeader,
    decode_ids,
    n_blocks,
    to_float32,
    to_int32,
)
from fmsim.trace.writer import SAFETENSORS_NAMES, content_sha256

MAX_HEADER_BYTES = 1 << 20  # a trace's header takes a few kilobytes
NUMPY_TYPES = {code: np.dtype(name) for name, code in SAFETENSORS_NAMES.items()}
NOT_A_TRACE = "give a trace file, recorded by `fmsim trace record`"
TRUNCATED = "the file is truncated or damaged; copy or record it again"


def read(path: str | Path, check: bool | None = None) -> Trace:
    """Open the trace at ``path``, whose values and digest are checked once, the first time that
    this file is read (`verified`); with ``check`` they are checked anyway, or not at all.

    Raises FmsimError, naming file, field and fix, for a file that is missing, truncated, foreign,
    inconsistent, or of a newer version.
    """
    path = Path(path)
    data = _map(path)
    table, start = _safetensors_header(path, data)
    header = _trace_header(path, table.pop("__metadata__", None))
    stored = _tensors(path, table, data[start:])
    columns: dict[str, Any] = dict.fromkeys(name for name in TENSORS if name != "entry_blocks")
    columns |= {
        name: _column(name, array) for name, array in stored.items() if name != "entry_blocks"
    }
    columns["entry_ids"] = _entry_ids(path, header, stored)
    trace = Trace(header=header, path=path, **columns)
    check_structure(trace)
    if check is None:
        check = verified.wanted() and not verified.is_known(path)
    if check:
        validate(trace)  # first, since it can say where the damage is
        if header.content_sha256 not in (None, content_sha256(header, stored, [data[start:].data])):
            fail(trace, "content_sha256", "does not match what the file holds")
        verified.remember(path)
    return trace


def _map(path: Path) -> np.ndarray:
    """The file as uint8 [bytes], mapped."""
    try:
        if path.is_dir():
            raise FmsimError(f"{path}: is a directory; {NOT_A_TRACE}")
        size_bytes = check_regular(path)
        if size_bytes < 10:
            raise FmsimError(f"{path}: is empty or truncated to {size_bytes} bytes; {NOT_A_TRACE}")
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise FmsimError(f"{shown(path)}: cannot be read: {reason(error)}; {NOT_A_TRACE}") from None


def _safetensors_header(path: Path, data: np.ndarray) -> tuple[dict[str, Any], int]:
    """The file's JSON table, and where its tensors start."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if data[8] != ord("{"):
        raise FmsimError(f"{path}: is not a safetensors file; {NOT_A_TRACE}")
    if length > MAX_HEADER_BYTES:
        raise FmsimError(
            f"{path}: claims a header of {length} bytes, so it is no trace or is damaged;"
            f" {NOT_A_TRACE}"
        )
    if 8 + length > len(data):
        raise FmsimError(
            f"{path}: header: {length} bytes are announced, {len(data) - 8} are there; {TRUNCATED}"
        )
    return _json_object(path, "header", data[8 : 8 + length].tobytes()), 8 + length


def _json_object(path: Path, what: str, text: bytes) -> dict[str, Any]:
    try:
        value = strict_json.parse(text.decode(), f"{path}: {what}")
    except UnicodeDecodeError as error:
        raise FmsimError(f"{path}: {what}: is not valid JSON ({error}); {TRUNCATED}") from None
    if not isinstance(value, dict):
        raise FmsimError(f"{path}: {what}: is not a JSON object; {TRUNCATED}")
    return value


def _trace_header(path: Path, metadata: Any) -> TraceHeader:
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise FmsimError(
            f"{path}: is a safetensors file without {METADATA_KEY!r} in its metadata, so no trace;"
            f" {NOT_A_TRACE}"
        )
    found = _json_object(path, METADATA_KEY, metadata[METADATA_KEY].encode(errors="surrogatepass"))
    version = found.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise FmsimError(
            f"{path}: format_version: is {version}, this fmsim reads {FORMAT_VERSION}; upgrade"
            " fmsim"
        )
    try:
        return TraceHeader.model_validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise FmsimError(
            f"{path}: {field}: {first['msg']} (in {METADATA_KEY}); {TRUNCATED}"
        ) from None


def _tensors(path: Path, table: dict[str, Any], data: np.ndarray) -> dict[str, np.ndarray]:
    """The file's tensors by name, in their stored types and the file's order; ``data`` is what
    follows the header.
    """
    for name in sorted(table.keys() - TENSORS.keys()):
        raise FmsimError(
            f"{path}: {name}: is no tensor of a trace (format {FORMAT_VERSION}); {TRUNCATED}"
        )
    for name, spec in TENSORS.items():
        if name not in table and not spec.optional:
            raise FmsimError(f"{path}: {name}: is missing; {TRUNCATED}")
    places = {name: _place(path, name, entry) for name, entry in table.items()}
    stored, end = {}, 0
    for name in sorted(places, key=lambda name: places[name].begin):
        place = places[name]
        if place.begin != end:
            raise FmsimError(
                f"{path}: {name}: starts at byte {place.begin}, the tensor before it ends at {end};"
                f" {TRUNCATED}"
            )
        end = place.end
        if end > len(data):
            raise FmsimError(f"{path}: {name}: ends at byte {end} of {len(data)}; {TRUNCATED}")
        stored[name] = data[place.begin : end].view(place.dtype).reshape(place.shape)
    if end != len(data):
        raise FmsimError(f"{path}: the tensors end at byte {end} of {len(data)}; {TRUNCATED}")
    return stored


class _Place(NamedTuple):
    """Where a tensor lies, in bytes from the first one's start."""

    begin: int
    end: int
    dtype: np.dtype
    shape: list[int]


def _place(path: Path, name: str, entry: Any) -> _Place:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = all(type(size) is int and size >= 0 for size in [*shape, begin, end])
    except (TypeError, ValueError, KeyError):
        sound = False
    if not sound:
        raise FmsimError(
            f"{path}: {name}: its dtype, shape or data_offsets cannot be read; {TRUNCATED}"
        )
    wanted = [SAFETENSORS_NAMES[dtype] for dtype in TENSORS[name].dtypes]
    if code not in wanted:
        raise FmsimError(
            f"{path}: {name}: is of type {code!r}, not {' or '.join(wanted)}; {TRUNCATED}"
        )
    dtype = NUMPY_TYPES[code]
    size_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != size_bytes:
        raise FmsimError(
            f"{path}: {name}: shape {shape} takes {size_bytes} bytes, its place has {end - begin};"
            f" {TRUNCATED}"
        )
    return _Place(begin, end, dtype, shape)


def _entry_ids(path: Path, header: TraceHeader, stored: dict[str, np.ndarray]) -> Column:
    """Entry ids, decoded where they are read: whole ones, or low 16 bits and the counts of each
    block of entries.
    """
    ids, blocks = stored["entry_ids"], stored.get("entry_blocks")
    total_entries = (header.prompt_tokens + len(ids)) // header.entry_tokens if ids.ndim else 0
    if (blocks is not None) != (ids.dtype == np.uint16 and total_entries > PADDING):
        there = "are there" if blocks is not None else "are missing"
        raise FmsimError(
            f"{path}: entry_blocks: {there}, though {total_entries} entries and {ids.dtype} ids say"
            f" otherwise; {TRUNCATED}"
        )
    if blocks is None:
        return Column(ids, decode_ids)
    wanted = [*ids.shape[:2], n_blocks(total_entries)]
    if list(blocks.shape) != wanted:
        raise FmsimError(
            f"{path}: entry_blocks: has shape {list(blocks.shape)}, entry_ids and the header say"
            f" {wanted}; {TRUNCATED}"
        )
    return BlockedIds(ids, decode_ids, blocks)


def _column(name: str, stored: np.ndarray) -> np.ndarray | Column:
    """As `Trace` gives it out: small and directly usable tensors as arrays, the others decoded
    where they are read.
    """
    if name in ("window_mass", "sink_mass"):
        return to_float32(stored)
    if name == "token_ids":
        return to_int32(stored)
    return Column(stored, to_float32) if stored.dtype == np.float16 else stored
