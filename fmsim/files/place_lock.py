"""A lock on a file or folder that a command writes, so that two do not write it at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Taken(Exception):
    """Another process writes there; the message says what to do."""


@contextlib.contextmanager
def place_lock(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, a hidden file beside it, while the block runs.

    The kernel lets it go with the process, however that ends. Where the system has no such locks,
    the file's being there is the lock, and a killed process leaves it. Raises Taken, or OSError.
    """
    beside = path.parent / f".{path.name}.lock"  # of "." too, which has no name
    beside.parent.mkdir(parents=True, exist_ok=True)
    handle = _made(beside) if fcntl is None else _locked(beside)
    try:
        yield
    finally:
        if fcntl is None:
            os.close(handle)  # an open file cannot be removed there
        beside.unlink(missing_ok=True)
        if fcntl is not None:
            os.close(handle)


def _locked(beside: Path) -> int:
    while True:
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Taken("wait for it, or give another") from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(beside).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # its owner has just taken the file away


def _made(beside: Path) -> int:
    try:
        return os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise Taken(f"wait for it, give another, or delete {beside} if none runs") from None
