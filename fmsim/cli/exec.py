"""`fmsim exec`."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fmsim.cli.extras import require
from fmsim.cli.given import device_given, labels_of, policy_given
from fmsim.cli.options import (
    MOST_SEED,
    TIMEOUT_S,
    Columns,
    Csv,
    NoVerify,
    PolicyTimeout,
    Quiet,
    Verbose,
    Wide,
    print_found,
    tokens,
)
from fmsim.cli.progress import bar, token_bar

if TYPE_CHECKING:
    from fmsim.exec.runs.stream import Stream
    from fmsim.policies.base import Policy


class Weights(enum.StrEnum):
    own = "own"
    synthetic = "synthetic"


class IndexKeyPlace(enum.StrEnum):
    all = "all"
    tiered = "tiered"


STEPS = 128
SHORTEST_TOKENS = 1024  # of a built-in prompt: what its facts and some text between them take
# each request of a batch than the one before, so that their lengths differ in every way
SHORTER_TOKENS = 37


def exec_(
    policy: Annotated[
        list[str],
        typer.Option(
            "--policy",
            "-p",
            help=(
                "which policy keeps the pages; see `fmsim policy list`. Several decode the same"
                " prompts one after the other, which are read once"
            ),
        ),
    ] = ["lsa"],
    override: Annotated[
        list[str],
        typer.Option(
            "--set", "-s", help="a parameter of the policy, e.g. budget=20%, on_miss=fallback"
        ),
    ] = [],
    model: Annotated[
        Path | None,
        typer.Option(
            help=(
                "a DeepSeek-V4 directory; the shipped nano by default. With --weights synthetic a"
                " preset, or a folder with a config.json"
            )
        ),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(
            help=(
                "the model's own, or random ones of a geometry's full size, whose accesses a trace"
                " drives"
            )
        ),
    ] = Weights.own,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="text to read, and then to continue; built-in questions by default"),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            "-c",
            parser=tokens,
            metavar="TOKENS",
            help="of the prompt, such as 8192 or 32k; a longer text is cut",
        ),
    ] = 8192,
    steps: Annotated[
        int,
        typer.Option(min=1, help="decode steps; built-in questions go on to the end of an answer"),
    ] = STEPS,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="requests side by side, each somewhat shorter than the one before"
        ),
    ] = 1,
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            help=(
                "with --weights synthetic: GPUs of this host. Each decodes its share of the"
                " requests, and holds its share of each layer's experts"
            ),
        ),
    ] = 1,
    index_keys: Annotated[
        IndexKeyPlace | None,
        typer.Option(
            help=(
                "on the GPU: all (the default), or tiered: in layers that the memory indexer does"
                " not score those of resident entries alone, as FlashMemory does; what such layers"
                " lose is then not measured"
            )
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help=(
                "with --weights synthetic: what drives the accesses; by default"
                " fmsim's own of that context"
            )
        ),
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            help=(
                "with --weights synthetic: as many requests as these bytes of KV hold, such as"
                " 16GiB"
            )
        ),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="write what the first request selected, as a trace")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object, in the fields of `fmsim run`")
    ] = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; cuda where there is one by default")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="decides the built-in questions")
    ] = 0,
    beyond_positions: Annotated[
        bool, typer.Option("--beyond-positions", help="contexts longer than the model knows")
    ] = False,
    policy_timeout: PolicyTimeout = TIMEOUT_S,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Decode with a real model under a policy: the answer, and what it cost, measured.

    \b
    fmsim exec --policy lsa
    fmsim exec --policy lru --set budget=1024entries --context 16384 --json
    fmsim exec -p full -p lsa -p lru --context 32k
    fmsim exec --policy full --prompt-file book.txt --steps 256 --record book.safetensors
    fmsim exec --policy lsa --set layers=[1] --index-keys tiered --steps 400
    fmsim exec --weights synthetic --model v4-flash --context 500k --policy lsa --kv-budget 16GiB
    """
    from fmsim.errors import FmsimError, PolicyError
    from fmsim.experiments.workers.parallel import alone
    from fmsim.policies import registry

    if weights is Weights.synthetic:
        from fmsim.cli import exec_synthetic

        if index_keys is not None:
            raise FmsimError(
                "--index-keys: with --weights synthetic they lie as `fmsim run` counts them, tiered"
                " under on_miss mask; leave it out"
            )
        if len(policy) > 1:
            raise FmsimError("--weights synthetic: decodes under one policy; give one --policy")
        asked = exec_synthetic.AskedRun(
            policy[0],
            override,
            str(model or "v4-flash"),
            context,
            batch,
            gpus,
            steps,
            trace,
            kv_budget,
            device,
            seed,
            quiet,
        )
        work = exec_synthetic.measure
    elif gpus > 1:
        raise FmsimError(f"--gpus {gpus}: takes --weights synthetic; leave it out")
    else:
        asked = _Asked(
            policy,
            override,
            model,
            prompt_file,
            context,
            batch,
            steps,
            index_keys,
            record,
            device,
            seed,
            beyond_positions,
            quiet,
        )
        work = _measure
    chosen = [policy_given(one, override) for one in policy]
    names = " and ".join(one.name for one in chosen)

    def lost(_, why: str) -> NoReturn:
        raise PolicyError(f"policy {names}: {why}")

    builtin = all(map(registry.is_builtin, chosen))
    if gpus > 1:
        ends = (None, None) if builtin else (lost, policy_timeout)
        report, transcripts = exec_synthetic.measure_on_gpus(asked, *ends)
    elif builtin:
        report, transcripts = work(asked)
    else:  # whatever it does, it is named
        report, transcripts = alone(work, asked, lost, policy_timeout, announced=True)
    from fmsim.report.tables import measured

    print_found(
        report,
        report["policies"],
        lambda: measured.parts(report, transcripts),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


@dataclass(frozen=True)
class _Asked:
    """Options of a decode with a model's own weights; another process can be told of them."""

    policies: list[str]
    override: list[str]
    model: Path | None
    prompt_file: Path | None
    context: int
    batch: int
    steps: int
    index_keys: IndexKeyPlace | None
    record: Path | None
    device: str | None
    seed: int
    beyond_positions: bool
    quiet: bool


def _measure(asked: _Asked) -> tuple[dict, list[list[tuple[str, str, bool | None]]]]:
    """Decode; -> the report, and of each policy what was asked and answered."""
    from fmsim.errors import FmsimError
    from fmsim.experiments.workers import parallel

    model, seed = asked.model, asked.seed
    chosen = [policy_given(one, asked.override) for one in asked.policies]
    labels = labels_of(asked.policies, chosen)
    if asked.record is not None and len(chosen) > 1:
        raise FmsimError("--record: writes what one policy's decode selected; give one --policy")
    lengths = _lengths(model, asked.prompt_file, asked.context, asked.batch)
    require("model", "exec")
    with bar("loading the model", quiet=asked.quiet):
        import torch

        from fmsim.exec.model.weights.loader import load_model
        from fmsim.exec.model.weights.needs import needs
        from fmsim.exec.runs import live as run
        from fmsim.nano.question import TEXT
        from fmsim.nano.tokenizer import MODEL_FOLDER

        [where, *_] = [_where(asked.index_keys, one, asked.record) for one in chosen]
        device = device_given(asked.device, torch.cuda.is_available())
        folder = model or MODEL_FOLDER
        text = TEXT if asked.prompt_file is None else asked.prompt_file.name
        streams = _streams(model, asked.prompt_file, lengths, asked.steps, seed)
        if model is not None:
            longest = [len(stream.prompt) + stream.steps for stream in streams]
            needed = needs(folder, device, longest, beyond_positions=asked.beyond_positions)
            for line in needed.lines():
                typer.echo(line, err=True)
        loaded = load_model(folder, device)
    fewest = min(stream.steps for stream in streams)
    decodes = fewest * len(chosen)
    tokens = sum(len(stream.prompt) + decodes for stream in streams)
    reports, transcripts = [], []
    with token_bar(tokens, asked.quiet) as advance:
        prompts = run.read(loaded, streams, advance)
        parallel.begin()
        for label, policy in zip(labels, chosen, strict=True):
            decoding, decoded = run.decode(
                prompts, streams, policy, seed=seed, index_keys=where, progress=advance
            )
            name = folder.name if model else "nano"
            reports.append(run.report(decoding, decoded, label, name, text))
            transcripts.append(_transcript(folder, decoded[0]))
            if asked.record is not None:
                _record(asked.record, run, decoding, decoded, folder, seed, text, streams[0].kind)
            del decoding  # the next one needs its memory
    return run.together(reports), transcripts


def _where(index_keys: IndexKeyPlace | None, policy: Policy, record: Path | None) -> str:
    """Where index keys lie. What they cannot do there is told before a model is loaded."""
    from fmsim.errors import FmsimError
    from fmsim.exec.kv.keys import check_tiered

    if index_keys is not IndexKeyPlace.tiered:
        return "all"
    check_tiered(policy)
    if record is not None:
        raise FmsimError(
            "--record: a trace says what each layer selects among all entries, which takes all"
            " index keys; leave out --index-keys tiered"
        )
    return "tiered"


def _lengths(model: Path | None, prompt_file: Path | None, context: int, batch: int) -> list[int]:
    """Prompt tokens of each request."""
    from fmsim.errors import FmsimError

    if model is not None and prompt_file is None:
        raise FmsimError(
            "--model: the built-in questions are in nano's wording; give a --prompt-file with a"
            " model of your own"
        )
    shorter, least = SHORTER_TOKENS * (batch - 1), SHORTEST_TOKENS if prompt_file is None else 1
    if context - shorter < least:
        what = "the built-in questions need" if prompt_file is None else f"a batch of {batch} needs"
        raise FmsimError(f"--context {context}: {what} {least + shorter:,} tokens or more")
    return [context - SHORTER_TOKENS * number for number in range(batch)]


def _streams(
    model: Path | None, prompt_file: Path | None, lengths: list[int], steps: int, seed: int
) -> list[Stream]:
    """What each request reads and is asked."""
    import numpy as np

    from fmsim.exec.runs.stream import Stream, Turn

    if prompt_file is not None:
        from fmsim.cli.trace import encode
        from fmsim.nano.tokenizer import MODEL_FOLDER

        ids = encode(model or MODEL_FOLDER, prompt_file, lengths[0])
        return [Stream("text", np.array(ids[:length]), [Turn([], steps)]) for length in lengths]
    from fmsim.nano.question import haystack, questions

    corpus = haystack()
    return [
        questions(length, steps, seed + number, corpus) for number, length in enumerate(lengths)
    ]


def _record(
    path: Path, run, decoding, decoded, folder: Path, seed: int, text: str, kind: str
) -> None:
    from fmsim import trace
    from fmsim.exec.runs.record import weights_digest

    found = run.recorded(
        decoding,
        decoded,
        name=folder.name,
        sha256=weights_digest(folder),
        seed=seed,
        prompt_text=text,
        kind=kind,
    )
    trace.write(path, found)
    typer.echo(f"{path}: {found.n_steps} steps after {found.header.prompt_tokens} tokens", err=True)


def _transcript(folder: Path, decoded) -> list[tuple[str, str, bool | None]]:
    """(asked, answered, right) as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        (tokenizer.decode(asked), tokenizer.decode(answer), right)
        for asked, answer, right in decoded.answers
    ]
