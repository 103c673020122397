"""From a plan to its lines: contexts are read, questions answered, and each answer's ledger turned
into what it costs.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from fmsim.errors import FmsimError
from fmsim.experiments.accuracy.lines import Line, Lines
from fmsim.experiments.accuracy.plan import Item, Plan, policy_of
from fmsim.experiments.workers.parallel import as_they_end, cores, one_by_one
from fmsim.experiments.workers.progress import Progress, StepsTold, Tally, silent
from fmsim.geometry import PRESETS
from fmsim.hw.spec import Hardware, load_hardware
from fmsim.sim import metrics
from fmsim.sim.decode import simulate
from fmsim.sim.footprint import ModelMemory, check_layer_map
from fmsim.tasks import build
from fmsim.tasks.questions import texts

if TYPE_CHECKING:
    from fmsim.exec.model.deepseek_v4 import DeepseekV4
    from fmsim.nano.tokens import Corpus
    from fmsim.replay.ledger import Ledger

READ = 0.5  # of a context's work is to read it, about; the rest is its answers
MOST_GPUS = 16  # of one machine
OpenSource = Callable[[], "tuple[DeepseekV4, Corpus]"]


def run(
    open_source: OpenSource,
    plan: Plan,
    lines: Lines,
    progress: Progress = silent,
    workers: int = 1,
    seconds: float | None = None,
) -> list[Line]:
    """All lines of ``plan``; those that ``lines`` has are not asked again. No context is begun
    after ``seconds``: the lines are then those that are there; FmsimError where there are none.

    ``progress`` is told (what, contexts done, contexts in all).

    ``open_source`` gives the model and the text of the contexts. With several ``workers`` it is
    pickled, and called in each; this process opens nothing, and writes the lines of a context when
    it is whole, so an interruption loses the contexts under way.
    """
    for spec in plan.policies:
        policy_of(spec, plan.budget, plan.checkpoint)  # a mistake is told before anything is read
    items = plan.items()
    ends_s = math.inf if seconds is None else time.monotonic() + seconds
    if workers == 1:
        progress("opening the model", 0, len(items))
        _one_by_one(open_source, plan, items, lines, progress, ends_s)
    else:
        progress(f"{workers} processes begin", 0, len(items))
        _side_by_side(open_source, plan, items, lines, workers, progress, ends_s)
    found = lines.of(items, plan.policies)
    if not found and seconds is not None:
        raise FmsimError(f"--seconds {seconds:g}: over before the first context began; give more")
    return found


def _one_by_one(
    open_source: OpenSource,
    plan: Plan,
    items: list[Item],
    lines: Lines,
    progress: Progress,
    ends_s: float,
) -> None:
    """Lines are added as they come."""
    model, corpus = open_source()

    def work(item: Item) -> None:
        for line in _ask(model, corpus, plan, item, set(lines.found)):
            lines.add(line)

    tally = Tally([str(item) for item in items], len(items), progress)
    in_time = takewhile(lambda item: time.monotonic() < ends_s, items)
    for _ in one_by_one(work, in_time, tally):
        pass


def _side_by_side(
    open_source: OpenSource,
    plan: Plan,
    items: list[Item],
    lines: Lines,
    workers: int,
    progress: Progress,
    ends_s: float,
) -> None:
    jobs = [
        (item, {lines.key(line) for line in lines.of([item], plan.policies)})
        for item in evenly(items)
    ]
    in_time = takewhile(lambda job: time.monotonic() < ends_s, jobs)
    context = multiprocessing.get_context("spawn")
    reading = tuple(context.Lock() for _ in range(MOST_GPUS))
    work = partial(_in_process, open_source, plan, max(1, cores() // workers), reading)
    tally = Tally([str(item) for item, _ in jobs], len(jobs), progress)
    lost: list[str] = []

    def gone(job: tuple[Item, set[tuple]], why: str) -> str:
        return f"{job[0]}: {why}"

    for made in as_they_end(work, in_time, workers, "spawn", gone, told=tally):
        if isinstance(made, str):
            lost.append(made)
            continue
        for line in made:
            lines.add(line)
    if lost:
        raise FmsimError(
            f"eval: {len(lost)} contexts were lost, the first is {lost[0]}; with the same --out it"
            " asks them again"
        )


def evenly(items: Sequence[Item]) -> list[Item]:
    """`items` such that a run that is cut off has the same share of every length, the first seeds
    of each; among equal shares the longest come first.
    """
    of_length: dict[int, list[Item]] = {}
    for item in items:
        of_length.setdefault(item.tokens, []).append(item)
    shares = [
        (place / len(group), -tokens, item)
        for tokens, group in of_length.items()
        for place, item in enumerate(group)
    ]
    return [item for _, _, item in sorted(shares, key=lambda share: share[:2])]


_opened: list[tuple[DeepseekV4, Corpus]] = []  # this worker's, for its next context


def _in_process(
    open_source: OpenSource,
    plan: Plan,
    threads: int,
    reading: Sequence[AbstractContextManager[Any]],
    job: tuple[Item, set[tuple]],
) -> list[Line] | str:
    """A context's lines, or why there are none.

    Workers take GPUs in turn, where there are several. Those of one GPU read one context at a time,
    since that takes the most memory: `reading` has a lock for each.
    """
    import torch

    gpu = 0
    if torch.cuda.is_available():
        number = int(multiprocessing.current_process().name.rpartition("-")[2])
        gpu = number % min(torch.cuda.device_count(), MOST_GPUS)
        torch.cuda.set_device(gpu)
    if not _opened:
        _opened.append(open_source())
        on_gpu = _opened[0][0].lm_head.weight.is_cuda
        # beside a GPU more threads only wait for each other
        torch.set_num_threads(1 if on_gpu else threads)
    item, known = job
    try:
        return list(_ask(*_opened[0], plan, item, known, reading[gpu]))
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return f"{item}: the GPU's memory is short: {error}"


def _ask(
    model: DeepseekV4,
    corpus: Corpus,
    plan: Plan,
    item: Item,
    known: set[tuple],
    reading: AbstractContextManager[Any] | None = None,
) -> Iterator[Line]:
    """One context's lines, but for those whose keys are ``known``. It is read while ``reading`` is
    held.
    """
    from fmsim.experiments.accuracy.answer import RefusedAnswer, answers

    [context] = build(item.tasks, item.tokens, item.sample, corpus, item.seed)
    makers = {
        spec: partial(policy_of, spec, plan.budget, plan.checkpoint) for spec in plan.policies
    }

    def head(number: int, label: str) -> Line:
        return {
            "policy": label,
            "task": context.questions[number].task,
            "tokens": item.tokens,
            "seed": item.seed,
            "sample": item.sample,
            "question": number,
        }

    pairs = [(number, label) for number in range(len(context.questions)) for label in makers]
    wanted = [pair for pair in pairs if Lines.key(head(*pair)) not in known]
    if not wanted:
        return
    memory = ModelMemory(PRESETS[plan.model])
    read = StepsTold(len(context.tokens), end=READ)
    answering = StepsTold(len(wanted), start=READ)
    seed = 1000 * item.seed + item.sample
    for answered in answers(
        model, context, wanted, makers, memory, seed, read.advance, reading=reading
    ):
        answering.advance()
        if isinstance(answered, RefusedAnswer):
            yield head(answered.question, answered.label) | {"refused": answered.why}
            continue
        question = context.questions[answered.question]
        judged = {"score": question.score(answered.tokens), "text": texts([answered.tokens])[0]}
        yield (
            head(answered.question, answered.label)
            | judged
            | costs(answered.ledger, plan)
            | {"confidence": answered.confidence}
        )


@cache
def _hardware(name: str) -> Hardware:
    return load_hardware(name)


def costs(ledger: Ledger, plan: Plan) -> Line:
    """What `fmsim run` says of a ledger, as far as the table needs it, in the plan's model and
    hardware; and what foretells a lost answer.
    """
    geometry, hw = PRESETS[plan.model], _hardware(plan.hardware)
    layer_map = check_layer_map(None, ledger.n_layers, geometry.n_csa)
    # The engine here keeps all index keys, to measure what was lost; a server keeps what it needs.
    sees_all = ledger.on_miss != "mask" or ledger.params.get("sees") == "all"
    ledger = replace(ledger, all_keys=sees_all)
    row = metrics.row(ledger, simulate(ledger, geometry, hw, layer_map, 1), geometry, hw, layer_map)
    mass_total, mass_kept = ledger.mass_total.sum(axis=1), ledger.mass_kept.sum(axis=1)
    return {
        "gpu_bytes": row["gpu_bytes"],
        "gpu_ratio": row["gpu_ratio"],
        "max_requests": row["max_requests"],
        "kv_bytes": row["kv_hbm_bytes"],
        "kv_ratio": row["kv_hbm_ratio"],
        "golden_kept": row["entry_recall"],
        "mass_kept": row["mass_kept"],
        "least_mass_kept": float(
            ((mass_kept + 1e-9) / (mass_total + 1e-9)).min()
        ),  # of all steps; a step without mass loses none
        "heaviest_lost": float(
            (ledger.heaviest_lost / (ledger.mass_total + 1e-9)).max()
        ),  # one entry's share of its step and layer
        "selected_resident": float(ledger.hit.sum() / max(1, ledger.accessed.sum())),
        "h2d_bytes_per_step": row["h2d_bytes_per_step"],
        "stall_ratio": row["stall_ratio"],
    }
