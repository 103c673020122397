"""``nano``'s tokenizer: byte-level BPE of 4,096 tokens.

Every digit is a token of its own, so that a number is as many tokens as it has digits. Any text
comes back unchanged.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from fmsim.errors import FmsimError

VOCABULARY = 4096
BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
MODEL_FOLDER = Path(__file__).parent / "model"


@cache
def load(folder: Path = MODEL_FOLDER) -> Tokenizer:
    """The trained tokenizer; it adds no special tokens by itself."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FmsimError(
            f"{path}: missing; make it with python -m fmsim.nano.text.train_tokenizer"
            f" --corpus DIR --out {folder}"
        )
    return Tokenizer.from_file(str(path))
