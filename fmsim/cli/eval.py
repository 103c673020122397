"""`fmsim eval`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fmsim.cli.extras import require
from fmsim.cli.given import device_given
from fmsim.cli.options import (
    Columns,
    Csv,
    Quiet,
    Verbose,
    Wide,
    finite,
    parse_tokens,
    print_found,
    write_page,
)
from fmsim.cli.progress import bar

# All at an equal budget: LSA's own threshold would leave part of its budget unused.
DEFAULT_POLICIES = [
    "full",
    "lsa:threshold=0.5",
    "lsa:threshold=0.5,on_miss=fallback",
    "recency",
    "random",
    "lru",
    "h2o",
    "oracle",
]


def evaluate(
    task: Annotated[
        list[str], typer.Option("--task", "-t", help="task family; repeat for more; all by default")
    ] = [],
    length: Annotated[
        list[str],
        typer.Option(
            "--length",
            "-l",
            help="tokens of a context, or TOKENS:SAMPLES:SEEDS for fewer of them; repeat for more",
        ),
    ] = ["32768"],
    samples: Annotated[
        int, typer.Option(min=1, max=100_000, help="contexts a family, length and seed")
    ] = 10,
    policy: Annotated[
        list[str],
        typer.Option("--policy", "-p", help="name, or name:key=value,key=value; repeat for more"),
    ] = DEFAULT_POLICIES,
    budget: Annotated[
        list[str],
        typer.Option(
            help="of every policy that names none, such as 10% of the entries, or '12.5% gpu' of"
            " what the full cache of --model takes there; repeat for more"
        ),
    ] = ["10%"],
    checkpoint: Annotated[
        Path | None, typer.Option(help="lsa's memory indexer; the shipped one by default")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="folder of `python -m fmsim.nano.text.pack_tokens`: text that nano never read"
        ),
    ] = None,
    text: Annotated[list[Path], typer.Option(help="text files instead of a corpus")] = [],
    geometry: Annotated[
        str, typer.Option("--model", "--geometry", help="preset whose full cache gives the GiB")
    ] = "v4-flash",
    hardware: Annotated[str, typer.Option(help="preset of the simulated stalls")] = "h100",
    seed: Annotated[
        list[int], typer.Option(help="decides texts, facts and questions; repeat for their spread")
    ] = [42],
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; cuda where there is one by default")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            "--workers",
            "-w",
            min=1,
            help="processes, each with a model; they take the GPUs in turn",
        ),
    ] = 1,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0, callback=finite, help="begin no context after that; what is there is reported"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for answers.jsonl, from which an interrupted run goes on, and report.json"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="write the page of `fmsim report` here as well")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object instead of the tables")
    ] = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Ask nano questions over long contexts under every policy, and print score and KV cache side
    by side.

    \b
    fmsim eval --corpus tokens --length 32768 --length 131072 --out results
    fmsim eval --text book.txt -l 8192 --samples 4 -t niah_single -t vt -p full -p lsa:budget=20% \\
      -p recency
    fmsim eval --corpus tokens -l 131072 --seed 42 --seed 43 --seed 44 --workers 8 --out results
    fmsim eval --corpus tokens -l 131072 -l 524288:8:2 --budget "10% gpu" --budget "12.5% gpu"
    """
    require("model", "eval")
    from fmsim.errors import FmsimError
    from fmsim.experiments import accuracy
    from fmsim.experiments.accuracy import Lines, Plan, at_budgets
    from fmsim.files import write_text
    from fmsim.report.tables import accuracy as table
    from fmsim.tasks import FAMILIES

    if (corpus is None) == (not text):
        raise FmsimError(
            "eval: give either --corpus, the folder that"
            " `python -m fmsim.nano.text.pack_tokens` writes, or"
            " --text, one or more text files"
        )
    given = str(checkpoint) if checkpoint else None
    lengths = [_length(text) for text in length]
    plan = Plan(
        tuple(task) or FAMILIES,
        tuple(tokens for tokens, *_ in lengths),
        samples,
        tuple(policy if len(budget) == 1 else at_budgets(policy, budget)),
        budget[0],
        given,
        tuple(seed),
        geometry,
        hardware,
        tuple((tokens, *fewer) for tokens, *fewer in lengths if fewer),
    )
    with bar("starting torch", quiet=quiet) as show:
        import torch

        device = device_given(device, torch.cuda.is_available())
        about = _about(corpus, text, checkpoint)
        answers = Lines(plan, about, out / "answers.jsonl" if out else None)
        source = partial(_open, device, corpus, text)
        lines = accuracy.run(source, plan, answers, show, workers, seconds)
    where = {"device": _device_name(device), "date": datetime.now(UTC).strftime("%F %T")}
    report = {"about": about | where | {"plan": vars(plan)}} | accuracy.summary(lines)
    if out:
        write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    if plot:
        from fmsim.report.pages import accuracy as page
        from fmsim.report.pages.layout import render

        write_page(plot, render(page.page(report, plot.stem)), "--plot")
    print_found(
        report,
        report["cells"],
        lambda: table.parts(report),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


def _length(text: str) -> tuple[int, ...]:
    """(tokens,) or (tokens, samples, seeds)."""
    from fmsim.errors import FmsimError

    length, *fewer = text.split(":")
    if len(fewer) not in (0, 2) or not all(part.isdecimal() and int(part) for part in fewer):
        raise FmsimError(
            f"--length {text}: give tokens, such as 32768, or TOKENS:SAMPLES:SEEDS, such as"
            " 524288:8:2"
        )
    return parse_tokens("--length", length), *map(int, fewer)


def _open(device: str, corpus: Path | None, files: list[Path]):
    """The model, and the text of the contexts."""
    return _model(device), _text(corpus, files)


def _model(device: str):
    import torch

    from fmsim.exec.model.weights.loader import load_model
    from fmsim.nano.tokenizer import MODEL_FOLDER

    if device == "cpu":
        return load_model(MODEL_FOLDER, device)
    return load_model(MODEL_FOLDER, device, torch.bfloat16, widen=True)


def _device_name(device: str) -> str:
    import torch

    if not device.startswith("cuda"):
        return device
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name()}"


def _about(corpus: Path | None, files: list[Path], checkpoint: Path | None) -> dict[str, str]:
    """The model, its weights' digest, that of the text's tokens, and that of the memory indexers:
    the one given, or all that ship.
    """
    import hashlib

    from fmsim.errors import FmsimError
    from fmsim.exec.model.weights.shards import weight_files
    from fmsim.exec.runs.record import weights_digest
    from fmsim.nano.tokenizer import MODEL_FOLDER

    text = hashlib.sha256(_text(corpus, files).tokens.tobytes()).hexdigest()
    if checkpoint is None:
        shipped = set(MODEL_FOLDER.glob("*.safetensors")) - set(weight_files(MODEL_FOLDER))
        paths = sorted(shipped)
    else:
        paths = weight_files(checkpoint) if checkpoint.is_dir() else [checkpoint]
    indexers = hashlib.sha256()
    try:
        for path in paths:
            indexers.update(path.read_bytes())
    except OSError as error:
        raise FmsimError(f"--checkpoint {path}: cannot be read ({error.strerror})") from None
    return {
        "model": "nano",
        "sha256": weights_digest(MODEL_FOLDER),
        "text": text,
        "indexers": indexers.hexdigest(),
    }


def _text(corpus: Path | None, files: list[Path]):
    """What contexts are made of. Raises FmsimError that names the option and the file."""
    from fmsim.errors import FmsimError
    from fmsim.files.inputs import reason
    from fmsim.nano import tokens

    if corpus is None:
        return tokens.from_texts({str(path): _read(path) for path in files})
    try:
        return tokens.load(corpus, "held_out")
    except OSError as error:
        raise FmsimError(f"--corpus {corpus}: cannot be read ({reason(error)})") from None


def _read(path: Path) -> str:
    from fmsim.errors import FmsimError
    from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, read_text

    try:
        text = read_text(path, MOST_BYTES_OF_RESULTS)
    except FileNotFoundError:
        raise FmsimError(f"--text {path}: no such file") from None
    if not text.strip():
        raise FmsimError(f"--text {path}: holds no text")
    return text
