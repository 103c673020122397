"""`fmsim trace import` and `fmsim trace export`: traces from and to other projects' formats."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmsim.cli.extras import require
from fmsim.cli.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fmsim.indexer.labels import LabelRule
    from fmsim.trace import Trace
    from fmsim.trace.importers.flashmemory import Votes


class Format(enum.StrEnum):
    flashmemory = "flashmemory"


FormatOption = Annotated[
    Format,
    typer.Option("--format", help="flashmemory: the training dumps of LSA's authors, doc_*.pkl"),
]


def import_traces(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of doc_*.pkl")],
    out: Annotated[Path, typer.Option(help="folder for the traces, one a document")],
    format: FormatOption = Format.flashmemory,
    tau: Annotated[
        int, typer.Option(help="decode steps of a window; a query stands at each window's start")
    ] = 64,
) -> None:
    """Turn another project's recordings into traces.

    Pickles are read, never run: tensors are admitted and nothing else.

    \b
    fmsim trace import --format flashmemory dumps/niah --out traces/niah
    fmsim indexer train traces/niah/*.safetensors --out indexer.safetensors
    """
    from fmsim import trace
    from fmsim.trace.importers import flashmemory

    paths = flashmemory.documents(folder)
    out.mkdir(parents=True, exist_ok=True)
    labels = dropped = unkeyed = 0
    for path in track(paths, "importing"):
        found = flashmemory.read_document(path, tau)
        trace.write(out / f"{path.stem}.safetensors", found)
        quality = found.header.quality
        labels, dropped = labels + quality["labels"], dropped + quality["labels_dropped"]
        unkeyed += quality["entries_without_keys"] > 0
    typer.echo(
        f"{out}: {len(paths)} traces with {labels:,} golden labels; they hold labels, not attention"
        " (docs/trace-format.md)"
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
    format: FormatOption = Format.flashmemory,
    head_share: Annotated[
        float, typer.Option(help="share of a step's compressed mass that golden entries carry")
    ] = 0.6,
    min_layers: Annotated[
        int,
        typer.Option(
            help="CSA layers that must choose an entry to make it golden (the paper: 3 of 21)"
        ),
    ] = 1,
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
