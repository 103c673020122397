"""What `fmsim exec` asks when it is given no prompt: questions about facts woven into fmsim's own source."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmsim.nano import prompts
from fmsim.nano.tokens import Corpus, from_texts

PACKAGE = Path(__file__).parents[1]
TEXT = "fmsim's own source (MIT), with facts woven in"


def haystack() -> Corpus:
    """Every Python file of the installed package, in the order of their names: real text that is always at hand.

    A prompt longer than it reads it again from its start.
    """
    paths = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    texts = {path.as_posix(): (PACKAGE / path).read_text(encoding="utf-8") for path in paths}
    return from_texts({name: text for name, text in texts.items() if text})


def questions(context_tokens: int, steps: int, seed: int, corpus: Corpus) -> prompts.Stream:
    """A prompt of `context_tokens` and at least `steps` decode steps of questions about it, in nano's tokens."""
    return prompts.question_stream(context_tokens, np.random.default_rng(seed), corpus, steps)
