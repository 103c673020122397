"""Files appear whole or not at all, and are read as what they say they are."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fmsim.errors import FmsimError
from fmsim.files import inputs, replacing, strict_json, write_bytes, write_text


def test_what_is_written_replaces_what_was(tmp_path):
    path = tmp_path / "made" / "it.txt"
    write_text(path, "one: é\n")
    assert path.read_text(encoding="utf-8") == "one: é\n"
    write_bytes(path, [b"tw", memoryview(b"o")])
    assert path.read_bytes() == b"two"
    assert [other.name for other in path.parent.iterdir()] == ["it.txt"]


def test_where_writing_fails_the_old_file_stays_alone(tmp_path):
    path = tmp_path / "it.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error_and_the_old_file_stays(tmp_path):
    path = tmp_path / "it.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    write_text(tmp_path / "it.txt", "")
    assert (tmp_path / "it.txt").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_read_where_it_lies(tmp_path, order):
    values = np.asarray(np.arange(24, dtype=np.int32).reshape(2, 3, 4), order=order)
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(inputs.read_npy(tmp_path / "a.npy"), values)
    np.testing.assert_array_equal(inputs.npy((tmp_path / "a.npy").read_bytes()), values)
    data = (tmp_path / "a.npy").read_bytes()
    for damaged in (data[:-4], data + b"\0", data.replace(b"(2, 3", b"(9, 3"), b"", data[:20]):
        (tmp_path / "b.npy").write_bytes(damaged)
        with pytest.raises(FmsimError, match=r"b\.npy: is no \.npy array"):
            inputs.read_npy(tmp_path / "b.npy")
    for words in ("'<i4', 'fortran_order': Falre, 'shape': (69, 3, 4), }", " (69, 3, 4), }"):
        header = data[:10] + words.ljust(117).encode() + b"\n"  # Python 3.12's tokenizer trips
        (tmp_path / "c.npy").write_bytes(header + data[128:])
        with pytest.raises(FmsimError, match=r"c\.npy: is no \.npy array"):
            inputs.read_npy(tmp_path / "c.npy")
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(FmsimError, match="is no"):
        inputs.read_npy(tmp_path / "o.npy")


@pytest.mark.parametrize(
    ("text", "sound"),
    [
        ("[" * 100 + "]" * 100, True),
        ("[" * 101 + "]" * 101, False),
        ('["' + "[{" * 200 + '"]', True),
        ('["' + '\\"[' * 200 + '", "\\\\"]', True),
        ("[" + ",".join(["[]"] * 300) + "]", True),
        ('["\\\\", ' + "[" * 150 + "]" * 150 + "]", False),
        ('{"a": "' + "[" * 300, False),
    ],
)
def test_only_brackets_outside_strings_nest(text, sound):
    if sound:
        assert strict_json.parse(text, "x") == json.loads(text)
    else:
        with pytest.raises(FmsimError, match="not valid JSON"):
            strict_json.parse(text, "x")


def test_what_a_killed_process_left_goes_and_a_living_ones_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".other.json.{ended.pid}-0123abcd.part"
    under_way = tmp_path / f".other.json.{os.getpid()}-0123abcd.part"
    foreign = tmp_path / ".mine.part"
    for path in (left, under_way, foreign):
        path.write_text("half")
    write_text(tmp_path / "it.txt", "whole")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"it.txt", under_way.name, foreign.name}


def test_a_process_killed_while_it_writes_leaves_nothing_behind_the_next(tmp_path):
    code = (
        "import os, pathlib, signal; from fmsim.files import replacing\n"
        "with replacing(pathlib.Path('it.txt')) as beside:\n"
        "    beside.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    [half] = tmp_path.iterdir()
    assert half.name.endswith(".part")
    write_text(tmp_path / "it.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["it.txt"]


def test_a_npy_whose_header_is_no_mapping_is_told():
    """Brackets that do not close, and words that are no values."""
    for header in (b"{'descr': '<i4', 'shape': (2,", b"{'descr': '<i4'}", b"9 + ]", b"(" * 3000):
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24)
        with pytest.raises(ValueError, match="(?i)header"):
            inputs.npy(data)
