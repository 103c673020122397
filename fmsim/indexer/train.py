"""Backbone-free training of the memory indexer, from traces alone (arXiv 2606.09079, section 3.2).

Queries are the windows' starts of the training traces. All entries visible to a query are scored; the loss sees its
positives, negatives sampled at random, and hard negatives: those that the indexer itself scores highest. The layers
learn jointly, through the maximum of their logits, which is what a resident set is chosen by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.network import MemoryIndexer
from fmsim.indexer.scorer import ScorerConfig, rotation
from fmsim.indexer.windows import Windows

FOCAL_GAMMA = 2.0
PRODUCTS_PER_BATCH = 2**26  # [queries, heads, entries] of one layer, 256 MiB in float32: bounds memory
RECALL_SHARES = (0.05, 0.10)


@dataclass(frozen=True)
class TrainOptions:
    """``random_negatives`` and ``hard_negatives`` a positive; ``loss`` "focal" or "infonce"; ``mass_power``: a positive
    weighs its attention mass to this power (0 = all alike); ``kept_share``: the share of entries that the recommended
    threshold keeps on the held-out queries; ``patience``: evaluations without a better recall before stopping."""

    heads: int = 32
    rank: int = 192
    loss: str = "infonce"
    random_negatives: float = 3.0
    hard_negatives: float = 1.0
    mass_power: float = 1.0
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    steps: int = 2000
    traces_per_step: int = 4
    evaluate_every: int = 100
    patience: int = 5
    kept_share: float = 0.10
    seed: int = 0


class Progress(NamedTuple):
    """One evaluation: mean loss since the last; of held-out queries at each of RECALL_SHARES, the share of golden
    entries and of attention mass kept."""

    step: int
    loss: float
    recall: tuple[float, ...]
    mass_kept: tuple[float, ...]

    @property
    def merit(self) -> float:
        """What the best parameters have most of. Mass counts too: where golden entries are many, all rankings recall alike."""
        return sum(self.recall) + sum(self.mass_kept)


class Batch(NamedTuple):
    """`Windows` on the training device."""

    rotation: tuple[Tensor, Tensor]  # cosine and sine of the queries' angles, float32 [W, rope_dims / 2]
    hidden: Tensor
    keys: Tensor
    visible: Tensor  # bool [W, E]
    golden: Tensor  # bool [W, E]
    mass: Tensor  # float32 [W, E]
    most_positives: int  # of a query


def train(
    training: Sequence[Windows],
    held_out: Sequence[Windows],
    config: ScorerConfig,
    options: TrainOptions,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda progress: None,
) -> Checkpoint:
    """Train retrievers for every CSA layer of the traces; the parameters of the best held-out recall are returned.

    The same inputs, options and device give the same parameters. Raises FmsimError where there is nothing to learn
    from, or where the traces' widths differ.
    """
    started = time.perf_counter()
    batches, held_out_batches = (_batches(part, config, options.heads, device) for part in (training, held_out))
    if not batches or not held_out_batches:
        raise FmsimError("indexer train: needs golden entries in training and in held-out traces; these hold none")
    torch.manual_seed(options.seed)
    _, layers, hidden_size = training[0].hidden.shape
    head_dim = training[0].keys.shape[2]
    model = MemoryIndexer(list(range(layers)), hidden_size, options.heads, head_dim, options.rank, config).to(device)
    best, best_weights = None, model.weights()
    for progress in _optimise(model, batches, held_out_batches, options):
        report(progress)
        if best is None or progress.merit > best.merit:
            best, best_weights = progress, model.weights()
        elif progress.step - best.step >= options.patience * options.evaluate_every:
            break
    _restore(model, best_weights)
    record = {
        "options": asdict(options),
        "traces": [windows.name for windows in training],
        "held_out": [windows.name for windows in held_out],
        "step": best.step,
        "recall": dict(zip(map(str, RECALL_SHARES), best.recall, strict=True)),
        "mass_kept": dict(zip(map(str, RECALL_SHARES), best.mass_kept, strict=True)),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return Checkpoint(best_weights, config, threshold_of_share(model, held_out_batches, options.kept_share), record)


def _optimise(model: MemoryIndexer, batches: list[Batch], held_out: list[Batch], options: TrainOptions):
    """AdamW over ``options.steps`` steps, warm-up then cosine; yields a Progress an evaluation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    warm_up = max(options.steps // 20, 1)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + np.cos(np.pi * max(step - warm_up, 0) / max(options.steps - warm_up, 1)))
        return min((step + 1) / warm_up, cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = np.random.default_rng(options.seed)
    generator = torch.Generator(device=batches[0].hidden.device).manual_seed(options.seed)
    losses = []
    for step in range(1, options.steps + 1):
        picked = order.choice(len(batches), size=min(options.traces_per_step, len(batches)), replace=False)
        for index in picked:
            loss = _loss(model, batches[index], options, generator) / len(picked)
            loss.backward()
            losses.append(loss.detach() * len(picked))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % options.evaluate_every == 0 or step == options.steps:
            yield Progress(step, torch.stack(losses).mean().item(), *recall_at(model, held_out, RECALL_SHARES))
            losses = []


def _loss(model: MemoryIndexer, batch: Batch, options: TrainOptions, generator: torch.Generator) -> Tensor:
    logits = model(batch.hidden, batch.rotation, batch.keys).amax(0)
    negatives = _negatives(logits.detach(), batch, options, generator)
    weights = batch.golden * (batch.mass.clamp(min=1e-6) ** options.mass_power)
    weights = weights / weights.sum(-1, keepdim=True) * batch.golden.sum(-1, keepdim=True)  # mean 1 a positive
    if options.loss == "infonce":
        return infonce_loss(logits, weights, batch.golden | negatives)
    return focal_loss(logits - model.margin, weights, negatives)


def _negatives(logits: Tensor, batch: Batch, options: TrainOptions, generator: torch.Generator) -> Tensor:
    """bool [W, E]: random negatives by a coin an entry, and the negatives that score highest."""
    candidates = batch.visible & ~batch.golden
    positives = batch.golden.sum(-1, keepdim=True)
    chance = options.random_negatives * positives / candidates.sum(-1, keepdim=True).clamp(min=1)
    chosen = torch.rand(logits.shape, device=logits.device, generator=generator) < chance
    most = min(int(options.hard_negatives * batch.most_positives) + 1, logits.shape[1])
    highest = logits.masked_fill(~candidates, -torch.inf).topk(most, dim=-1).values
    hard = (options.hard_negatives * positives).long().clamp(max=most - 1)
    return candidates & (chosen | (logits > highest.gather(1, hard)))


def focal_loss(logits: Tensor, positive_weights: Tensor, negatives: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002, gamma 2) a positive: logits, weights (0 = no positive) [W, E], negatives bool."""
    score = logits.sigmoid()
    missed = positive_weights * (1 - score) ** FOCAL_GAMMA * F.softplus(-logits)
    false = negatives * score**FOCAL_GAMMA * F.softplus(logits)
    return (missed + false).sum() / positive_weights.sum()


def infonce_loss(logits: Tensor, positive_weights: Tensor, listed: Tensor) -> Tensor:
    """InfoNCE with several positives: cross-entropy of the softmax over ``listed`` entries with the positives' share."""
    log_shares = logits.masked_fill(~listed, -torch.inf).log_softmax(-1)
    target = positive_weights / positive_weights.sum(-1, keepdim=True)
    return -(target * log_shares.masked_fill(~listed, 0.0)).sum(-1).mean()


@torch.no_grad()
def recall_at(model: MemoryIndexer, batches: list[Batch], shares: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Means over queries of what the best ``share`` of the visible entries holds: of positives, and of mass, by share."""
    found: list[Tensor] = []
    for batch in batches:
        logits = model(batch.hidden, batch.rotation, batch.keys).amax(0).masked_fill(~batch.visible, -torch.inf)
        order = logits.argsort(dim=1, descending=True, stable=True)
        place = torch.arange(order.shape[1], device=order.device)
        kept = [place < torch.ceil(share * batch.visible.sum(1, keepdim=True)) for share in shares]
        wanted = [part / part.sum(1, keepdim=True) for part in (batch.golden.float(), batch.mass)]
        found.append(torch.stack([torch.stack([(part.gather(1, order) * k).sum(1) for k in kept]) for part in wanted]))
    golden, mass = torch.cat(found, dim=2).mean(2).tolist()  # of [2, shares, queries]
    return tuple(golden), tuple(mass)


@torch.no_grad()
def threshold_of_share(model: MemoryIndexer, batches: list[Batch], share: float) -> float:
    """The score above which a query of ``batches`` has, on average, ``share`` of its visible entries."""
    scores, weights = [], []
    for batch in batches:
        logits = model(batch.hidden, batch.rotation, batch.keys).amax(0)
        scores.append(logits[batch.visible])
        weights.append((batch.visible / batch.visible.sum(1, keepdim=True))[batch.visible])
    score, group = torch.cat(scores).unique(return_inverse=True)  # ascending; many entries may share a logit of 0
    kept = torch.zeros(len(score), dtype=torch.float64, device=score.device)
    kept = kept.index_add(0, group, torch.cat(weights).double()).flip(0).cumsum(0).flip(0)
    return score[(kept / kept[0] - share).abs().argmin()].double().sigmoid().clamp(1e-9, 1 - 1e-9).item()


def _batches(parts: Sequence[Windows], config: ScorerConfig, heads: int, device: str) -> list[Batch]:
    """Windows on the device, split so that no batch exceeds PRODUCTS_PER_BATCH; queries without positives left out."""
    batches = []
    for windows in parts:
        if windows.hidden.shape[1:] != parts[0].hidden.shape[1:] or windows.keys.shape[2] != parts[0].keys.shape[2]:
            raise FmsimError(f"{windows.name}: its layers or widths differ from those of {parts[0].name}")
        keys = torch.from_numpy(windows.keys).to(device)
        queries = np.flatnonzero(windows.golden.any(1))
        size = max(PRODUCTS_PER_BATCH // (heads * max(keys.shape[1], 1)), 1)
        for start in range(0, len(queries), size):
            part = queries[start : start + size]
            visible = np.arange(keys.shape[1]) < windows.entries[part, None]
            arrays = (windows.hidden[part], visible, windows.golden[part], windows.mass[part])
            hidden, visible, golden, mass = (torch.from_numpy(array).to(device) for array in arrays)
            cos, sin = (torch.from_numpy(array).to(device) for array in rotation(config, windows.positions[part]))
            batches.append(Batch((cos, sin), hidden, keys, visible, golden, mass, int(golden.sum(1).max())))
    return batches


def _restore(model: MemoryIndexer, weights: dict) -> None:
    with torch.no_grad():
        for layer, parts in weights.items():
            retriever = model.retrievers[f"l{layer}"]
            targets = (retriever.wq_a.weight, retriever.q_norm_weight, retriever.wq_b.weight, retriever.weights_proj.weight)
            for target, value in zip(targets, parts, strict=True):
                target.copy_(torch.from_numpy(value))
