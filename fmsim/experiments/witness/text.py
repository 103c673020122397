"""Real text in a witness' own tokens: ``python -m fmsim.experiments.witness.text --corpus DIR
--model MODEL --out DIR``.

Documents are those of `fmsim.nano.text.corpus`. What nano holds out is split again, by a hash of
the document's name, into text to choose by and text to report on. So the three parts share no
document. Documents of a package stand in their order, with the end of text between.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.nano.text.corpus import Document, read_documents
from fmsim.trace.importers.dense import load_tokenizer

PARTS = ("train", "validation", "test")
LONGEST_CHARS = 1_000_000  # of a document
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]  # two-byte items


def part_of(document: Document) -> str:
    """One of `PARTS`."""
    if not document.held_out:
        return "train"
    name = f"witness/{document.package}/{document.name}".encode()
    return PARTS[1 + hashlib.blake2b(name).digest()[0] % 2]


def chosen(documents: Iterable[Document], tokens: dict[str, int]) -> dict[str, list[Document]]:
    """Of each part some whole packages' shares: documents, spread over packages, of about as many
    characters as ``tokens`` of it need (four each), in the packages' own order.
    """
    found: dict[str, list[Document]] = {part: [] for part in PARTS}
    for document in documents:
        found[part_of(document)].append(document)
    for part, listed in found.items():
        size = sum(min(len(document.text), LONGEST_CHARS) for document in listed)
        share = min(1.0, 4.0 * tokens[part] / max(size, 1))
        packages = sorted({document.package for document in listed})
        kept: list[Document] = []
        for package in packages:
            own = [document for document in listed if document.package == package]
            limit = share * sum(len(document.text) for document in own)
            while own and limit > 0:
                kept.append(own.pop(0))
                limit -= len(kept[-1].text)
        found[part] = kept
    return found


def encode(documents: Sequence[Document], tokenizer: Any) -> np.ndarray:
    """uint16 [N]: the documents' tokens, the end of text after each."""
    end = tokenizer.eos_token_id
    texts = [document.text[:LONGEST_CHARS] for document in documents]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if tokenizer.vocab_size > 2**16:
        raise FmsimError("a witness' vocabulary has at most 65,536 tokens here")
    return np.concatenate([np.asarray([*found, end], np.uint16) for found in ids])


def save(folder: Path, part: str, tokens: np.ndarray) -> None:
    """``folder/part.xz``."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = lzma.compress(tokens.astype("<u2").tobytes(), lzma.FORMAT_XZ, filters=FILTERS)
    (folder / f"{part}.xz").write_bytes(packed)


def load(folder: Path, part: str) -> np.ndarray:
    """uint16 [N], as `save` wrote it."""
    path = folder / f"{part}.xz"
    try:
        return np.frombuffer(lzma.decompress(path.read_bytes()), "<u2")
    except (OSError, lzma.LZMAError) as error:
        raise FmsimError(f"{path}: no tokens of a witness: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="of fmsim.nano.text.corpus")
    parser.add_argument("--model", type=Path, required=True, help="directory or GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokens")
    parser.add_argument(
        "--tokens", type=int, nargs=3, default=[6_000_000, 500_000, 1_000_000], metavar="N",
        help="of train, validation and test, about",
    )  # fmt: skip
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    wanted = dict(zip(PARTS, args.tokens, strict=True))
    listed = {}
    for part, documents in chosen(read_documents(args.corpus), wanted).items():
        tokens = encode(documents, tokenizer)
        save(args.out, part, tokens)
        listed[part] = [f"{document.package}/{document.name}" for document in documents]
        print(f"{part}: {len(documents)} documents, {len(tokens) / 1e6:.2f}M tokens")
    (args.out / "documents.json").write_text(json.dumps(listed))


if __name__ == "__main__":
    main()
