"""Fit what `foresight` goes by, a network and the weights of the attention it saw, together.

    python benchmarks/nano/fit_foresight.py DIR --out DIR

DIR holds contexts (`contexts.py`): training ones to learn from, validation ones to choose by. A
policy's own choices decide what it sees, so the attention it learns from is what the policy before
it saw, at budgets from 2% to 15% of the entries.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import HIDDEN, Case, by_kind, closed_loop, load, lru, oracle
from indexer_curve import SHIPPED, logits, shipped
from torch import Tensor, nn

from fmsim.indexer.network import Retriever

BUDGETS = (0.02, 0.03, 0.05, 0.10)
SEEN_BUDGETS = (0.02, 0.03, 0.05, 0.10, 0.15)
KEYS_OF_A_LAYER = 0.0085  # of the entries: what the index keys of one layer of 21 take in slots
FADE, UNITS = 0.5, (1e-6, 1e-3)


@dataclass(frozen=True)
class Shape:
    keyed: tuple[int, ...] = (4,)
    heads: int = 32
    own_states: bool = True  # head weights from each served layer's state, else the scored one's
    kept: float = 0.0  # share of the steps, the last, whose loss is the mass not kept
    held: bool = False  # a feature: held in the window before
    without: tuple[int, ...] = ()  # features left out
    heavy: float = 0.0  # what attention on heavy entries counts beside all
    steps: int = 480
    lr: float = 2e-3


class Network(nn.Module):
    """Scores of some layers' keys for each layer that is served, and the weights of what was
    seen.
    """

    def __init__(self, shape: Shape, layers: int = 6, rank: int = 192):
        super().__init__()
        self.shape = shape
        hidden, dim = SHIPPED.hidden_size, SHIPPED.head_dim
        self.retrievers = nn.ModuleList(
            Retriever(hidden, shape.heads, dim, rank, SHIPPED.config) for _ in shape.keyed
        )
        size = (len(shape.keyed), layers, shape.heads, hidden)
        self.served = nn.Parameter(torch.randn(size) * hidden**-0.5)
        self.weights = nn.Parameter(torch.tensor([0.16, 0.14, 0.09, -0.09, 0.0]))

    def scores(self, case: Case) -> Tensor:
        """[W, L, E]."""
        hidden, keys = case.states(), case.keys(self.shape.keyed)
        turns = case.turns(SHIPPED.config)
        found = []
        for n, (layer, retriever) in enumerate(zip(self.shape.keyed, self.retrievers)):
            query, _ = retriever.queries(hidden[:, layer], turns)
            products = (query.flatten(0, 1) @ keys[n].T).relu().unflatten(0, (len(query), -1))
            states = (
                hidden if self.shape.own_states else hidden[:, layer : layer + 1].expand_as(hidden)
            )
            weights = torch.einsum("wlh,lnh->wln", states, self.served[n])
            found.append(weights * (self.shape.heads * query.shape[-1]) ** -0.5 @ products)
        return torch.stack(found).amax(0)

    def bonus(self, features: Tensor) -> Tensor:
        used = torch.tensor([float(n not in self.shape.without) for n in range(len(features))])
        weights = self.weights[: len(features)] * used.to(features.device)
        return torch.tensordot(weights.to(features.dtype), features, 1).float()


def features(case: Case, own: Tensor, held: Tensor, visible: Tensor, with_held: bool) -> Tensor:
    """[F, ..., L, E]: logarithms of what was seen."""
    prompt = torch.zeros(case.layers, case.entries, device=case.device)
    prompt[:, : case.prompt_entries] = case.prompt_mass.float()
    age = (visible.reshape(-1, 1, 1) - torch.arange(case.entries, device=case.device)).clamp(min=0)
    found = [torch.log2(1 + own.float() / unit) for unit in UNITS]
    found += [torch.log2(1 + prompt / UNITS[0]).expand_as(own), torch.log2(1 + age).expand_as(own)]
    return torch.stack(found + ([held.float()] if with_held else []))


def slots(case: Case, keyed: int) -> list[int]:
    """Entries a layer at each of BUDGETS, where keys of ``keyed`` layers are paid for."""
    return [max(8, int((b - KEYS_OF_A_LAYER * keyed) * case.prompt_entries)) for b in BUDGETS]


@torch.no_grad()
def run(case: Case, net: Network, sizes: Sequence[int], tables: list | None = None) -> Any:
    scores, visible = net.scores(case), case.visible()

    def decide(window: int, seen: dict[str, Tensor]) -> Tensor:
        found = features(case, seen["own"], seen["held"], visible[window], net.shape.held)
        return scores[window] + net.bonus(found)

    return closed_loop(case, decide, sizes, FADE, tables)


def look(cases: Sequence[Case], net: Network, with_held: bool, rng: np.random.Generator) -> None:
    """Remember what a policy of ``net`` sees, as features in half precision, and its slots."""
    for case in cases:
        case.slots = max(8, int(case.prompt_entries * rng.choice(SEEN_BUDGETS)))
        tables: list = []
        run(case, net, [case.slots], tables)
        own, held = (torch.stack([table[name] for table in tables]) for name in ("own", "held"))
        case.features = features(case, own, held, case.visible(), with_held).half()
        case.features_with_held = with_held


def loss(net: Network, case: Case, kept: bool) -> Tensor:
    seen = case.seen()[:, None]
    worth = (net.scores(case) + net.bonus(case.features)).masked_fill(~seen, HIDDEN)
    mass = case.window_mass.float() * seen
    if net.shape.heavy:
        heavy = case.heavy_mass.float() * seen
        mass = mass + heavy * (net.shape.heavy * mass.sum() / heavy.sum().clamp(min=1e-6))
    if kept:
        cut = worth.detach().topk(case.slots, -1).values[..., -1:]
        return 1 - (mass * ((worth - cut) / 0.3).sigmoid()).sum() / mass.sum()
    whole = mass.sum(-1, keepdim=True)
    logs = worth.log_softmax(-1).masked_fill(~seen, 0.0)
    return -(mass * logs).sum() / whole.sum()


@torch.no_grad()
def open_loop(net: Network, cases: Sequence[Case]) -> float:
    """Mass kept at each case's slots, from what was seen."""
    found: dict[int, list[float]] = {}
    for case in cases:
        seen = case.seen()[:, None]
        worth = (net.scores(case) + net.bonus(case.features)).masked_fill(~seen, HIDDEN)
        mass = case.window_mass.float() * seen
        got = mass.gather(-1, worth.topk(case.slots, -1).indices)
        found.setdefault(case.length, []).append((got[1:].sum() / mass[1:].sum()).item())
    return float(np.mean([np.mean(each) for each in found.values()]))


def fit(
    net: Network, train: Sequence[Case], judge: Sequence[Case], until: float, seed: int = 0
) -> list:
    """The best by `open_loop` is left in ``net``; -> it by step."""
    shape, rng = net.shape, np.random.default_rng(seed)
    slow = [p for p in net.parameters() if p is not net.weights]
    optimizer = torch.optim.AdamW(
        [{"params": slow, "base": shape.lr}, {"params": [net.weights], "base": shape.lr}],
        lr=shape.lr,
        weight_decay=0.01,
    )
    found, best = [], {}
    for step in range(1, shape.steps + 1):
        warm = 0.05 * shape.steps
        rate = min(
            step / warm, 0.5 * (1 + math.cos(math.pi * max(step - warm, 0) / (shape.steps - warm)))
        )
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate
        kept = step > (1 - shape.kept) * shape.steps
        for place in rng.choice(len(train), min(4, len(train)), replace=False):
            (loss(net, train[place], kept) * (4.0 if kept else 1.0) / 4).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(shape.steps // 6, 1) == 0:
            value = open_loop(net, judge)
            if not found or value > max(v for _, v in found):
                best = {key: value.clone() for key, value in net.state_dict().items()}
            found.append((step, round(value, 4)))
            if time.time() > until:
                break
    net.load_state_dict(best)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contexts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=Path, help="a network to see with at first")
    parser.add_argument("--shapes", type=Path, required=True, help="JSON: by name a Shape's fields")
    parser.add_argument(
        "--last", type=float, default=0, help="seconds before --until when the best is fitted again"
    )
    parser.add_argument("--until", type=float, default=1e12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    dev, began = args.device, time.time()
    training, judging = (load(args.contexts, name, dev) for name in ("training", "validation"))
    train, judge = ([case for each in part for case in each] for part in (training, judging))
    print(f"loaded {len(training)} {len(judging)} in {time.time() - began:.0f} s", flush=True)
    result: dict[str, Any] = {"budgets": BUDGETS, "closed": {}, "fits": []}

    def save() -> None:
        (args.out / "fits.json").write_text(json.dumps(result, indent=1))

    paper = shipped(dev)

    @torch.no_grad()
    def lsa(case: Case, sizes: Sequence[int]) -> Any:
        scores = logits(paper, case).amax(0)
        ahead = [int(size / 1.25) for size in slots(case, 2)]
        return closed_loop(case, lambda w, seen: scores[w] + 0 * seen["own"], ahead, FADE)

    for name, policy in (("oracle", oracle), ("lru held, seeded", lru), ("lsa", lsa)):
        result["closed"][name] = by_kind(judge, lambda case: policy(case, slots(case, 0)))
        print(name, result["closed"][name]["mean"], flush=True)
    first = Network(Shape(own_states=False)).to(dev)
    state = torch.load(args.first, weights_only=True, map_location=dev)
    first.load_state_dict({key: value.float() for key, value in state.items()})
    seen_with_held = None

    def see(net: Network, with_held: bool) -> None:
        nonlocal seen_with_held
        look(train + judge, net, with_held, np.random.default_rng(7))
        seen_with_held = with_held

    best: tuple[float, Network | None, str] = (0.0, None, "")

    def attempt(name: str, net: Network) -> None:
        nonlocal best
        t = time.time()
        curve = fit(net, train, judge, args.until - 25)
        taken = time.time() - t
        keyed = len(net.shape.keyed)
        rows = by_kind(judge, lambda case: run(case, net, slots(case, keyed)))
        result["closed"][name] = rows
        result["fits"].append(
            {
                "name": name,
                "shape": asdict(net.shape),
                "weights": net.weights.tolist(),
                "curve": curve,
                "seconds": round(taken, 1),
            }
        )
        merit = sum(rows["mean"][0]) + sum(rows["mean"][1])
        print(
            name,
            rows["mean"],
            [round(w, 3) for w in net.weights.tolist()],
            curve,
            f"{taken:.0f} + {time.time() - t - taken:.0f} s",
            flush=True,
        )
        if merit > best[0]:
            best = (merit, net, name)
            torch.save(
                {key: value.half() for key, value in net.state_dict().items()}, args.out / "best.pt"
            )
            result["best"] = name
        save()

    rows = by_kind(judge, lambda case: run(case, first, slots(case, 1)))
    result["closed"]["first"] = rows
    print("first", rows["mean"], flush=True)
    for name, fields in json.loads(args.shapes.read_text()).items():
        if time.time() > args.until - args.last:
            break
        fields["keyed"] = tuple(fields.get("keyed", (4,)))
        fields["without"] = tuple(fields.get("without", ()))
        shape = Shape(**fields)
        if seen_with_held != shape.held:
            see(first, shape.held)
            print(f"saw in {time.time() - began:.0f} s", flush=True)
        torch.manual_seed(0)
        attempt(name, Network(shape).to(dev))
    if args.last and best[1] is not None:
        found = best[1]
        see(found, found.shape.held)
        again = Network(
            Shape(**(asdict(found.shape) | {"steps": 600, "kept": 0.5, "lr": 1e-3}))
        ).to(dev)
        again.load_state_dict(found.state_dict())
        attempt(best[2] + ", again", again)


if __name__ == "__main__":
    main()
