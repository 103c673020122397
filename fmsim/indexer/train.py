"""Backbone-free training of the memory indexer, from traces alone (arXiv 2606.09079, section 3.2).

Queries are the windows' starts of the training traces. All entries visible to a query are scored;
the loss sees its positives, negatives sampled at random, and hard negatives: those that the indexer
itself scores highest. The layers learn jointly, through the maximum of their logits, which is what
a resident set is chosen by.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmsim.errors import FmsimError
from fmsim.files import replacing
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.network import MemoryIndexer
from fmsim.indexer.scorer import ScorerConfig, rotation
from fmsim.indexer.windows import Windows

# [queries, heads, entries] of one layer, 256 MiB in float32: bounds memory
PRODUCTS_PER_BATCH = 2**26
RECALL_SHARES = (0.05, 0.10)


@dataclass(frozen=True)
class TrainOptions:
    """``random_negatives`` and ``hard_negatives`` a positive; ``loss`` "focal" or "infonce";
    ``mass_power``: a positive weighs its attention mass to this power (0 = all alike); ``warm_up``:
    share of the steps; ``kept_share``: the share of entries that the recommended threshold keeps on
    the held-out queries; ``patience``: evaluations without a better recall before stopping.
    """

    heads: int = 32
    rank: int = 192
    loss: str = "infonce"
    random_negatives: float = 3.0
    hard_negatives: float = 1.0
    mass_power: float = 1.0
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warm_up: float = 0.05
    focal_gamma: float = 2.0
    steps: int = 2000
    traces_per_step: int = 4
    evaluate_every: int = 100
    patience: int = 5
    kept_share: float = 0.10
    seed: int = 0


class Progress(NamedTuple):
    """One evaluation: mean loss since the last; of held-out queries at each of RECALL_SHARES, the
    share of golden entries and of attention mass kept.
    """

    step: int
    loss: float
    recall: tuple[float, ...]
    mass_kept: tuple[float, ...]

    @property
    def merit(self) -> float:
        """What the best parameters have most of.

        Mass counts too: where golden entries are many, all rankings recall alike.
        """
        return sum(self.recall) + sum(self.mass_kept)


class TrainingBatch(NamedTuple):
    """`Windows` on the training device."""

    # cosine and sine of the queries' angles, float32 [W, rope_dims / 2]
    rotation: tuple[Tensor, Tensor]
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
    state: Path | None = None,
    resume: bool = False,
) -> Checkpoint:
    """Train retrievers for every CSA layer of the traces; the parameters of the best held-out
    recall are returned.

    The same inputs, options and device give the same parameters. With ``state``, a file, each
    evaluation leaves there what is needed to go on; ``resume`` does, and ends with the parameters
    that an uninterrupted run has. Raises FmsimError where there is nothing to learn from, where the
    traces' widths differ, or where the state is another run's.
    """
    started = time.perf_counter()
    batches, held_out_batches = (
        _batches(part, config, options.heads, device) for part in (training, held_out)
    )
    if not batches or not held_out_batches:
        raise FmsimError(
            "indexer train: needs golden entries in training and in held-out traces; these hold"
            " none"
        )
    torch.manual_seed(options.seed)
    hidden_size, head_dim = training[0].hidden.shape[2], training[0].keys.shape[2]
    model = MemoryIndexer(
        training[0].layers, hidden_size, options.heads, head_dim, options.rank, config
    ).to(device)
    names = [windows.name for windows in (*training, *held_out)]
    state_age = training[0].state_age
    if any(windows.state_age != state_age for windows in (*training, *held_out)):
        raise FmsimError("indexer train: queries of different state ages; read all traces alike")
    run = TrainingRun(model, batches, options, names, state_age)
    if resume:
        run.load(state)
    while not run.finished:
        progress = run.advance(held_out_batches)
        if state is not None:
            run.save(state)
        report(progress)
    if state is not None:
        state.unlink(missing_ok=True)
    best = run.best
    model.load_state_dict(run.best_parameters)
    record = {
        "options": asdict(options),
        "state_age": state_age,
        "traces": [windows.name for windows in training],
        "held_out": [windows.name for windows in held_out],
        "step": best.step,
        "recall": dict(zip(map(str, RECALL_SHARES), best.recall, strict=True)),
        "mass_kept": dict(zip(map(str, RECALL_SHARES), best.mass_kept, strict=True)),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return Checkpoint(
        model.weights(),
        config,
        threshold_of_share(model, held_out_batches, options.kept_share),
        record,
    )


class TrainingRun:
    """AdamW over the options' steps, warm-up then cosine, from one evaluation to the next; it can
    be saved in between.
    """

    def __init__(
        self,
        model: MemoryIndexer,
        batches: list[TrainingBatch],
        options: TrainOptions,
        traces: list[str],
        state_age: int = 0,
    ):
        self.model, self.batches, self.options = model, batches, options
        self.about = json.dumps([asdict(options), traces, state_age])
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.order = np.random.default_rng(options.seed)
        self.generator = torch.Generator(device=batches[0].hidden.device).manual_seed(options.seed)
        self.step = 0
        self.best: Progress | None = None
        self.best_parameters: dict[str, Tensor] = {}

    def _rate(self, step: int) -> float:
        warm_up = max(int(self.options.steps * self.options.warm_up), 1)
        cosine = 0.5 * (
            1 + math.cos(math.pi * max(step - warm_up, 0) / max(self.options.steps - warm_up, 1))
        )
        return min((step + 1) / warm_up, cosine)

    @property
    def finished(self) -> bool:
        options = self.options
        stale = (
            self.best is not None
            and self.step - self.best.step >= options.patience * options.evaluate_every
        )
        return stale or self.step >= options.steps

    def advance(self, held_out: list[TrainingBatch]) -> Progress:
        """Train up to the next evaluation, evaluate, and keep the parameters if they are the best
        so far.
        """
        losses = []
        while not losses or (
            self.step % self.options.evaluate_every and self.step < self.options.steps
        ):
            losses.append(self._one_step())
        progress = Progress(
            self.step,
            torch.stack(losses).mean().item(),
            *recall_at(self.model, held_out, RECALL_SHARES),
        )
        if self.best is None or progress.merit > self.best.merit:
            self.best = progress
            self.best_parameters = {
                key: value.clone() for key, value in self.model.state_dict().items()
            }
        return progress

    def _one_step(self) -> Tensor:
        picked = self.order.choice(
            len(self.batches),
            size=min(self.options.traces_per_step, len(self.batches)),
            replace=False,
        )
        losses = []
        for index in picked:
            loss = _loss(self.model, self.batches[index], self.options, self.generator)
            (loss / len(picked)).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        return torch.stack(losses).mean()

    def save(self, path: Path) -> None:
        """Write the run's state, whole or not at all."""
        found = {
            "about": self.about,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": json.dumps(self.order.bit_generator.state),
            "generator": self.generator.get_state(),
            "best": list(self.best),
            "best_parameters": self.best_parameters,
        }
        with replacing(path) as beside:
            torch.save(found, beside)

    def load(self, path: Path) -> None:
        """Go on from a saved state; FmsimError where it is missing, damaged, or of other traces or
        options.
        """
        if not path.exists():
            raise FmsimError(f"{path}: no interrupted training to resume; leave out --resume")
        try:
            found = torch.load(path, map_location=self.generator.device, weights_only=True)
            about = found["about"]
        except Exception as error:  # torch names no common class for what a damaged file raises
            raise FmsimError(
                f"{path}: no training state ({str(error).splitlines()[0]}); take it away and train"
                " anew"
            ) from None
        if about != self.about:
            raise FmsimError(
                f"{path}: is the state of a run with other traces or options; give those, or train"
                " without --resume"
            )
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.schedule.load_state_dict(found["schedule"])
        self.order.bit_generator.state = json.loads(found["order"])
        self.generator.set_state(found["generator"].cpu())
        self.step, self.best_parameters = found["step"], found["best_parameters"]
        self.best = Progress(
            *(tuple(part) if isinstance(part, list | tuple) else part for part in found["best"])
        )


def _loss(
    model: MemoryIndexer, batch: TrainingBatch, options: TrainOptions, generator: torch.Generator
) -> Tensor:
    logits = model(batch.hidden, batch.rotation, batch.keys).amax(0)
    negatives = _negatives(logits.detach(), batch, options, generator)
    weights = batch.golden * (batch.mass.clamp(min=1e-6) ** options.mass_power)
    # mean 1 a positive
    weights = weights / weights.sum(1, keepdim=True) * batch.golden.sum(1, keepdim=True)
    if options.loss == "infonce":
        return infonce_loss(logits, weights, batch.golden | negatives)
    return focal_loss(logits - model.margin, weights, negatives, options.focal_gamma)


def _negatives(
    logits: Tensor, batch: TrainingBatch, options: TrainOptions, generator: torch.Generator
) -> Tensor:
    """bool [W, E]: random negatives by a coin an entry, and the negatives that score highest."""
    candidates = batch.visible & ~batch.golden
    positives = batch.golden.sum(1, keepdim=True)
    chance = options.random_negatives * positives / candidates.sum(1, keepdim=True).clamp(min=1)
    chosen = torch.rand(logits.shape, device=logits.device, generator=generator) < chance
    most = min(int(options.hard_negatives * batch.most_positives) + 1, logits.shape[1])
    highest = logits.masked_fill(~candidates, -torch.inf).topk(most, dim=1).values
    hard = (options.hard_negatives * positives).long().clamp(max=most - 1)
    return candidates & (chosen | (logits > highest.gather(1, hard)))


def focal_loss(logits: Tensor, positive_weights: Tensor, negatives: Tensor, gamma: float) -> Tensor:
    """Focal loss (arXiv 1708.02002) a positive: logits, weights (0 = no positive) [W, E], negatives
    bool.
    """
    score = logits.sigmoid()
    missed = positive_weights * (1 - score) ** gamma * F.softplus(-logits)
    false = negatives * score**gamma * F.softplus(logits)
    return (missed + false).sum() / positive_weights.sum()


def infonce_loss(logits: Tensor, positive_weights: Tensor, listed: Tensor) -> Tensor:
    """InfoNCE with several positives: cross-entropy of the softmax over ``listed`` entries with the
    positives' share.
    """
    log_shares = logits.masked_fill(~listed, -torch.inf).log_softmax(1)
    target = positive_weights / positive_weights.sum(1, keepdim=True)
    return -(target * log_shares.masked_fill(~listed, 0.0)).sum(1).mean()


@torch.no_grad()
def recall_at(
    model: MemoryIndexer, batches: list[TrainingBatch], shares: Sequence[float]
) -> tuple[tuple[float, ...], ...]:
    """Means over queries of what the best ``share`` of the visible entries holds: of positives, and
    of mass, by share.
    """
    found: list[Tensor] = []
    for batch in batches:
        logits = (
            model(batch.hidden, batch.rotation, batch.keys)
            .amax(0)
            .masked_fill(~batch.visible, -torch.inf)
        )
        order = logits.argsort(dim=1, descending=True, stable=True)
        place = torch.arange(order.shape[1], device=order.device)
        kept = [place < torch.ceil(share * batch.visible.sum(1, keepdim=True)) for share in shares]
        wanted = [part / part.sum(1, keepdim=True) for part in (batch.golden.float(), batch.mass)]
        found.append(
            torch.stack(
                [torch.stack([(part.gather(1, order) * k).sum(1) for k in kept]) for part in wanted]
            )
        )
    golden, mass = torch.cat(found, dim=2).mean(2).tolist()  # of [2, shares, queries]
    return tuple(golden), tuple(mass)


@torch.no_grad()
def threshold_of_share(model: MemoryIndexer, batches: list[TrainingBatch], share: float) -> float:
    """The score above which a query of ``batches`` has, on average, ``share`` of its visible
    entries.
    """
    scores, weights = [], []
    for batch in batches:
        logits = model(batch.hidden, batch.rotation, batch.keys).amax(0)
        scores.append(logits[batch.visible])
        weights.append((batch.visible / batch.visible.sum(1, keepdim=True))[batch.visible])
    # ascending; many entries may share a logit of 0
    score, group = torch.cat(scores).unique(return_inverse=True)
    kept = torch.zeros(len(score), dtype=torch.float64, device=score.device)
    kept = kept.index_add(0, group, torch.cat(weights).double()).flip(0).cumsum(0).flip(0)
    return (
        score[(kept / kept[0] - share).abs().argmin()]
        .double()
        .sigmoid()
        .clamp(1e-9, 1 - 1e-9)
        .item()
    )


def _batches(
    parts: Sequence[Windows], config: ScorerConfig, heads: int, device: str
) -> list[TrainingBatch]:
    """Windows on the device, split so that no batch exceeds PRODUCTS_PER_BATCH; queries without
    positives left out.
    """
    batches = []
    for windows in parts:
        if (
            windows.layers != parts[0].layers
            or windows.hidden.shape[2] != parts[0].hidden.shape[2]
            or windows.keys.shape[2] != parts[0].keys.shape[2]
        ):
            raise FmsimError(
                f"{windows.name}: its layers or widths differ from those of {parts[0].name}"
            )
        keys = torch.from_numpy(windows.keys).to(device)
        queries = np.flatnonzero(windows.golden.any(1))
        size = max(PRODUCTS_PER_BATCH // (heads * max(keys.shape[1], 1)), 1)
        for start in range(0, len(queries), size):
            part = queries[start : start + size]
            visible = np.arange(keys.shape[1]) < windows.entries[part, None]
            arrays = (windows.hidden[part], visible, windows.golden[part], windows.mass[part])
            hidden, visible, golden, mass = (torch.from_numpy(array).to(device) for array in arrays)
            cos, sin = (
                torch.from_numpy(array).to(device)
                for array in rotation(config, windows.positions[part])
            )
            batches.append(
                TrainingBatch(
                    (cos, sin), hidden, keys, visible, golden, mass, int(golden.sum(1).max())
                )
            )
    return batches
