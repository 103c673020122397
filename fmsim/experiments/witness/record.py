"""Record what a witness selects: ``python -m fmsim.experiments.witness.record --model MODEL
--indexers FILE --tokens DIR --out FOLDER``.

The text is read in one pass: its last ``--steps`` tokens are decode steps, each the text's own next
token. These, and the prompt's last queries, attend in every layer to what its indexer selects and
to nothing else; the prompt before them is read by the model's own attention. So a step's masses sum
to 1, as in a DSA model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmsim import trace
from fmsim.experiments.witness import text
from fmsim.experiments.witness.frozen import Choose, FrozenAttention, FrozenModel, sparse
from fmsim.experiments.witness.indexer import LightningIndexers
from fmsim.experiments.witness.measure import spread_texts
from fmsim.indexer import checkpoint
from fmsim.trace import CacheLayout, ModelInfo, Trace, TraceHeader, TraceRecorder
from fmsim.trace.cut import parse_numbers
from fmsim.trace.format import PACKED_VERSION
from fmsim.trace.importers.dense import weights_sha256

PROMPT_QUERIES = 1024  # of the prompt's end that make its history
KV_BYTES = 2  # of a value in the cache, bfloat16
SCALE_BYTES = 4  # of an index key, beside one byte a dim
MASS_BITS = 5  # mantissa bits of a recorded mass: within 1.6%


def record(
    model: FrozenModel,
    indexers: LightningIndexers,
    tokens: Sequence[int] | np.ndarray,
    steps: int,
    layers: Sequence[int],
    topk: int,
    header: TraceHeader,
) -> Trace:
    """The trace of ``layers`` over the last ``steps`` of ``tokens``."""
    recorder = TraceRecorder(header, steps, len(layers), topk)
    prompt = header.prompt_tokens
    first_query = prompt - header.prompt_mass_queries
    number_of = {layer: number for number, layer in enumerate(layers)}
    selector = indexers.selector(topk)

    def watched(attention: FrozenAttention) -> Choose:
        if attention.layer in number_of:
            number = number_of[attention.layer]
            for window in range(-(-steps // header.tau)):
                state = attention.states[prompt + header.tau * window - 1]
                recorder.hidden(window, number, state.float().cpu().numpy())
            recorder.index_keys(number, indexers.keys(attention).cpu().numpy())
        return selector(attention)

    def seen(layer: int, rows: Tensor, chosen: Tensor, mass: Tensor) -> None:
        if layer not in number_of:
            return
        number = number_of[layer]
        history = rows < prompt
        if history.any():
            recorder.prompt_mass(number, mass[history].sum(0).cpu().numpy())
        decoded = rows >= prompt
        if decoded.any():
            # the chosen first, in their order
            order = chosen[decoded].int().argsort(dim=1, descending=True, stable=True)[:, :topk]
            there = chosen[decoded].gather(1, order)
            recorder.step(
                int(rows[decoded][0]) - prompt,
                number,
                torch.where(there, order, -1).cpu().numpy(),
                torch.where(there, mass[decoded].gather(1, order), 0).cpu().numpy(),
            )

    losses = model.losses(tokens, sparse(watched, first_query, seen))
    decoded_loss = round(float(losses[-steps:].mean()), 4)
    recorder.header = header.model_copy(update={"quality": {"nll_per_token": decoded_loss}})
    return recorder.finish(np.asarray(tokens, np.int32), np.ones(steps, bool))


def header_of(
    model: FrozenModel,
    indexers: LightningIndexers,
    layers: Sequence[int],
    *,
    prompt_tokens: int,
    topk: int,
    name: str,
    sha256: str,
    prompt_text: str,
    seed: int,
) -> TraceHeader:
    """The header of a trace of ``layers`` that is about to be recorded."""
    config, shape = model.config, indexers.shape
    return TraceHeader(
        format_version=PACKED_VERSION,
        geometry={
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "n_layers": config.num_hidden_layers,
            "csa_layers": list(layers),
            "csa_numbers": list(layers),
            "index_topk": topk,
            "index_n_heads": shape.heads,
            "index_head_dim": shape.width,
            "rope_dims": shape.rope_dims,
            "compress_rope": indexers.rope,
        },
        entry_tokens=1,
        topk=topk,
        layout=CacheLayout(
            family="DSA",
            entry_bytes=2 * config.num_key_value_heads * config.head_dim * KV_BYTES,
            key_bytes=shape.width + SCALE_BYTES,
        ),
        model=ModelInfo(
            name=name, sha256=sha256, dtype=str(model.model.dtype).removeprefix("torch.")
        ),
        source="dense_indexed",
        prompt_kind="continuation",
        prompt_text=prompt_text,
        prompt_tokens=prompt_tokens,
        prompt_mass_queries=min(PROMPT_QUERIES, prompt_tokens),
        seed=seed,
        device=torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory or GGUF file")
    parser.add_argument("--indexers", type=Path, required=True, help="of witness.train")
    parser.add_argument("--tokens", type=Path, required=True, help="of witness.text")
    parser.add_argument("--out", type=Path, required=True, help="folder for PART-N.safetensors")
    parser.add_argument("--context", type=int, default=8192, help="tokens, the steps included")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument(
        "--counts", type=int, nargs=3, default=[0, 0, 1], metavar="N",
        help="texts of the train, validation and test parts",
    )  # fmt: skip
    parser.add_argument("--topk", type=int, default=256)
    parser.add_argument("--layers", default=None, help="such as 2,8-10; all by default")
    parser.add_argument("--keyed", default=None, help="of these the ones that keep index keys")
    parser.add_argument("--share", default="0/1", help="J/N: of the texts those of job J of N")
    parser.add_argument("--native", type=Path, help="write the indexers there, to be held")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    model = FrozenModel.load(args.model, args.device)
    indexers = LightningIndexers.load(args.indexers, args.device)
    model.rotate_by(indexers.rope)
    layers = (
        list(range(model.config.num_hidden_layers))
        if args.layers is None
        else parse_numbers(args.layers, "--layers")
    )
    keyed = None if args.keyed is None else parse_numbers(args.keyed, "--keyed")
    digest = weights_sha256(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.native and not args.native.exists():
        checkpoint.save(indexers.checkpoint(), args.native)
    job, jobs = map(int, args.share.split("/"))
    every = [
        (part, number, tokens)
        for part, count in zip(text.PARTS, args.counts, strict=True)
        for number, tokens in enumerate(
            spread_texts(text.load(args.tokens, part), args.context, count)
        )
    ]
    for part, number, tokens in every[::-1][job::jobs]:  # the fewest, those of the test, first
        path = args.out / f"{part}-{number}.safetensors"
        if path.exists():
            continue
        header = header_of(
            model,
            indexers,
            layers,
            prompt_tokens=args.context - args.steps,
            topk=args.topk,
            name=args.model.stem,
            sha256=digest,
            prompt_text=f"{part} text of Debian packages, free licences"
            " (fmsim.experiments.witness.text)",
            seed=number,
        )
        found = record(model, indexers, tokens, args.steps, layers, args.topk, header)
        light = trace.lightened(found, keyed and [layers.index(one) for one in keyed], MASS_BITS)
        trace.write(path, light)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {found.header.quality}", flush=True)


if __name__ == "__main__":
    main()
