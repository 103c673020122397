"""The code that a policy is made of, as a digest: a change in it makes other results."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from fmsim.policies.base import Policy

INSTALLED = ("site-packages", "dist-packages")  # a folder of packages that are not one project's


def source_digest(policy: type[Policy]) -> str:
    """A digest of the file that a policy stands in and of the modules that it imports from the
    file's folder, they too, as they are on disk. fmsim's own code is known by its version.
    """
    try:
        path = Path(inspect.getsourcefile(policy) or "").resolve()
        parts = _parts(path, policy) if path.is_file() else [inspect.getsource(policy).encode()]
    except (OSError, TypeError):  # typed in by hand
        parts = [policy.__qualname__.encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _parts(path: Path, policy: type[Policy]) -> list[bytes]:
    """The text of the policy's file; then the name and the text of each module it needs."""
    folder = path.parent
    package = getattr(sys.modules.get(policy.__module__), "__package__", None) or ""
    is_alone = folder.name in INSTALLED or package.partition(".")[0] == "fmsim"
    found = {path}
    waiting = [] if is_alone else [path]
    while waiting:
        new = set(_imported(waiting.pop(), folder, package)) - found
        found |= new
        waiting += new
    parts = [path.read_bytes()]
    for module in sorted(found - {path}):
        parts += [str(module.relative_to(folder)).encode(), module.read_bytes()]
    return parts


def _imported(path: Path, folder: Path, package: str) -> Iterator[Path]:
    """The files in `folder`, which is that of `package` ("" for none), that the one at `path`
    imports.
    """
    changed = path.stat()
    for level, name in _names(path, changed.st_size, changed.st_mtime_ns, changed.st_ino):
        at = path.parents[min(level, len(path.parents)) - 1] if level else folder
        if name.partition(".")[0] == "fmsim" or not at.is_relative_to(folder):
            continue
        if level == 0 and package:
            name = name.removeprefix(f"{package}.")
        for part in name.split("."):
            at /= part
            for file in (at.with_name(f"{part}.py"), at / "__init__.py"):
                if file.is_file():
                    yield file


@lru_cache(maxsize=256)
def _names(path: Path, *unchanged: int) -> tuple[tuple[int, str], ...]:
    """(leading dots, dotted name) of each module that a file may import, wherever it does so."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # nothing imports it then
        return ()
    names = [
        (0, alias.name) for node in nodes if isinstance(node, ast.Import) for alias in node.names
    ]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):  # what it names may be a module itself
            before = f"{node.module}." if node.module else ""
            names += [(node.level, f"{before}{alias.name}") for alias in node.names]
    return tuple(dict.fromkeys(names))
