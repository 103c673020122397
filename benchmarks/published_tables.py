"""Tables of README and docs that show a file of benchmarks/results, rendered from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
MIB = 2**20
# What `fmsim eval` calls a policy, and what it is called in the tables.
EVALUATED = {
    "lsa": "lsa at its threshold",
    "lsa:on_miss=fallback": "lsa at its threshold, fallback",
    "lsa:threshold=0.5": "lsa, its budget filled",
    "lsa:threshold=0.5,on_miss=fallback": "lsa, its budget filled, fallback",
}
FRESH_SEEDS = ("43", "44")  # the first table's seed, 42, chose what was asked next
README_POLICIES = (
    *("full", "lru", "oracle", "lsa:threshold=0.5", "lsa:on_miss=fallback"),
    *("lsa", "h2o", "recency", "random"),
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def accuracy(result: Result) -> str:
    """Scores by task, then what was kept and fetched for them."""
    tasks = result["about"]["plan"]["tasks"]
    score = {(cell["policy"], cell["task"]): cell["score"] for cell in result["cells"]}
    scores, prices = [], []
    for row in result["overall"]:
        policy = row["policy"]
        label = EVALUATED.get(policy, policy)
        cells = [f"{100 * score[policy, task]:.0f}" for task in tasks]
        scores.append([label, *cells, f"**{100 * row['score']:.1f}**"])
        prices.append([label, _percent(row["kv_ratio"]), _fetched(row)])
    head = ["policy", *(f"`{task}`" for task in tasks), "mean"]
    kept = ["policy", "entries kept", "PCIe MiB/step"]
    return f"{table(head, scores)}\n\n{table(kept, prices)}"


def accuracy_short(result: Result) -> str:
    """The same for the README: a row a policy."""
    found = {row["policy"]: row for row in result["overall"]}
    rows = [
        [
            EVALUATED.get(policy, policy),
            f"{100 * found[policy]['score']:.1f}",
            _percent(found[policy]["kv_ratio"]),
            _fetched(found[policy]),
        ]
        for policy in README_POLICIES
    ]
    return table(["policy", "score", "entries kept", "fetched, MiB a step"], rows)


def fresh_seeds(result: Result) -> str:
    """Differences to the full cache, in points, by seed."""
    rows = []
    for policy, found in result["paired"].items():
        points = [100 * found["by_seed"][seed] for seed in FRESH_SEEDS]
        mean = sum(points) / len(points)
        cells = [f"{value:+.1f}" for value in (*points, mean)]
        rows.append([EVALUATED.get(policy, policy), *cells])
    return table(["policy", *(f"seed {seed}" for seed in FRESH_SEEDS), "mean"], rows)


def fallback(result: Result) -> str:
    """A row a budget and threshold of fallback."""
    rows = []
    for row in result["overall"]:
        policy = row["policy"]
        if policy == "full":
            continue
        params = dict(text.split("=") for text in policy.partition(":")[2].split(",") if text)
        above = params.get("fallback_above")
        if "fallback_below" in params:
            how = f"below {float(params['fallback_below']):.0%} by count"
        else:
            how = "none (mask)" if above is None else f"above {float(above):.0%}"
        rows.append(
            [
                params.get("budget", result["about"]["plan"]["budget"]),
                how,
                f"{100 * row['score']:.1f}",
                str(result["signals"][policy]["lost"]),
                _fetched(row),
                f"{row['mass_kept']:.2f}",
            ]
        )
    head = ["budget", "fallback", "score", "answers lost", "PCIe MiB/step", "mass kept"]
    return table(head, rows)


def _fetched(row: Result) -> str:
    return f"{row['h2d_bytes_per_step'] / MIB:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def paper_serving(result: Result) -> str:
    """Published and modelled requests and tokens/s on 8 x H20."""
    set_on = {
        ("h20-256k", "full"): "set on",
        ("h20-512k", "full"): "set on",
        ("h20-512k", "lsa"): "set on (requests)",
    }
    rows = []
    for row in result["serving"]:
        if row["published"] != row["modelled"]:
            continue  # a stand-in
        context = row["scenario"].removeprefix("h20-").upper()
        rows.append(
            [
                context,
                row["published"],
                row["budget"] if row["published"] == "lsa" else "-",
                f"{row['published_held']} / {row['published_tokens_per_s']}",
                f"{row['held']} / {row['arriving_tokens_per_s']:.0f}",
                f"{row['error']['held']:+.0%} / {row['error']['tokens_per_s']:+.0%}",
                row["bound"],
                set_on.get((row["scenario"], row["published"]), "predicted"),
            ]
        )
    head = ["context", "policy", "budget", "published", "modelled", "error", "bound by"]
    return table([*head, "the row is"], rows)


def paper_footprints(result: Result) -> str:
    """Published and modelled GiB of one request, by suite."""
    rows = [
        [suite, *(f"{published:.2f} / {ours:.3f}" for published, ours in row.values())]
        for suite, row in result["footprints"]["rows"].items()
    ]
    return table(["suite", "full", "LSA", "recency", "random 10%"], rows)


def step_times(result: Result) -> str:
    """Published times a token and the model's, in ms."""
    rows = []
    for row in result["published"]:
        placed = ", ".join(f"{key} {value}" for key, value in row["deployment"].items())
        beside = ", with prefill" if row["prefill_tokens_per_step"] else ""
        rows.append(
            [
                f"{row['model']}, {row['hardware']}{f', {placed}' if placed else ''}{beside}",
                f"{row['context']:,}",
                str(row["batch"]),
                f"{row['published_tpot_ms']:.1f}",
                f"{row['modelled_tpot_ms']:.1f}",
                f"{row['error']:+.0%}",
            ]
        )
    return table(["model, server", "tokens", "requests", "published", "modelled", "error"], rows)


def synthetic(result: Result) -> str:
    """Rows of benchmarks/exec.py: measured on a whole model of random weights, and predicted."""
    rows = []
    for row in result["rows"]:
        step_error = row["predicted_step_p50_s"] / row["step_p50_s"] - 1
        rate_error = row["predicted_tokens_per_s"] / row["tokens_per_s"] - 1
        rows.append(
            [
                row["policy"],
                str(row["batch"]),
                f"{row['kv_bytes'] / MIB:,.0f} + {row['spare_bytes'] / MIB:,.0f}",
                _percent(row["kv_and_spare_of_full"]),
                f"{1e3 * row['step_p50_s']:.1f}, {step_error:+.0%}",
                f"{row['tokens_per_s']:,.0f}, {rate_error:+.0%}",
                f"{row['h2d_bytes_per_step'] / MIB:.2f}",
                f"{row['mass_kept']:.2f}",
            ]
        )
    head = ["policy", "batch", "KV a request, and spare, MiB", "of full", "step, ms, and simulated"]
    return table([*head, "tokens/s, and simulated", "MiB recalled a step", "mass kept"], rows)


def kernels(result: Result) -> str:
    """Each kernel's time, how near it is to its floor, and its fastest peer."""
    rows = []
    for row in result["rows"]:
        star = "*" if "run" in row else ""
        peers = row["peers_us"]
        fastest = min(peers, key=lambda name: peers[name]) if peers else None
        rows.append(
            [
                f"{row['kernel']}{star}",
                row["shape"],
                f"{row['us']:,.1f}",
                f"{row['share_of_floor']:.0%}",
                f"{fastest}: {peers[fastest]:,.1f}" if fastest else "",
            ]
        )
    return table(["kernel", "shape", "us", "of its floor", "fastest peer, us"], rows)
