"""Train lightning indexers beside a frozen dense model: ``python -m fmsim.experiments.witness.train
--model MODEL --tokens DIR --out indexers.safetensors``.

A step reads one text of ``--context`` tokens with the model's own attention, and every layer's
indexer learns from some of its queries, drawn at random. Losses go to OUT.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmsim.experiments.witness import text
from fmsim.experiments.witness.frozen import FrozenAttention, FrozenModel, before, dense
from fmsim.experiments.witness.indexer import IndexerShape, LightningIndexers, divergence

LOG_STEPS = 20


@dataclass(frozen=True)
class Lessons:
    """Tokens of a text, queries of it that are learnt from, steps at most, seconds at most (the
    rate falls to 0 by whichever comes first), how positions are stretched
    (`FrozenModel.stretched`), AdamW's peak rate, seed of weights and texts.
    """

    context: int = 8192
    queries: int = 1024
    steps: int = 100_000
    seconds: float = 300.0
    positions: str = "own"
    learning_rate: float = 2e-3
    warm_up: float = 0.05
    seed: int = 0


class IndexerTraining:
    """Indexers, their optimiser, and the model that they stand beside."""

    def __init__(self, model: FrozenModel, indexers: LightningIndexers, lessons: Lessons) -> None:
        self.model, self.indexers, self.lessons = model, indexers, lessons
        self.optimizer = torch.optim.AdamW(
            indexers.parameters(), lr=lessons.learning_rate, weight_decay=0.0
        )
        self.random = np.random.default_rng(lessons.seed)
        self.step, self.started = 0, time.monotonic()

    @property
    def share_done(self) -> float:
        """Of the steps or of the seconds, whichever is more."""
        spent = (time.monotonic() - self.started) / self.lessons.seconds
        return min(1.0, max(spent, self.step / self.lessons.steps))

    def advance(self, tokens: np.ndarray) -> Tensor:
        """One step on a text of ``tokens``, drawn at random -> the loss of each layer [L]."""
        lessons = self.lessons
        done = self.share_done
        rate = min(done / lessons.warm_up, 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimizer.param_groups:
            group["lr"] = lessons.learning_rate * max(rate, 1e-3)
        first = self.random.integers(len(tokens) - lessons.context + 1)
        count = min(lessons.queries, lessons.context)
        queries = self.random.choice(lessons.context, count, replace=False)
        rows = torch.from_numpy(np.sort(queries)).to(self.model.device)
        losses: list[Tensor] = []

        def attend(attention: FrozenAttention) -> Tensor:
            losses.append(self._learn(attention, rows))
            return dense(attention)

        self.model.read(tokens[first : first + lessons.context], attend)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return torch.stack(losses)

    @torch.enable_grad()
    def _learn(self, attention: FrozenAttention, rows: Tensor) -> Tensor:
        target = attention.probabilities(rows).mean(0)
        keys = self.indexers.keys(attention)
        loss = divergence(self.indexers.scores(attention, rows, keys), target, before(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.indexers.layers[attention.layer].parameters(), 1.0)
        return loss.detach()


def train(
    model: FrozenModel,
    tokens: np.ndarray,
    shape: IndexerShape,
    lessons: Lessons,
    log: Path,
    start: Path | None = None,
) -> tuple[LightningIndexers, dict[str, Any]]:
    """Indexers for every layer, from the weights in ``start`` or from random ones, and how they
    came about.
    """
    torch.manual_seed(lessons.seed)
    config = model.config
    rope = model.stretched(lessons.positions)
    model.rotate_by(rope)
    indexers = LightningIndexers(config.num_hidden_layers, config.hidden_size, shape, rope)
    if start is not None:
        indexers.load_state_dict(LightningIndexers.load(start, "cpu").state_dict())
    run = IndexerTraining(model, indexers.to(model.device), lessons)
    recent: list[Tensor] = []
    log.write_text("")
    while run.share_done < 1.0:
        recent.append(run.advance(tokens))
        if run.step % LOG_STEPS == 0 or run.share_done == 1.0:
            mean = torch.stack(recent).mean(0).tolist()
            recent = []
            line = {
                "step": run.step,
                "seconds": round(time.monotonic() - run.started, 1),
                "loss": round(float(np.mean(mean)), 4),
                "by_layer": [round(value, 4) for value in mean],
            }
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
    about = asdict(lessons) | {
        "start": start and start.name,
        "steps": run.step,
        "seconds": round(time.monotonic() - run.started, 1),
        "tokens": len(tokens),
        "last_loss": line["loss"],
    }
    return indexers, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory or GGUF file")
    parser.add_argument(
        "--tokens", type=Path, required=True, help="of fmsim.experiments.witness.text"
    )
    parser.add_argument("--out", type=Path, required=True, help="indexers to write (.safetensors)")
    parser.add_argument("--start", type=Path, help="indexers of this shape to go on from")
    for name, value in asdict(Lessons()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    for name, value in asdict(IndexerShape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    lessons = Lessons(**{name: getattr(args, name) for name in asdict(Lessons())})
    shape = IndexerShape(**{name: getattr(args, name) for name in asdict(IndexerShape())})
    model = FrozenModel.load(args.model, args.device)
    tokens = text.load(args.tokens, "train")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out.with_suffix(".jsonl")
    indexers, about = train(model, tokens, shape, lessons, log, args.start)
    indexers.save(args.out, about)
    print(f"{args.out}: {about}")


if __name__ == "__main__":
    main()
