"""What a model still answers under each policy, and what the policy keeps for it: the table of `fmsim eval`.

Each answer becomes a line, a dict of plain values; lines are kept in a file as they come, so that a run can be interrupted and
go on. `summary` makes the table's cells of lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from fmsim import metrics
from fmsim.errors import FmsimError
from fmsim.footprint import check_layer_map
from fmsim.geometry import PRESETS
from fmsim.hw.spec import load_hardware
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.simulate import simulate
from fmsim.tasks import FAMILIES, build
from fmsim.tasks.questions import texts

if TYPE_CHECKING:
    from fmsim.exec.model import DeepseekV4
    from fmsim.ledger import Ledger
    from fmsim.nano.tokens import Corpus

POLICIES = ("full", "lsa", "lsa:on_miss=fallback", "recency", "random", "lru", "h2o", "oracle")
Line = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is asked of whom. ``policies`` are specs as `policy_of` reads them; ``budget`` is of all that do not name their own; ``model``
    names the preset whose bytes, and ``hardware`` the one whose times, the answers' ledgers are turned into."""

    tasks: tuple[str, ...] = FAMILIES
    lengths: tuple[int, ...] = (32_768,)
    samples: int = 10
    policies: tuple[str, ...] = POLICIES
    budget: str = "10%"
    checkpoint: str | None = None
    seed: int = 42
    model: str = "v4-flash"
    hardware: str = "h100"

    def __post_init__(self) -> None:
        for task in set(self.tasks) - set(FAMILIES):
            raise FmsimError(f"--task {task}: no such family; there are {', '.join(FAMILIES)}")
        if self.model not in PRESETS:
            raise FmsimError(f"--geometry {self.model}: no such preset; there are {', '.join(PRESETS)}")
        if self.samples < 1 or min(self.lengths) < 1:
            raise FmsimError("eval: --samples and --length must be at least 1")


def policy_of(spec: str, budget: str, checkpoint: str | None = None) -> Policy:
    """A policy from ``name`` or ``name:key=value,key=value``; FmsimError where it cannot be read or built."""
    name, _, given = spec.partition(":")
    params: dict[str, Any] = {}
    for pair in filter(None, given.split(",")):
        key, found, value = pair.partition("=")
        if not found:
            raise FmsimError(f"--policy {spec}: {pair!r} is no key=value; write e.g. lsa:on_miss=fallback,budget=20%")
        try:
            params[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise FmsimError(f"--policy {spec}: {value!r} is no value of {key.strip()}") from None
    fields = registry.get(name).Params.model_fields
    if name != "full":
        params.setdefault("budget", budget)
    if checkpoint is not None and "checkpoint" in fields:
        params.setdefault("checkpoint", checkpoint)
    return registry.build({"policy": name} | params)


class Lines:
    """Answers by (policy, task, tokens, sample, question), and the file that keeps them, if any.

    The file's first line is the plan's part that decides an answer; another plan's file is refused.
    """

    def __init__(self, plan: Plan, about: dict[str, Any], path: Path | None = None):
        self.path, self.found = path, {}
        decides = {key: value for key, value in asdict(plan).items() if key not in ("lengths", "samples", "policies")} | about
        head = json.dumps({"plan": json.loads(json.dumps(decides))})
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                self._load(path, head)
            else:
                path.write_text(head + "\n", encoding="utf-8")
        except OSError as error:
            raise FmsimError(f"{path}: the answers cannot be kept there ({error.strerror}); give another --out") from None

    def _load(self, path: Path, head: str) -> None:
        whole = [text for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if text.endswith("\n")]  # a kill may cut the last
        if not whole or whole[0].strip() != head:
            raise FmsimError(f"{path}: holds answers of another plan, model or text; give another --out, or take it away")
        for number, text in enumerate(whole[1:], start=2):
            try:
                line = json.loads(text)
                self.found[self.key(line)] = line
            except (ValueError, KeyError, TypeError):
                raise FmsimError(f"{path}: line {number} is no answer; take it out, and it is asked again") from None
        path.write_text("".join(whole), encoding="utf-8")

    @staticmethod
    def key(line: Line) -> tuple:
        return tuple(line[name] for name in ("policy", "task", "tokens", "sample", "question"))

    def add(self, line: Line) -> None:
        self.found[self.key(line)] = line
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def run(
    model: DeepseekV4, corpus: Corpus, plan: Plan, lines: Lines, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> list[Line]:
    """All lines of ``plan``; those that ``lines`` has are not asked again. ``progress`` is told (what, contexts done, contexts in all)."""
    makers = {spec: (lambda spec=spec: policy_of(spec, plan.budget, plan.checkpoint)) for spec in plan.policies}
    for make in makers.values():
        make()  # a mistake is told before anything is read
    jobs = [(length, sample) for length in plan.lengths for sample in range(plan.samples)]
    asked: list[Line] = []
    for done, (length, sample) in enumerate(jobs):
        progress(f"{length:,} tokens, sample {sample + 1}", done, len(jobs))
        for context in build(plan.tasks, length, sample, corpus, plan.seed):
            asked += _answer(model, context, makers, plan, lines, length, sample)
    progress("done", len(jobs), len(jobs))
    return asked


def _answer(model, context, makers, plan: Plan, lines: Lines, length: int, sample: int) -> list[Line]:
    """One context's lines, in the order of questions and policies."""
    from fmsim.exec.answer import answers

    keys = {
        (number, label): (label, question.task, length, sample, number)
        for number, question in enumerate(context.questions)
        for label in makers
    }
    wanted = [pair for pair, key in keys.items() if key not in lines.found]
    if wanted:
        for answered in answers(model, context, wanted, makers, seed=sample):
            question = context.questions[answered.question]
            line = {
                "policy": answered.label, "task": question.task, "tokens": length, "sample": sample, "question": answered.question,
                "score": question.score(answered.tokens), "text": texts([answered.tokens])[0],
            }  # fmt: skip
            lines.add(line | _costs(answered.ledger, plan) | {"confidence": answered.confidence})
    return [lines.found[key] for key in keys.values()]


def _costs(ledger: Ledger, plan: Plan) -> Line:
    """What `fmsim run` says of a ledger, as far as the table needs it, in the plan's model and hardware."""
    geometry, hw = PRESETS[plan.model], load_hardware(plan.hardware)
    layer_map = check_layer_map(None, ledger.n_layers, geometry.n_csa)
    row = metrics.row(ledger, simulate(ledger, geometry, hw, layer_map, 1), geometry, hw, layer_map)
    return {
        "kv_bytes": row["kv_hbm_bytes"],
        "kv_ratio": row["kv_hbm_ratio"],
        "golden_kept": row["entry_recall"],
        "mass_kept": row["mass_kept"],
        "selected_resident": float(ledger.hit.sum() / max(1, ledger.accessed.sum())),
        "h2d_bytes_per_step": row["h2d_bytes"] / ledger.n_steps,
        "stall_ratio": row["stall_ratio"],
    }


# --------------------------------------------------------------------------------------------------------- the table


COSTS = ("kv_bytes", "kv_ratio", "golden_kept", "mass_kept", "h2d_bytes_per_step", "stall_ratio")


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """-> {"cells": a (length, task, policy) each, "averages": a (length, policy) each over tasks, "overall": a policy each over all of
    them, "signals": ...}; ready for JSON.

    ``score`` is a mean over samples, of one's questions their mean, in 0 to 1. ``versus_full`` is the mean difference to the full cache's on
    the same samples, and ``versus_full_se`` its standard error (null for one sample): a difference within twice that is not one.
    """
    cells = [_cell(*key, group) for key, group in _grouped(lines, ("tokens", "task", "policy")).items()]
    averages = [
        {"tokens": tokens, "policy": policy, **_mean(group)} for (tokens, policy), group in _grouped(cells, ("tokens", "policy")).items()
    ]
    overall = [{"policy": policy, **_mean(group)} for (policy,), group in _grouped(averages, ("policy",)).items()]
    full = {(line["task"], line["tokens"], line["sample"], line["question"]): line["score"] for line in lines if line["policy"] == "full"}
    for cell in cells:
        cell |= _versus_full([line for line in lines if all(line[key] == cell[key] for key in ("tokens", "task", "policy"))], full)
    return {"cells": cells, "averages": averages, "overall": overall, "signals": signals(lines, full)}


def _grouped(rows: Sequence[Line], keys: tuple[str, ...]) -> dict[tuple, list[Line]]:
    groups: dict[tuple, list[Line]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _cell(tokens: int, task: str, policy: str, lines: list[Line]) -> Line:
    samples = _grouped(lines, ("sample",))
    means = [np.mean([line["score"] for line in group]) for group in samples.values()]
    costs = {key: float(np.mean([line[key] for line in lines])) for key in COSTS}
    return {"tokens": tokens, "task": task, "policy": policy, "samples": len(samples), "score": float(np.mean(means)), **costs}


def _mean(rows: list[Line]) -> Line:
    return {key: float(np.mean([row[key] for row in rows])) for key in ("score", *COSTS)}


def _versus_full(lines: list[Line], full: dict[tuple, float]) -> Line:
    """Paired by sample; null where the full cache was not asked."""
    by_sample: dict[int, list[float]] = {}
    for line in lines:
        key = (line["task"], line["tokens"], line["sample"], line["question"])
        if key in full:
            by_sample.setdefault(line["sample"], []).append(line["score"] - full[key])
    differences = [float(np.mean(part)) for part in by_sample.values()]
    if not differences:
        return {"versus_full": None, "versus_full_se": None}
    error = float(np.std(differences, ddof=1) / len(differences) ** 0.5) if len(differences) > 1 else None
    return {"versus_full": float(np.mean(differences)), "versus_full_se": error}


SIGNALS = {"selected entries not resident": lambda line: 1 - line["selected_resident"], "indexer unsure": lambda line: -line["confidence"]}


def signals(lines: Sequence[Line], full: dict[tuple, float]) -> dict[str, Any]:
    """How well what a serving engine knows while it decodes foretells a lost answer, for policies that lose some.

    {policy: {"lost", "kept", "auc": {signal: ...}}}: of answers that the full cache gives, how many the policy loses and keeps, and the
    chance that the signal was larger for a lost one (0.5: it tells nothing). "selected entries not resident": the share of what the
    native indexer selected; "indexer unsure": how low the memory indexer's highest logit was at its last decision.
    """
    found = {}
    for (policy,), group in _grouped(lines, ("policy",)).items():
        known = [line for line in group if _right(line, full)]
        lost = np.array([line["score"] < _right(line, full) for line in known], dtype=bool)
        if lost.any() and not lost.all():
            there = [name for name in SIGNALS if "unsure" not in name or known[0]["confidence"] is not None]
            auc = {name: _auc(np.array([SIGNALS[name](line) for line in known]), lost) for name in there}
            found[policy] = {"lost": int(lost.sum()), "kept": int((~lost).sum()), "auc": auc}
    return found


def _auc(signal: np.ndarray, lost: np.ndarray) -> float:
    gap = signal[lost][:, None] - signal[~lost][None]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def _right(line: Line, full: dict[tuple, float]) -> float:
    return full.get((line["task"], line["tokens"], line["sample"], line["question"]), 0.0)
