"""Contexts for memory indexers to learn from: nano reads a prompt and what follows it, all given.

    python benchmarks/nano/contexts.py --corpus TOKENS --out DIR --validation 6 --training 40

A recorded trace decodes its answers one token at a time. Here the right answers are given, so that
a stream is read in one chunk, and a context of 512K tokens takes about two seconds on a GPU. All
text is of the training split: its last documents, `VALIDATION` of the tokens, are for validation
alone. A context is a file SPLIT-LENGTH-SEED.pt, a dictionary of tensors on the CPU:

- ``length`` tokens of the prompt, ``seed``; ``keys`` float16 [L, E, D] the index keys of its
  entries, ``prompt_mass`` float16 [L, E] the attention of its last QUERIES tokens;
- ``streams``: for each kind, ``ids`` int32 and ``mass`` float16 [T, L, K] what each step selected,
  ``hidden`` float16 [T / 64, L, H] the states before the windows, ``keys`` of the later entries.

Processes share the work: each takes the next context that nobody has taken.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmsim.exec.decode.prompt import PROMPT_QUERIES as QUERIES
from fmsim.exec.decode.session import Session
from fmsim.exec.model.cache import Access
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.loader import load_model
from fmsim.exec.runs.stream import Stream
from fmsim.nano import tokens as corpora
from fmsim.nano.prompts import streams_of_one_context
from fmsim.nano.tokenizer import MODEL_FOLDER
from fmsim.nano.tokens import Corpus
from fmsim.trace import ENTRY_TOKENS, TAU

LENGTHS = (524_288, 131_072, 32_768, 8192)
VALIDATION = 0.15
Job = tuple[str, int, int]  # split, length, seed


def splits(corpus: Corpus) -> dict[str, Corpus]:
    """Training and validation text, whole documents each."""
    border = int(np.searchsorted(corpus.documents, (1 - VALIDATION) * len(corpus.tokens)))
    parts = {"training": (0, border), "validation": (border, len(corpus.documents) - 1)}
    return {name: _documents(corpus, *ends) for name, ends in parts.items()}


def _documents(corpus: Corpus, first: int, last: int) -> Corpus:
    ends = corpus.documents[first : last + 1]
    return Corpus(corpus.tokens[ends[0] : ends[-1]], ends - ends[0], corpus.names[first:last])


class Chunks:
    """Observes a reading: the accesses of all chunks that reach beyond ``first``."""

    def __init__(self, first: int = 0):
        self.first = first
        self.seen: list[tuple[int, list[Access]]] = []

    def __call__(self, start: int, tokens: int, accesses: list[Access]) -> None:
        if start + tokens > self.first:
            self.seen.append((start, accesses))

    def all(self, part: str) -> Tensor:
        """One part of the accesses, all chunks' tokens in a row: [T, L, ...]."""
        chunks = [[getattr(access, part)[0] for access in accesses] for _, accesses in self.seen]
        return torch.cat([torch.stack(layers, 1) for layers in chunks])


def read_context(
    model: DeepseekV4, corpus: Corpus, length: int, seed: int, steps: int
) -> dict[str, Any]:
    """The three kinds of stream after one prompt, of ``steps`` tokens each."""
    streams = streams_of_one_context(length, np.random.default_rng((seed, length)), corpus, steps)
    chunks = Chunks(length - QUERIES)
    session = Session(model, length + steps, chunks, chunks.first)
    session.read(streams[0].prompt.astype(np.int64))
    mass, entries = [], length // ENTRY_TOKENS
    for layer in range(len(chunks.seen[-1][1])):
        found = torch.zeros(entries, device=session.device)
        for start, accesses in chunks.seen:
            rows = slice(max(0, chunks.first - start), None)
            ids, seen = accesses[layer].ids[0, rows], accesses[layer].mass[0, rows]
            found.index_add_(0, ids[ids >= 0], seen[ids >= 0].float())
        mass.append(found)
    newest = torch.stack([access.hidden[0, -1] for access in chunks.seen[-1][1]])
    return {
        "length": length,
        "seed": seed,
        "keys": _keys(session, 0).half().cpu(),
        "prompt_mass": torch.stack(mass).half().cpu(),
        "streams": [_follow(session, stream, steps, newest) for stream in streams],
    }


def _follow(session: Session, stream: Stream, steps: int, newest: Tensor) -> dict[str, Any]:
    """What the stream's tokens select, its right answers given; ``newest`` [L, H] is the state
    before them.
    """
    given = [int(token) for turn in stream.turns for token in (*turn.forced, *turn.answer)]
    fork, chunks = copy.copy(session), Chunks()
    fork.cache, fork.observer = copy.deepcopy(session.cache), chunks
    fork.read(given[:steps])
    hidden = chunks.all("hidden")[TAU - 1 : -1 : TAU]
    return {
        "kind": stream.kind,
        "ids": chunks.all("ids").int().cpu(),
        "mass": chunks.all("mass").half().cpu(),
        "hidden": torch.cat((newest[None], hidden)).half().cpu(),
        "keys": _keys(fork, len(stream.prompt) // ENTRY_TOKENS).half().cpu(),
    }


def _keys(session: Session, first: int) -> Tensor:
    """Index keys of the closed entries from ``first`` on, [L, E, D]."""
    states = [layer.index for layer in session.cache.layers if layer.index is not None]
    return torch.stack([state.entries[0, first : state.closed] for state in states])


def work(
    jobs: Sequence[Job], tokens: Path, out: Path, device: str, steps: int, until: float
) -> None:
    """Write contexts that nobody has taken, until none is left or the time is over."""
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_model(MODEL_FOLDER, device, dtype)
    texts = splits(corpora.load(tokens, "train"))
    for split, length, seed in jobs:
        path = out / f"{split}-{length}-{seed}.pt"
        if time.time() > until:
            return
        try:
            os.close(os.open(f"{path}.taken", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        torch.save(read_context(model, texts[split], length, seed, steps), f"{path}.part")
        os.rename(f"{path}.part", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train.xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of the prompts")
    parser.add_argument("--training", type=int, default=32, help="contexts of each length")
    parser.add_argument("--validation", type=int, default=6, help="contexts of each length")
    parser.add_argument("--steps", type=int, default=640, help="tokens after the prompt")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no context after these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        (split, length, seed)
        for split, count in (("validation", args.validation), ("training", args.training))
        for seed in range(1, count + 1)
        for length in args.lengths
    ]
    given = (jobs, args.corpus, args.out, args.device, args.steps, time.time() + args.seconds)
    spawning = multiprocessing.get_context("spawn")
    workers = [spawning.Process(target=work, args=given) for _ in range(args.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker failed")


if __name__ == "__main__":
    main()
