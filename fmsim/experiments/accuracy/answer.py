"""A model's answers to the questions of a context, under policies: the context is read once, each
question once, and questions are answered side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.request import Request
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.policies.base import Policy
from fmsim.policies.full import Full
from fmsim.replay.ledger import Ledger
from fmsim.tasks import Question, TaskContext

MakePolicy = Callable[[], Policy]

ABREAST_TOKENS = (
    2**22
    # of all prompts that stand side by side, each
    # a copy of the context's cache: eight of 512K tokens
)


class Answered(NamedTuple):
    """One policy's answer to question number ``question`` of a context."""

    question: int
    label: str
    tokens: list[int]
    ledger: Ledger
    # the memory indexer's highest logit at its last decision, where there is one
    confidence: float | None


def answers(
    model: DeepseekV4,
    context: TaskContext,
    wanted: Sequence[tuple[int, str]],
    policies: Mapping[str, MakePolicy],
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    abreast_tokens: int = ABREAST_TOKENS,
) -> Iterator[Answered]:
    """The (question, policy) pairs that are ``wanted``, in the order in which they are decoded.

    ``progress`` is told of tokens read.

    The question is part of the prompt, which is read exactly; the policy rules from the first
    generated token on. A policy that looks into the future is given what the full cache's answer
    selected. Questions whose answers are of one length are decoded as one batch a policy, as many
    as ``abreast_tokens`` hold, at least one.
    """
    questions = {number: context.questions[number] for number, _ in wanted}
    room = max(len(question.tokens) + len(question.answer) for question in questions.values())
    read = Prompt(model, context.tokens.tolist(), room, progress)
    for numbers in abreast(questions, max(1, abreast_tokens // (len(context.tokens) + room))):
        steps = len(questions[numbers[0]].answer)
        prompts = {number: read.extended(questions[number].tokens, steps) for number in numbers}
        full: dict[int, Request] = {}  # the full cache's answers
        for label in dict.fromkeys(label for _, label in wanted):
            asked = {
                number: prompt for number, prompt in prompts.items() if (number, label) in wanted
            }
            for number, request in _decoded(asked, policies[label](), steps, seed, full):
                confidence = getattr(request.policy, "confidence", None)
                yield Answered(
                    number,
                    label,
                    request.tokens,
                    request.ledger(),
                    None if confidence is None else float(confidence),
                )


def abreast(questions: Mapping[int, Question], most: int) -> list[list[int]]:
    """The numbers of ``questions`` that are answered together: at most ``most``, whose answers have
    as many tokens.
    """
    by_length: dict[int, list[int]] = {}
    for number, question in questions.items():
        by_length.setdefault(len(question.answer), []).append(number)
    return [
        numbers[first : first + most]
        for numbers in by_length.values()
        for first in range(0, len(numbers), most)
    ]


def _decoded(
    prompts: Mapping[int, Prompt], policy: Policy, steps: int, seed: int, full: dict[int, Request]
) -> Iterator[tuple[int, Request]]:
    """Each prompt's request after ``steps`` tokens under ``policy``.

    ``full`` has the full cache's, and gets those that are decoded here.
    """
    foresees = policy.evidence == "future"  # each into an answer of its own, so one by one
    if foresees:
        for _ in _decoded(
            {number: prompt for number, prompt in prompts.items() if number not in full},
            Full(),
            steps,
            seed,
            full,
        ):
            pass
    for numbers in [[number] for number in prompts] if foresees else filter(None, [list(prompts)]):
        batch = Batch(
            [prompts[number] for number in numbers],
            policy,
            seed=seed,
            hindsight=full[numbers[0]] if foresees else None,
        )
        batch.generate(steps)
        requests = dict(zip(numbers, batch.requests, strict=True))
        if policy.name == "full":
            full |= requests
        yield from requests.items()
