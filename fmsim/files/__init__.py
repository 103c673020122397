"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fmsim.errors import FmsimError, shown

_PART = re.compile(r"\..+\.(?P<pid>\d+)-[0-9a-f]{8}\.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; when the block ends, that file takes its place.

    The folder is made. What was written is on the disk before the old file goes, so a crash leaves
    the old file or the new one, never half. Where the block raises, the old file stays and the new
    one is removed. What killed processes left in the folder goes first. Raises OSError, for a
    folder before anything is written.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove the half files of processes that are no more."""
    for name in os.listdir(folder):
        found = _PART.fullmatch(name)
        if found and not _lives(int(found["pid"])):
            (folder / name).unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether a process may still run; only POSIX can be asked without harm."""
    if os.name != "posix" or not 0 < pid < 2**31:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def check_apart(source: Path, out: Path, option: str = "--out") -> None:
    """Raise FmsimError where ``option``'s place ``out`` is the file that is read, by any name."""
    if source.exists() and out.exists() and source.samefile(out):
        raise FmsimError(
            f"{option} {shown(out)}: would replace {shown(source)}, which is read; name another"
        )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, as `replacing` does."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_bytes(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write ``parts``, one after another, as `replacing` does."""
    with replacing(path) as beside, beside.open("wb") as file:
        file.writelines(parts)
