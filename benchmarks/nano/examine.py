"""How well a model answers: ``python benchmarks/nano/examine.py MODEL --corpus DIR
single:8192:40 ...``.

``TASK:LENGTH:SAMPLES``. The task is one of `fmsim.nano.measure.evaluate` ("single", "many", ...) or
"families": all families of `fmsim.tasks` that share a context. A prompt, its questions and their
right answers are one sequence, which is read in one pass by the training's forward, in bfloat16 and
with the indexer's selection, as at inference; so a context's questions stand one behind the other,
each after the right answers of those before. An answer counts if every token of it is the model's
first choice, given those before it: just what greedy decoding would produce.
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
from fmsim.nano import tokens as corpora
from fmsim.nano.measure.evaluate import prompts_of
from fmsim.nano.tokenizer import EOS_ID
from fmsim.nano.tokens import Corpus
from fmsim.nano.training import forward
from fmsim.nano.training.trainer import Workers
from fmsim.tasks.woven import SHARING

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


@torch.no_grad()
def judged(
    model: DeepseekV4, batch: list[Asked], device: torch.device
) -> list[tuple[str, bool, float]]:
    """Of each answer its task, whether all of it is right, and the share of its tokens that are."""
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
    verdicts, at = [], 0
    for asked in batch:
        for task, start, end in asked.answers:
            right = chosen[at : at + end - start] == asked.tokens[start:end]
            verdicts.append((task, bool(right.all()), float(right.mean())))
            at += end - start
    return verdicts


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
        for name in dict.fromkeys(verdict[0] for verdict in verdicts):
            own = [verdict for verdict in verdicts if verdict[0] == name]
            yield {
                "task": name, "tokens": int(length), "contexts": contexts, "questions": len(own),
                "exact": round(sum(v[1] for v in own) / len(own), 4),
                "right_tokens": round(sum(v[2] for v in own) / len(own), 4),
                "tokens_per_s": round(read / max(1e-9, seconds_read)),
                "seconds": round(time.monotonic() - started, 1),
            }  # fmt: skip


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
