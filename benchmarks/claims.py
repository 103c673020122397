"""Figures that stand in the prose of README and docs, each worded from its result file.

A page must hold the text that a claim makes of the file, whatever its line breaks. So a figure that
moves is found, and the sentence with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import paper

Result = Mapping[str, Any]
MIB = 2**20


@dataclass(frozen=True)
class Claim:
    """A text that `page` must hold."""

    page: str
    worded: Callable[[Result], str]


def _engine_speed(result: Result) -> str:
    full = result["decode"]["full"]
    return (
        f"nano decodes {full['tokens_per_s']:,.0f} tokens/s after {result['context_tokens']:,}"
        f" tokens, {full['times_transformers']:.0f} times as many as transformers'"
    )


def _engine_list(result: Result) -> str:
    full = result["decode"]["full"]
    return (
        f"`full` (tokens/s: {full['tokens_per_s']:,.0f}): {full['times_transformers']:.0f} times;"
        f" {full['tokens_equal']} of {result['steps']} tokens equal"
    )


def _full_footprints(result: Result) -> str:
    errors = {
        suite: abs(row["full"][1] / row["full"][0] - 1)
        for suite, row in result["footprints"]["rows"].items()
    }
    worst = errors.pop("RULER 64K")
    others = max(errors.values())
    within = 0.015 if others <= 0.015 else others
    return f"reproduces within {within:.1%} ({0.025 if worst <= 0.025 else worst:.1%} at 64K)"


def _older_entries(result: Result) -> str:
    shares = result["footprints"]["shares_of_older_entries"]
    return (
        f"it keeps {shares['RULER']:.1%} of the older entries of needles (taken for RULER),"
        f" {shares['LongMemEval']:.1%} of memory (LongMemEval) and {shares['LongBench']:.1%} of"
        " plain text (LongBench)"
    )


def _implied_shares(result: Result) -> str:
    """What the paper's LSA column comes to, by its own recency column's constant, from 128K on."""
    shares = []
    for suite, (tokens, _, lsa, _, _) in paper.FOOTPRINTS.items():
        if tokens < 256 * paper.K:
            continue
        full = result["footprints"]["rows"][suite]["full"][1]
        kept = lsa / full * tokens - paper.RECENT_TOKENS - paper.DECODED_TOKENS
        shares.append(kept / (tokens - paper.RECENT_TOKENS))
    return f"the paper's figures imply {min(shares):.1%} to {max(shares):.1%} from 256K on"


def _oracle_pages(result: Result) -> str:
    row = next(row for row in result["serving"] if row["modelled"] == "oracle pages")
    return f"would let {row['held']} requests in (the {row['bound']})"


def _at_1m(result: Result) -> str:
    row = next(
        r for r in result["serving"] if r["scenario"] == "h20-1m" and r["published_held"] == 30
    )
    errors = row["error"]
    return (
        f"At 1M with 384 pages {-errors['held']:.0%} fewer requests are predicted than were run,"
        f" and {-errors['tokens_per_s']:.0%} fewer tokens/s"
    )


def _an_hour(result: Result) -> str:
    runs = result["runs"]
    cpu_s = {name: row["cpu_s"] for name, row in runs.items()}
    return (
        f"took {cpu_s['full']:.1f} CPU seconds with the full cache, {cpu_s['lookahead']:.1f} with a"
        f" lookahead policy and {cpu_s['lru']:.1f} with LRU, 100,000 recorded requests"
        f" {cpu_s['full, 100000 recorded']:.0f}"
    )


def _left_out(result: Result) -> str:
    found = result["left_out"]
    return f"mean error {found['mean']:.1%}, worst of any module {found['worst']:.1%}"


def _mass(result: Result, budget: str, policy: str, trace: str) -> float:
    rows = result["traces"][trace]["policies"]
    found = next(r for r in rows if (r["budget"], r["policy"]) == (budget, policy))
    mass: float = found["mass_kept"]
    return mass


def _held_against_indexer(result: Result) -> str:
    low = "12.5% gpu"
    pairs = [
        f"({_mass(result, low, 'lru, held', trace):.2f} against"
        f" {_mass(result, low, 'lsa, filled', trace):.2f})"
        for trace in ("nano-500k-continuation", "nano-500k-memory", "nano-500k-needles")
    ]
    return (
        f"keeps more than the indexer where text goes on {pairs[0]} and in the memory task"
        f" {pairs[1]}, and as much at the needles {pairs[2]}"
    )


def _indexer_at_128k(result: Result) -> str:
    mass = [
        _mass(result, "12.5% gpu", label, "nano-128k-needles")
        for label in ("lsa, filled", "lru, held")
    ]
    return f"At 128K the indexer keeps more ({mass[0]:.2f} against {mass[1]:.2f})"


def _history_at_25(result: Result) -> str:
    traces = ("128k-needles", "500k-continuation", "500k-memory", "500k-needles")
    mass = [f"{_mass(result, '25% gpu', 'lsa-history', f'nano-{trace}'):.2f}" for trace in traces]
    return f"from 128K on: {', '.join(mass[:-1])} and {mass[-1]}"


def _lost(result: Result) -> str:
    found = result["signals"]["lsa"]
    return f"`lsa` loses {found['lost']} of {found['lost'] + found['kept']} answers here"


def _threshold_scores(result: Result) -> str:
    found = {row["policy"]: row for row in result["overall"]}
    filled, low = found["lsa:threshold=0.5"], found["lsa:threshold=0.95"]
    return (
        f"`threshold=0.5`, which fills the budget, scores {100 * filled['score']:.1f} where the"
        f" full cache scores {100 * found['full']['score']:.1f}; 0.95 scores"
        f" {100 * low['score']:.1f} with {low['kv_ratio']:.1%}"
    )


def _fresh_mean(result: Result) -> str:
    by_seed = result["paired"]["lsa:threshold=0.5"]["by_seed"]
    points = -100 * (by_seed["43"] + by_seed["44"]) / 2
    return f"loses on both fresh seeds, {points:.1f} points on average"


def _fresh_mean_again(result: Result) -> str:
    by_seed = result["paired"]["lsa:threshold=0.5"]["by_seed"]
    return f"({50 * (by_seed['43'] + by_seed['44']):.1f} points on fresh seeds)"


def _one_lost_at_32k(result: Result) -> str:
    found = result["signals"]["lsa:threshold=0.5"]
    assert found["lost"] == 1
    return f"loses one of {found['lost'] + found['kept']} answers"


def _given_back(result: Result) -> str:
    lost = {policy: found["lost"] for policy, found in result["signals"].items()}
    pairs = []
    for budget in ("", "budget=5%", "budget=3%"):
        masked = lost[f"lsa:{budget}" if budget else "lsa"]
        middle = f",{budget}" if budget else ""
        above = lost[f"lsa:on_miss=fallback{middle},fallback_above=0.05"]
        pairs.append(f"{masked - above} of {masked}")
    return f"gives back {pairs[0]}, {pairs[1]} and {pairs[2]} lost answers"


def _auc(result: Result) -> str:
    found = [result["signals"][p]["auc"] for p in ("lsa", "lsa:budget=5%", "lsa:budget=3%")]
    heavy = [f"{auc['heaviest entry lost']:.2f}" for auc in found]
    count = [f"{auc['selected entries not resident']:.2f}" for auc in found]
    return (
        f"AUC {heavy[0]}, {heavy[1]} and {heavy[2]} at the three budgets, where the share by count"
        f" has {count[0]}, {count[1]} and {count[2]}"
    )


def _agreement(result: Result) -> str:
    rows = [row for row in result["rows"] if "failed" not in row]
    assert all(row["identical"] for row in rows)
    step = max(abs(row["step_error"]) for row in rows)
    rate = max(abs(row["tokens_error"]) for row in rows)
    return (
        f"In all {len(rows)} rows slots and bytes moved are equal in replay and engine. Step"
        f" medians are at most {step:.0%} off, tokens/s at most {rate:.0%}"
    )


def _by_policy(result: Result) -> dict[tuple[str, str], Any]:
    """Rows of exec.json by policy and whether alone."""
    key = lambda row: "alone" if row["batch"] == 1 else "many"
    return {(row["policy"], key(row)): row for row in result["rows"]}


def _lsa_bytes(result: Result) -> str:
    rows = _by_policy(result)
    lsa, full = rows["lsa", "many"], rows["full", "many"]
    return (
        f"KV under `lsa` is {lsa['kv_bytes'] / full['kv_bytes']:.1%} of the full cache by"
        f" allocation ({lsa['kv_and_spare_of_full']:.1%} with the pages that a recall ahead needs),"
        f" and with the same {result['kv_budget_gib']:.0f} GiB it decodes"
        f" {lsa['tokens_per_s'] / full['tokens_per_s']:.1f} times as many tokens as `full`"
    )


def _filled_budget(result: Result) -> str:
    rows = _by_policy(result)
    share = rows["lsa, pages of 1", "alone"]["kv_bytes"] / rows["full", "alone"]["kv_bytes"]
    return f"10% of the entries makes {share:.1%} of the full cache's bytes"


def _synthetic_errors(result: Result) -> str:
    rows = result["rows"]
    step = max(abs(row["predicted_step_p50_s"] / row["step_p50_s"] - 1) for row in rows)
    rate = max(abs(row["predicted_tokens_per_s"] / row["tokens_per_s"] - 1) for row in rows)
    return f"within {step:.0%} of the step's median and {rate:.0%} of the tokens/s in every row"


def _beside_recall(result: Result) -> str:
    slower = {row["programs"]: row for row in result["a_full_step_beside_recall"]}
    return (
        f"slows down by {slower[4]['slower']:.1%} while {slower[4]['bytes_per_s'] / 1e9:.1f} GB/s"
        f" come in; on 8 by {slower[8]['slower']:.1%}, on 16 by {slower[16]['slower']:.1%}"
    )


def _live_gap(result: Result) -> str:
    found = [each["policies"]["lru held"] for each in result["contexts"]]
    pages = [each["replay, sees resident"]["pages_shared"] for each in found]
    apart = max(
        abs(each["live"]["mass_kept"] - each["replay, sees resident"]["mass_kept"])
        for each in found
    )
    assert apart < 0.001
    return f"{min(pages):.0%} of the resident pages are the same for `lru` held"


CLAIMS: dict[str, tuple[Claim, ...]] = {  # by result file
    "generate.json": (
        Claim("benchmarks/results/README.md", _engine_speed),
        Claim("docs/gpu.md", _engine_list),
    ),
    "live-gap.json": (Claim("benchmarks/results/README.md", _live_gap),),
    "headline.json": (Claim("docs/gpu.md", _agreement),),
    "exec.json": (
        Claim("docs/gpu.md", _lsa_bytes),
        Claim("docs/gpu.md", _filled_budget),
        Claim("docs/gpu.md", _synthetic_errors),
        Claim("docs/gpu.md", _beside_recall),
    ),
    "paper.json": (
        Claim("benchmarks/results/published.md", _full_footprints),
        Claim("benchmarks/results/published.md", _older_entries),
        Claim("benchmarks/results/published.md", _implied_shares),
        Claim("benchmarks/results/published.md", _oracle_pages),
        Claim("benchmarks/results/published.md", _at_1m),
    ),
    "serve.json": (Claim("benchmarks/results/published.md", _an_hour),),
    "steps.json": (Claim("benchmarks/results/published.md", _left_out),),
    "indexer.json": (
        Claim("benchmarks/results/indexer.md", _held_against_indexer),
        Claim("benchmarks/results/indexer.md", _indexer_at_128k),
        Claim("benchmarks/results/indexer.md", _history_at_25),
    ),
    "accuracy-8k.json": (Claim("benchmarks/results/accuracy.md", _lost),),
    "accuracy-threshold-8k.json": (Claim("benchmarks/results/accuracy.md", _threshold_scores),),
    "accuracy-seeds-8k.json": (
        Claim("benchmarks/results/accuracy.md", _fresh_mean),
        Claim("benchmarks/results/accuracy.md", _fresh_mean_again),
    ),
    "accuracy-32k.json": (Claim("benchmarks/results/accuracy.md", _one_lost_at_32k),),
    "accuracy-fallback-8k.json": (
        Claim("benchmarks/results/accuracy.md", _given_back),
        Claim("benchmarks/results/accuracy.md", _auc),
    ),
}
