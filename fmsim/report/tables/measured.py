"""What `fmsim exec` prints: answers, and one policy's measured figures."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid
from fmsim.units import MIB, mib

Transcript = list[tuple[str, str, bool | None]]


def parts(report: dict[str, Any], transcript: Transcript) -> list[Text | Grid]:
    """From the report's JSON object and the first request's questions and answers."""
    told: list[Text | Grid] = [*_head(report)]
    for asked, answered, right in transcript:
        told.append(Text(f"\n{asked.strip()}" if asked.strip() else "", style="dim"))
        verdict = {True: ("  right", "green"), False: ("  wrong", "red"), None: ("", "")}[right]
        told.append(Text.assemble((answered.strip(), "bold"), verdict))
    return [*told, Text(), _figures(report)]


def _head(report: dict[str, Any]) -> list[Text]:
    about, row = report["scenario"], report["policies"][0]
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
        Text(
            f"policy  {row['policy']}: "
            + ", ".join(
                f"{key} {value}"
                for key, value in _main(about["details"][row["policy"]]["params"]).items()
            )
        ),
    ]


def _main(params: dict[str, Any]) -> dict[str, Any]:
    return {
        key: params[key]
        for key in ("budget", "granularity", "scope", "cadence", "on_miss")
        if key in params
    }


def _figures(report: dict[str, Any]) -> Grid:
    about, row = report["scenario"], report["policies"][0]
    details, quality = about["details"][row["policy"]], about["quality"]
    grid = Grid([Field("measured", 0, "left"), Field("", 0, "left", 40)])
    if quality["asked"]:
        grid.add("answers", f"{quality['exact']} of {quality['asked']} right")
    grid.add(
        "KV allocated",
        f"{mib(row['gpu_bytes'])} a request, {row['gpu_ratio']:.1%} of what keeping"
        f" every page takes ({details['slot_bytes'] / MIB:.2f} slots,"
        f" {details['fixed_bytes'] / MIB:.2f} index keys, HCA entries, windows; all requests)",
    )
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
