"""How fast a nano reads a long prompt at once, and that it selects what it does chunk by chunk:
``python benchmarks/nano/prefill.py --corpus DIR [--model DIR] [LENGTH ...]``.

Tokens a second with the model's weights in bfloat16 and in float32, the second of two readings of
each length. At the first length both ways of reading are compared by what the next tokens select
and by the next 32 greedy tokens. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from fmsim.exec.decode import session as sessions
from fmsim.exec.decode.session import Session
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.loader import load_model
from fmsim.nano import tokens as corpora
from fmsim.nano.tokenizer import MODEL_FOLDER

NEXT_TOKENS = 32


def seconds_of(model: DeepseekV4, tokens: list[int]) -> float:
    """The second of two readings."""
    for _ in range(2):
        session = Session(model, len(tokens) + 1)
        torch.cuda.synchronize()
        began = time.perf_counter()
        session.read(tokens)
        torch.cuda.synchronize()
        taken = time.perf_counter() - began
    return taken


def answers(model: DeepseekV4, tokens: list[int]) -> tuple[list, list[int], float]:
    """What the token after the prompt selects by layer, the greedy tokens, and the seconds."""
    began, found = time.perf_counter(), []
    session = Session(model, len(tokens) + NEXT_TOKENS, None)
    session.read(tokens)
    session.observer = lambda start, count, accesses: found.append(accesses)
    chosen = session.generate(NEXT_TOKENS)
    ids = [set(access.ids[0, 0].tolist()) for access in found[0]]
    return ids, chosen, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lengths", type=int, nargs="*", default=[32_768, 131_072, 524_288])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of held_out.xz")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    text = corpora.load(args.corpus, "held_out").tokens
    about = {"device": torch.cuda.get_device_name(), "date": time.strftime("%F %T")}
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(args.model, "cuda", dtype)
        about |= {"model": str(args.model), "dtype": str(dtype).removeprefix("torch.")}
        for length in args.lengths:
            taken = seconds_of(model, text[:length].tolist())
            row = {"tokens": length, "seconds": round(taken, 3), "per_s": round(length / taken)}
            row |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
            print(json.dumps(row | about), flush=True)
        prompt = text[: args.lengths[0]].tolist()
        ids, chosen, _ = answers(model, prompt)
        sessions.WHOLE_TOKENS = len(prompt) + 1  # the other way
        plain_ids, plain_chosen, taken = answers(model, prompt)
        sessions.WHOLE_TOKENS = 16_384
        shared = [
            round(len(one & two) / len(two), 4) for one, two in zip(ids, plain_ids, strict=True)
        ]
        equal = sum(one == two for one, two in zip(chosen, plain_chosen, strict=True))
        row = {"compared": len(prompt), "selected_alike": shared, "greedy_alike": equal}
        print(
            json.dumps(row | {"of": NEXT_TOKENS, "chunks_s": round(taken, 2)} | about), flush=True
        )


if __name__ == "__main__":
    main()
