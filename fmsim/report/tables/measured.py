"""What `fmsim exec` prints: of each policy its answers and measured figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid
from fmsim.units import MIB, mib

Transcript = list[tuple[str, str, bool | None]]


def parts(report: dict[str, Any], transcripts: Sequence[Transcript]) -> list[Text | Grid]:
    """From the report's JSON object and of each policy the first request's questions and
    answers.
    """
    told: list[Text | Grid] = [*_head(report)]
    for row, transcript in zip(report["policies"], transcripts, strict=True):
        told.append(_policy(report, row))
        for asked, answered, right in transcript:
            told.append(Text(f"\n{asked.strip()}" if asked.strip() else "", style="dim"))
            verdict = {True: ("  right", "green"), False: ("  wrong", "red"), None: ("", "")}[right]
            told.append(Text.assemble((answered.strip(), "bold"), verdict))
        told += [Text(), _figures(report, row)]
        if row is not report["policies"][-1]:
            told.append(Text())
    return told


def _head(report: dict[str, Any]) -> list[Text]:
    about = report["scenario"]
    model, prompt = about["model"], about["prompt"]
    tokens = " and ".join(f"{count:,}" for count in prompt["tokens"])
    return [
        Text(
            f"model   {model['name']}: {model['csa_layers']} of {model['layers']} layers CSA,"
            f" top-{model['topk']}; {about['dtype']} on {about['device']}"
        ),
        Text(
            f"prompt  {tokens} tokens: {prompt['text']}; {about['steps']} decode steps, batch"
            f" {about['batch']}"
        ),
    ]


def _policy(report: dict[str, Any], row: dict[str, Any]) -> Text:
    params = report["scenario"]["details"][row["policy"]]["params"]
    told = ", ".join(f"{key} {value}" for key, value in _main(params).items())
    return Text(f"policy  {row['policy']}: {told}")


def _main(params: dict[str, Any]) -> dict[str, Any]:
    return {
        key: params[key]
        for key in ("budget", "granularity", "scope", "cadence", "on_miss")
        if key in params
    }


def _allocated(row: dict[str, Any], details: dict[str, Any]) -> str:
    """What of it is what; and where it is more than all pages would take, why."""
    spare = details["spare_bytes"]
    parts = [
        f"{details['slot_bytes'] / MIB:.2f} slots",
        *([f"{spare / MIB:.2f} spare pages for misses and recalls"] if spare else []),
        f"{details['fixed_bytes'] / MIB:.2f} index keys, HCA entries, windows",
    ]
    told = (
        f"{mib(row['gpu_bytes'])} a request, {row['gpu_ratio']:.1%} of what keeping every page"
        f" takes ({', '.join(parts)}; all requests)"
    )
    if row["gpu_ratio"] > 1 and spare:
        told += ": all that one step selects may miss, and so short a prompt has little more"
    return told


def _figures(report: dict[str, Any], row: dict[str, Any]) -> Grid:
    about = report["scenario"]
    details = about["details"][row["policy"]]
    quality = details.get("quality", about["quality"])
    grid = Grid([Field("measured", 0, "left"), Field("", 0, "left", 40)])
    if quality["asked"]:
        grid.add("answers", f"{quality['exact']} of {quality['asked']} right")
    grid.add("KV allocated", _allocated(row, details))
    layers, measured = about["model"]["csa_layers"], len(details.get("measured_layers", []))
    if details.get("index_keys") == "tiered":
        elsewhere = (
            "; in the others beside their entries, in the slots"
            if measured < layers
            else ", so none leave the GPU"
        )
        grid.add(
            "index keys",
            f"all in the {measured} of {layers} CSA layers that the memory indexer"
            f" scores{elsewhere}",
        )
    grid.add("host mirror", mib(details["host_kv_bytes"]))
    grid.add(
        "step",
        f"p50 {row['step_s']['p50'] * 1e3:.1f} ms, p99 {row['step_s']['p99'] * 1e3:.1f} ms,"
        f" {row['decode_tokens_per_s']:.1f} tokens/s on {about['device']}, bookkeeping of these"
        " figures included"
        + (
            ""
            if row["stall_ratio"] is None
            else f"; {row['stall_ratio']:.1%} of it waiting for pages"
        ),
    )
    pages = details["pages"]
    grid.add(
        "pages moved",
        f"{pages['lookahead_loads']:,} recalled, {pages['demand_loads']:,} fetched,"
        f" {pages['written']:,} written, {pages['evicted']:,} given up;"
        f" {mib(row['h2d_bytes'])} from the host",
    )
    within = (
        f", in {measured} of {layers} CSA layers; not measured in the others"
        if 0 < measured < layers
        else ""
    )
    grid.add(
        "kept",
        f"{row['entry_recall']:.1%} of golden entries, {row['mass_kept']:.1%} of the attention mass"
        f" on selected entries{within}",
    )
    return grid
