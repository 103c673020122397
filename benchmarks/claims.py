"""Sentences and lists of README, docs and benchmarks/results that say figures of result files.

Each is a marked part of a page, written from its file like a table: a figure that moves is mended
with its sentence, and no sentence says which of two is larger unless it asked. What a person wrote
stands around these parts, without figures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import paper

Result = Mapping[str, Any]
Part = tuple[str, str]  # page, name of its marked part
GPU = "benchmarks/results/whole-steps.md"
STEPS = "benchmarks/results/engine-steps.md"
RESULTS = "benchmarks/results/README.md"
PUBLISHED = "benchmarks/results/published.md"
INDEXER = "benchmarks/results/indexer.md"
CARD = "fmsim/nano/model/README.md"
SHIPPED, BEFORE = "fmsim/nano/model, float8", "nano2 of 2026-11-28 18:03"  # in nano2-answers.jsonl
LEAST_US = 100  # a step, of the kernels that are named
TASKS = {  # as `benchmarks/nano/examine.py` calls them
    "single": "single needle, alone",
    "niah_single": "single needle",
    "niah_multikey": "one of 4 keys",
    "many": "one of 32 keys",
    "niah_multivalue": "4 values of a key, any order",
    "niah_multiquery": "4 keys at once",
    "memory": "memory",
    "memory_update": "memory, updated",
    "multi_round": "multi-round",
    "vt": "variable tracking",
}


def paragraph(text: str, indent: str = "") -> str:
    """In lines of at most 100 columns."""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def bullets(texts: Iterable[str]) -> str:
    return "\n".join(paragraph(f"- {text}", "  ") for text in texts)


def beside_transformers(result: Result) -> str:
    """nano's decode, of generate.json."""
    found = result["decode"]
    steps = result["steps"]
    own = found["transformers"]["tokens_per_s"]
    lines = [
        f"Greedy decode after {result['context_tokens']:,} tokens, {result['model']}, batch 1, one"
        f" {result['device'].removeprefix('NVIDIA ')} and one process (`generate.json`, the nano of"
        f" {result['date'][:10]}). transformers {result['versions']['transformers']}, `generate`:"
        f" {own:,.1f} tokens/s."
    ]
    listed = [
        f"`{name}`, {row['tokens_per_s']:,.0f} tokens/s: {row['times_transformers']:.0f} times as"
        f" many; {row['tokens_equal']} of {steps} tokens equal"
        for name, row in found.items()
        if name != "transformers"
    ]
    return f"{paragraph(lines[0])}\n\n{bullets(listed)}"


def _of_exec(result: Result) -> dict[tuple[str, str], Any]:
    """Rows of exec.json by policy and whether alone."""
    return {
        (row["policy"], "alone" if row["batch"] == 1 else "many"): row for row in result["rows"]
    }


def synthetic(result: Result) -> str:
    """What the rows of exec.json come to."""
    rows = _of_exec(result)
    lsa, full = rows["lsa", "many"], rows["full", "many"]
    share = rows["lsa, pages of 1", "alone"]["kv_bytes"] / rows["full", "alone"]["kv_bytes"]
    faster = rows["lsa", "alone"]["tokens_per_s"] / rows["full", "alone"]["tokens_per_s"]
    step = max(abs(row["predicted_step_p50_s"] / row["step_p50_s"] - 1) for row in result["rows"])
    rate = max(
        abs(row["predicted_tokens_per_s"] / row["tokens_per_s"] - 1) for row in result["rows"]
    )
    slower = [
        f"{row['slower']:.1%} on {row['programs']} programs ({row['bytes_per_s'] / 1e9:.1f} GB/s)"
        for row in result["a_full_step_beside_recall"]
    ]
    return bullets(
        [
            f"KV under `lsa` is {lsa['kv_bytes'] / full['kv_bytes']:.1%} of the full cache by"
            f" allocation ({lsa['kv_and_spare_of_full']:.1%} with the pages that a recall ahead"
            f" needs). With the same {result['kv_budget_gib']:.0f} GiB it decodes"
            f" {lsa['tokens_per_s'] / full['tokens_per_s']:.1f} times as many tokens as `full`; one"
            f" request alone {faster:.2f} times as many.",
            f"A budget of 10% of the entries makes {share:.1%} of the full cache's bytes: HCA"
            " entries, windows and the target layers' keys come on top.",
            f"The simulator is within {step:.0%} of the step's median and {rate:.0%} of the"
            " tokens/s in every row.",
            f"*Beside a recall* that never stops a whole step slows down by {', '.join(slower)}.",
        ]
    )


def agreement(result: Result) -> str:
    """How far simulated and measured figures of headline.json are apart."""
    rows = [row for row in result["rows"] if "failed" not in row]
    same = sum(row["identical"] for row in rows)
    step = max(abs(row["step_error"]) for row in rows)
    rate = max(abs(row["tokens_error"]) for row in rows)
    memory = {
        context: max(abs(row["memory_error"]) for row in rows if row["context"] == context)
        for context in dict.fromkeys(row["context"] for row in rows)
    }
    apart = ", ".join(f"{error:.2%} at {context}" for context, error in memory.items())
    text = (
        f"Slots and bytes moved are equal in replay and engine in {same} of {len(rows)} rows. Step"
        f" medians are at most {step:.0%} off, tokens/s at most {rate:.0%}. Bytes are at most"
        f" {apart} above what is predicted."
    )
    again = result.get("memory")
    if again:
        text += (
            f" The bytes were measured again on {again['date'][:10]} ({again['device']}), by what"
            f" torch's allocator is asked for, without decoding; steps and times are those of"
            f" {result['date'][:10]}."
        )
    else:
        text += " The bytes are what torch's allocator was asked for."
    return paragraph(text)


def beside_floor(result: Result) -> str:
    """A step of `full` beside the bytes that it reads, of step-h200.json."""
    kinds = result["read_bytes"]
    read = ", ".join(f"{name.replace('_', ' ')} {n / 1e9:.2f}" for name, n in kinds.items())
    most = [row for row in result["kernels"] if row["us"] >= LEAST_US]
    return paragraph(
        f"A step of `full` with one request of {result['context_tokens']:,} tokens"
        f" ({result['device'].removeprefix('NVIDIA ')}, {result['date'][:10]},"
        f" {result['experts']} experts a layer) takes {result['step_p50_ms']:.2f} ms. It reads"
        f" {sum(kinds.values()) / 1e9:.2f} GB: {read}. At the"
        f" {result['bytes_per_s'] / 1e12:.2f} TB/s at which that GPU adds up 4 GiB this is"
        f" {result['floor_ms']:.2f} ms,"
        f" {result['of_floor']:.0%} of the step. It is {result['launches']:.0f} launches."
        " What each kernel adds to the step beyond those before it, in us: "
        + ", ".join(f"`{row['kernel'][:20]}` {row['us']:,.0f}" for row in most)
        + "."
    )


def steps_tried(result: Result) -> str:
    """What a step took after each change, of step-tries-h200.json from run 3 on."""
    one = (
        f"{row['change']}: {row['step_p50_ms']:.2f} ms, {row['of_floor']:.0%}"
        for row in result["rows"]
        if row["run"] >= 3
    )
    few = (
        f"{row['requests']} requests, {row['change']}: {row['step_p50_ms']:.2f} ms, before"
        f" {row['as_it_was_ms']:.2f}"
        for row in result["few_requests"]["rows"]
    )
    return bullets([*one, *few])


def one_request(result: Result) -> str:
    """How long a step of one request takes, of headline.json."""
    rows = [row for row in result["rows"] if "failed" not in row]
    times = [1e3 * row["measured_step_p50_s"] for row in rows]
    longest = list(dict.fromkeys(row["context"] for row in rows))[-1]
    card = result["device"].removeprefix("NVIDIA ")
    return bullets(
        [
            f"A step of one request takes {min(times):.1f} to {max(times):.1f} ms on an {card} at"
            f" every context to {longest} and under every policy: it reads weights."
        ]
    )


def by_batch(result: Result) -> str:
    """Steps at each batch beside the line between their neighbours', of batches-h200.json."""
    rows = [row for row in result["rows"] if row["activations"] == "bfloat16"]
    lines = ["| requests | step, ms | of the line between its neighbours |", "|---" * 3 + "|"]
    for row in rows:
        share = f"{row['of_neighbours']:.2f}" if "of_neighbours" in row else ""
        lines.append(f"| {row['batch']} | {1e3 * row['step_s']:.2f} | {share} |")
    most = max(row.get("of_neighbours", 0.0) for row in rows)
    told = (
        f"{result['device']}, {result['date'][:10]}: `{result['policy']}`,"
        f" {result['context_tokens']:,} tokens, {result['experts']} experts a layer. No step takes"
        f" more than {most:.2f} times what the line between its neighbours says."
    )
    return "\n".join([paragraph(told), "", *lines])


def bookkeeping(result: Result) -> str:
    """By how much steps are longer than those of `recency`, of bookkeeping-h200.json."""
    lines = [
        "| policy | requests | step, ms | over recency | over recency, all scored |",
        "|---" * 5 + "|",
    ]
    for row in result["rows"]:
        if row["part"] != "whole" or "over_recency_and_misses" not in row:
            continue
        spec = row["spec"]
        name = f"{spec['policy']} {spec.get('on_miss', '')}".strip()
        lines.append(
            f"| {name} | {row['batch']} | {row['step_p50_ms']:.2f} |"
            f" {row['over_recency_and_misses']:.1%} | {row['over_recency_that_sees_all']:.1%} |"
        )
    told = (
        f"{result['device']}, {result['date'][:10]}, 32K. Baseline: `recency`. The time to copy the"
        " misses is measured alone and subtracted. *All scored*: over a `recency` that scores all"
        " entries, as these policies do."
    )
    return "\n".join([paragraph(told), "", *lines])


def single_entries(result: Result) -> str:
    """How near to the link's rate gathers of single entries come, of kernels.json."""
    shares = [
        row["share_of_floor"] for row in result["rows"] if row["kernel"].startswith("recall, 584")
    ]
    return bullets(
        [
            "Larger pages cost mass or traffic at one budget. Single entries already come in at"
            f" {min(shares):.0%} to {max(shares):.0%} of the link's rate."
        ]
    )


def live_gap(result: Result) -> str:
    """A live engine that masks beside the replay of what it recorded."""
    rows = []
    for context in result["contexts"]:
        for name, found in context["policies"].items():
            live, replay = found["live"], found["replay, sees resident"]
            rows.append(
                f"| {context['context']:,} | {name} | {replay['pages_shared']:.0%} |"
                f" {live['mass_kept']:.4f} | {replay['mass_kept']:.4f} |"
            )
    head = (
        f"{result['model']} of {result['date'][:10]}, {result['contexts'][0]['steps']} steps,"
        f" room for twice top-k ({result['device']}):"
    )
    return "\n".join(
        [
            paragraph(head),
            "",
            "| tokens | policy | resident pages that are the same | mass kept, live | replayed |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def left_out(result: Result) -> str:
    found = result["left_out"]
    return paragraph(
        "Module rows left out (other batches, up to 512 requests, at all contexts; tensor-parallel"
        f" size 4 from 2 and 8; H100, H200, B200; five models): mean error {found['mean']:.1%},"
        f" worst of any module {found['worst']:.1%}."
    )


def of_serving(result: Result) -> str:
    """Where the model of FlashMemory's serving table errs most, of paper.json."""
    rows = [row for row in result["serving"] if row["published"] == row["modelled"]]
    held = max(rows, key=lambda row: abs(row["error"]["held"]))
    rate = max(rows, key=lambda row: abs(row["error"]["tokens_per_s"]))
    pages = next(row for row in result["serving"] if row["modelled"] == "oracle pages")
    named = lambda row: (
        f"{row['scenario'].removeprefix('h20-').upper()}, {row['published']},"
        f" {row['published_held']} requests"
    )
    return bullets(
        [
            f"Requests err most at {named(held)}: {held['error']['held']:+.0%}. Tokens/s err most"
            f" at {named(rate)}: {rate['error']['tokens_per_s']:+.0%}.",
            "How many pages are new in a window is nano's, and the link's wall depends on it much:"
            f" the oracle's pages would let {pages['held']} requests in (the {pages['bound']}) at"
            f" {pages['scenario'].removeprefix('h20-').upper()}.",
        ]
    )


def of_footprints(result: Result) -> str:
    """How far the modelled footprints of paper.json are from Table 1's."""
    rows = result["footprints"]["rows"]
    off = {
        column: {suite: row[column][1] / row[column][0] - 1 for suite, row in rows.items()}
        for column in ("full", "lsa", "recency", "random")
    }
    full = {suite: abs(error) for suite, error in off["full"].items()}
    worst = max(full, key=lambda suite: full[suite])
    others = max(error for suite, error in full.items() if suite != worst)
    shares = result["footprints"]["shares_of_older_entries"]
    implied = [
        (lsa / rows[suite]["full"][1] * tokens - paper.RECENT_TOKENS - paper.DECODED_TOKENS)
        / (tokens - paper.RECENT_TOKENS)
        for suite, (tokens, _, lsa, _, _) in paper.FOOTPRINTS.items()
        if tokens >= 256 * paper.K
    ]
    lsa = sorted(off["lsa"].items(), key=lambda pair: pair[1])
    said = ", ".join(f"{suite} {error:+.0%}" for suite, error in lsa)
    return bullets(
        [
            f"Full: within {others:.1%}, but {worst} ({full[worst]:.1%}).",
            "LSA's share is measured: what nano's indexer scores at its threshold or above, on one"
            f" trace for each kind of suite, at 512,000 tokens: {shares['RULER']:.1%} of the older"
            f" entries of needles (taken for RULER), {shares['LongMemEval']:.1%} of memory"
            f" (LongMemEval), {shares['LongBench']:.1%} of plain text (LongBench). The paper's"
            f" figures imply {min(implied):.1%} to {max(implied):.1%} from 256K on.",
            f"LSA, modelled over published: {said}.",
        ]
    )


def how_fast(result: Result) -> str:
    """CPU seconds of the serving simulation, of serve.json."""
    cpu_s = {name: row["cpu_s"] for name, row in result["runs"].items()}
    return paragraph(
        f"An hour of traffic with {result['concurrent_requests']} concurrent requests of 512K"
        f" tokens took {cpu_s['full']:.1f} CPU seconds with the full cache,"
        f" {cpu_s['lookahead']:.1f} with a lookahead policy and {cpu_s['lru']:.1f} with LRU,"
        f" 100,000 recorded requests {cpu_s['full, 100000 recorded']:.0f}"
        f" ({result['device'].partition(', numpy')[0]}; `python benchmarks/serve.py`,"
        " [serve.json](serve.json))."
    )


def exam(result: Result) -> str:
    """What the shipped nano answers, of nano2-answers.jsonl; its longest length in bfloat16 too."""
    rows = [row for row in result["rows"] if row.get("task") in TASKS]
    found = {(row["model"], row["task"], row["tokens"]): row for row in rows}
    lengths = sorted({row["tokens"] for row in rows if row["model"] == SHIPPED})
    head = [f"{tokens:,}" for tokens in lengths]
    lines = [
        f"| task, tokens | {' | '.join(head)} | {head[-1]}, bf16 |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for task, name in TASKS.items():
        cells = [_right(found.get((SHIPPED, task, tokens))) for tokens in lengths]
        cells.append(_right(found.get((BEFORE, task, lengths[-1]))))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _right(row: Mapping[str, Any] | None) -> str:
    """Right of asked, and Wilson's 95% interval in percent."""
    if row is None:
        return ""
    asked = row["questions"]
    right = round(row["exact"] * asked)
    z = 1.96
    share = right / asked
    middle = share + z**2 / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2))
    low, high = ((middle + sign * spread) / (1 + z**2 / asked) for sign in (-1, 1))
    said = f"{right}/{asked} ({abs(100 * low):.0f}-{100 * high:.0f})"  # no "-0"
    return (
        f"{said}, in order" if row["task"] == "niah_multivalue" and "in_order" not in row else said
    )


BOUNDS = ("oracle", "oracle, one set")


def rivals(result: Result) -> str:
    """Which policy keeps most mass at each budget, by trace, of indexer.json."""
    lines = []
    for budget in result["budgets"]:
        said = []
        for trace, found in result["traces"].items():
            rows = {
                row["policy"]: row
                for row in found["policies"]
                if row["budget"] == budget and "mass_kept" in row and row["policy"] not in BOUNDS
            }
            best = max(rows, key=lambda label: rows[label]["mass_kept"])
            own = rows.get("lsa")
            beside = f" (`lsa` {own['mass_kept']:.2f})" if own and best != "lsa" else ""
            short = trace.removeprefix("nano-").replace("continuation", "text").replace("-", " ")
            said.append(f"{short} `{best}` {rows[best]['mass_kept']:.2f}{beside}")
        lines.append(f"Most mass at {budget.removesuffix(' gpu')}: {'; '.join(said)}.")
    return bullets(lines)


PARTS: dict[str, dict[Part, Callable[[Result], str]]] = {  # by result file
    "generate.json": {(GPU, "nano beside transformers"): beside_transformers},
    "live-gap.json": {(RESULTS, "live and replayed"): live_gap},
    "headline.json": {
        (GPU, "agreement in words"): agreement,
        ("docs/gpu.md", "one request"): one_request,
    },
    "step-h200.json": {(STEPS, "step beside its floor"): beside_floor},
    "step-tries-h200.json": {(STEPS, "steps tried"): steps_tried},
    "batches-h200.json": {(STEPS, "steps by batch"): by_batch},
    "bookkeeping-h200.json": {(STEPS, "bookkeeping"): bookkeeping},
    "exec.json": {(GPU, "synthetic weights in words"): synthetic},
    "kernels.json": {("docs/gpu.md", "single entries"): single_entries},
    "paper.json": {
        (PUBLISHED, "serving in words"): of_serving,
        (PUBLISHED, "footprints in words"): of_footprints,
    },
    "serve.json": {(PUBLISHED, "how fast"): how_fast},
    "steps.json": {(PUBLISHED, "left out"): left_out},
    "nano2-answers.jsonl": {(CARD, "answers"): exam},
    "indexer.json": {(INDEXER, "rivals in words"): rivals},
}
