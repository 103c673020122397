"""Harvest the words that facts are about.

``python -m fmsim.nano.text.harvest_words --corpus DIR``.

Nouns and adjectives are the headwords so marked in the Collaborative International Dictionary of
English (dict-gcide), where the whole corpus uses them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from fmsim.nano.text.corpus import read_documents
from fmsim.nano.words import WORDS_FILE

HEADWORD = re.compile(r"(?m)^([A-Za-z]+) \\[^\\\n]+\\,?[^\n]{0,60}?\b(n|a|adj)\.")
LEAST_USES, MOST_USES = 25, 20_000
UNFIT = re.compile(
    r"sex|erect|rape|whor|harlot|slut|negr|mulatt|genit|penis|vagin|coit|incest|obscen"
    r"|homicid|suicid|terroris|bastard|bitch"
)
KINDS = {"n": "nouns", "a": "adjectives", "adj": "adjectives"}


def harvest(texts: list[str]) -> dict[str, list[str]]:
    """Lower-case words of 4 to 9 letters that the dictionary marks and ``texts`` use, sorted; each
    under its first mark.
    """
    uses = Counter(word for text in texts for word in re.findall(r"\b[a-z]{4,9}\b", text))
    found: dict[str, str] = {}
    for text in texts:
        for word, mark in HEADWORD.findall(text):
            found.setdefault(word.lower(), KINDS[mark])
    kept = {
        word: kind
        for word, kind in found.items()
        if LEAST_USES <= uses[word] <= MOST_USES and not UNFIT.search(word)
    }
    return {
        kind: sorted(word for word in kept if kept[word] == kind)
        for kind in ("nouns", "adjectives")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder written by fmsim.nano.text.corpus"
    )
    words = harvest([document.text for document in read_documents(parser.parse_args().corpus)])
    WORDS_FILE.write_text(json.dumps(words, separators=(",", ":")) + "\n")
    print({kind: len(listed) for kind, listed in words.items()})


if __name__ == "__main__":
    main()
