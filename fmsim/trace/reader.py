"""Read a trace by mapping its file into memory: opening reads the header, indexing a column reads
that part.

The safetensors layout (8 length bytes, a JSON header, then the tensors) is parsed here, so that
every way in which a file can be wrong is told from every other, and nothing but numpy is needed.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
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
    FILE_ONLY,
    METADATA_KEY,
    PACKED_VERSION,
    PADDING,
    TENSORS,
    BlockedIds,
    Column,
    TensorSpec,
    Trace,
    TraceHeader,
    decode_ids,
    n_blocks,
    to_float32,
    to_int32,
)
from fmsim.trace.packed import CHUNK_STEPS, PackedColumn, unpack_ids, unpack_masses
from fmsim.trace.shared import (
    CONTEXT_KEY,
    SharedContext,
    context_path,
    file_digest,
    joined,
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
    columns: dict[str, Any] = dict.fromkeys(name for name in TENSORS if name not in FILE_ONLY)
    columns |= {
        name: _column(name, array) for name, array in stored.items() if name not in FILE_ONLY
    }
    columns |= _packed_rows(path, header, stored)
    if header.packed_shape is None:
        columns["entry_ids"] = _entry_ids(path, header, stored)
    trace = Trace(header=header, path=path, **columns)
    beside = None
    if header.context_sha256 is not None:
        beside = context_path(path, header.context_sha256)
        trace = _with_context(trace, beside)
    check_structure(trace)
    files = [path] if beside is None else [path, beside]
    if check is None:
        check = verified.wanted() and not all(map(verified.is_known, files))
    if check:
        if beside is not None and file_digest(beside) != header.context_sha256:
            raise FmsimError(f"{beside}: is not what {path} was written with; {TRUNCATED}")
        validate(trace)  # first, since it can say where the damage is
        if header.content_sha256 not in (None, content_sha256(header, stored, [data[start:].data])):
            fail(trace, "content_sha256", "does not match what the file holds")
        for file in files:
            verified.remember(file)
    return trace


def _with_context(trace: Trace, beside: Path) -> Trace:
    """The trace with what lies in the file ``beside`` it."""
    if not beside.exists():
        raise FmsimError(
            f"{trace.path}: needs the file {beside.name} beside it, which traces of one prompt"
            " share; copy it too"
        )
    data = _map(beside)
    table, start = _safetensors_header(beside, data)
    if not isinstance(found := table.pop("__metadata__", None), dict) or CONTEXT_KEY not in found:
        raise FmsimError(f"{beside}: is no context of traces; {TRUNCATED}")
    wanted = [field.name for field in fields(SharedContext)]
    stored = _tensors(beside, table, data[start:], {name: TENSORS[name] for name in wanted})
    try:
        return joined(trace, SharedContext(**{name: stored.get(name) for name in wanted}))
    except ValueError as error:
        raise FmsimError(f"{beside}: does not fit {trace.path} ({error}); {TRUNCATED}") from None


def _packed_rows(
    path: Path, header: TraceHeader, stored: dict[str, np.ndarray]
) -> dict[str, PackedColumn]:
    """Packed ids and masses, by name; none where the header says so."""
    whole = header.packed_shape
    found = {}
    for name, ends_name, kind, unpack in (
        ("entry_ids", "entry_ends", np.int32, unpack_ids),
        ("mass", "mass_ends", np.float32, unpack_masses),
    ):
        array, ends = stored.get(name), stored.get(ends_name)
        if array is None and ends is None:
            continue
        packed = array is not None and array.dtype == np.uint8
        if not packed == (ends is not None) == (whole is not None):
            raise FmsimError(
                f"{path}: {name}: is {'not ' * (whole is not None)}packed, though the header says"
                f" otherwise; {TRUNCATED}"
            )
        if whole is None or array is None or ends is None:
            continue  # it is not packed
        chunks = -(-whole[0] // CHUNK_STEPS)
        rising = np.concatenate(([0], ends)) if ends.ndim == 1 else np.zeros(1)
        if len(rising) != chunks + 1 or (np.diff(rising) < 0).any() or rising[-1] != array.size:
            raise FmsimError(
                f"{path}: {ends_name}: does not say where {chunks} chunks of {name} end;"
                f" {TRUNCATED}"
            )
        found[name] = PackedColumn(array, ends, whole, kind, unpack, f"{path}: {name}")
    return found


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
    if type(version) is int and version > PACKED_VERSION:
        raise FmsimError(
            f"{path}: format_version: is {version}, this fmsim reads {PACKED_VERSION}; upgrade"
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


def _tensors(
    path: Path, table: dict[str, Any], data: np.ndarray, specs: dict[str, TensorSpec] = TENSORS
) -> dict[str, np.ndarray]:
    """The file's tensors by name, in their stored types and the file's order; ``data`` is what
    follows the header.
    """
    for name in sorted(table.keys() - specs.keys()):
        raise FmsimError(
            f"{path}: {name}: is no tensor of a trace (format {PACKED_VERSION}); {TRUNCATED}"
        )
    for name, spec in specs.items():
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
