"""A model's answers to the questions of a context, under policies: the context is read once, each question once, each answer once a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fmsim.exec.engine import Engine
from fmsim.exec.model import DeepseekV4
from fmsim.exec.prompt import Prompt
from fmsim.ledger import Ledger
from fmsim.policies.base import Policy
from fmsim.policies.full import Full
from fmsim.tasks import Context

MakePolicy = Callable[[], Policy]


class Answered(NamedTuple):
    """One policy's answer to question number ``question`` of a context."""

    question: int
    label: str
    tokens: list[int]
    ledger: Ledger
    confidence: float | None  # the memory indexer's highest logit at its last decision, where there is one


def answers(
    model: DeepseekV4,
    context: Context,
    wanted: Sequence[tuple[int, str]],
    policies: Mapping[str, MakePolicy],
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Answered]:
    """The (question, policy) pairs that are ``wanted``, questions in order. ``progress`` is told of tokens read.

    The question is part of the prompt, which is read exactly; the policy rules from the first generated token on. A policy that looks
    into the future is given what the full cache's answer selected.
    """
    questions = {number: context.questions[number] for number, _ in wanted}
    room = max(len(question.tokens) + len(question.answer) for question in questions.values())
    read = Prompt(model, context.tokens.tolist(), room, progress)
    for number, question in questions.items():
        prompt, hindsight = read.extended(question.tokens, len(question.answer)), None
        for label in (label for other, label in wanted if other == number):
            policy = policies[label]()
            if policy.evidence == "future" and hindsight is None:
                full = Engine(prompt, Full(), seed=seed)
                full.generate(len(question.answer))
                hindsight = full.request
            engine = Engine(prompt, policy, seed=seed, hindsight=hindsight)
            tokens, confidence = engine.generate(len(question.answer)), getattr(engine.request.policy, "confidence", None)
            yield Answered(number, label, tokens, engine.ledger(), None if confidence is None else float(confidence))
