"""Tables of README and docs that show a file of benchmarks/results, rendered from it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmsim.policies import registry
from fmsim.report.console import spread_text

Result = Mapping[str, Any]
MIB = 2**20
NOT_MEASURED = "Not measured yet."
README_BUDGET = "12.5% gpu"
SHORTEST = 32_768  # at 8,192 tokens an eighth leaves next to nothing for entries
AHEAD = ("lsa", "foresight")  # they look ahead, and could run on a server
README_ROWS = (*AHEAD, "lru, held, prompt")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def answers_kept(result: Result) -> str:
    """What was measured of answers at budgets in GPU bytes: a table a length, at the budgets that
    all policies were asked at; then one of those with budgets of their own.
    """
    rows = [row for row in result["rows"] if row["policy"] != "full"]
    if not rows:
        return NOT_MEASURED
    tables = [_measured_on(result)]
    lengths = sorted({row["tokens"] for row in rows})
    own: dict[tuple[str, str], dict[int, Result]] = {}
    for tokens in lengths:
        found: dict[str, dict[str, Result]] = {}
        of_length = [row for row in rows if row["tokens"] == tokens]
        budgets = [row["budget"] for row in of_length if row["policy"] == "recency"]
        budgets.sort(key=_share)
        for row in of_length:
            if row["budget"] in budgets and not _loads(row):
                found.setdefault(_named(row), {})[row["budget"]] = row
            else:
                own.setdefault((_named(row), row["budget"]), {})[tokens] = row
        [full] = [r for r in result["rows"] if r["tokens"] == tokens and r["policy"] == "full"]
        said = (
            f"{tokens:,} tokens: {full['questions']} questions, {full['contexts']} contexts; the"
            f" full cache scores {100 * full['score']:.1f} of 100.{_fewer(of_length, full)}"
        )
        tables.append(textwrap.fill(said, 100, break_on_hyphens=False))
        order = sorted(found, key=lambda name: -sum(row["kept"] for row in found[name].values()))
        lines = [[name, *(_kept(found[name].get(budget)) for budget in budgets)] for name in order]
        heads = [f"at {budget.removesuffix(' gpu')} of the bytes" for budget in budgets]
        tables.append(table(["policy", *heads], lines))
    if own:
        tables.append("At bytes of their own:")
        heads = [f"{tokens:,} tokens" for tokens in lengths]
        lines = [
            [name, budget.removesuffix(" gpu"), *(_kept(found.get(tokens)) for tokens in lengths)]
            for (name, budget), found in sorted(
                own.items(), key=lambda one: (one[0][0], _share(one[0][1]))
            )
        ]
        tables.append(table(["policy", "of the bytes", *heads], lines))
    return "\n\n".join(tables)


def _fewer(rows: Sequence[Result], full: Result) -> str:
    """Which rows are of fewer contexts than the full cache's."""
    counts: dict[str, set[int]] = {}
    for row in rows:
        if row["contexts"] < full["contexts"]:
            counts.setdefault(_named(row), set()).add(row["contexts"])
    if not counts:
        return ""
    told = (
        f"`{name}` {' or '.join(map(str, sorted(found)))}" for name, found in sorted(counts.items())
    )
    return f" Some rows are of fewer contexts: {', '.join(told)}."


def _share(budget: str) -> float:
    return float(budget.partition("%")[0])


def _loads(row: Result) -> bool:
    """It loads what it misses, all or the heavy: it keeps all index keys."""
    return row["params"]["on_miss"] != "mask" or row["params"]["sees"] == "all"


def answers_kept_short(result: Result) -> str:
    """The same for the README: some policies at one budget, a column a length."""
    rows = [row for row in result["rows"] if row["budget"] == README_BUDGET]
    if not rows:
        return NOT_MEASURED
    every = sorted(result["rows"], key=lambda row: int(row["tokens"]))
    full = {row["tokens"]: row for row in every if row["policy"] == "full"}
    found: dict[str, dict[int, Result]] = {}
    for row in rows:
        found.setdefault(_named(row), {})[row["tokens"]] = row
    head = [f"at {README_BUDGET.removesuffix(' gpu')} of the bytes"]
    head += [f"{tokens:,} tokens" for tokens in full]
    lines = [
        [f"`{name}`", *(_kept(found[name].get(tokens)) for tokens in full)]
        for name in README_ROWS
        if name in found
    ]
    contexts = sorted({row["contexts"] for row in full.values()})
    said = (
        f"Of the full cache's answers; {len(result['about']['families'])} kinds of question,"
        f" {' to '.join(map(str, dict.fromkeys((contexts[0], contexts[-1]))))} contexts. –: no"
        f" room, or not asked. {_worse(found, full)}"
    )
    return f"{table(head, lines)}\n\n{textwrap.fill(said, 80)}"


def _worse(found: Mapping[str, Mapping[int, Result]], lengths: Iterable[int]) -> str:
    """What the better of those that look ahead loses, where that is more than chance and 1%; which
    may be the one that was asked.
    """
    lost: dict[str, list[str]] = {}
    for tokens in lengths:
        if tokens < SHORTEST:
            continue
        rows = [found[name][tokens] for name in AHEAD if tokens in found.get(name, {})]
        best = max(rows, key=lambda row: row["kept"], default=None)
        if best is not None and best["kept"] < 0.99 and best["kept"] + best["half_width"] < 1:
            told = f"{100 * (1 - best['kept']):.0f}% at {tokens:,}"
            lost.setdefault(best["policy"], []).append(told)
    return " ".join(f"`{name}` loses {', '.join(told)} tokens." for name, told in lost.items())


def _measured_on(result: Result) -> str:
    about = result["about"]
    families = ", ".join(f"`{name}`" for name in about["families"])
    day = about["date"][:10]
    return textwrap.fill(
        f"{about['model']['name']} on {about['device']}, {day}. Families: {families}.",
        100,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _kept(row: Result | None) -> str:
    if row is None:
        return "–"
    return f"{100 * row['kept']:.1f}%{spread_text(row | {'n': row['contexts']})}"


def _named(row: Result) -> str:
    """The policy, and the parameters in which it is not as it comes."""
    usual = registry.build({"policy": row["policy"]}).params.model_dump(mode="json")
    own = {key: value for key, value in row["params"].items() if usual.get(key) != value}
    own.pop("budget", None)
    said = []
    if own.get("on_miss") == "mask" and "cadence" in own:
        said.append("held")
        del own["on_miss"], own["cadence"]
    if own.pop("prompt_history", False):
        said.append("prompt")
    said += [f"{key} {value}" for key, value in own.items()]
    return ", ".join([row["policy"], *said])


def signals(result: Result) -> str:
    """How well two signals order answers, of those that a mask loses and keeps."""
    rows = []
    for policy, found in result["signals"].items():
        if "fallback" in policy or not found["lost"]:
            continue
        params = dict(text.split("=") for text in policy.partition(":")[2].split(",") if text)
        auc = found["auc"]
        rows.append(
            [
                params.get("budget", result["about"]["plan"]["budget"]),
                f"{found['lost']} of {found['lost'] + found['kept']}",
                f"{auc['heaviest entry lost']:.2f}",
                f"{auc['selected entries not resident']:.2f}",
            ]
        )
    return table(["budget", "answers lost", "heaviest entry lost", "share by count"], rows)


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


def two_gpus(result: Result) -> str:
    """Rows of benchmarks/two_gpus.py: what two GPUs exchange in a layer; steps of both, of one and
    of the simulator, measured ones where there are any.
    """
    exchanges, steps = [], []
    for row in result["rows"]:
        if "exchange" in row:
            us = [f"{1e3 * row[name]:.1f}" for name in ("gather_ms", "scatter_ms")]
            exchanges.append([str(row["exchange"]), *us])
            continue
        off = f"{row['simulated_s'] / row['step_s'] - 1:+.0%}" if "step_s" in row else ""
        measured = [
            f"{1e3 * row[name]:.2f}" if name in row else "not yet" for name in ("step_s", "alone_s")
        ]
        simulated, planned = (f"{1e3 * row[name]:.2f}" for name in ("simulated_s", "planned_s"))
        steps.append([row["policy"], str(row["batch"]), *measured, simulated, off, planned])
    head = ["policy", "batch", "step, ms", "one GPU with half, ms", "simulated, ms"]
    return (
        table(["batch", "all-gather, us", "reduce-scatter, us"], exchanges)
        + "\n\n"
        + table([*head, "off", "preset h200, ms"], steps)
    )


def float8_products(result: Result) -> str:
    """The fastest way to each product of float8 rows, beside torch with bfloat16 weights: alone,
    and with what makes the rows, where that was timed.
    """
    wide, rows = "torch, bf16", []
    for shape in result["shapes"]:
        name = f"{shape['inputs']:,} x {shape['outputs']:,}"
        name += f" / {shape['groups']}" if shape["groups"] > 1 else ""
        for row in shape["rows"]:
            alone, made = row["us"], row.get("producer_us", {})
            way = min((way for way in alone if way != wide), key=alone.get)
            us = alone[way]
            floors = row["floor_us"], row["floor_us"] + result["start_us"]
            cells = [f"{us:,.1f}", f"{us / alone[wide]:.2f}", *(f"{us / of:.1f}" for of in floors)]
            cells += [f"{made[how]:,.1f}" if how in made else "" for how in ("as it is", "rounded")]
            both = row.get("with_producer_us")
            cells += [f"{both[way]:,.1f}", f"{both[way] / both[wide]:.2f}"] if both else ["", ""]
            rows.append([name, f"{row['rows']:,}", way, *cells])
    head = ["inputs x outputs", "rows", "fastest", "us", "of torch's bf16", "of the floor"]
    head += ["and a start"]
    head += ["making the rows, us", "and rounding, us", "all, us", "of torch's bf16"]
    return table(head, rows)


def kernels(result: Result, elsewhere: str = "") -> str:
    """Each kernel's time, how near it is to its floor, and its fastest peer; but for the kernel
    whose table is ``elsewhere``.
    """
    rows = []
    for row in result["rows"]:
        if "us" not in row or row["kernel"] == elsewhere:
            continue  # the former was not timed
        star = "*" if "run" in row else ""
        peers = {name: us for name, us in row["peers_us"].items() if name != "own"}
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
