"""Read files of `torch.save` that hold plain values, numpy arrays and tensors, without running
them: the dumps of trainers.

`tensor_pickle` admits a dict of tensors. Here lists, dicts, numbers and strings may nest, and
numpy's own names are admitted, each of which stands for a function of this module.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.files import inputs
from fmsim.trace.importers.tensor_pickle import (
    DAMAGED,
    OPCODES,
    Refused,
    Storage,
    Tensor,
    TensorReader,
)

MORE_OPCODES = OPCODES | {"BUILD", "BINFLOAT", "LONG", "LONG4", "EMPTY_SET", "ADDITEMS", "LONG1"}
NUMBERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "b1")


class Dtype:
    """Stands for `numpy.dtype`: its code, and that its bytes are little-endian."""

    def __init__(self, code: Any = None, align: Any = False, copy: Any = False):
        if code not in NUMBERS:
            raise Refused(f"it has an array of type {code!r}, not of numbers")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|"):
            raise ValueError("an array's bytes are not little-endian")


class Array:
    """Stands for a numpy array until its state is there."""

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        sound = type(state) is tuple and len(state) == 5 and isinstance(state[2], Dtype)
        if not sound or type(state[1]) is not tuple or type(state[4]) is not bytes:
            raise ValueError("an array's shape, type or bytes cannot be read")
        _, shape, dtype, fortran, data = state
        if any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("an array's shape cannot be read")
        kind = np.dtype(dtype.code).newbyteorder("<")
        if math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"an array of shape {list(shape)} has {len(data)} bytes")
        flat = np.frombuffer(data, kind)
        self.values = flat.reshape(shape[::-1]).T if fortran is True else flat.reshape(shape)


class Named:
    """A function of this module that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *given: Any) -> Any:
        return self._function(*given)

    def __setstate__(self, state: Any) -> None:
        raise Refused("it would change what it names")


class ArrayReader(TensorReader):
    """Admits numpy's arrays beside tensors."""

    def find_class(self, module: str, name: str) -> Any:
        found = self._admitted(module, name)
        return found if isinstance(found, (str, type)) else Named(found)

    def _admitted(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy._core.multiarray", "numpy.core.multiarray"):
            return self.empty
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        if (module, name) == ("numpy", "dtype"):
            return self.dtype
        if (module, name) == ("_codecs", "encode"):
            return self.encoded
        return super().find_class(module, name)

    def empty(self, kind: Any, shape: Any, code: Any) -> Array:
        if kind != "ndarray":
            raise Refused("it has an array of another class than numpy's")
        return Array()

    def dtype(self, *given: Any) -> Dtype:
        return Dtype(*given)

    def encoded(self, text: Any, encoding: Any) -> bytes:
        """How bytes stand in older pickles."""
        if type(text) is not str or encoding != "latin1":
            raise Refused("it encodes a text")
        return text.encode("latin1")


def load(path: Path) -> Any:
    """What the file holds, with numpy arrays for arrays and tensors.

    Raises FmsimError, naming the file, for one that is missing, damaged, or holds anything else.
    """
    inputs.check_regular(path, inputs.MOST_BYTES_OF_CAPTURE)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {item.filename.partition("/")[2]: item for item in archive.infolist()}
            stored = all(item.compress_type == zipfile.ZIP_STORED for item in members.values())
            size = path.stat().st_size
            if not stored or sum(item.file_size for item in members.values()) > size:
                raise Refused("its members are compressed or overlap, which torch.save never does")
            storages = {
                name.removeprefix("data/"): Storage("", archive.read(item))
                for name, item in members.items()
                if name.startswith("data/")
            }
            data = archive.read(members["data.pkl"])
        _check_opcodes(data)
        return _plain(ArrayReader(io.BytesIO(data), storages).load())
    except OSError as error:
        raise FmsimError(f"{path}: cannot be read: {error.strerror}") from None
    except Refused as error:
        raise FmsimError(
            f"{path}: refused: {error}; numbers, texts and arrays are read, nothing in a pickle is"
            " ever run"
        ) from None
    except DAMAGED as error:
        raise FmsimError(
            f"{path}: is no sound file of torch.save ({error or type(error).__name__})"
        ) from None


def _check_opcodes(data: bytes) -> None:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in MORE_OPCODES:
            raise Refused(f"it has the opcode {opcode.name}, which no such dump needs")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise Refused("its memo has holes")


def _plain(value: Any, depth: int = 0) -> Any:
    """Arrays in the place of what stood for them."""
    if depth > 50:
        raise pickle.UnpicklingError("it nests too deep")
    if isinstance(value, Tensor):
        return value.array
    if isinstance(value, Array):
        if value.values is None:
            raise ValueError("an array has no values")
        return value.values
    if isinstance(value, dict):
        return {key: _plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, depth + 1) for one in value]
    return value
