"""`fmsim trace import` and `fmsim trace export`: traces from and to other projects' formats."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmsim.cli.extras import require
from fmsim.cli.options import NoVerify
from fmsim.cli.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fmsim.indexer.labels import LabelRule
    from fmsim.trace import Trace
    from fmsim.trace.importers.flashmemory import Votes


class Format(enum.StrEnum):
    flashmemory = "flashmemory"
    sglang = "sglang"
    vllm = "vllm"
    miles = "miles"
    npy = "npy"
    csv = "csv"


class ExportFormat(enum.StrEnum):
    flashmemory = "flashmemory"


def import_traces(
    source: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="one file, or a folder")],
    out: Annotated[Path, typer.Option(help="a trace for one file, a folder for a folder")],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            help=(
                "sglang, vllm: responses with captured selections (.json, .jsonl, .npy); miles:"
                " rollout dumps (.pt, .parquet); npy: steps x layers x top-k; csv: time, layer,"
                " ids; flashmemory: the training dumps of LSA's authors, doc_*.pkl"
            ),
        ),
    ] = Format.flashmemory,
    model: Annotated[
        str | None,
        typer.Option(help="what was captured: a preset (`fmsim model list`) or a config.json"),
    ] = None,
    topk: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="entries of a row, of a model without a preset"),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="layers of a row, of a model without a preset"),
    ] = None,
    entry_tokens: Annotated[
        int,
        typer.Option(min=1, max=1_000_000, help="tokens of an entry, of a model without a preset"),
    ] = 1,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000_000, help="length of the prompt, where the file does not say"
        ),
    ] = None,
    tau: Annotated[
        int,
        typer.Option(
            min=1,
            max=1_000_000,
            help="flashmemory: steps of a window; a query stands at each window's start",
        ),
    ] = 64,
) -> None:
    """Turn an engine's captures, or another project's recordings, into traces.

    Pickles are read, never run: numbers, texts and arrays are admitted and nothing else.

    \b
    fmsim trace import response.json --format sglang --model v3.2 --out v3.2.safetensors
    fmsim trace import steps.npy --format npy --topk 64 --layers 4 --prompt-tokens 900 --out t
    fmsim trace import --format flashmemory dumps/niah --out traces/niah
    """
    from fmsim.trace.importers import files

    if format is Format.flashmemory:
        _flashmemory(source, out, tau)
        return
    watched = files.model_of(model, topk, layers, entry_tokens)
    pairs = files.places(source, out, format.value)
    for path, place in track(pairs, "importing"):
        for written, found in files.import_file(path, place, format.value, watched, prompt_tokens):
            masses = "" if found.has_mass else ", no masses"
            typer.echo(
                f"{written}: {found.n_steps} steps after {found.header.prompt_tokens:,} tokens,"
                f" {found.n_layers} selections of {found.topk}{masses}"
            )


def _flashmemory(source: Path, out: Path, tau: int) -> None:
    """All dumps of a folder, or one dump."""
    from fmsim import trace
    from fmsim.files import check_apart
    from fmsim.trace.importers import files, flashmemory

    one = source.is_file()
    paths = [source] if one else flashmemory.documents(source)
    if not one:
        out.mkdir(parents=True, exist_ok=True)
    labels = dropped = unkeyed = 0
    for path in track(paths, "importing"):
        place = files.place_of(path, out) if one else out / f"{path.stem}.safetensors"
        check_apart(path, place)
        found = flashmemory.read_document(path, tau)
        trace.write(place, found)
        quality = found.header.quality
        labels, dropped = labels + quality["labels"], dropped + quality["labels_dropped"]
        unkeyed += quality["entries_without_keys"] > 0
    typer.echo(
        f"{out}: {len(paths)} traces with {labels:,} golden labels; they hold labels, not attention"
        " (docs/reference/trace-format.md)"
    )
    if dropped:
        typer.echo(f"left out: {dropped:,} labels on entries that did not exist yet at their token")
    if unkeyed:
        typer.echo(
            f"{unkeyed} documents lack the index keys of their last entries (the dump's second"
            " pass); these score as zero"
        )


def export_traces(
    traces: Annotated[list[Path], typer.Argument(help="traces with hidden states and index keys")],
    out: Annotated[Path, typer.Option(help="folder for doc_*.pkl and their metadata")],
    format: Annotated[
        ExportFormat,
        typer.Option("--format", help="flashmemory: the training dumps of LSA's authors"),
    ] = ExportFormat.flashmemory,
    head_share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="share of a step's compressed mass that golden entries carry"
        ),
    ] = 0.6,
    min_layers: Annotated[
        int,
        typer.Option(
            min=1,
            max=10_000,
            help="CSA layers that must choose an entry to make it golden (the paper: 3 of 21)",
        ),
    ] = 1,
    no_verify: NoVerify = False,
) -> None:
    """Write traces as training data of another project (needs torch).

    \b
    fmsim trace export traces/nano-32k-*.safetensors --format flashmemory --out dumps/nano
    """
    from fmsim import trace
    from fmsim.indexer.labels import LabelRule
    from fmsim.indexer.windows import check_scorable
    from fmsim.trace.importers.flashmemory import TRAINER_WIDTHS
    from fmsim.trace.importers.flashmemory_writer import write_document

    require("model", "trace export")
    rule, read = LabelRule(head_share, min_layers), None
    out.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(track(traces, "exporting")):
        read = trace.read(path)
        check_scorable(read, path.name)
        voters = read.header.geometry["label_layers"] if read.holds_labels else read.n_layers
        write_document(out, number, read, _votes(read, rule, voters), voters)
    tau, widths = read.header.tau, (read.hidden.shape[2], read.index_keys.shape[2])
    typer.echo(
        f"{out}: {len(traces)} documents. A trace has a hidden state every {tau} tokens: train with"
        f" --sample-interval {tau}"
    )
    if widths != TRAINER_WIDTHS:
        typer.echo(
            f"these are {widths} wide; FlashMemory's trainer takes hidden and key widths of"
            f" {TRAINER_WIDTHS} only"
        )


def _votes(read: Trace, rule: LabelRule, voters: int) -> Iterator[Votes]:
    """Golden entries of each decode step."""
    import numpy as np

    from fmsim.indexer.labels import step_votes
    from fmsim.trace.importers.flashmemory import Votes

    for step in range(read.n_steps):
        ids, mass = read.entry_ids[step], read.mass[step]
        if read.holds_labels:
            there = ids[0] >= 0
            yield Votes(ids[0][there], np.rint(mass[0][there] * voters).astype(np.int32))
        else:
            yield Votes(*step_votes(ids, mass, rule))
