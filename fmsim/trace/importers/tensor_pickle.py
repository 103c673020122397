"""Read pickles of tensors without running them, and without torch: the files of `torch.save`, and
plain pickles of tensors.

A pickle is a program. Here it is read twice: first its opcodes, of which only those admitted below
may occur; then by an unpickler that knows three names of torch and `OrderedDict`, each of which
stands for a function of this module. Nothing is looked up in any module, and no storage is made
that is larger than the bytes that are there.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmsim.errors import FmsimError

STORAGES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
OPCODES = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "SETITEM",
        "SETITEMS",
        "APPEND",
        "APPENDS",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BINPERSID",
    ]
)
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC, LEGACY_VERSION = (
    0x1950A86A20F9469CFC6C,
    1001,
)  # of torch.save before the zip format, which pickled storages still use
# what zipfile and our own unpickler raise of bytes that are no such file; NotImplementedError:
# zipfile's, of a compression it lacks
DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    RuntimeError,
)


class Refused(pickle.UnpicklingError):
    """The file asks for something else than tensors."""


class Storage(NamedTuple):
    kind: str  # of STORAGES
    data: bytes


class Tensor(NamedTuple):
    """A tuple, so that no pickle can change one."""

    array: np.ndarray


def load(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a dict in a file of `torch.save` or `pickle.dump`, by key; bfloat16 comes as
    float32, which holds it exactly.

    Values that are no tensors (a string, a number) are left out. Raises FmsimError, naming the
    file, for one that is missing, truncated, or holds anything that is not a tensor's.
    """
    path = Path(path)
    try:
        found = _load(path.read_bytes())
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise Refused("it holds no dict of tensors")
        return {key: value.array for key, value in found.items() if isinstance(value, Tensor)}
    except OSError as error:
        raise FmsimError(f"{path}: cannot be read: {error.strerror}") from None
    except Refused as error:
        raise FmsimError(
            f"{path}: refused: {error}; only a dict of tensors is read, nothing in a pickle is"
            " ever run"
        ) from None
    except DAMAGED as error:
        raise FmsimError(
            f"{path}: is no sound pickle of tensors ({error or type(error).__name__}); copy or dump"
            " it again"
        ) from None


def _load(data: bytes) -> Any:
    if data.startswith(ZIP_MAGIC):
        return _load_zip(data)
    stream = io.BytesIO(data)
    if data.startswith(pickle.dumps(LEGACY_MAGIC, protocol=2)):
        return _load_legacy(stream, TensorReader)
    return _unpickle(stream, PlainReader)


class StorageReader(pickle.Unpickler):
    """Admits a storage's type, and what ``storages`` hold as persistent ids: all that the pickle of
    one storage may name.
    """

    def __init__(self, stream: io.BytesIO, storages: dict[str, Storage] | None = None):
        super().__init__(stream)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name  # a str can be neither called nor changed
        raise Refused(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        """('storage', type, key, location, elements) and, in older files, a view that must be
        None.
        """
        sound = (
            self.storages is not None
            and type(pid) is tuple
            and len(pid) in (5, 6)
            and pid[0] == "storage"
        )
        if (
            not sound
            or any(type(part) is not str for part in pid[:4])
            or pid[1] not in STORAGES
            or type(pid[4]) is not int
            or any(pid[5:])
        ):
            raise Refused("it has a persistent id that is no storage's")
        return self.storage(kind=pid[1], key=pid[2], elements=pid[4])

    def storage(self, kind: str, key: str, elements: int) -> Storage:
        assert self.storages is not None  # persistent_load has refused it else
        data = self.storages[key].data
        if len(data) != elements * _width(kind):
            raise ValueError(
                f"storage {key!r} claims {elements} elements of {_width(kind)} bytes, {len(data)}"
                " bytes are there"
            )
        return Storage(kind, data)


class TensorReader(StorageReader):
    """Admits tensors of such storages, and the empty OrderedDict of hooks that stands with each."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return (
            self.tensor
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2")
            else super().find_class(module, name)
        )

    def tensor(
        self,
        storage: Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        *rest: Any,
    ) -> Tensor:
        """The tensor, copied; ValueError where it would reach beyond its storage, or hold more
        elements than that.
        """
        parts = (offset, *size, *stride)
        if (
            not isinstance(storage, Storage)
            or any(type(n) is not int or n < 0 for n in parts)
            or len(size) != len(stride)
        ):
            raise ValueError("a tensor's storage, offset, size or stride cannot be read")
        values, elements = _values(storage), math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if elements > len(values) or (elements and last >= len(values)):
            raise ValueError(
                f"a tensor of size {list(size)} reaches beyond its storage of {len(values)}"
                " elements"
            )
        if not elements:
            return Tensor(np.empty(size, values.dtype))
        steps = [step * values.itemsize for step in stride]
        return Tensor(np.lib.stride_tricks.as_strided(values[offset:], size, steps).copy())


class PlainReader(TensorReader):
    """Admits tensors as `pickle.dump` writes them: each storage's bytes, a small file of
    torch.save, stand in place.
    """

    def find_class(self, module: str, name: str) -> Any:
        return (
            self.in_place
            if (module, name) == ("torch.storage", "_load_from_bytes")
            else super().find_class(module, name)
        )

    @staticmethod
    def in_place(data: bytes) -> Storage:
        found = _load_legacy(io.BytesIO(data), StorageReader)
        if not isinstance(found, Storage):
            raise Refused("a storage's bytes hold something else")
        return found


def _values(storage: Storage) -> np.ndarray:
    if storage.kind == "BFloat16Storage":
        return (np.frombuffer(storage.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if storage.kind == "BoolStorage" and storage.data.strip(b"\x00\x01"):
        raise ValueError("a bool is neither 0 nor 1")
    return np.frombuffer(storage.data, np.dtype(STORAGES[storage.kind]).newbyteorder("<"))


def _width(kind: str) -> int:
    return 2 if STORAGES[kind] == "bf16" else np.dtype(STORAGES[kind]).itemsize


def _unpickle(
    stream: io.BytesIO, reader: type[StorageReader], storages: dict[str, Storage] | None = None
) -> Any:
    _check_opcodes(stream)
    return reader(stream, storages).load()


def _check_opcodes(stream: io.BytesIO) -> None:
    """Refuse the pickle at the stream's place if it has an opcode that tensors do not need, or a
    memo with holes, which takes memory.
    """
    start = stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name not in OPCODES:
            raise Refused(f"it has the opcode {opcode.name}, which no tensor needs")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise Refused("its memo has holes")
    stream.seek(start)


def _load_legacy(stream: io.BytesIO, reader: type[StorageReader]) -> Any:
    """torch.save's older format: magic, version, system, object, the storages' keys, then each
    storage's element count and bytes.

    The bytes stand behind the object that wants them, so the object is read twice: once to see of
    which type each key is.
    """
    magic, version, system = (_unpickle(stream, StorageReader) for _ in range(3))
    if (
        (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION)
        or not isinstance(system, dict)
        or system.get("little_endian") is not True
    ):
        raise ValueError("not a little-endian file of torch.save")
    place = stream.tell()
    kinds = _kinds(stream, reader)
    keys = _unpickle(stream, StorageReader)
    if not isinstance(keys, list) or set(keys) != kinds.keys():
        raise ValueError("the storages listed are not those that the object wants")
    storages = {key: Storage(kinds[key], _counted(stream, kinds[key])) for key in keys}
    stream.seek(place)
    return _unpickle(stream, reader, storages)


def _kinds(stream: io.BytesIO, reader: type[StorageReader]) -> dict[str, str]:
    """The type of each storage that the object at the stream's place wants, by key; reads past the
    object.
    """
    kinds: dict[str, str] = {}

    class Noting(reader):  # type: ignore[valid-type,misc] # the base is chosen by the caller
        def storage(self, kind: str, key: str, elements: int) -> Storage:
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(f"storage {key!r} is of two types")
            return Storage(kind, b"")

        def tensor(self, *parts: Any) -> None:
            """Nothing yet: its bytes are not there."""

    _unpickle(stream, Noting, {})
    return kinds


def _counted(stream: io.BytesIO, kind: str) -> bytes:
    size = int.from_bytes(stream.read(8), "little", signed=True) * _width(kind)
    left = len(stream.getbuffer()) - stream.tell()
    if not 0 <= size <= left:
        raise ValueError(f"a storage claims {size} bytes, {left} are left")
    return stream.read(size)


def _load_zip(data: bytes) -> Any:
    """torch.save's present format: a zip of data.pkl, whose persistent ids name the members
    data/{key}.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {item.filename.partition("/")[2]: item for item in archive.infolist()}
        stored = all(item.compress_type == zipfile.ZIP_STORED for item in members.values())
        if not stored or sum(item.file_size for item in members.values()) > len(data):
            raise Refused("its members are compressed or overlap, which torch.save never does")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian")
        storages = {
            name.removeprefix("data/"): Storage("", archive.read(item))
            for name, item in members.items()
            if name.startswith("data/")
        }
        return _unpickle(io.BytesIO(archive.read(members["data.pkl"])), TensorReader, storages)
