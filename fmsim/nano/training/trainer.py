"""Model and optimiser of one process; several processes, one a GPU, hold the same and add up their
gradients.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.whole import forward
from fmsim.nano.training.stages import Stage

ANSWER_WEIGHT = 3.0
INDEX_WEIGHT = 1.0
BALANCE_STEP = 1e-3  # of the experts' bias, a step towards equal load
LOSS_TOKENS = 16384  # whose logits are held at once


class Workers:
    """This process among those that train together, as torchrun's environment tells it."""

    def __init__(self, device: str):
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device, self.host = torch.device(device), None
        if device == "cuda":  # each process may see its own GPU alone
            self.device = torch.device(device, self.rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
            self.host = dist.new_group(backend="gloo")

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1:
            dist.destroy_process_group()

    def mean(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its mean over all processes."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        parts = [
            part.view_as(tensor)
            for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
        ]
        torch._foreach_copy_(tensors, parts)

    def first(self, number: float) -> float:
        """What the first process says, without waiting for a GPU."""
        if self.count == 1:
            return number
        told = torch.tensor([number], dtype=torch.float64)
        dist.broadcast(told, 0, group=self.host)
        return told.item()

    def gathered(self, thing) -> list:
        """Everybody's, in order of rank."""
        if self.count == 1:
            return [thing]
        things = [None] * self.count
        dist.all_gather_object(things, thing, group=self.host)
        return things


class Trainer:
    """float32 master weights, bf16 autocast, AdamW."""

    def __init__(self, model: DeepseekV4, workers: Workers):
        self.workers, self.device = workers, workers.device
        self.model = model.float().requires_grad_(True).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        fused = self.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)
        self.spoilt = torch.zeros(
            (), device=self.device
        )  # steps left out, for a gradient not finite

    def save(self, path: Path) -> None:
        """Weights and moments, written beside and then renamed; for this machine, since it is
        large.
        """
        torch.save(
            {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()},
            path.with_suffix(".tmp"),
        )
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """What `save` wrote."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])

    def train_step(
        self, stage: Stage, rate: float, top_k: int | None, batch: tuple[Tensor, Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """One update on tokens [B, S + 1], loss weights [B, S] of the predicted ones, positions [B,
        S].
        """
        tokens, weights, positions = batch
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        watched = forward.watch(weights, stage.length // 4)
        manner = forward.Manner(top_k, stage.calm, watched, stage.recompute)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            found = forward.train_forward(
                self.model, tokens[:, :-1].contiguous(), positions, manner
            )
            text, answer = next_token_loss(
                self.model.lm_head.weight, found.hidden, tokens[:, 1:].flatten(), weights.flatten()
            )
        (text + ANSWER_WEIGHT * answer + INDEX_WEIGHT * found.index_loss).backward()
        losses = {
            "text": text.detach(),
            "answer": answer.detach(),
            "index": found.index_loss.detach(),
        }
        loads = found.loads.detach()
        self.workers.mean([p.grad for p in self.model.parameters()] + [loads, *losses.values()])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        spoilt = (~torch.isfinite(norm)).float()
        if self.device.type == "cuda":
            self.optimiser.found_inf = spoilt  # the fused update leaves itself out, unasked
            self.optimiser.step()
        elif not spoilt:
            self.optimiser.step()
        self.spoilt += spoilt
        self.optimiser.zero_grad(set_to_none=True)
        self._balance(loads)
        return losses | {"norm": norm, "spoilt": self.spoilt}

    @torch.no_grad()
    def _balance(self, loads: Tensor) -> None:
        """Balance without a loss: raise the bias of experts below their share, lower it above."""
        for layer, load in zip(self.model.model.layers, loads, strict=True):
            if not layer.mlp.gate.hashed:
                bias = layer.mlp.gate.e_score_correction_bias
                bias += BALANCE_STEP * torch.sign(load.mean() - load)


def part_loss(head: Tensor, hidden: Tensor, targets: Tensor, weights: Tensor):
    """Summed cross-entropy of some tokens, hidden [T, D], and of it the part that answers."""
    loss = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
    return loss.sum(), (loss * weights).sum()


def next_token_loss(head: Tensor, hidden: Tensor, targets: Tensor, weights: Tensor):
    """Mean cross-entropy over all tokens and over answer tokens; ``LOSS_TOKENS`` logits at a time,
    made anew.
    """
    total, answers = hidden.new_zeros((), dtype=torch.float32), 0.0
    for part in zip(
        *(x.split(LOSS_TOKENS) for x in (hidden, targets, weights.float())), strict=True
    ):
        of_all, of_answers = checkpoint(part_loss, head, *part, use_reentrant=False)
        total, answers = total + of_all, answers + of_answers
    return total / len(targets), answers / weights.sum().clamp(min=1)
