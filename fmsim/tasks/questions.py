"""What a task asks, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fmsim.nano import tokenizer as bpe

Scoring = Literal["all", "any", "exact"]


@dataclass(frozen=True)
class Question:
    """Asked after a context.

    ``tokens`` lead up to the answer; ``answer`` are the tokens that a good model generates.

    scoring, as RULER defines it, on the generated text whatever its case: "all", the share of
    ``references`` found in it; "any", whether one is. "exact": whether just the answer's tokens
    were generated.
    """

    task: str
    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    references: tuple[str, ...]
    scoring: Scoring = "all"

    def score(self, generated: Sequence[int]) -> float:
        """Between 0 and 1."""
        if self.scoring == "exact":
            return float(tuple(generated[: len(self.answer)]) == self.answer)
        text = bpe.load().decode(list(generated), skip_special_tokens=False).lower()
        found = [reference.lower() in text for reference in self.references]
        return float(any(found)) if self.scoring == "any" else sum(found) / len(found)


@dataclass(frozen=True)
class TaskContext:
    """``tokens`` uint16 [length], read once, and the questions about them, each asked by itself."""

    tokens: np.ndarray
    questions: tuple[Question, ...]


def texts(items: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Tokens as text, without blanks around."""
    return tuple(
        text.strip()
        for text in bpe.load().decode_batch(
            [list(item) for item in items], skip_special_tokens=False
        )
    )
