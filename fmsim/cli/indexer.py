"""`fmsim indexer`: train LSA's memory indexer from traces, and say how well it recalls."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmsim.cli.extras import require
from fmsim.cli.given import device_given
from fmsim.cli.options import MOST_SEED, Columns, Csv, Json, NoVerify, Wide, print_found, write_page
from fmsim.cli.progress import track

if TYPE_CHECKING:
    from fmsim.indexer.checkpoint import Checkpoint
    from fmsim.indexer.labels import LabelRule
    from fmsim.indexer.windows import Windows
    from fmsim.trace import Trace

app = typer.Typer(
    help="Train and evaluate LSA's memory indexer (needs torch to train).", no_args_is_help=True
)


class Loss(enum.StrEnum):
    infonce = "infonce"
    focal = "focal"


Traces = Annotated[list[Path], typer.Argument(help="traces recorded from a DeepSeek-V4 model")]
HeadShare = Annotated[
    float,
    typer.Option(min=0, max=1, help="share of a step's compressed mass that golden entries carry"),
]
MinLayers = Annotated[
    int,
    typer.Option(min=1, max=10_000, help="CSA layers that must choose an entry to make it golden"),
]
StateAge = Annotated[
    int,
    typer.Option(
        min=0,
        max=1_000_000,
        help="windows between a query's state and the window it serves: 0 is right before it, 1 is"
        " what a policy has that recalls ahead",
    ),
]
Horizon = Annotated[
    int | None,
    typer.Option(
        min=1, max=1_000_000, help="steps that a query must serve; the trace's tau by default"
    ),
]


@app.command()
def train(
    traces: Traces,
    out: Annotated[Path, typer.Option(help="checkpoint to write (.safetensors)")],
    held_out: Annotated[
        list[Path], typer.Option(help="traces to judge by; every tenth one by default")
    ] = [],
    heads: Annotated[int, typer.Option(min=1, max=4096, help="heads a layer")] = 32,
    rank: Annotated[
        int, typer.Option(min=1, max=65_536, help="width of the queries' bottleneck")
    ] = 192,
    loss: Annotated[
        Loss, typer.Option(help="over a query's list, or over single entries")
    ] = Loss.infonce,
    random_negatives: Annotated[
        float, typer.Option(min=0, max=1e6, help="negatives sampled a positive")
    ] = 3.0,
    hard_negatives: Annotated[
        float, typer.Option(min=0, max=1e6, help="highest-scoring negatives a positive")
    ] = 1.0,
    mass_power: Annotated[
        float,
        typer.Option(min=0, max=10, help="a positive weighs its mass to this power; 0: all alike"),
    ] = 1.0,
    focal_gamma: Annotated[
        float,
        typer.Option(min=0, max=100, help="focal loss: how little what is already right counts"),
    ] = 2.0,
    learning_rate: Annotated[
        float, typer.Option(min=0, max=100, help="AdamW's peak learning rate")
    ] = 2e-3,
    weight_decay: Annotated[
        float, typer.Option(min=0, max=100, help="AdamW's weight decay")
    ] = 0.01,
    warm_up: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="share of the steps in which the rate rises; then it falls as a cosine",
        ),
    ] = 0.05,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 2000,
    traces_per_step: Annotated[
        int, typer.Option(min=1, help="traces whose queries make a batch")
    ] = 4,
    evaluate_every: Annotated[int, typer.Option(min=1, help="steps between evaluations")] = 100,
    patience: Annotated[
        int, typer.Option(min=1, help="evaluations without better recall before stopping")
    ] = 5,
    kept_share: Annotated[
        float, typer.Option(min=0, max=1, help="share that the recommended threshold keeps")
    ] = 0.10,
    head_share: HeadShare = 0.6,
    min_layers: MinLayers = 1,
    horizon: Horizon = None,
    state_age: StateAge = 0,
    layers: Annotated[
        str | None,
        typer.Option(help="CSA layers to score, from 0, e.g. 0,2; by default all that have keys"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="decides the weights and the sampling")
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="go on with an interrupted run of the same traces and options"
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; cuda where there is one by default")
    ] = None,
    no_verify: NoVerify = False,
) -> None:
    """Train a memory indexer from traces alone; the model that made them is never loaded.

    \b
    fmsim indexer train traces/*.safetensors --held-out held/*.safetensors --out indexer.safetensors
    fmsim indexer train traces/*.safetensors --out focal.safetensors --loss focal --min-layers 3 \\
      --mass-power 0
    fmsim indexer train traces/*.safetensors --out stale.safetensors --state-age 1
    """
    from fmsim.errors import FmsimError

    require("model", "indexer train")
    import torch

    from fmsim.indexer import checkpoint
    from fmsim.indexer.labels import LabelRule
    from fmsim.indexer.scorer import ScorerConfig
    from fmsim.indexer.train import TrainOptions
    from fmsim.indexer.train import train as run
    from fmsim.trace.cut import parse_numbers

    options = TrainOptions(
        heads=heads,
        rank=rank,
        loss=loss.value,
        random_negatives=random_negatives,
        hard_negatives=hard_negatives,
        mass_power=mass_power,
        focal_gamma=focal_gamma,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warm_up=warm_up,
        steps=steps,
        traces_per_step=traces_per_step,
        evaluate_every=evaluate_every,
        patience=patience,
        kept_share=kept_share,
        seed=seed,
    )
    if not held_out:
        traces, held_out = [path for n, path in enumerate(traces) if n % 10], traces[::10]
    if not traces:
        raise FmsimError(
            "indexer train: one trace is held out, which leaves none to train on; give two or more"
        )
    rule = LabelRule(head_share, min_layers, horizon, state_age)
    parts = [
        [windows for _, windows in _read(paths, rule, "reading")] for paths in (traces, held_out)
    ]
    if layers is not None:
        chosen = parse_numbers(layers, "--layers")
        parts = [[windows.of_layers(chosen) for windows in part] for part in parts]
    config = ScorerConfig.from_geometry(_geometry(traces[0]))
    device = device_given(device, torch.cuda.is_available())
    typer.echo(
        f"{sum(len(windows.entries) for windows in parts[0])} queries of {len(traces)} traces, on"
        f" {device}",
        err=True,
    )
    state = out.with_name(out.name + ".state")
    if state.exists() and not resume:
        typer.echo(
            f"{state}: an interrupted run is overwritten; --resume would go on with it", err=True
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    trained = run(*parts, config, options, device, _show_progress, state, resume)
    checkpoint.save(trained, out)
    recall = ", ".join(
        f"{value:.3f} at {float(share):.0%} kept"
        for share, value in trained.training["recall"].items()
    )
    typer.echo(
        f"{out}: golden recall {recall} on held-out traces, in {trained.training['seconds']}"
        f" s{_peak(device)}"
    )


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="indexer checkpoint (.safetensors or .pt)")],
    traces: Traces,
    head_share: HeadShare = 0.6,
    min_layers: MinLayers = 1,
    horizon: Horizon = None,
    state_age: StateAge = 1,
    native: Annotated[
        Path | None,
        typer.Option(
            help="the model's lightning indexer (fmsim indexer native); found for nano's traces"
        ),
    ] = None,
    budget: Annotated[
        list[str],
        typer.Option(help="replay policies at this budget, such as '12.5% gpu'; repeat for more"),
    ] = [],
    model: Annotated[
        str, typer.Option(help="whose bytes a budget is of: a preset (`fmsim model list`)")
    ] = "v4-flash",
    plot: Annotated[Path | None, typer.Option(help="write the curves as an HTML page")] = None,
    as_json: Json = False,
    as_csv: Csv = False,
    wide: Wide = False,
    columns: Columns = None,
    no_verify: NoVerify = False,
) -> None:
    """Recall of golden entries and of attention mass against kept share, beside simpler rankings
    and the oracle; with --budget also as policies at equal bytes on the GPU.

    \b
    fmsim indexer eval indexer.safetensors held/*.safetensors --plot recall.html
    fmsim indexer eval indexer.safetensors held/*.safetensors --budget "12.5% gpu"
    """
    from fmsim.indexer import checkpoint as checkpoints
    from fmsim.indexer.eval import evaluate as run
    from fmsim.indexer.labels import LabelRule
    from fmsim.report.tables import indexer as table

    read = _read(traces, LabelRule(head_share, min_layers, horizon, state_age), "scoring")
    held = checkpoints.load(native) if native else _nanos_own([found for found, _ in read])
    found = run(checkpoints.load(checkpoint), read, native=held)
    if budget:
        own = held is not None and native is None
        found["policies"] = {
            windows.name: _rivals(each, budget, model, checkpoint, own) for each, windows in read
        }
    if plot:
        from fmsim.report.pages import recall
        from fmsim.report.pages.layout import render

        write_page(plot, render(recall.page(found, checkpoint.stem)), "--plot")
    print_found(
        found,
        table.rows(found),
        lambda: table.parts(found),
        as_json=as_json,
        as_csv=as_csv,
        wide=wide,
        columns=columns,
    )


def _rivals(
    trace: Trace, budgets: list[str], model: str, checkpoint: Path, native: bool
) -> list[dict]:
    from fmsim.experiments import rivals
    from fmsim.geometry import geometry_named

    geometry = geometry_named(model, Path, "--model")
    return rivals.compare(trace, budgets, geometry, checkpoint, native)


def _nanos_own(traces: list[Trace]) -> Checkpoint | None:
    """nano's lightning indexer, where all traces are of the shipped weights and have all layers'
    keys, and torch is there to read them.
    """
    if any(len(found.keyed) < found.n_layers for found in traces):
        return None
    try:
        from fmsim.exec.model.weights.loader import load_model
        from fmsim.exec.runs.native import native_indexer
        from fmsim.exec.runs.record import weights_digest
    except ModuleNotFoundError:
        return None
    from fmsim.nano.tokenizer import MODEL_FOLDER

    if {found.header.model.sha256 for found in traces} != {weights_digest(MODEL_FOLDER)}:
        return None
    return native_indexer(load_model(MODEL_FOLDER), "nano")


@app.command()
def native(
    out: Annotated[Path, typer.Option(help="checkpoint to write (.safetensors)")],
    model: Annotated[
        Path | None, typer.Argument(help="a DeepSeek-V4 directory; the shipped nano by default")
    ] = None,
) -> None:
    """Write a model's own lightning indexer as a checkpoint, to hold for a window: a baseline for
    eval, and for the policy lsa.

    \b
    fmsim indexer native --out native.safetensors
    fmsim run scenarios/500k.yaml -p lsa --set policies.lsa.checkpoint=native.safetensors
    """
    require("model", "indexer native")
    from fmsim.exec.model.weights.loader import load_model
    from fmsim.exec.runs.native import native_indexer
    from fmsim.indexer import checkpoint
    from fmsim.nano.tokenizer import MODEL_FOLDER

    name = model.resolve().name if model else "nano"
    checkpoint.save(native_indexer(load_model(model or MODEL_FOLDER), name), out)
    typer.echo(f"{out}: the lightning indexer of {name}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="indexer checkpoint (.safetensors or .pt)")],
    target: Annotated[
        Path, typer.Argument(help="checkpoint to write; its suffix decides the format")
    ],
) -> None:
    """Read a checkpoint, check it, and write its weights unchanged in the other format.

    \b
    fmsim indexer convert flashmemory.pt flashmemory.safetensors
    """
    from fmsim.indexer import checkpoint

    found = checkpoint.load(source)
    checkpoint.save(found, target)
    shapes = {
        f"l{layer}": f"{weights.heads} heads x {weights.head_dim}, rank {len(weights.q_norm)}"
        for layer, weights in found.layers.items()
    }
    typer.echo(
        f"{target}: hidden size {found.hidden_size}; "
        + "; ".join(f"{layer}: {shape}" for layer, shape in shapes.items())
    )


def _read(paths: list[Path], rule: LabelRule, doing: str) -> list[tuple[Trace, Windows]]:
    from fmsim import trace
    from fmsim.indexer.windows import read_windows

    read = (trace.read(path) for path in track(paths, doing))
    return [
        (found, read_windows(found, path.name, rule))
        for path, found in zip(paths, read, strict=False)
    ]


def _geometry(path: Path) -> dict:
    from fmsim import trace

    return trace.read(path).header.geometry


def _show_progress(progress) -> None:
    from fmsim.indexer.train import RECALL_SHARES

    rows = zip(RECALL_SHARES, progress.recall, progress.mass_kept, strict=True)
    kept = [f"at {share:.0%}: recall {recall:.3f}, mass {mass:.3f}" for share, recall, mass in rows]
    typer.echo(f"step {progress.step:5d}  loss {progress.loss:.4f}  {'  '.join(kept)}", err=True)


def _peak(device: str) -> str:
    import resource

    import torch

    from fmsim.units import KIB, gib

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    on_device = (
        f", {gib(torch.cuda.max_memory_allocated(), 1)} on the GPU"
        if device.startswith("cuda")
        else ""
    )
    return f"; peak memory {gib(host, 1)}{on_device}"
