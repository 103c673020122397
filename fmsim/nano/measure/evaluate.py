"""How well a model answers, by task and length: ``python -m fmsim.nano.measure.evaluate MODEL
--corpus DIR single:8192:40 ...``.

``KIND:LENGTH:SAMPLES`` asks one question of each of SAMPLES prompts. ``many:LENGTH:SAMPLES`` puts
32 facts into each of SAMPLES prompts and asks for every one, which costs one prefill. An answer
counts if every token of it, given those before it, is the model's first choice: just what greedy
decoding would produce.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from fmsim.exec.decode.session import Session
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.loader import load_model
from fmsim.nano import tokens as corpora
from fmsim.nano import wording as say
from fmsim.nano.prompts import STREAM_FACTS, VALUE_DIGITS, evaluation_prompt
from fmsim.nano.tokens import Corpus
from fmsim.nano.weaving import weave

Question = tuple[list[int], list[int]]  # tokens that lead up to the answer, and the answer


def prompts_of(
    kind: str,
    length: int,
    samples: int,
    corpus: Corpus,
    seed: int,
    numbers: Iterable[int] | None = None,
) -> Iterator[tuple[np.ndarray, list[Question]]]:
    """Prompts of ``length`` tokens, and the questions put to each; asked facts stand at evenly
    spread depths. Of ``samples`` prompts those ``numbers`` alone, where they are given.
    """
    for sample in range(samples) if numbers is None else numbers:
        rng = np.random.default_rng((seed, length, sample))
        if kind == "many":
            yield _many(length, rng, corpus)
        else:
            prompt = evaluation_prompt(
                kind, length, rng, corpus, depth=0.97 * (sample + 0.5) / samples
            )
            yield prompt.tokens[:-1], [([int(prompt.tokens[-1])], list(prompt.answer))]


def _many(
    length: int, rng: np.random.Generator, corpus: Corpus
) -> tuple[np.ndarray, list[Question]]:
    words = say.wording(evaluation=True)
    keys = words.keys(rng, STREAM_FACTS)
    values = [words.value(rng, VALUE_DIGITS) for _ in range(STREAM_FACTS)]
    places = 0.97 * (np.arange(STREAM_FACTS) + 0.5) / STREAM_FACTS
    facts = [say.fact(rng, place, key, value) for place, key, value in zip(places, keys, values)]
    asked = [say.ask(1.0, keys[i], values[i]) for i in rng.permutation(STREAM_FACTS)]
    return weave(rng, corpus, length, facts).tokens, [
        (q.tokens[: q.answer[0]], q.tokens[q.answer[0] :]) for q in asked
    ]


@torch.inference_mode()
def right_answers(model: DeepseekV4, prompt: np.ndarray, questions: list[Question]) -> list[bool]:
    """Read the prompt, then all questions with their answers at once, and look at what would have
    been chosen.
    """
    asked = [token for question, answer in questions for token in [*question, *answer]]
    session = Session(model, len(prompt) + len(asked))
    session.read(prompt.astype(np.int64))
    tokens = torch.tensor([asked], device=session.device)
    chosen = model(tokens, session.cache)[0][0].argmax(-1).tolist()
    verdicts, place = [], 0
    for question, answer in questions:
        start = place + len(question)
        place = start + len(answer)
        verdicts.append(chosen[start - 1 : place - 1] == asked[start:place])
    return verdicts


def evaluate(
    model: DeepseekV4, corpus: Corpus, plan: list[str], seed: int, seconds: float
) -> Iterator[dict]:
    """A row an item of the plan; prompts that ``seconds`` leave no time for are not counted, and
    items without any left out.
    """
    deadline = time.monotonic() + seconds
    for item in plan:
        kind, length, samples = item.split(":")
        started, verdicts, prompts = time.monotonic(), [], 0
        for prompt, questions in prompts_of(kind, int(length), int(samples), corpus, seed):
            if time.monotonic() > deadline:
                break
            verdicts += right_answers(model, prompt, questions)
            prompts += 1
        if verdicts:
            yield {
                "task": kind,
                "tokens": int(length),
                "prompts": prompts,
                "questions": len(verdicts),
                "exact": round(sum(verdicts) / len(verdicts), 4),
                "seconds": round(time.monotonic() - started, 1),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", nargs="+", help="KIND:LENGTH:SAMPLES")
    parser.add_argument(
        "--corpus",
        type=Path,
        required=True,
        help="folder written by fmsim.nano.text.pack_tokens",
    )
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    model = load_model(args.model, args.device)
    for row in evaluate(
        model, corpora.load(args.corpus, "held_out"), args.plan, args.seed, args.seconds
    ):
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
