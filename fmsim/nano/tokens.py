"""The corpus as tokens, as ``python -m fmsim.nano.text.pack_tokens`` writes them.

One folder holds ``train.xz`` and ``held_out.xz`` (little-endian uint16, each document ended by
``<|eos|>``, in an order shuffled by a hash of the names) and ``documents.json`` (package, name and
tokens of each document, in that order).
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fmsim.errors import FmsimError
from fmsim.nano import tokenizer as bpe

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Corpus:
    """Documents laid end to end.

    tokens: uint16 [N], documents: int64 [D + 1] offsets, names: list of D "package/name".
    """

    tokens: np.ndarray
    documents: np.ndarray
    names: list[str]

    @cached_property
    def breaks(self) -> np.ndarray:
        """int64, ascending: the places between two tokens where a sentence or line has just
        ended.
        """
        ends = np.zeros(bpe.VOCABULARY, bool)
        for token, number in bpe.load().get_vocab().items():
            ends[number] = token.endswith(("Ċ", ".")) or number == bpe.EOS_ID
        places = np.flatnonzero(ends[self.tokens]) + 1
        return places[places < len(self.tokens)]

    def text(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, int]:
        """A stretch of ``length`` tokens from a random place, and where it starts; wraps around at
        the end.
        """
        start = int(rng.integers(len(self.tokens)))
        if start + length <= len(self.tokens):
            return self.tokens[start : start + length], start
        return self.tokens.take(np.arange(start, start + length), mode="wrap"), start


def from_texts(texts: dict[str, str]) -> Corpus:
    """A corpus of the given texts by name, in their order."""
    encoded = [[*item.ids, bpe.EOS_ID] for item in bpe.load().encode_batch(list(texts.values()))]
    ends = np.cumsum([0] + [len(item) for item in encoded])
    return Corpus(
        np.concatenate([np.asarray(item, np.uint16) for item in encoded]), ends, list(texts)
    )


def load(folder: Path, split: str) -> Corpus:
    """Read ``train`` or ``held_out`` from ``folder``, in about two seconds."""
    path = folder / f"{split}.xz"
    if not path.exists():
        raise FmsimError(
            f"{path}: missing; make it with python -m fmsim.nano.text.pack_tokens --corpus DIR"
            f" --out {folder}"
        )
    try:
        tokens = np.frombuffer(lzma.decompress(path.read_bytes(), lzma.FORMAT_XZ), "<u2")
    except lzma.LZMAError as error:
        raise FmsimError(
            f"{path}: truncated or not xz ({error}); write it anew with"
            " python -m fmsim.nano.text.pack_tokens"
        ) from error
    listed = json.loads((folder / "documents.json").read_text())[split]
    ends = np.cumsum([0] + [size for _, size in listed])
    if ends[-1] != len(tokens):
        raise FmsimError(
            f"{path}: {len(tokens)} tokens, but documents.json tells of {ends[-1]}; write both anew"
        )
    return Corpus(tokens, ends, [name for name, _ in listed])
