"""Fit what `foresight` goes by: an indexer that serves layers, and the weights of the attention
that a layer saw, together.

    python benchmarks/nano/fit_foresight.py DIR --out DIR

DIR holds contexts (`contexts.py`): training ones to learn from, validation ones to choose by. The
loss is the cross-entropy of a softmax over all visible entries, in each layer, against its
attention in the window to come. A policy's own choices decide what it sees, so the attention that
is learnt from is what another one saw at budgets from 2% to 15% of the entries: the policy of
`--first`, or of attention alone. Writes foresight.safetensors, whose metadata hold the weights,
and fit.json, what it and its rivals keep of validation contexts at equal bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import HIDDEN, Case, Kept, by_kind, closed_loop, lengths, load, lru, oracle
from indexer_curve import SHIPPED, SPLITS, logits, shipped
from torch import Tensor, nn

from fmsim.indexer import checkpoint as checkpoints
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.network import ServedIndexer
from fmsim.policies.foresight import HEAVY, LIGHT

BUDGETS = (0.02, 0.03, 0.05, 0.10)
SEEN_BUDGETS = (0.02, 0.03, 0.05, 0.10, 0.15)
# Of the entries: what the index keys of one of V4-Flash's 21 CSA layers take in slots.
KEYS_OF_A_LAYER = 0.0085
SPARE = 1.25  # slots that `lsa` holds for what it recalls ahead, to those that it fills
FADE, PROMPT_SHARE = 0.5, 0.15
FEATURES = ("weight", "heavy_weight", "prompt_weight", "age_weight")
FIRST_WEIGHTS = (0.15, 0.15, 0.1, -0.1)
LAYERS, HEADS, RANK = (4,), 32, 192


class Network(nn.Module):
    """An indexer that serves layers, and the weights of what was seen."""

    def __init__(self, served: int):
        super().__init__()
        sizes = SHIPPED.hidden_size, HEADS, SHIPPED.head_dim, RANK
        self.indexer = ServedIndexer(list(LAYERS), served, *sizes, SHIPPED.config)
        self.weights = nn.Parameter(torch.tensor(FIRST_WEIGHTS))

    def scores(self, case: Case) -> Tensor:
        """[W, L, E]."""
        turns = case.turns(SHIPPED.config)
        return self.indexer(case.states()[:, list(LAYERS)], turns, case.keys(LAYERS))

    def bonus(self, features: Tensor) -> Tensor:
        """Of `seen` [F, ...], by their weights."""
        return torch.tensordot(self.weights.to(features.dtype), features, 1).float()

    def checkpoint(self, training: dict[str, Any]) -> Checkpoint:
        layers, served = self.indexer.weights()
        training |= {"weights": dict(zip(FEATURES, self.weights.tolist(), strict=True))}
        return Checkpoint(layers, SHIPPED.config, None, training, served=served)


def seen(case: Case, own: Tensor, window: Tensor) -> Tensor:
    """[F, ..., L, E]: what `Foresight.score` weighs; own [..., L, E] is the attention of the decode
    at the start of ``window`` [...].
    """
    prompt = torch.zeros(case.layers, case.entries, device=case.device)
    prompt[:, : case.prompt_entries] = case.prompt_mass.float()
    left = PROMPT_SHARE * FADE ** window[..., None, None].float()
    attention = own.float() + left * prompt
    age = case.visible()[window][..., None, None] - torch.arange(case.entries, device=case.device)
    found = [torch.log2(1 + attention / unit) for unit in (LIGHT, HEAVY)]
    found += [torch.log2(1 + prompt / LIGHT), torch.log2(1 + age.clamp(min=0))]
    return torch.stack([each.expand_as(attention) for each in found])


def slots(case: Case, keyed: int) -> list[int]:
    """Entries a layer at each of BUDGETS, where the keys of ``keyed`` layers are paid for."""
    shares = (budget - KEYS_OF_A_LAYER * keyed for budget in BUDGETS)
    return [max(8, int(share * case.prompt_entries)) for share in shares]


@torch.no_grad()
def follow(
    case: Case, net: Network | None, sizes: Sequence[int], tables: list | None = None
) -> Kept:
    """The policy of a network, or of attention alone, in a closed loop."""
    scores = 0.0 if net is None else net.scores(case)
    weights = torch.tensor(FIRST_WEIGHTS, device=case.device)

    def decide(window: int, held: dict[str, Tensor]) -> Tensor:
        found = seen(case, held["own"], torch.tensor(window, device=case.device))
        if net is None:
            return torch.tensordot(weights, found, 1)
        return scores[window] + net.bonus(found)

    return closed_loop(case, decide, sizes, FADE, tables)


@torch.no_grad()
def lsa(case: Case, indexer: nn.Module) -> Kept:
    """The paper's, at the bytes of `slots`."""
    scores = logits(indexer, case).amax(0)
    sizes = [max(8, int(size / SPARE)) for size in slots(case, len(indexer.layers))]
    return closed_loop(case, lambda window, held: scores[window] + 0 * held["own"], sizes, FADE)


class Lesson:
    """A stream, with what a policy saw of it, half precision, at one of SEEN_BUDGETS."""

    def __init__(self, case: Case, net: Network | None, rng: np.random.Generator):
        self.case, tables = case, []
        self.slots = max(8, int(case.prompt_entries * rng.choice(SEEN_BUDGETS)))
        follow(case, net, [self.slots], tables)
        own = torch.stack([table["own"] for table in tables])
        self.features = seen(case, own, torch.arange(case.windows, device=case.device)).half()
        self.visible = case.seen()[:, None]
        self.mass = case.window_mass * self.visible

    def worth(self, net: Network) -> Tensor:
        """[W, L, E]."""
        found = net.scores(self.case) + net.bonus(self.features)
        return found.masked_fill(~self.visible, HIDDEN)

    def loss(self, net: Network) -> Tensor:
        mass = self.mass.float()
        logs = self.worth(net).log_softmax(-1).masked_fill(~self.visible, 0.0)
        return -(mass * logs).sum() / mass.sum()

    @torch.no_grad()
    def kept(self, net: Network) -> float:
        """The share of the mass, over windows from the second on."""
        best = self.worth(net).topk(self.slots, -1).indices
        mass = self.mass.float()
        return (mass.gather(-1, best)[1:].sum() / mass[1:].sum()).item()


def fit(net: Network, training: list[Lesson], judging: list[Lesson], steps: int) -> list:
    """AdamW with four streams a step, warm-up and cosine; the best by what is kept of ``judging``
    is left in ``net``. -> that by step.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    rng, found, best = np.random.default_rng(0), [], {}
    for step in range(1, steps + 1):
        warm = 0.05 * steps
        rate = 0.5 * (1 + math.cos(math.pi * max(step - warm, 0) / (steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(step / warm, rate)
        for place in rng.choice(len(training), min(4, len(training)), replace=False):
            (training[place].loss(net) / 4).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(steps // 6, 1) == 0:
            value = float(np.mean([lesson.kept(net) for lesson in judging]))
            if not found or value > max(each for _, each in found):
                best = {key: each.clone() for key, each in net.state_dict().items()}
            found.append((step, round(value, 4)))
    net.load_state_dict(best)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contexts", type=Path, help="folder that contexts.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--first", type=Path, help="a checkpoint that this wrote, to see with")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    contexts = [load(args.contexts, name, args.device) for name in SPLITS]
    training, judging = ([case for streams in part for case in streams] for part in contexts)
    first = read(args.first).to(args.device) if args.first else None
    rng = np.random.default_rng(7)
    lessons = [[Lesson(case, first, rng) for case in part] for part in (training, judging)]
    torch.manual_seed(0)
    net = Network(judging[0].layers).to(args.device)
    curve = fit(net, *lessons, args.steps)
    paper = shipped(args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    report = {
        "date": f"{datetime.datetime.now(datetime.UTC):%F %T}",
        "command": "python benchmarks/nano/fit_foresight.py DIR --out DIR",
        "device": device,
        "contexts": dict(zip(SPLITS, map(lengths, contexts), strict=True)),
        "budgets": BUDGETS,
        "kept_by_step": curve,
        "kept": {
            "oracle": by_kind(judging, lambda case: oracle(case, slots(case, 0))),
            "lru held, seeded": by_kind(judging, lambda case: lru(case, slots(case, 0))),
            "lsa": by_kind(judging, lambda case: lsa(case, paper)),
            "foresight": by_kind(judging, lambda case: follow(case, net, slots(case, 1))),
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"contexts": report["contexts"], "steps": args.steps, "device": device}
    checkpoints.save(net.checkpoint(about), args.out / "foresight.safetensors")
    (args.out / "fit.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, rows in report["kept"].items():
        print(name, rows["mean"])


def read(path: Path) -> Network:
    """A network from the checkpoint that it was written to."""
    found = checkpoints.load(path)
    net = Network(len(found.served[LAYERS[0]]))
    parts = {"wq_a": "wq_a.weight", "q_norm": "q_norm_weight", "wq_b": "wq_b.weight"}
    state = {
        f"indexer.retrievers.{n}.{parts[part]}": torch.from_numpy(
            getattr(found.layers[layer], part)
        )
        for n, layer in enumerate(LAYERS)
        for part in parts
    }
    state["indexer.served"] = torch.from_numpy(np.stack([found.served[layer] for layer in LAYERS]))
    state["weights"] = torch.tensor([found.training["weights"][name] for name in FEATURES])
    net.load_state_dict(state)
    return net


if __name__ == "__main__":
    main()
