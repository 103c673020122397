"""Which trace files were read through and found sound, remembered between commands.

A note is an empty file in a cache folder, named by a digest of the trace's place, size, times and
inode: whatever changes the file makes the note void. Where the folder cannot be written, every
command reads the trace through again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

RULES = "1"  # raise it where `check.validate` refuses more than before
SWITCH = "FMSIM_VERIFY"  # "0": trust every trace, as --no-verify does


def wanted() -> bool:
    """Whether traces are to be read through at all."""
    return os.environ.get(SWITCH, "") != "0"


def is_known(path: Path) -> bool:
    """The file at `path` was found sound, and has not changed since."""
    try:
        return _note(path).exists()
    except (OSError, RuntimeError):
        return False


def remember(path: Path) -> None:
    """The file at `path` is sound."""
    try:
        note = _note(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except (OSError, RuntimeError):
        pass  # it will be read through again


def _note(path: Path) -> Path:
    """RuntimeError where there is no home folder."""
    there = path.resolve()
    found = there.stat()
    about = (
        RULES,
        str(there),
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_dev,
        found.st_ino,
    )
    digest = hashlib.sha256(repr(about).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fmsim" / "sound-traces" / digest
