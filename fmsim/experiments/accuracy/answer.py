"""A model's answers to the questions of a context, under policies: the context is read once, each
question once, and all questions are answered side by side under all policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.request import Request
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.runs.after_one import AfterOne, Asked
from fmsim.policies.base import Policy
from fmsim.policies.full import Full
from fmsim.replay.ledger import Ledger
from fmsim.replay.needs import GpuMemory
from fmsim.tasks import TaskContext

MakePolicy = Callable[[], Policy]
Pair = tuple[int, str]  # a question's number, and a policy's label

# Rows decoded side by side, times the context's entries. A row takes some 18 bytes an entry on the
# GPU (scores, and what is resident), and 100 on the host (tables of six layers).
ABREAST_ENTRIES = {"cuda": 2**26, "cpu": 2**23}


class Answered(NamedTuple):
    """One policy's answer to question number ``question`` of a context."""

    question: int
    label: str
    tokens: list[int]
    ledger: Ledger
    # the memory indexer's highest logit at its last decision, where there is one
    confidence: float | None


class RefusedAnswer(NamedTuple):
    """One policy that cannot be at its budget."""

    question: int
    label: str
    why: str


def answers(
    model: DeepseekV4,
    context: TaskContext,
    wanted: Sequence[Pair],
    policies: Mapping[str, MakePolicy],
    memory: GpuMemory,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    abreast_entries: int | None = None,
    reading: AbstractContextManager[Any] | None = None,
) -> Iterator[Answered | RefusedAnswer]:
    """The (question, policy) pairs that are ``wanted``, in no certain order.

    ``memory`` says what a budget in bytes buys; ``progress`` is told of tokens read; ``reading`` is
    held while the context is read, which takes the most of a GPU's memory. The question
    is part of the prompt, which is read exactly; the policy rules from the first generated token
    on. A policy that looks into the future is given what the full cache's answer selected, so that
    one comes first.
    """
    questions = {number: context.questions[number] for number, _ in wanted}
    room = max(len(question.tokens) + len(question.answer) for question in questions.values())
    with reading or nullcontext():
        read = Prompt(model, context.tokens.tolist(), room, progress)
        if read.logits.is_cuda:
            import torch

            torch.cuda.empty_cache()  # for those that read next
    prompts = {
        number: read.extended(question.tokens, len(question.answer))
        for number, question in questions.items()
    }
    most = abreast_entries or ABREAST_ENTRIES[read.logits.device.type]
    rows = max(1, most // max(1, len(read.tokens) // read.rate))
    built = {label: policies[label] for label in dict.fromkeys(label for _, label in wanted)}
    foresee = {label for label, make in built.items() if make().evidence == "future"}
    first = [pair for pair in wanted if pair[1] == "full"]
    full: dict[int, Request] = {}
    for pairs in _parts(_with_full(first, wanted, foresee), rows):
        asked = [Asked(prompts[number], Full()) for number, _ in pairs]
        run = AfterOne(read, asked, memory, seed=seed)
        run.decode()
        for place, (number, label) in enumerate(pairs):
            full[number] = run.requests[place]
            if (number, label) in first:
                yield _answered(number, label, full[number])
    for pairs in _parts([pair for pair in wanted if pair[1] != "full"], rows):
        asked = [
            Asked(prompts[number], built[label](), full[number] if label in foresee else None)
            for number, label in pairs
        ]
        run = AfterOne(read, asked, memory, seed=seed)
        run.decode()
        for place, (number, label) in enumerate(pairs):
            if place in run.refused:
                yield RefusedAnswer(number, label, str(run.refused[place]))
            else:
                yield _answered(number, label, run.requests[place])


def _with_full(first: Sequence[Pair], wanted: Sequence[Pair], foresee: set[str]) -> list[Pair]:
    """`first`, and the full cache on every question that a policy that looks into the future is
    asked.
    """
    needed = [(number, "full") for number, label in wanted if label in foresee]
    return list(dict.fromkeys([*first, *needed]))


def _parts(pairs: Sequence[Pair], most: int) -> list[Sequence[Pair]]:
    return [pairs[first : first + most] for first in range(0, len(pairs), most)]


def _answered(number: int, label: str, request: Request) -> Answered:
    confidence = getattr(request.policy, "confidence", None)
    return Answered(
        number,
        label,
        request.tokens,
        request.ledger(),
        None if confidence is None else float(confidence),
    )
