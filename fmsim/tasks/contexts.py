"""From names of families to contexts with questions.

The same seed, length and sample give the same tokens anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmsim.errors import FmsimError
from fmsim.nano.tokens import Corpus
from fmsim.nano.weaving import weave
from fmsim.tasks.lists import LISTS
from fmsim.tasks.questions import Question, TaskContext
from fmsim.tasks.woven import ALONE, IN_SESSIONS, SHARING, Draw, WovenTask, sessions

FAMILIES = (*SHARING, *ALONE, *LISTS)


def build(
    tasks: Sequence[str], length_tokens: int, sample: int, corpus: Corpus, seed: int = 42
) -> list[TaskContext]:
    """The contexts of one sample, each of exactly ``length_tokens``.

    Families in `SHARING` stand in one context, which is costly to read; their facts are about
    different things. The others have one each, since theirs fill it. Raises FmsimError for a name
    that is no family's, or a length too short for what is told.
    """
    contexts = []
    for families in in_contexts(tasks):
        draw = _draw(families[0], length_tokens, sample, seed)
        contexts.append(
            LISTS[families[0]](draw) if families[0] in LISTS else _woven(families, draw, corpus)
        )
    return contexts


def in_contexts(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """``tasks`` by the context that they stand in, in the order of `build`, which makes the same
    context of such a part alone.
    """
    unknown = [task for task in tasks if task not in FAMILIES]
    if unknown:
        raise FmsimError(f"no task family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    together = tuple(task for task in SHARING if task in tasks)
    return ([together] if together else []) + [
        (task,) for task in (*ALONE, *LISTS) if task in tasks
    ]


def _draw(task: str, length_tokens: int, sample: int, seed: int) -> Draw:
    """Families that share a context draw from one generator in turn, so what one tells depends on
    which others were asked for.
    """
    generator = np.random.default_rng((seed, length_tokens, sample, context_number(task)))
    return Draw(generator, length_tokens)


def context_number(task: str) -> int:
    """Which of a sample's contexts a family stands in: those in `SHARING` in number 0, the others
    in one each.
    """
    return 0 if task in SHARING else FAMILIES.index(task)


def _woven(tasks: Sequence[str], draw: Draw, corpus: Corpus) -> TaskContext:
    families: list[WovenTask] = [(SHARING | ALONE)[task](draw) for task in tasks]
    marks = sessions(draw) if set(tasks) & set(IN_SESSIONS) else []
    tokens = weave(
        draw.rng, corpus, draw.length, marks + [item for family in families for item in family.told]
    ).tokens
    questions: list[Question] = [question for family in families for question in family.ask(tokens)]
    return TaskContext(tokens, tuple(questions))
