"""Train ``nano``'s tokenizer.

``python -m fmsim.nano.text.train_tokenizer --corpus DIR --out DIR``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fmsim.errors import FmsimError
from fmsim.nano.text.corpus import read_documents
from fmsim.nano.tokenizer import BOS, EOS, MODEL_FOLDER, VOCABULARY

# A contraction, a word with the blank before it, one digit, a run of signs, white space (the last
# blank before a word belongs to it).
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train(texts: Iterator[str]) -> Tokenizer:
    """A BPE tokenizer of exactly ``VOCABULARY`` tokens, trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise FmsimError(
            f"the text gives only {tokenizer.get_vocab_size()} of {VOCABULARY} tokens; train on"
            " more text"
        )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, as
    ``AutoTokenizer.from_pretrained(folder)`` reads them.
    """
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=1_048_576,
    )
    wrapped.save_pretrained(folder)
    # by the class's old name, which every version of transformers knows
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)
    path.write_text(
        json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder written by fmsim.nano.text.corpus"
    )
    parser.add_argument(
        "--out", type=Path, default=MODEL_FOLDER, help="folder for the tokenizer's files"
    )
    args = parser.parse_args()
    texts = (item.text for item in read_documents(args.corpus) if not item.held_out)
    save(train(texts), args.out)


if __name__ == "__main__":
    main()
