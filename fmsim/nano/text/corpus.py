"""The real text ``nano`` learns from: ``python -m fmsim.nano.text.corpus --out DIR``.

Downloads Debian documentation packages (``apt-get download``, no root needed), strips their markup
and writes ``DIR/documents.jsonl.xz``, one document a line: package, version, licence, name,
held_out, text. The split into train and held-out is by a hash of the document's name.
``fmsim.nano.text.pack_tokens`` makes tokens of it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fmsim.errors import FmsimError
from fmsim.nano.text.extract import dictd_text, html_text, pod_text, r_strings, tidy
from fmsim.nano.text.sources import HELD_OUT_SHARE, SOURCES, Source

HELD_OUT_NAMES = frozenset({"r-cran-janeaustenr/Mansfield Park"})
SHORTEST_CHARS = 600
SHORTEST_REPEATED_CHARS = 200  # a paragraph this long is kept once in the whole corpus
DICTIONARY_PART_CHARS = 65_536
# what comes before a headword, by dictionary; elsewhere it is a line that is not indented
HEADWORDS = {"gcide": r"\n\n(?=\S[^\n]* \\)"}
SOURCE_CODE = frozenset({".c", ".go", ".h", ".py"})
COMMON_WORDS = frozenset(
    [
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "a",
        "for",
        "it",
        "be",
        "that",
        "this",
        "with",
        "as",
        "on",
        "or",
        "not",
        "are",
        "by",
        "if",
        "from",
    ]
)


@dataclass(frozen=True)
class Document:
    """One text; ``name`` is unique in its package."""

    package: str
    version: str
    licence: str
    name: str
    held_out: bool
    text: str


def download(folder: Path, sources: Sequence[Source]) -> None:
    """Fetch the packages of ``sources`` as .deb files into ``folder``."""
    packages = [source.package for source in sources]
    try:
        subprocess.run(
            ["apt-get", "download", *packages],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError as error:
        raise FmsimError(
            "apt-get is not on this machine; fetch the .deb files elsewhere and give --packages DIR"
        ) from error
    except subprocess.CalledProcessError as error:
        raise FmsimError(
            f"apt-get download failed ({error.stderr.strip()[-200:]}); run apt-get update, or give"
            " --packages DIR"
        ) from error


def read_packages(folder: Path, sources: Sequence[Source]) -> Iterator[Document]:
    """All documents of the .deb files in ``folder``: English or code, of some length, no paragraph
    twice, in a stable order.
    """
    seen: set[bytes] = set()
    with multiprocessing.Pool() as pool:
        for source in sources:
            archive = _archive(folder, source.package)
            version = _field(archive, "Version")
            with tempfile.TemporaryDirectory() as unpacked:
                subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
                found = sorted(
                    p
                    for p in Path(unpacked).rglob("*")
                    if p.is_file() and re.search(source.files, str(p))
                )
                paths = [
                    p for p in found if not p.is_symlink() and not re.search(source.skip, str(p))
                ]
                for texts in pool.imap(read_file, paths, chunksize=4):
                    for name, text in texts:
                        text = _unseen(text, seen)
                        if len(text) >= SHORTEST_CHARS and (source.code or is_english(text)):
                            name = name.replace(unpacked, "").removeprefix("/usr/share/")
                            yield Document(
                                source.package,
                                version,
                                source.licence,
                                name,
                                is_held_out(source.package, name, source.held_out_share),
                                text,
                            )


def _archive(folder: Path, package: str) -> Path:
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise FmsimError(f"{folder}: no {package}_*.deb; leave out --packages to download it")
    return found[-1]


def _field(archive: Path, field: str) -> str:
    return subprocess.run(
        ["dpkg-deb", "-f", archive, field], check=True, capture_output=True, text=True
    ).stdout.strip()


def read_file(path: Path) -> list[tuple[str, str]]:
    """(name, text) of each document in one file."""
    if path.suffix == ".dz":
        stem = path.name.split(".")[0]
        parts = _dictionary_parts(dictd_text(path), stem)
        return [(f"{stem} {number:04}", part) for number, part in enumerate(parts)]
    if path.suffix == ".rdb":
        return [(_novel_title(lines), "\n".join(lines).strip() + "\n") for lines in r_strings(path)]
    page = path.read_bytes()
    page = (gzip.decompress(page) if path.suffix == ".gz" else page).decode("utf-8", "replace")
    if path.suffix in SOURCE_CODE:
        return [(str(path), tidy(page))]
    return [(str(path), pod_text(page) if path.suffix == ".pod" else html_text(page))]


def _novel_title(lines: list[str]) -> str:
    return next(line for line in lines if line.strip()).strip().title()


def _dictionary_parts(text: str, stem: str) -> Iterator[str]:
    """The dictionary in parts of about ``DICTIONARY_PART_CHARS``, cut before a headword."""
    headword, start = re.compile(HEADWORDS.get(stem, r"\n(?=\S)")), 0
    while start < len(text):
        cut = headword.search(text, start + DICTIONARY_PART_CHARS)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def _unseen(text: str, seen: set[bytes]) -> str:
    """``text`` without the long paragraphs that came before anywhere; adds its own to ``seen``."""
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= SHORTEST_REPEATED_CHARS:
            mark = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
            if mark in seen:
                continue
            seen.add(mark)
        kept.append(paragraph)
    return "\n\n".join(kept)


def is_english(text: str) -> bool:
    """Whether the text is nearly all ASCII and has English's common words."""
    sample = text[:20_000]
    words = re.findall(r"[a-z]+", sample.lower())
    common = sum(word in COMMON_WORDS for word in words)
    return sum(map(str.isascii, sample)) > 0.95 * len(sample) and common > 0.05 * len(words)


def is_held_out(package: str, name: str, of: float = HELD_OUT_SHARE) -> bool:
    """Whether a document is kept from training: by its name, and the share ``of`` all that is."""
    key = f"{package}/{name}"
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
    return key in HELD_OUT_NAMES or share < of


def write_documents(documents: Iterator[Document], path: Path) -> dict[str, int]:
    """Write one JSON object a line, xz-compressed; returns UTF-8 bytes by package."""
    sizes: dict[str, int] = {}
    with lzma.open(path, "wt", preset=1, encoding="utf-8") as out:
        for document in documents:
            out.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
            sizes[document.package] = sizes.get(document.package, 0) + len(document.text.encode())
    return sizes


def read_documents(folder: Path) -> Iterator[Document]:
    """The documents that ``write_documents`` put into ``folder``."""
    path = folder / "documents.jsonl.xz"
    if not path.exists():
        raise FmsimError(
            f"{path}: missing; make it with python -m fmsim.nano.text.corpus --out {folder}"
        )
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield Document(**json.loads(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write documents.jsonl.xz into"
    )
    parser.add_argument("--packages", type=Path, help="folder of .deb files already downloaded")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as fresh:
        if args.packages is None:
            download(Path(fresh), SOURCES)
        sizes = write_documents(
            read_packages(args.packages or Path(fresh), SOURCES), args.out / "documents.jsonl.xz"
        )
    for package, size_bytes in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{package:28}{size_bytes / 1e6:8.1f} MB")
    print(f"{'all':28}{sum(sizes.values()) / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
