"""Make tokens of the corpus: ``python -m fmsim.nano.text.pack_tokens --corpus DIR --out DIR``.

`fmsim.nano.tokens` reads what this writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
from pathlib import Path

import numpy as np

from fmsim.nano.text.corpus import Document, read_documents
from fmsim.nano.tokens import SPLITS, Corpus, from_texts

FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]  # two-byte items


def save(documents: list[Document], folder: Path) -> dict[str, int]:
    """Encode and write both splits; returns tokens by split."""
    splits = {}
    for split in SPLITS:
        chosen = [d for d in documents if d.held_out == (split == "held_out")]
        chosen.sort(key=lambda d: hashlib.blake2b(f"{d.package}/{d.name}".encode()).digest())
        splits[split] = from_texts({f"{d.package}/{d.name}": d.text for d in chosen})
    write(splits, folder)
    return {split: len(corpus.tokens) for split, corpus in splits.items()}


def write(splits: dict[str, Corpus], folder: Path) -> None:
    """Each split as ``SPLIT.xz``, and their documents' names and sizes in ``documents.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = {}
    for split, corpus in splits.items():
        data = corpus.tokens.astype("<u2").tobytes()
        (folder / f"{split}.xz").write_bytes(lzma.compress(data, lzma.FORMAT_XZ, filters=FILTERS))
        sizes = np.diff(corpus.documents)
        listed[split] = [[name, int(size)] for name, size in zip(corpus.names, sizes)]
    (folder / "documents.json").write_text(json.dumps(listed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder written by fmsim.nano.text.corpus"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokens")
    args = parser.parse_args()
    for split, tokens in save(list(read_documents(args.corpus)), args.out).items():
        print(
            f"{split}: {tokens / 1e6:.2f}M tokens,"
            f" {(args.out / f'{split}.xz').stat().st_size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
