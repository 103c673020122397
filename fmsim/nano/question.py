"""What `fmsim exec` asks when it is given no prompt: questions about facts woven into a pinned
text.
"""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path

import numpy as np

from fmsim.exec.runs.stream import Stream
from fmsim.nano import prompts
from fmsim.nano.tokens import Corpus, from_texts

TEXT_FILE = Path(__file__).with_name("question_text.json.xz")  # fmsim 0.1.0's source, by file
TEXT = "fmsim 0.1.0's source (MIT), with facts woven in"


@cache
def haystack() -> Corpus:
    """The pinned text: real, always at hand, and the same in every version.

    A prompt longer than it reads it again from its start.
    """
    return from_texts(json.loads(lzma.decompress(TEXT_FILE.read_bytes())))


def questions(context_tokens: int, steps: int, seed: int, corpus: Corpus) -> Stream:
    """A prompt of `context_tokens` and at least `steps` decode steps of questions about it, in
    nano's tokens.
    """
    return prompts.question_stream(context_tokens, np.random.default_rng(seed), corpus, steps)
