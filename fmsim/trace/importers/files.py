"""Which captures a file holds, and where their traces go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fmsim.errors import FmsimError
from fmsim.files import check_apart
from fmsim.geometry import geometry_named
from fmsim.trace.format import Trace
from fmsim.trace.importers import engines, tables
from fmsim.trace.importers.capture import Watched, described, to_trace, watched
from fmsim.trace.writer import write

READERS = {
    "sglang": engines.read_sglang,
    "vllm": engines.read_vllm,
    "miles": tables.read_miles,
    "npy": tables.read_npy,
    "csv": tables.read_csv,
}
SUFFIXES = {
    "sglang": (".json", ".jsonl", ".npy"),
    "vllm": (".json", ".jsonl"),
    "miles": (".pt", ".parquet"),
    "npy": (".npy",),
    "csv": (".csv",),
}


def model_of(name: str | None, topk: int | None, layers: int | None, entry_tokens: int) -> Watched:
    """The captured model: by name, with another top-k or number of layers where they are given; or
    described by these alone.
    """
    if name is None:
        if topk is None or layers is None:
            raise FmsimError("trace import: give --model, or --topk and --layers")
        return described(topk, layers, entry_tokens)
    found = watched(geometry_named(name))
    if layers is not None and layers != len(found.layers):
        return described(topk or found.topk, layers, found.entry_tokens, found.name)
    return found if topk is None else replace(found, topk=topk)


def places(source: Path, out: Path, kind: str) -> list[tuple[Path, Path]]:
    """(file, where its trace goes): one file to a file or into a folder, a folder to a folder."""
    if not source.is_dir():
        return [(source, place_of(source, out))]
    paths = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES[kind])
    if not paths:
        raise FmsimError(
            f"{source}: no file there ends in {' or '.join(SUFFIXES[kind])}, as --format"
            f" {kind} has them"
        )
    if out.is_file():
        raise FmsimError(f"--out {out}: is a file; a folder of captures needs a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FmsimError(f"--out {out}: cannot be made ({error.strerror})") from None
    return [(path, out / f"{path.stem}.safetensors") for path in paths]


def place_of(path: Path, out: Path) -> Path:
    """``out``, or a file in it where it is a folder."""
    return out / f"{path.stem}.safetensors" if out.is_dir() else out


def import_file(
    path: Path, place: Path, kind: str, model: Watched, prompt_tokens: int | None
) -> Iterator[tuple[Path, Trace]]:
    """Write the trace of each request in ``path``; several get numbers behind the name."""
    if path.suffix not in SUFFIXES[kind]:
        raise FmsimError(f"{path}: --format {kind} reads {' and '.join(SUFFIXES[kind])} files")
    check_apart(path, place)
    try:
        captures = READERS[kind](path, model, prompt_tokens)
    except FileNotFoundError:
        raise FmsimError(f"{path}: no such file") from None
    for number, capture in enumerate(captures):
        found = to_trace(capture, model)
        several = len(captures) > 1
        target = place.with_name(f"{place.stem}-{number}{place.suffix}") if several else place
        write(target, found)
        yield target, found
