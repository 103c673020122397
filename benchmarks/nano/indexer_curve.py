"""How much the memory indexer of the paper learns from how many contexts: what its best entries
hold of the golden ones, and of the attention.

    python benchmarks/nano/indexer_curve.py DIR --out benchmarks/results/indexer-curve.json

DIR holds contexts (`contexts.py`). One set for all layers is chosen, from states one window old,
as `lsa` does. The loss is the cross-entropy of a softmax over all visible entries against the
attention on golden ones; the best parameters by validation contexts are kept. Beside the curve
stand the shipped indexer on the same contexts, and the bounds: how many entries are golden, how
many of them had been selected before, and what the best set could hold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import HIDDEN, Case, lengths, load
from torch import Tensor

from fmsim.indexer import checkpoint as checkpoints
from fmsim.indexer.network import MemoryIndexer

AGE = 1
SHARES = (0.05, 0.10)
LAYERS = (1, 4)
SHIPPED = checkpoints.load(checkpoints.SHIPPED)
COLUMNS = ("golden recall at 5%", "golden recall at 10%", "mass at 5%", "mass at 10%")


def network(layers: Sequence[int], device: str) -> MemoryIndexer:
    """A new one, of the shipped one's shape."""
    first = next(iter(SHIPPED.layers.values()))
    shape = first.hidden_size, first.heads, first.head_dim, len(first.q_norm)
    return MemoryIndexer(list(layers), *shape, SHIPPED.config).to(device)


def shipped(device: str) -> MemoryIndexer:
    """The shipped indexer, as a network."""
    found = network(SHIPPED.layers, device)
    names = {"wq_a": "wq_a.weight", "q_norm": "q_norm_weight", "wq_b": "wq_b.weight"}
    names["weights_proj"] = "weights_proj.weight"
    found.load_state_dict(
        {
            f"retrievers.l{layer}.{names[part]}": torch.from_numpy(value)
            for layer, weights in SHIPPED.layers.items()
            for part, value in weights._asdict().items()
        },
        strict=False,
    )
    return found


def logits(model: MemoryIndexer, case: Case) -> Tensor:
    """[layers scored, W, E]."""
    hidden = case.states(AGE)[:, model.layers]
    return model(hidden, case.turns(model.config, AGE), case.keys(model.layers))


def loss(model: MemoryIndexer, case: Case) -> Tensor:
    """Cross-entropy against the attention, summed over layers, on golden entries."""
    seen = case.seen(AGE)
    wanted = case.window_mass.float().sum(1) * (case.golden & seen)
    logs = logits(model, case).amax(0).masked_fill(~seen, HIDDEN).log_softmax(-1)
    shares = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-9)
    return -(shares * logs.masked_fill(~seen, 0.0)).sum(-1).mean()


@torch.no_grad()
def recall(case: Case, scores: Tensor) -> Tensor:
    """[4]: `COLUMNS` of a stream, a mean over windows from the second on; scores [W, E]."""
    seen = case.seen(AGE)
    order = scores.masked_fill(~seen, HIDDEN).argsort(dim=1, descending=True, stable=True)
    found = []
    for wanted in (case.golden.float(), case.window_mass.float().sum(1)):
        held = (wanted * seen).gather(1, order).cumsum(1)
        for share in SHARES:
            last = (torch.ceil(share * seen.sum(1)).long() - 1)[:, None]
            found.append((held.gather(1, last)[:, 0] / held[:, -1])[1:].nanmean())
    return torch.stack(found)


@torch.no_grad()
def recalls(model: MemoryIndexer, contexts: Sequence[Sequence[Case]]) -> dict[str, Any]:
    """`COLUMNS` by what is scored, "max" or a layer, and by length; "mean" is over lengths."""
    rows: dict[str, dict[str, list[Tensor]]] = {}
    for case in (case for streams in contexts for case in streams):
        scored = logits(model, case)
        ranked = {"max": scored.amax(0)}
        if len(model.layers) > 1:
            ranked |= {f"l{layer}": scored[n] for n, layer in enumerate(model.layers)}
        for name, scores in ranked.items():
            by_length = rows.setdefault(name, {})
            by_length.setdefault(str(case.length), []).append(recall(case, scores).cpu())
    found: dict[str, Any] = {}
    for name, by_length in rows.items():
        means = {length: torch.stack(each).mean(0).tolist() for length, each in by_length.items()}
        means["mean"] = np.mean(list(means.values()), axis=0).tolist()
        found[name] = {key: [round(value, 4) for value in row] for key, row in means.items()}
    return found


def train(
    contexts: Sequence[Sequence[Case]],
    judging: Sequence[Sequence[Case]],
    layers: Sequence[int],
    steps: int,
    seed: int,
    until: float,
) -> tuple[MemoryIndexer, list[tuple[int, float]]]:
    """AdamW with four streams a step, warm-up and cosine; -> the best by the sum of `COLUMNS` on
    ``judging``, and that sum by step.
    """
    torch.manual_seed(seed)
    streams = [case for each in contexts for case in each]
    model = network(layers, streams[0].device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rng, found, best = np.random.default_rng(seed), [], {}
    for step in range(1, steps + 1):
        warm = 0.05 * steps
        rate = 0.5 * (1 + math.cos(math.pi * max(step - warm, 0) / (steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(step / warm, rate)
        for place in rng.choice(len(streams), min(4, len(streams)), replace=False):
            (loss(model, streams[place]) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(steps // 6, 1) == 0:
            merit = sum(recalls(model, judging)["max"]["mean"])
            if not found or merit > max(value for _, value in found):
                best = {key: value.clone() for key, value in model.state_dict().items()}
            found.append((step, round(merit, 4)))
            if time.time() > until:
                break
    model.load_state_dict(best)
    return model, found


BOUNDS = (
    "golden entries", "of them selected before", "recall of a set of 10%", "of 5%",
    "each layer's best 5%: mass", "of what the layer had selected before",
    "one set's best 5%: mass", "each layer's best 10%: mass", "one set's best 10%: mass",
)  # fmt: skip


@torch.no_grad()
def bounds(case: Case) -> np.ndarray:
    """[9]: `BOUNDS`, means over windows from the second on."""
    before = torch.zeros(case.layers, case.entries, dtype=torch.bool, device=case.device)
    before[:, : case.prompt_entries] = case.prompt_mass > 0
    rows = []
    for window, visible in enumerate(case.visible().tolist()):
        mass = case.window_mass[window].float()[:, :visible]
        golden, known = case.golden[window, :visible], before[:, :visible]
        count, whole = golden.sum().item(), mass.sum()
        sizes = [math.ceil(share * visible) for share in SHARES]
        each = [mass.topk(size, -1).values.sum() / whole for size in sizes]
        one = [mass.sum(0).topk(size).values.sum() / whole for size in sizes]
        old = (mass * known).topk(sizes[0], -1).values.sum() / whole
        shares = [min(size / count, 1.0) for size in sizes]
        row = [count / visible, (golden & known.any(0)).sum() / count, shares[1], shares[0]]
        rows.append([float(value) for value in (*row, each[0], old, one[0], each[1], one[1])])
        before |= case.window_mass[window] > 0
    return np.mean(rows[1:], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contexts", type=Path, help="folder that contexts.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 1000], help="in contexts")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each size")
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--until", type=float, default=1e12, help="epoch seconds to stop at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    training, judging = (load(args.contexts, name, args.device) for name in SPLITS)
    groups: dict[str, list[np.ndarray]] = {}
    for case in (case for streams in judging for case in streams):
        groups.setdefault(f"{case.length} {case.kind}", []).append(bounds(case))
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    result: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.UTC):%F %T}",
        "command": "python benchmarks/nano/indexer_curve.py DIR --out FILE",
        "device": device,
        "contexts": {"training": lengths(training), "validation": lengths(judging)},
        "steps": args.steps,
        "state_age": AGE,
        "columns": COLUMNS,
        "bounds": {
            "columns": BOUNDS,
            "rows": {
                key: [round(float(value), 4) for value in np.mean(rows, axis=0)]
                for key, rows in groups.items()
            },
        },
        "shipped": recalls(shipped(args.device), judging),
        "runs": [],
    }
    sizes = sorted({min(size, len(training)) for size in args.sizes})
    plan = [(size, LAYERS, seed) for seed in range(args.seeds) for size in sizes]
    plan[len(sizes) : len(sizes)] = [(sizes[-1], layers, 0) for layers in ((4,), (1,))]
    for size, layers, seed in plan:
        if time.time() > args.until:
            break
        given = (training[:size], judging, layers, args.steps, seed, args.until)
        model, curve = train(*given)
        row = {"contexts": size, "layers": layers, "seed": seed, "merit_by_step": curve}
        result["runs"].append(row | {"validation": recalls(model, judging)})
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(size, layers, seed, result["runs"][-1]["validation"]["max"]["mean"], flush=True)


SPLITS = ("training", "validation")

if __name__ == "__main__":
    main()
