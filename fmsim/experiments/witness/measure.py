"""What a witness reads well, and what its indexers find: ``python -m
fmsim.experiments.witness.measure --model MODEL --tokens DIR --out FILE``.

`positions`: perplexity by position, as the model is and with its positions scaled. With
``--indexers`` also `found`: by layer, of the attention of held-out queries, the share of its
heaviest top-k that the indexer selects, and the mass selected, beside the most that as many tokens
can have; and `sparse`: perplexity of the last tokens when every layer attends for them to what is
selected and to nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmsim.experiments.witness import text
from fmsim.experiments.witness.frozen import (
    Choose,
    FrozenAttention,
    FrozenModel,
    before,
    dense,
    sparse,
)
from fmsim.experiments.witness.indexer import LightningIndexers, best, divergence
from fmsim.files import write_text

BUCKET = 4096  # positions that share a perplexity
QUERIES = 256  # of a text, in its later half
LAST = 1024  # tokens of a text whose attention is made sparse
SINK_TOKENS = 4  # of `recency`, beside the newest


def perplexities(losses: list[Tensor], bucket: int) -> dict[str, float]:
    """By the tokens read at the end of each bucket, over all texts."""
    joined = torch.stack([loss.float().cpu() for loss in losses])
    parts = joined.split(bucket, 1)
    ends = np.cumsum([part.shape[1] for part in parts])
    return {
        str(end): round(math.exp(part.mean()), 3) for end, part in zip(ends, parts, strict=True)
    }


def positions(
    model: FrozenModel, texts: list[np.ndarray], bucket: int = BUCKET
) -> dict[str, dict[str, float]]:
    """Perplexity by way to stretch (`FrozenModel.stretched`) and by the tokens read, at the end of
    each ``bucket``; the model is then as it was.
    """
    ways, factor = ["own"], 2
    while factor * model.config.max_position_embeddings <= len(texts[0]):
        ways += [f"ntk:{factor}", f"yarn:{factor}"]
        factor *= 2
    found = {}
    for way in ways:
        model.rotate_by(model.stretched(way))
        found[way] = perplexities([model.losses(tokens) for tokens in texts], bucket)
    model.rotate_by(model.stretched("own"))
    return found


def found_by_layer(
    model: FrozenModel, indexers: LightningIndexers, texts: list[np.ndarray], topk: int
) -> list[dict[str, float]]:
    """A row a layer, means over queries drawn from the later half of each text."""
    sums: dict[int, list[dict[str, float]]] = {}
    random = np.random.default_rng(0)
    for tokens in texts:
        half = len(tokens) // 2
        drawn = half + random.choice(len(tokens) - half, min(QUERIES, half), replace=False)
        rows = torch.from_numpy(np.sort(drawn)).to(model.device)

        def attend(attention: FrozenAttention) -> Tensor:
            target = attention.probabilities(rows).mean(0)
            scores = indexers.scores(attention, rows, indexers.keys(attention))
            chosen, wanted = best(scores, rows, topk), best(target, rows, topk)
            figures = {
                "recall": (chosen & wanted).sum(1) / wanted.sum(1),
                "mass": (target * chosen).sum(1),
                "most": (target * wanted).sum(1),
                "first_token": target[:, 0],
                "recent_mass": (target * recent(rows, topk)).sum(1),
            }
            row = {name: float(value.float().mean()) for name, value in figures.items()}
            row["divergence"] = float(divergence(scores, target, before(rows)))
            sums.setdefault(attention.layer, []).append(row)
            return dense(attention)

        model.read(tokens, attend)
    return [
        {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}
        for _, rows in sorted(sums.items())
    ]


def recent(rows: Tensor, topk: int) -> Tensor:
    """bool [n, W]: for each query the first tokens of the text and the newest, ``topk`` in all."""
    places = torch.arange(int(rows[-1]) + 1, device=rows.device)
    newest = places > rows[:, None] - (topk - SINK_TOKENS)
    return before(rows) & (newest | (places < SINK_TOKENS))


def sparse_perplexities(
    model: FrozenModel, indexers: LightningIndexers, texts: list[np.ndarray], topk: int, last: int
) -> dict[str, float]:
    """Perplexity of each text's ``last`` tokens, by what they attend to in every layer: everything,
    the indexers' choice, the newest tokens.
    """
    first = max(0, len(texts[0]) - 1 - last)

    def newest(attention: FrozenAttention) -> Choose:
        return lambda rows: recent(rows, topk)

    ways = {
        "dense": dense,
        "indexers": sparse(indexers.selector(topk), first),
        "recency": sparse(newest, first),
    }
    losses = {
        name: torch.cat([model.losses(tokens, way)[first:] for tokens in texts])
        for name, way in ways.items()
    }
    return {name: round(math.exp(values.mean()), 3) for name, values in losses.items()}


def spread_texts(tokens: np.ndarray, context: int, count: int) -> list[np.ndarray]:
    """``count`` texts of ``context`` tokens, evenly over ``tokens``."""
    starts = np.linspace(0, len(tokens) - context, count).astype(int)
    return [tokens[start : start + context] for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory or GGUF file")
    parser.add_argument(
        "--tokens", type=Path, required=True, help="of fmsim.experiments.witness.text"
    )
    parser.add_argument("--indexers", type=Path, help="of fmsim.experiments.witness.train")
    parser.add_argument("--part", choices=text.PARTS, default="validation")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a text")
    parser.add_argument("--topk", type=int, default=256, help="tokens that a query selects")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--bucket", type=int, default=BUCKET)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    model = FrozenModel.load(args.model, args.device)
    texts = spread_texts(text.load(args.tokens, args.part), args.context + 1, args.texts)
    report: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.UTC):%F %T}",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "part": args.part,
        "context": args.context,
        "texts": args.texts,
    }
    if args.indexers is None:
        report["positions"] = positions(model, texts, args.bucket)
    else:
        indexers = LightningIndexers.load(args.indexers, args.device)
        model.rotate_by(indexers.rope)
        report["topk"] = args.topk
        report["found"] = found_by_layer(model, indexers, texts, args.topk)
        report["sparse"] = sparse_perplexities(model, indexers, texts, args.topk, LAST)
    write_text(args.out, json.dumps(report, indent=1) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
