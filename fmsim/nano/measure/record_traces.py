"""Record nano's traces: ``python -m fmsim.nano.measure.record_traces --corpus DIR --out traces
--context 512000 --kinds needles,memory``.

One prompt of each context is read once, and every kind of decode starts from its state, since
reading is what costs. The traces that the project ships stand in held-out text; those a memory
indexer learns from, in the training text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fmsim import trace
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.loader import load_model
from fmsim.exec.runs.record import record, weights_digest
from fmsim.nano import tokens as corpora
from fmsim.nano.measure.calm import lru_misses
from fmsim.nano.prompts import streams_of_one_context
from fmsim.nano.tokenizer import MODEL_FOLDER
from fmsim.nano.tokens import Corpus
from fmsim.trace import Trace
from fmsim.trace.summary import LRU_MISSES

TEXT = {
    "held_out": (
        "held-out documents of Debian packages, free licences, with facts woven in"
        " (fmsim.nano.text.corpus)"
    ),
    "train": (
        "documents of Debian packages that nano was trained on, free licences, with facts woven in"
        " (fmsim.nano.text.corpus)"
    ),
}
REPORT_SECONDS = 20
MASS_BITS = 5  # mantissa bits of a recorded mass: within 1.6%


def record_context(
    model: DeepseekV4,
    corpus: Corpus,
    split: str,
    out: Path,
    stem: str,
    context: int,
    kinds: list[str],
    steps: int,
    seed: int,
    digest: str,
    keyed: list[int] | None = None,
) -> None:
    """Write ``out/stem-KIND.safetensors`` for each kind, all after one prompt of ``context``
    tokens, which share a file of what is the prompt's; index keys of the layers ``keyed``.
    """
    streams = streams_of_one_context(context, np.random.default_rng((seed, context)), corpus, steps)
    chosen = [stream for stream in streams if stream.kind in kinds]
    total = context + sum(stream.steps for stream in chosen)
    recorded = record(
        model,
        chosen,
        name="nano",
        seed=seed,
        sha256=digest,
        prompt_text=TEXT[split],
        progress=_progress(stem, total),
    )
    light = [trace.lightened(with_misses(found), keyed, MASS_BITS) for found in recorded]
    paths = [out / f"{stem}-{found.header.prompt_kind}.safetensors" for found in light]
    shared = trace.write_shared(paths, light)
    print(f"{shared}: {shared.stat().st_size / 1e6:.1f} MB, shared by {len(paths)}")
    for path, found in zip(paths, light, strict=True):
        print(
            f"{path}: {found.n_steps} steps, {path.stat().st_size / 1e6:.1f} MB,"
            f" {found.header.quality}",
            flush=True,
        )


def with_misses(found: Trace) -> Trace:
    """The trace with what `lru` misses of its selections in its header."""
    ids, entries = np.asarray(found.entry_ids), np.arange(found.n_steps)
    entries = (found.header.prompt_tokens + entries + 1) // found.header.entry_tokens
    layers = [lru_misses(ids[:, n], entries, 2 * found.topk) for n in range(found.n_layers)]
    misses = round(float(np.mean(layers)), 4)
    return found.with_header(quality=found.header.quality | {LRU_MISSES: misses})


def _progress(stem: str, total: int) -> Callable[[int], None]:
    """Now and then a line with the share done and the tokens a second."""
    started = reported = time.monotonic()
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done, reported
        done += tokens
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(
                f"{stem}: {done / total:.0%}, {done / (reported - started):.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    return advance


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        required=True,
        help="folder written by fmsim.nano.text.pack_tokens",
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL_FOLDER, help="directory of a nano; by default shipped"
    )
    parser.add_argument("--split", choices=corpora.SPLITS, default="held_out")
    parser.add_argument("--out", type=Path, required=True, help="folder for the traces")
    parser.add_argument(
        "--name",
        default="nano",
        help="file names are NAME-KIND.safetensors, with the seed between where there are several",
    )
    parser.add_argument("--context", type=int, required=True, help="tokens of the prompt")
    parser.add_argument(
        "--kinds", default="needles,memory,continuation", help="of these, with commas between"
    )
    parser.add_argument(
        "--keyed", type=int, nargs="+", help="CSA layers, from 0, whose index keys to keep; or all"
    )
    parser.add_argument("--steps", type=int, default=512, help="least decode steps of each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one context for each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    model, digest = load_model(args.model, args.device), weights_digest(args.model)
    corpus = corpora.load(args.corpus, args.split)
    for seed in args.seeds:
        stem = f"{args.name}-{seed}" if len(args.seeds) > 1 else args.name
        record_context(
            model,
            corpus,
            args.split,
            args.out,
            stem,
            args.context,
            args.kinds.split(","),
            args.steps,
            seed,
            digest,
            args.keyed,
        )


if __name__ == "__main__":
    main()
