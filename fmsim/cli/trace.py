"""`fmsim trace`: record what a model attends to, look into a recording, exchange it."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmsim.cli import exchange, trace_tools
from fmsim.cli.extras import require
from fmsim.cli.given import device_given
from fmsim.cli.options import (
    MOST_SEED,
    Columns,
    Csv,
    Json,
    NoVerify,
    TraceFile,
    Wide,
    print_found,
    tokens,
)
from fmsim.cli.progress import token_bar

if TYPE_CHECKING:
    from fmsim.exec.runs.stream import Stream

app = typer.Typer(help="Record attention traces, and look into them.", no_args_is_help=True)
app.command("import")(exchange.import_traces)
app.command("export")(exchange.export_traces)
app.command("cut")(trace_tools.cut)
app.command("pack")(trace_tools.pack)
app.command("stats")(trace_tools.stats)


class Kind(enum.StrEnum):
    needles = "needles"
    continuation = "continuation"
    memory = "memory"


@app.command()
def info(
    file: TraceFile,
    check: Annotated[
        bool, typer.Option("--check", help="read every value again, and compare the digest")
    ] = False,
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
    no_verify: NoVerify = False,
) -> None:
    """What a trace was recorded from, and how its attention is spread.

    \b
    fmsim trace info nano-500k-needles
    fmsim trace info capture.safetensors --check --json
    """
    from fmsim import trace
    from fmsim.report.tables import trace_info
    from fmsim.trace.summary import summary

    found = summary(trace.read(file, check or None))
    print_found(
        found,
        [{"layer": number} | row for number, row in enumerate(found["layers"])],
        lambda: trace_info.parts(str(file), found),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="trace to write (.safetensors)")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="a directory of DeepSeek-V4, DeepSeek-V3.2 or GLM-5; the shipped nano by default"
        ),
    ] = None,
    dense: Annotated[
        Path | None, typer.Option(help="a dense causal LM instead: a directory or a .gguf file")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="text to read, and then to continue")
    ] = None,
    kind: Annotated[
        Kind | None, typer.Option(help="a built-in task instead of a text of your own (nano only)")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="folder of `python -m fmsim.nano.text.pack_tokens`; built-in tasks need it"
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            "-c",
            parser=tokens,
            metavar="TOKENS",
            help="of the prompt, such as 8192 or 32K; a longer text is cut",
        ),
    ] = 32_768,
    steps: Annotated[int, typer.Option(min=1, help="decode steps")] = 512,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="decides a built-in task's text and facts")
    ] = 0,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; cuda where there is one by default")
    ] = None,
    beyond_positions: Annotated[
        bool,
        typer.Option(
            "--beyond-positions", help="a context longer than the model knows (DeepSeek-V4)"
        ),
    ] = False,
) -> None:
    """Read a prompt, decode, and keep what every sparse layer attended to.

    \b
    fmsim trace record --prompt-file book.txt --context 32768 --out book.safetensors
    fmsim trace record --model DeepSeek-V4-dir --prompt-file book.txt --out book.safetensors
    fmsim trace record --dense SmolLM2-dir --prompt-file book.txt --context 8064 --steps 128 \\
      --out dense.safetensors
    """
    from fmsim.errors import FmsimError

    if (prompt_file is None) == (kind is None):
        raise FmsimError("trace record: give either --prompt-file or --kind")
    require("model", "trace record")
    import torch

    from fmsim import trace

    device = device_given(device, torch.cuda.is_available())
    if dense is not None:
        if prompt_file is None:
            raise FmsimError("trace record: --dense needs --prompt-file")
        recorded = _dense(dense, prompt_file, context, steps, device)
    elif model is not None and _is_dsa(model):
        recorded = _dsa(model, prompt_file, context, steps, device)
    else:
        stream = _stream(model, prompt_file, kind, corpus, context, steps, seed)
        recorded = _deepseek(model, stream, seed, device, beyond_positions)
    trace.write(out, recorded)
    typer.echo(
        f"{out}: {recorded.n_steps} steps after {recorded.header.prompt_tokens} tokens,"
        f" {out.stat().st_size / 1e6:.1f} MB"
    )


def _is_dsa(model: Path) -> bool:
    from fmsim.trace.importers.dsa import is_dsa

    return is_dsa(model)


def _dsa(model: Path, prompt_file: Path | None, context: int, steps: int, device: str):
    from fmsim.errors import FmsimError
    from fmsim.trace.importers.dense import load_dense, weights_sha256
    from fmsim.trace.importers.dsa import record_dsa

    if prompt_file is None:
        raise FmsimError("trace record: a built-in task is for nano; give --prompt-file")
    loaded, tokenizer = load_dense(model, device)
    ids = tokenizer(_text(prompt_file))["input_ids"][:context]
    if not ids:
        raise FmsimError(f"--prompt-file {prompt_file}: holds no text")
    with token_bar(len(ids) + steps) as advance:
        return record_dsa(
            loaded,
            ids,
            steps,
            name=model.resolve().name,
            sha256=weights_sha256(model),
            prompt_text=prompt_file.name,
            progress=advance,
        )


def _deepseek(model: Path | None, stream: Stream, seed: int, device: str, beyond_positions: bool):
    from fmsim.exec.model.config import read_config
    from fmsim.exec.model.weights.loader import load_model
    from fmsim.exec.model.weights.needs import check_positions
    from fmsim.exec.runs.record import record, weights_digest
    from fmsim.nano.tokenizer import MODEL_FOLDER

    folder = model or MODEL_FOLDER
    if not beyond_positions:
        check_positions(folder, read_config(folder), len(stream.prompt) + stream.steps)
    loaded = load_model(folder, device)
    with token_bar(len(stream.prompt) + stream.steps) as advance:
        [recorded] = record(
            loaded,
            [stream],
            name=folder.name,
            seed=seed,
            sha256=weights_digest(folder),
            progress=advance,
        )
    return recorded


def _stream(
    model: Path | None,
    prompt_file: Path | None,
    kind: Kind | None,
    corpus: Path | None,
    context: int,
    steps: int,
    seed: int,
):
    import numpy as np

    from fmsim.errors import FmsimError
    from fmsim.exec.runs.stream import Stream, Turn
    from fmsim.nano import prompts, tokens
    from fmsim.nano.tokenizer import MODEL_FOLDER

    if kind is not None:
        if corpus is None:
            raise FmsimError(
                "trace record: --kind needs --corpus, the folder that"
                " `python -m fmsim.nano.text.pack_tokens` writes"
            )
        return prompts.decode_stream(
            kind.value, context, np.random.default_rng(seed), tokens.load(corpus, "held_out"), steps
        )
    ids = encode(model or MODEL_FOLDER, prompt_file, context)
    return Stream("text", np.array(ids), [Turn([], steps)])


def encode(folder: Path, prompt_file: Path, context: int) -> list[int]:
    """The first `context` tokens of a text file, by the tokenizer of a model's folder."""
    from transformers import AutoTokenizer

    from fmsim.errors import FmsimError

    ids = AutoTokenizer.from_pretrained(folder)(_text(prompt_file))["input_ids"][:context]
    if not ids:
        raise FmsimError(f"--prompt-file {prompt_file}: holds no text")
    return ids


def _text(prompt_file: Path) -> str:
    from fmsim.errors import FmsimError
    from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, read_text

    try:
        return read_text(prompt_file, MOST_BYTES_OF_RESULTS)
    except FileNotFoundError:
        raise FmsimError(f"--prompt-file {prompt_file}: no such file") from None


def _dense(path: Path, prompt_file: Path, context: int, steps: int, device: str):
    from fmsim.errors import FmsimError
    from fmsim.trace.importers.dense import load_dense, record_dense, weights_sha256

    loaded, tokenizer = load_dense(path, device)
    ids = tokenizer(_text(prompt_file))["input_ids"][: context + steps]
    if len(ids) < context + steps:
        raise FmsimError(
            f"--prompt-file {prompt_file}: has {len(ids)} tokens, --context and --steps ask for"
            f" {context + steps}; lower one of them"
        )
    with token_bar(len(ids)) as advance:
        return record_dense(
            loaded,
            ids,
            steps,
            name=path.resolve().name,
            sha256=weights_sha256(path),
            prompt_text=prompt_file.name,
            progress=advance,
        )
