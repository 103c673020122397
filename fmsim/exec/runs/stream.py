"""What a decode is fed: a prompt, and turns of given and generated tokens after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Turn:
    """Feed ``forced``, then decode ``generate`` tokens; a good model generates ``answer``, which
    holds ``references``.
    """

    forced: list[int]
    generate: int = 0
    answer: tuple[int, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """A prompt (uint16 [length]) and the turns decoded after it."""

    kind: str
    prompt: np.ndarray
    turns: list[Turn]

    @property
    def steps(self) -> int:
        """Tokens processed after the prompt."""
        return n_steps(self.turns)


def n_steps(turns: Sequence[Turn]) -> int:
    """Tokens that the turns process, given and generated."""
    return sum(len(turn.forced) + turn.generate for turn in turns)


def exact(answer: Sequence[int], generated: Sequence[int]) -> bool:
    """Whether the generated tokens start with all of the answer's."""
    return list(generated[: len(answer)]) == list(answer)
