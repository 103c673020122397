"""How restless a model's selection is: ``python -m fmsim.nano.measure.calm MODEL --corpus DIR
32768 131072``.

One context of each length, then 512 tokens of questions with their right answers; what the CSA
layers select at those is put to a buffer of twice top-k entries, a layer, that keeps what was used
last. The share of selected entries that it misses is what an exact cache of that size has to fetch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.loader import load_model
from fmsim.exec.whole import forward
from fmsim.nano import tokens as corpora
from fmsim.nano.prompts import decode_stream
from fmsim.nano.tokens import Corpus

STEPS = 512
FIRST_STEPS = 64  # that fill the buffer and are not counted
USES_BITS = 18


def lru_misses(ids: np.ndarray, entries: np.ndarray, capacity: int) -> float:
    """The share of selected entries that a buffer of ``capacity`` entries lacks, by
    `fmsim.policies.lru`'s order.

    ids int [steps, K], -1 for none; ``entries`` int [steps], how many there are at each step. Of
    the entries of one step those rank higher that were used later before it; a new one counts as
    used when it closes.
    """
    used = np.zeros(int(entries.max()) + 1, np.int64)
    used[: entries[0]] = np.arange(entries[0]) - entries[0]  # the newest ones lie there at first
    missed = asked = 0
    for step, (chosen, count) in enumerate(zip(ids, entries, strict=True)):
        used[entries[max(0, step - 1)] : count] = ((step + 1) << USES_BITS) - 1
        known = used[:count]
        least = np.partition(known, max(0, count - capacity))[max(0, count - capacity)]
        wanted = chosen[chosen >= 0]
        if step >= FIRST_STEPS:
            missed, asked = missed + int((known[wanted] < least).sum()), asked + len(wanted)
        used[wanted] = ((step + 1) << USES_BITS) + (np.maximum(used[wanted], 0) >> USES_BITS)
    return missed / max(1, asked)


@torch.no_grad()
def selections(model: DeepseekV4, corpus: Corpus, length: int, kind: str, seed: int) -> np.ndarray:
    """What each CSA layer selects at the ``STEPS`` tokens after a context: int32 [L, STEPS, K]."""
    device = model.lm_head.weight.device
    stream = decode_stream(kind, length, np.random.default_rng((seed, length)), corpus, STEPS)
    after = [token for turn in stream.turns for token in [*turn.forced, *turn.answer]]
    tokens = np.concatenate([stream.prompt, after[:STEPS]]).astype(np.int64)
    tokens = np.pad(tokens, (0, -len(tokens) % max(model.config.compress_rates.values())))
    given = torch.from_numpy(tokens)[None].to(device)
    positions = torch.arange(len(tokens), device=device)[None]
    manner = forward.Manner(model.config.index_topk, index_loss=False)
    places = forward.Places.of(model, positions)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        forward.train_forward(model, given, positions, manner, places)
    kept = [places.kept[number][0, length : length + STEPS] for number in sorted(places.kept)]
    return torch.stack(kept).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("lengths", type=int, nargs="+", help="tokens of the contexts")
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder written by fmsim.nano.text.pack_tokens"
    )
    parser.add_argument("--kinds", nargs="+", default=["needles", "continuation"])
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = load_model(args.model, args.device)
    corpus, top_k = corpora.load(args.corpus, "held_out"), model.config.index_topk
    for length in args.lengths:
        for kind in args.kinds:
            chosen = selections(model, corpus, length, kind, args.seed)
            entries = (length + 1 + np.arange(STEPS)) // 4
            layers = [lru_misses(ids, entries, 2 * top_k) for ids in chosen]
            again = [np.isin(b, a).mean() for ids in chosen for a, b in itertools.pairwise(ids)]
            row = {"lru_misses": round(float(np.mean(layers)), 4), "tokens": length, "kind": kind}
            row |= {"layers": [round(layer, 4) for layer in layers]}
            row |= {"selected_again": round(float(np.mean(again)), 4), "top_k": top_k}
            print(json.dumps(row), flush=True)
            if args.out:
                row |= {"model": str(args.model), "date": time.strftime("%F %T")}
                with args.out.open("a") as file:
                    file.write(json.dumps(row | {"command": " ".join(sys.argv)}) + "\n")


if __name__ == "__main__":
    main()
