"""Train ``nano``: ``python -m fmsim.nano.training.train --corpus DIR --out DIR``.

A curriculum of growing lengths: dense attention first, while the lightning indexer learns by KL
what the attention looks at, then only what the indexer picks. Every stage ends in a checkpoint; a
call that runs out of its ``--minutes`` leaves one too, and ``--resume`` goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors.torch import load_file, save_file

from fmsim.errors import FmsimError
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA
from fmsim.files import replacing, write_text
from fmsim.nano.config import initialise, nano_config
from fmsim.nano.training.batches import stream_batches

ANSWER_WEIGHT = 2.0
INDEX_WEIGHT = 1.0
BALANCE_STEP = 1e-3  # of the experts' bias, a step towards equal load
LOSS_TOKENS = 8192  # logits held at once


@dataclass(frozen=True)
class Stage:
    """One length of the curriculum; ``mixture`` names a task mixture of ``fmsim.nano.weaving``.

    The stage ends after ``steps``, or after ``seconds`` counted from its first step (which
    compiles), whichever is first; the learning rate reaches ``final_lr`` then. Attention is
    recomputed in the backward pass at lengths where it would not fit otherwise (``recompute``).
    """

    length: int
    steps: int
    seconds: float
    batch_tokens: int
    peak_lr: float
    final_lr: float
    sparse: bool
    mixture: str
    warmup: int = 100
    recompute: bool = False


CURRICULUM = (
    Stage(1024, 2700, 400, 32768, 2e-3, 2e-3, sparse=False, mixture="dense"),
    Stage(4096, 1200, 105, 65536, 1.5e-3, 6e-4, sparse=True, mixture="all_skipping", warmup=50),
    Stage(
        32768,
        600,
        55,
        65536,
        6e-4,
        2e-5,
        sparse=True,
        mixture="all_skipping",
        warmup=10,
        recompute=True,
    ),
)


class Trainer:
    """Model, optimiser and place in the curriculum; float32 masters, bf16 autocast."""

    def __init__(self, device: str, seed: int, compiled: bool):
        self.device, self.seed = device, seed
        self.model = DeepseekV4(nano_config()).to(device)
        initialise_on_cpu(self.model, seed)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device == "cuda")
        self.stage, self.step, self.tokens_seen = 0, 0, 0
        self.stage_started: float | None = None
        if compiled:
            compile_layers(self.model)

    def save(self, directory: Path) -> None:
        """Weights and both moments, one file each, written beside and then renamed."""
        directory.mkdir(parents=True, exist_ok=True)
        state = {
            name: (
                {k: self.optimiser.state[p][k] for k in ("exp_avg", "exp_avg_sq", "step")}
                if p in self.optimiser.state
                else {}
            )
            for name, p in self.model.named_parameters()
        }
        moments = {f"{name}/{k}": v for name, parts in state.items() for k, v in parts.items()}
        place = {
            "stage": self.stage,
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "seed": self.seed,
        }
        for filename, tensors in (("weights", self.model.state_dict()), ("moments", moments)):
            with replacing(directory / f"{filename}.safetensors") as beside:
                save_file(tensors, beside)
        write_text(directory / "place.json", json.dumps(place))

    def load(self, directory: Path) -> None:
        self.model.load_state_dict(load_file(directory / "weights.safetensors", device=self.device))
        if (directory / "moments.safetensors").exists():
            moments = load_file(directory / "moments.safetensors", device=self.device)
            for name, p in self.model.named_parameters():
                if f"{name}/step" in moments:
                    self.optimiser.state[p] = {
                        k: moments[f"{name}/{k}"] for k in ("exp_avg", "exp_avg_sq")
                    }
                    self.optimiser.state[p]["step"] = (
                        moments[f"{name}/step"].cpu()
                        if self.device == "cpu"
                        else moments[f"{name}/step"]
                    )
        place = json.loads((directory / "place.json").read_text())
        self.stage = place["stage"]
        self.step = place["step"]
        self.tokens_seen = place["tokens_seen"]

    def train_step(self, stage: Stage, tokens, weights, positions) -> dict[str, torch.Tensor]:
        """One update on tokens [B, S + 1], loss weights [B, S] of the predicted tokens, positions
        [B, S].
        """
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(stage, self.step, self.stage_share(stage))
        for layer in self.model.model.layers:
            layer.recompute_attention = stage.recompute
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:]
        with torch.autocast(self.device, dtype=torch.bfloat16):
            hidden, aux = self.model.train_forward(inputs, positions, stage.sparse)
            text_loss, answer_loss = chunked_loss(self.model.lm_head, hidden, targets, weights)
        index_loss = torch.stack([a.index_loss for a in aux if a.index_loss is not None]).sum()
        (text_loss + ANSWER_WEIGHT * answer_loss + INDEX_WEIGHT * index_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._balance(aux)
        self.step += 1
        self.tokens_seen += inputs.numel()
        return {"text": text_loss, "answer": answer_loss, "index": index_loss, "norm": norm}

    def stage_share(self, stage: Stage) -> float:
        """How much of the stage is done, by steps or by seconds."""
        seconds = 0.0 if self.stage_started is None else time.monotonic() - self.stage_started
        return max(self.step / stage.steps, seconds / stage.seconds)

    @torch.no_grad()
    def _balance(self, aux) -> None:
        """Aux-loss-free balance: raise the bias of experts below their share, lower it above."""
        for layer, parts in zip(self.model.model.layers, aux):
            if not layer.mlp.gate.hashed:
                load = parts.expert_load
                layer.mlp.gate.e_score_correction_bias += BALANCE_STEP * torch.sign(
                    load.mean() - load
                )


def compile_layers(model: DeepseekV4) -> None:
    """Compile what is worth its half minute: all that works token by token, and the attention of
    CSA layers, whose shapes alone change with the length.
    """
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        parts = [(layer, "_enter_attention"), (layer, "_feed_forward")]
        if layer.self_attn.kind == CSA:
            parts.append((layer.self_attn, "train_forward"))
        for owner, name in parts:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))


def initialise_on_cpu(model: DeepseekV4, seed: int) -> None:
    """The same start on every device: drawn on the CPU, then copied."""
    twin = DeepseekV4(model.config)
    initialise(twin, seed)
    model.load_state_dict(twin.state_dict())


def chunked_loss(head, hidden, targets, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over all tokens and over answer tokens; logits of ``LOSS_TOKENS`` at a
    time, recomputed.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    answers = total.clone()

    def part(h, t, w):
        loss = F.cross_entropy(head(h).float(), t, reduction="none")
        return loss.sum(), (loss * w).sum()

    flat = hidden.flatten(0, 1), targets.flatten(), weights.flatten().float()
    for h, t, w in zip(*(x.split(LOSS_TOKENS) for x in flat)):
        a, b = torch.utils.checkpoint.checkpoint(part, h, t, w, use_reentrant=False)
        total, answers = total + a, answers + b
    return total / targets.numel(), answers / weights.sum().clamp(min=1)


def learning_rate(stage: Stage, step: int, share: float) -> float:
    """Linear warm-up in steps, then a cosine from the stage's peak to its final rate over the share
    of it that is done.
    """
    cosine = stage.final_lr + (stage.peak_lr - stage.final_lr) * 0.5 * (
        1 + math.cos(math.pi * min(1.0, share))
    )
    return min(cosine, stage.peak_lr * (step + 1) / stage.warmup)


def run(
    trainer: Trainer, corpus: Path, out: Path, minutes: float, workers: int, curriculum=CURRICULUM
) -> bool:
    """Train until the curriculum or the time ends; True if it is complete.

    Losses go to ``out/log.jsonl``.
    """
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    while trainer.stage < len(curriculum):
        stage = curriculum[trainer.stage]
        batches = stream_batches(
            corpus,
            stage.length,
            stage.batch_tokens // stage.length,
            stage.mixture,
            seed=trainer.seed * 1000 + trainer.stage,
            start=trainer.step,
            workers=workers,
        )
        trainer.stage_started = None
        finished = run_stage(trainer, stage, batches, deadline, out)
        if not finished:
            trainer.save(out / "checkpoint")
            return False
        trainer.stage, trainer.step = trainer.stage + 1, 0
        trainer.save(out / "checkpoint")
    return True


def run_stage(trainer: Trainer, stage: Stage, batches, deadline: float, out: Path) -> bool:
    since = trainer.tokens_seen
    with (out / "log.jsonl").open("a") as log:
        for tokens, weights, positions in batches:
            if trainer.stage_share(stage) >= 1:
                return True
            if time.monotonic() > deadline:
                return False
            losses = trainer.train_step(
                stage,
                *(x.to(trainer.device, non_blocking=True) for x in (tokens, weights, positions)),
            )
            if trainer.stage_started is None:
                trainer.stage_started = time.monotonic()
                since = trainer.tokens_seen
            if trainer.step % 20 == 0 or trainer.step <= 3:
                row = {k: round(v.item(), 4) for k, v in losses.items()}
                if not math.isfinite(row["norm"]):
                    raise FmsimError(
                        f"training diverged in stage {trainer.stage} at step {trainer.step}: {row};"
                        " lower the rate"
                    )
                seconds = time.monotonic() - trainer.stage_started
                row |= {
                    "length": stage.length,
                    "step": trainer.step,
                    "lr": trainer.optimiser.param_groups[0]["lr"],
                    "seconds": round(seconds, 1),
                    "tokens": trainer.tokens_seen,
                    "tokens_per_s": round((trainer.tokens_seen - since) / max(seconds, 1e-9)),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                if trainer.step % 100 == 0 or trainer.step <= 3:
                    print(row, flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder written by fmsim.nano.training.corpus"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--resume", type=Path, help="checkpoint folder to go on from")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop and save after this long")
    parser.add_argument("--workers", type=int, default=12, help="processes that build batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(args.device, args.seed, compiled=args.device == "cuda")
    if args.resume:
        trainer.load(args.resume)
    done = run(trainer, args.corpus, args.out, args.minutes, args.workers)
    print(
        "curriculum complete"
        if done
        else (
            f"out of time in stage {trainer.stage} at step {trainer.step}; call again with --resume"
        )
    )


if __name__ == "__main__":
    main()
