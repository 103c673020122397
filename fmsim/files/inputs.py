"""Read what a user hands over: of the right kind, no larger than such a file can be, with one clear
error.

A FIFO or a device is refused before it is opened, since reading it may never end.
"""

from __future__ import annotations

import io
import math
import stat
import tokenize
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from fmsim.errors import FmsimError, shown
from fmsim.files import strict_json

MIB = 2**20
MOST_BYTES_OF_TEXT = 1 * MIB  # a scenario, a preset, a config.json: a few kilobytes
MOST_BYTES_OF_RESULTS = 256 * MIB  # reports, timelines, rows, recorded requests
MOST_BYTES_OF_CAPTURE = 256 * 1024 * MIB  # selections of one request: V3.2's take 500 KB a token


def check_regular(path: Path, most_bytes: int | None = None) -> int:
    """The size of a regular file in bytes.

    Raises FileNotFoundError where there is none, and FmsimError for a folder, a FIFO, a device, or
    a file that is larger than `most_bytes`.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise FmsimError(f"{shown(path)}: cannot be read ({reason(error)})") from None
    if stat.S_ISDIR(found.st_mode):
        raise FmsimError(f"{shown(path)}: is a folder, not a file; name the file in it")
    if not stat.S_ISREG(found.st_mode):
        raise FmsimError(
            f"{shown(path)}: is a FIFO, a device or a socket; give a file (copy it to one first)"
        )
    if most_bytes is not None and found.st_size > most_bytes:
        raise FmsimError(
            f"{shown(path)}: has {found.st_size:,} bytes, more than the {most_bytes:,} that such a"
            " file may have; give the right file"
        )
    return found.st_size


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """A whole file. Raises FileNotFoundError, and FmsimError for whatever else is wrong."""
    check_regular(path, most_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise FmsimError(f"{shown(path)}: cannot be read ({reason(error)})") from None


def read_text(path: Path, most_bytes: int = MOST_BYTES_OF_TEXT) -> str:
    """A whole file of UTF-8, a byte-order mark at its start left out. Raises as `read_bytes`
    does.
    """
    data = read_bytes(path, most_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FmsimError(
            f"{shown(path)}, line {line}: cannot be read as UTF-8 text (byte"
            f" 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None


def read_json(path: Path, most_bytes: int = MOST_BYTES_OF_TEXT) -> Any:
    """A JSON file, strictly; raises as `read_bytes` does."""
    return strict_json.parse(read_text(path, most_bytes), str(path))


def reason(error: Exception) -> str:
    """What the operating system says, without the path."""
    return getattr(error, "strerror", None) or shown(error)


def read_npz(path: Path, most_bytes: int = MOST_BYTES_OF_RESULTS) -> dict[str, np.ndarray]:
    """The arrays of an .npz, whose members say truly, and within `most_bytes` together, how large
    they are.

    Raises FileNotFoundError, FmsimError, or what zipfile and numpy raise for a damaged file
    (ValueError, OSError, EOFError, KeyError, BadZipFile, zlib.error).
    """
    check_regular(path, most_bytes)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > most_bytes:
            raise FmsimError(
                f"{shown(path)}: its arrays would take {total:,} bytes, more than the"
                f" {most_bytes:,} that such a file may have; give the right file"
            )
        return {
            member.filename.removesuffix(".npy"): npy(archive.read(member)).copy()
            for member in members
        }


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped and read-only; raises as `read_bytes` does."""
    size = check_regular(path, MOST_BYTES_OF_CAPTURE)
    try:
        with path.open("rb") as file:
            shape, order, dtype = _npy_header(file, size)
            offset = file.tell()
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape, order)
    except (ValueError, OSError, EOFError) as error:
        raise FmsimError(f"{shown(path)}: is no .npy array ({reason(error)})") from None


def npy(data: bytes) -> np.ndarray:
    """The array of the bytes of a .npy, read-only. Raises ValueError, or EOFError, for others."""
    file = io.BytesIO(data)
    shape, order, dtype = _npy_header(file, len(data))
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order=order)


def _npy_header(
    file: BinaryIO, n_bytes: int
) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[Any]]:
    """(shape, order, dtype), believed only where the bytes are there; ``file`` is then at them."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    try:
        shape, fortran, dtype = read(file)
    except (  # the last is what Python 3.12's tokenizer makes of some bytes
        SyntaxError,
        tokenize.TokenError,
        TypeError,
        RecursionError,
        SystemError,
    ) as error:
        raise ValueError(f"its header cannot be read: {error}") from None
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != n_bytes - file.tell():
        raise ValueError("an array's header does not say what is there")
    return shape, "F" if fortran else "C", dtype
