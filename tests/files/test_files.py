"""A file is the old one or the new one, whatever happens between."""

import pytest

from fmsim.files import replacing, write_bytes, write_text


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
