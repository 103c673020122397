"""Train the next nano: ``python -m fmsim.nano.training.train --corpus DIR --model DIR --out DIR``.

``--model`` is a Hugging Face directory to go on from, with a fresh optimiser. ``--resume FILE``
goes on with moments, from what an earlier call on this machine left. Several GPUs: one process a
GPU, each with torchrun's variables WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT;
``benchmarks/nano/train.sh`` starts them.

Every stage's losses go to OUT/log.jsonl, the weights at its end in bfloat16, in files of less than
14 MB, to OUT/model, with the moments to OUT/state.pt. A call that runs out of its ``--seconds``
ends its stage there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fmsim.errors import FmsimError
from fmsim.exec.model.weights.loader import load_model
from fmsim.nano.training.batches import stream_batches
from fmsim.nano.training.export import export
from fmsim.nano.training.stages import Stage, curriculum
from fmsim.nano.training.trainer import Trainer, Workers

LOG_STEPS = 10
COMPILING_STEPS = 2  # of a stage, not counted in its seconds


@dataclass(frozen=True)
class Settings:
    """Of one call: folders of tokens and of results, the seconds it may train, whether stages share
    those out (``fit``), the processes that make batches, the seed of text and top-k.
    """

    corpus: Path
    out: Path
    seconds: float = 3600
    fit: bool = False
    workers: int = 12
    seed: int = 0


def run(
    trainer: Trainer,
    stages: tuple[Stage, ...],
    settings: Settings,
    first_stage: int = 0,
    until: int | None = None,
) -> None:
    """The stages from ``first_stage`` to before ``until``, until they or the seconds are over; each
    leaves its state.
    """
    deadline = time.monotonic() + settings.seconds
    end = len(stages) if until is None else until
    for number in range(first_stage, end):
        share = stages[number].seconds / sum(stage.seconds for stage in stages[number:end])
        run_stage(trainer, stages[number], number, deadline, share, settings)
        if trainer.workers.rank == 0:
            export(trainer.model, settings.out / "model")
            trainer.save(settings.out / "state.pt")
        if trainer.workers.first(time.monotonic() - deadline) >= 0:
            break


def run_stage(
    trainer: Trainer,
    stage: Stage,
    number: int,
    deadline: float,
    of_rest: float,
    settings: Settings,
) -> None:
    """One stage; a row of ``log.jsonl`` every ``LOG_STEPS`` steps, means over them, and one at its
    end.

    Where ``settings.fit`` it takes ``of_rest`` of what is left once it is compiled, else its own
    seconds.
    """
    workers, sequences = trainer.workers, stage.batch_tokens // stage.length
    batches = _batches(trainer, stage, number, sequences, settings)
    step, began, since, share, given = 0, time.monotonic(), 0, 0.0, stage.seconds
    compiled, summed, first_logged = 0.0, {}, 0
    chance = torch.Generator().manual_seed(settings.seed * 1000 + number)
    if workers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while True:
        now = time.monotonic()
        if step == COMPILING_STEPS and settings.fit:
            given = of_rest * (deadline - now)
        if step >= COMPILING_STEPS:
            share = (now - began) / max(given, 1e-9)
        share = workers.first(1.0 if now >= deadline else share)  # or one would wait for the others
        if share >= 1:
            break
        rate = stage.learning_rate(step, share)
        top_k = stage.draw_top_k(torch.rand((), generator=chance).item())
        losses = trainer.train_step(stage, rate, top_k, next(batches))
        step += 1
        summed = {name: summed.get(name, 0.0) + loss for name, loss in losses.items()}
        if step == COMPILING_STEPS:
            _synchronise(workers.device)
            compiled, began, since = time.monotonic() - began, time.monotonic(), step
        if step % LOG_STEPS == 0 or step <= COMPILING_STEPS:
            row = {"stage": number, "length": stage.length, "step": step, "rate": round(rate, 7)}
            steps = step - first_logged
            row |= {name: round(total.item() / steps, 4) for name, total in summed.items()}
            row |= {"spoilt": int(losses["spoilt"].item())}
            summed, first_logged = {}, step
            seconds = time.monotonic() - began
            tokens = (step - since) * stage.batch_tokens * workers.count
            row |= {
                "seconds": round(seconds, 1),
                "tokens_per_s": round(tokens / max(seconds, 1e-9)),
            }
            _log(workers, row, settings.out)
            if not math.isfinite(row["text"]):
                raise FmsimError(f"stage {number} diverged: {row}; lower its rates")
    _synchronise(workers.device)
    seconds = time.monotonic() - began
    tokens = step * stage.batch_tokens * workers.count
    row = {"ended": number, "length": stage.length, "steps": step, "tokens": tokens}
    row |= {"seconds": round(seconds, 1), "compiling_s": round(compiled, 1)}
    if workers.device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    _log(workers, row, settings.out)


def _batches(
    trainer: Trainer, stage: Stage, number: int, sequences: int, settings: Settings
) -> Iterator[tuple[torch.Tensor, ...]]:
    seed = (settings.seed * 1000 + number) * 64 + trainer.workers.rank
    workers = settings.workers // trainer.workers.count
    loader = stream_batches(
        settings.corpus, stage.length, sequences, stage.mixture, seed, workers=workers
    )
    for batch in loader:
        yield tuple(part.to(trainer.device, non_blocking=True) for part in batch)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _log(workers: Workers, row: dict, out: Path) -> None:
    """To the file and to the screen, by the first process."""
    if workers.rank:
        return
    gpu = torch.cuda.get_device_name() if workers.device.type == "cuda" else "cpu"
    row |= {"device": f"{workers.count} x {gpu}"}
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder written by fmsim.nano.text.pack_tokens"
    )
    parser.add_argument("--model", type=Path, required=True, help="directory to begin from")
    parser.add_argument("--out", type=Path, required=True, help="folder of log, state and model")
    parser.add_argument("--curriculum", default="nano2", help="of fmsim.nano.training.stages")
    parser.add_argument("--stage", type=int, default=0, help="the stage to begin with")
    parser.add_argument("--until", type=int, help="the stage to end before")
    parser.add_argument("--resume", type=Path, help="state.pt of an earlier call on this machine")
    parser.add_argument("--seconds", type=float, default=3600, help="of the whole call's training")
    parser.add_argument("--fit", action="store_true", help="share out the seconds among stages")
    parser.add_argument("--workers", type=int, default=12, help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    workers = Workers(args.device)
    torch.manual_seed(args.seed * 64 + workers.rank)
    trainer = Trainer(load_model(args.model), workers)
    if args.resume:
        trainer.load(args.resume)
    _log(workers, {"command": " ".join(sys.argv), "date": time.strftime("%F %T")}, args.out)
    settings = Settings(args.corpus, args.out, args.seconds, args.fit, args.workers, args.seed)
    run(trainer, curriculum(args.curriculum), settings, args.stage, args.until)
    _log(workers, {"done": True}, args.out)
    workers.first(0.0)
    workers.close()


if __name__ == "__main__":
    main()
