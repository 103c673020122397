"""Pickles of tensors are read; whatever else a pickle may do is refused, and nothing in it runs."""

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.trace.importers import tensor_pickle

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SAVERS = {
    "plain": pickle.dump,
    "plain, protocol 3": lambda value, file: pickle.dump(value, file, protocol=3),
    "zip": torch.save,
    "legacy": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
}


def written(tmp_path, value, saver="plain"):
    path = tmp_path / "doc_00000.pkl"
    with path.open("wb") as file:
        SAVERS[saver](value, file)
    return path


@pytest.mark.parametrize("saver", SAVERS)
def test_tensors_of_every_type_come_back(tmp_path, saver):
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 4) * 20).to(dtype) for dtype in DTYPES}
    whole = torch.arange(60).reshape(3, 4, 5)
    tensors |= {
        "slice": whole[1:, 2],
        "transposed": whole.transpose(0, 2),
        "shared": whole,
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(3.5),
    }
    found = tensor_pickle.load(written(tmp_path, tensors | {"a note": "kept out"}, saver))
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert found[key].dtype == expected.numpy().dtype and np.array_equal(
            found[key], expected.numpy()
        ), key


def reduced(function, *arguments):
    """An object whose pickle calls a function."""
    return type("Hostile", (), {"__reduce__": lambda self: (function, arguments)})()


class Custom:
    pass


def with_state():
    found = OrderedDict()
    found.extra = "needs BUILD"
    return found


HOSTILE = {
    "os.system": lambda: reduced(os.system, "touch {mark}"),
    "eval": lambda: reduced(eval, "open({mark!r}, 'w')"),
    "exec": lambda: reduced(exec, "open({mark!r}, 'w')"),
    "getattr chain": lambda: reduced(getattr, reduced(__import__, "os"), "system"),
    "import": lambda: reduced(__import__, "os"),
    "torch.load": lambda: reduced(torch.load, "{mark}"),
    "a class": Custom,
    "an OrderedDict with state": with_state,
    "a numpy array": lambda: np.arange(3),
    "a code-carrying partial": lambda: reduced(
        __import__("functools").partial, os.system, "touch {mark}"
    ),
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_object_is_refused_and_does_not_run(tmp_path, name, saver):
    mark = tmp_path / "ran"
    value = HOSTILE[name]()
    if hasattr(value, "__reduce__") and type(value).__name__ == "Hostile":
        function, arguments = value.__reduce__()
        value = reduced(
            function,
            *(part.format(mark=str(mark)) if isinstance(part, str) else part for part in arguments),
        )
    path = written(tmp_path, {"hidden_layer_0": torch.zeros(2), "x": value}, saver)
    with pytest.raises(FmsimError, match="doc_00000.pkl: refused"):
        tensor_pickle.load(path)
    assert not mark.exists()


def raw(*parts):
    """A pickle written opcode by opcode."""
    return b"\x80\x04" + b"".join(parts) + b"."


def unicode(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


HOSTILE_BYTES = {
    "stack global os.system": raw(
        unicode("os"), unicode("system"), b"\x93", unicode("true"), b"\x85R"
    ),
    "dotted name in an admitted module": raw(
        unicode("torch._utils"), unicode("_rebuild_tensor_v2.__globals__"), b"\x93"
    ),
    "INST": b"(S'true'\nios\nsystem\n.",
    "EXT": raw(b"\x82\x01"),
    "BUILD on a dict": raw(b"}", b"}", b"b"),
    "persistent id": raw(unicode("anything"), b"Q"),
    "persistent id in a persistent id": raw(unicode("storage"), b"Q", b"\x85", b"Q"),
    "memo with holes": raw(b"}", b"r", struct.pack("<I", 2**31), b"0"),
    "a list of storages for bytes": raw(
        unicode("torch.storage"), unicode("_load_from_bytes"), b"\x93", b"C\x03abc", b"\x85R"
    ),
    "bytes that do not come": raw(b"\x8e", struct.pack("<Q", 2**60)),
    "frame that does not come": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "not a dict": pickle.dumps([1, 2]),
    "keys that are numbers": pickle.dumps({1: 2}),
    "an endless long": raw(b"\x8b", struct.pack("<i", 2**30)),
    "empty": b"",
    "text": b"these are not tensors",
}


@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_hostile_bytes_are_one_clear_error(tmp_path, name):
    path = tmp_path / "doc_00000.pkl"
    path.write_bytes(HOSTILE_BYTES[name])
    with pytest.raises(FmsimError, match="doc_00000.pkl"):
        tensor_pickle.load(path)


def with_tensor(
    size, stride, offset=0, kind="FloatStorage", elements=4, bytes_there=16, key="0", pid_key=None
):
    """A zip of torch.save whose data.pkl claims these for one tensor."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return (
                ("storage", getattr(torch, kind), pid_key or key, "cpu", elements)
                if value == "here"
                else None
            )

        def reducer_override(self, value):
            if isinstance(value, Custom):
                return torch._utils._rebuild_tensor_v2, (
                    "here",
                    offset,
                    size,
                    stride,
                    False,
                    OrderedDict(),
                )
            return NotImplemented

    pickled, archive = io.BytesIO(), io.BytesIO()
    Writer(pickled, protocol=2).dump({"x": Custom()})
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled.getvalue())
        file.writestr(f"archive/data/{key}", bytes(bytes_there))
    return archive.getvalue()


@pytest.mark.parametrize(
    "claims",
    [
        {"size": (5,), "stride": (1,)},  # more than there is
        {"size": (2,), "stride": (4,)},  # a stride beyond
        {"size": (4,), "stride": (1,), "offset": 1},
        {"size": (2**40,), "stride": (0,)},  # one element, repeated
        {"size": (2,), "stride": (-1,)},
        {"size": (-1,), "stride": (1,)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (4,), "stride": (1,), "elements": 2**50},  # a huge storage
        {"size": (4,), "stride": (1,), "bytes_there": 15},
        {"size": (4,), "stride": (1,), "pid_key": "1"},  # bytes that are not in the file
        {"size": (2**32, 2**32), "stride": (0, 0)},
        {"size": (True,), "stride": (1,)},
    ],
)
def test_tensors_that_reach_beyond_their_bytes_are_refused(tmp_path, claims):
    path = tmp_path / "doc.pkl"
    path.write_bytes(with_tensor((4,), (1,)))
    assert tensor_pickle.load(path)["x"].tolist() == [0, 0, 0, 0]
    path.write_bytes(with_tensor(**claims))
    with pytest.raises(FmsimError, match="doc.pkl"):
        tensor_pickle.load(path)


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "doc.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(FmsimError, match="compressed"):
        tensor_pickle.load(path)


@pytest.mark.parametrize("saver", SAVERS)
def test_a_truncated_file_is_told_wherever_it_ends(tmp_path, saver):
    path = written(
        tmp_path, {"x": torch.arange(9.0), "y": torch.zeros(2, 3, dtype=torch.bfloat16)}, saver
    )
    data = path.read_bytes()
    for cut in range(0, len(data) - 1, max(1, len(data) // 60)):
        path.write_bytes(data[:cut])
        with pytest.raises(FmsimError, match="doc_00000.pkl"):
            tensor_pickle.load(path)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(SAVERS)), st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_gives_tensors_or_one_error(tmp_path_factory, saver, place, value):
    path = written(
        tmp_path_factory.mktemp("flip"),
        {"x": torch.arange(9.0), "y": torch.zeros(2, 3, dtype=torch.bfloat16)},
        saver,
    )
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= value
    path.write_bytes(data)
    try:
        found = tensor_pickle.load(path)
    except FmsimError as error:
        assert "doc_00000.pkl" in str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in found.values())


def test_reading_needs_no_torch():
    code = "import sys, fmsim.trace.importers.tensor_pickle; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
