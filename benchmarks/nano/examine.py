"""How well a model answers: ``python benchmarks/nano/examine.py MODEL --corpus DIR
single:8192:40 ...``.

``TASK:LENGTH:SAMPLES``. The task is one of `fmsim.nano.measure.evaluate` ("single", "many", ...) or
"families": all families of `fmsim.tasks` that share a context. A prompt, its questions and their
right answers are one sequence, which is read in one pass by the training's forward, in bfloat16 and
with the indexer's selection, as at inference; so a context's questions stand one behind the other,
each after the right answers of those before. An answer counts if every token of it is the model's
first choice, given those before it: just what greedy decoding would produce.

Where a question asks for several things in no order (``UNORDERED``), any order of them is right, as
in RULER: where the model goes on with another thing than was given, the answer is put in the
model's order and read again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fmsim import tasks
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.loader import load_model
from fmsim.exec.whole import forward
from fmsim.nano import tokens as corpora
from fmsim.nano import wording as say
from fmsim.nano.measure.evaluate import prompts_of
from fmsim.nano.tokenizer import EOS_ID
from fmsim.nano.tokens import Corpus
from fmsim.nano.training.trainer import Workers
from fmsim.tasks.woven import SHARING

UNORDERED = {"niah_multivalue": ", ", "vt": ","}  # what stands between the things of an answer
PASSES = 8  # to find out the model's order of four or five things
UNTAUGHT = ("text_recall",)  # needs a quote that occurs once
GRAIN = 128  # the length of a sequence is a multiple of it
AT_ONCE = 131_072  # tokens of one pass, or one sequence


class Asked(NamedTuple):
    """A whole sequence, uint16, and of each answer in it the task and the place [from, to)."""

    tokens: np.ndarray
    answers: list[tuple[str, int, int]]


def sequence(prompt: np.ndarray, questions: list[tuple[str, list[int], list[int]]]) -> Asked:
    """A prompt, then each question (task, tokens, answer) with its answer, filled up to whole
    blocks.
    """
    tokens, answers = prompt.tolist(), []
    for task, question, answer in questions:
        tokens += question
        answers.append((task, len(tokens), len(tokens) + len(answer)))
        tokens += answer
    tokens += [EOS_ID] * (-len(tokens) % GRAIN)
    return Asked(np.array(tokens, np.uint16), answers)


def sequences(
    task: str, length: int, samples: int, corpus: Corpus, seed: int, workers: Workers
) -> Iterator[Asked]:
    """Of ``samples`` contexts of ``length`` tokens with their questions, those of this process."""
    mine = range(workers.rank, samples, workers.count)
    if task != "families":
        for prompt, questions in prompts_of(task, length, samples, corpus, seed, mine):
            yield sequence(prompt, [(task, *question) for question in questions])
        return
    wanted = [name for name in SHARING if name not in UNTAUGHT]
    for sample in mine:
        [context] = tasks.build(wanted, length, sample, corpus, seed)
        rounds = [q for q in context.questions if q.task == "multi_round"]
        asked = [q for q in context.questions if q.task != "multi_round"] + rounds[-1:]
        yield sequence(context.tokens, [(q.task, list(q.tokens), list(q.answer)) for q in asked])


class Verdict(NamedTuple):
    """Of one answer: whether all of it is right, the share of its tokens that are, whether it is
    right in the order given.
    """

    task: str
    right: bool
    tokens: float
    in_order: bool


def judged(model: DeepseekV4, batch: list[Asked], device: torch.device) -> list[Verdict]:
    """A verdict on each answer of a batch of sequences, one sequence after another."""
    given = first_choices(model, batch, device)
    right = [
        [bool((choice == asked.tokens[start:end]).all()) for choice, (_, start, end) in rows]
        for asked, rows in ((asked, zip(made, asked.answers)) for asked, made in zip(batch, given))
    ]
    in_order = [list(row) for row in right]
    tokens, chosen = [asked.tokens.copy() for asked in batch], list(given)
    waiting = {
        row: [n for n, (task, _, _) in enumerate(asked.answers) if task in UNORDERED]
        for row, asked in enumerate(batch)
    }
    for _ in range(PASSES):
        turned: dict[int, list[int]] = {}
        for row, numbers in waiting.items():
            for number in (n for n in numbers if not right[row][n]):
                task, start, end = batch[row].answers[number]
                answer, choice = tokens[row][start:end], chosen[row][number]
                order = in_order_of(choice, answer, UNORDERED[task])
                if order is not None:
                    tokens[row][start:end] = order
                    turned.setdefault(row, []).append(number)
        if not turned:
            break
        again = [Asked(tokens[row], batch[row].answers) for row in turned]
        for row, made in zip(turned, first_choices(model, again, device), strict=True):
            chosen[row] = made
            for number in turned[row]:
                _, start, end = batch[row].answers[number]
                right[row][number] = bool((made[number] == tokens[row][start:end]).all())
        waiting = turned
    verdicts = []
    for row, asked in enumerate(batch):
        for number, (task, start, end) in enumerate(asked.answers):
            share = float((given[row][number] == asked.tokens[start:end]).mean())
            verdicts.append(Verdict(task, right[row][number], share, in_order[row][number]))
    return verdicts


def in_order_of(chosen: np.ndarray, answer: np.ndarray, between: str) -> np.ndarray | None:
    """The things of ``answer`` with another one where ``chosen`` first leaves it; None if no thing
    goes on as chosen there.
    """
    separator = list(say.piece(between))
    things = _split(answer[:-1].tolist(), separator)
    place = int(np.argmax(chosen != answer))
    ends = np.cumsum([len(thing) + len(separator) for thing in things])
    number = int(np.searchsorted(ends, place, side="right"))
    at = int(ends[number - 1]) if number else 0
    wanted = [*answer[at:place].tolist(), int(chosen[place])]
    for other in range(number + 1, len(things)):
        if things[other][: place - at + 1] == wanted:
            things[number], things[other] = things[other], things[number]
            joined = things[0]
            for thing in things[1:]:
                joined = [*joined, *separator, *thing]
            return np.array([*joined, answer[-1]], answer.dtype)
    return None


def _split(tokens: list[int], separator: list[int]) -> list[list[int]]:
    things: list[list[int]] = [[]]
    while tokens:
        if tokens[: len(separator)] == separator:
            things.append([])
            tokens = tokens[len(separator) :]
        else:
            things[-1].append(tokens[0])
            tokens = tokens[1:]
    return things


@torch.no_grad()
def first_choices(
    model: DeepseekV4, batch: list[Asked], device: torch.device
) -> list[list[np.ndarray]]:
    """Of each sequence and answer the tokens that the model would choose in its place."""
    longest = max(len(asked.tokens) for asked in batch)
    tokens = np.full((len(batch), longest), EOS_ID, np.int64)
    for row, asked in enumerate(batch):
        tokens[row, : len(asked.tokens)] = asked.tokens
    given = torch.from_numpy(tokens).to(device)
    positions = torch.arange(longest, device=device).expand_as(given)
    manner = forward.Manner(model.config.index_topk, index_loss=False)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = forward.train_forward(model, given, positions, manner).hidden
        places = [
            row * longest + place - 1
            for row, asked in enumerate(batch)
            for _, start, end in asked.answers
            for place in range(start, end)
        ]
        chosen = model.lm_head(hidden[torch.tensor(places, device=device)]).argmax(-1).cpu().numpy()
    parts = iter(np.split(chosen, np.cumsum([e - s for q in batch for _, s, e in q.answers])[:-1]))
    return [[next(parts) for _ in asked.answers] for asked in batch]


def examine(
    model: DeepseekV4, corpus: Corpus, plan: list[str], seed: int, seconds: float, workers: Workers
) -> Iterator[dict]:
    """A row for each task of the plan; what ``seconds`` leave no time for is not counted."""
    deadline = time.monotonic() + seconds
    for item in plan:
        task, length, samples = item.split(":")
        started, verdicts, read, contexts, seconds_read = time.monotonic(), [], 0, 0, 0.0
        mine = sequences(task, int(length), int(samples), corpus, seed, workers)
        abreast = max(1, AT_ONCE // int(length))
        while time.monotonic() < deadline and (batch := list(islice(mine, abreast))):
            made = time.monotonic()
            verdicts += judged(model, batch, workers.device)
            read, contexts = read + sum(len(asked.tokens) for asked in batch), contexts + len(batch)
            seconds_read += time.monotonic() - made
        parts = workers.gathered((verdicts, contexts, read))
        verdicts = [verdict for part in parts for verdict in part[0]]
        contexts, read = sum(part[1] for part in parts), sum(part[2] for part in parts)
        for name in dict.fromkeys(verdict.task for verdict in verdicts):
            own = [verdict for verdict in verdicts if verdict.task == name]
            order = round(sum(v.in_order for v in own) / len(own), 4)
            yield {
                "task": name, "tokens": int(length), "contexts": contexts, "questions": len(own),
                "exact": round(sum(v.right for v in own) / len(own), 4),
                "right_tokens": round(sum(v.tokens for v in own) / len(own), 4),
                "tokens_per_s": round(read / max(1e-9, seconds_read)),
                "seconds": round(time.monotonic() - started, 1),
            } | ({"in_order": order} if name in UNORDERED else {})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", nargs="+", help="TASK:LENGTH:SAMPLES")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of held_out.xz")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    workers = Workers(args.device)
    model = load_model(args.model, str(workers.device))
    corpus = corpora.load(args.corpus, "held_out")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    told = {"model": str(args.model), "device": f"{workers.count} x {gpu}", "seed": args.seed}
    told |= {"date": time.strftime("%F %T"), "command": " ".join(sys.argv)}
    for row in examine(model, corpus, args.plan, args.seed, args.seconds, workers):
        if workers.rank == 0:
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row | told) + "\n")
    workers.close()


if __name__ == "__main__":
    main()
