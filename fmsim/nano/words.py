"""The words that facts are about.

``python -m fmsim.nano.text.harvest_words`` writes them into ``words.json`` beside this file.

Nouns and adjectives are the headwords so marked in the Collaborative International Dictionary of
English (dict-gcide), where the whole corpus uses them. A word belongs to training or to evaluation
for good, by a hash of its letters.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

WORDS_FILE = Path(__file__).parent / "words.json"
EVALUATION_SHARE = 0.15


def is_for_evaluation(word: str) -> bool:
    """Whether facts about ``word`` are kept for evaluation."""
    return hashlib.blake2b(word.encode(), digest_size=2).digest()[0] < 256 * EVALUATION_SHARE


@cache
def load(evaluation: bool) -> dict[str, list[str]]:
    """{"nouns": [...], "adjectives": [...]}, of training or of evaluation; the two have no word in
    common.
    """
    words = json.loads(WORDS_FILE.read_text())
    return {
        kind: [w for w in listed if is_for_evaluation(w) == evaluation]
        for kind, listed in words.items()
    }
