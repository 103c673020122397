"""A part of the corpus that travels: ``python -m fmsim.nano.text.part --tokens DIR --out DIR
--train 30e6``.

The documents stand in an order shuffled by a hash, so the first of them are a fair sample of all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fmsim.nano import tokens as corpora
from fmsim.nano.text.pack_tokens import write
from fmsim.nano.tokens import SPLITS, Corpus


def first_documents(corpus: Corpus, tokens: int, skip: int = 0) -> Corpus:
    """Whole documents of ``tokens`` together at most, after the first ``skip`` tokens."""
    begin = int(np.searchsorted(corpus.documents, skip))
    last = np.searchsorted(corpus.documents, corpus.documents[begin] + tokens, side="right") - 1
    chosen = slice(int(corpus.documents[begin]), int(corpus.documents[last]))
    ends = corpus.documents[begin : last + 1] - corpus.documents[begin]
    return Corpus(corpus.tokens[chosen], ends, corpus.names[begin:last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=Path, required=True, help="folder written by fmsim.nano.text.pack_tokens"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=float, default=30e6, help="tokens to train on")
    parser.add_argument("--skip", type=float, default=0, help="tokens of it to leave out first")
    parser.add_argument("--held-out", type=float, default=2e6, help="tokens held out")
    args = parser.parse_args()
    whole = {split: corpora.load(args.tokens, split) for split in SPLITS}
    parts = {
        "train": first_documents(whole["train"], int(args.train), int(args.skip)),
        "held_out": first_documents(whole["held_out"], int(args.held_out)),
    }
    write(parts, args.out)
    for split, part in parts.items():
        size = (args.out / f"{split}.xz").stat().st_size
        print(f"{split}: {len(part.tokens) / 1e6:.1f}M tokens, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
