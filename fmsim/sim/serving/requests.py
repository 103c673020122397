"""Recorded requests: Mooncake's JSON lines, and the CSV of Azure's and of BurstGPT's traces.

Formats: kvcache-ai/Mooncake FAST25-release (`timestamp` in ms, `input_length`, `output_length`,
`hash_ids` of 512-token prefix blocks); Azure/AzurePublicDataset LLM inference traces
(`TIMESTAMP,ContextTokens,GeneratedTokens`); HPMLL/BurstGPT (`Timestamp` in s, `Model`, `Request
tokens`, `Response tokens`, `Total tokens`, `Log Type`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fmsim.errors import FmsimError


class Arrival(NamedTuple):
    """One request: when it comes, how long its prompt is, and how many tokens it wants."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def read_requests(path: Path) -> list[Arrival]:
    """All requests of a file by arrival, the first at 0 s.

    Those without a prompt or an output (failed ones) are left out.

    Raises FmsimError that names file, line and what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FmsimError(
            f"{path}: no such request file; name one in the Mooncake, Azure or BurstGPT format"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FmsimError(f"{path}: cannot be read as requests ({error})") from None
    rows = sorted(
        row
        for row in _reader(path, text)(path, text)
        if row.prompt_tokens > 0 and row.output_tokens > 0
    )
    if not rows:
        raise FmsimError(f"{path}: no request with a prompt and an output in it")
    return [row._replace(arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows]


def repeated_share(path: Path) -> float | None:
    """Share of prompt blocks that an earlier request of a Mooncake file had as well; None for files
    without block ids.
    """
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("{"):
        return None
    seen: set[int] = set()
    repeated = total = 0
    for line in filter(str.strip, text.splitlines()):
        blocks = json.loads(line).get("hash_ids", [])
        total, repeated = total + len(blocks), repeated + sum(block in seen for block in blocks)
        seen.update(blocks)
    return repeated / total if total else None


def _reader(path: Path, text: str) -> Callable[[Path, str], Iterator[Arrival]]:
    first = text.lstrip().partition("\n")[0].strip()
    if first.startswith("{"):
        return _mooncake
    columns = {name.strip() for name in first.split(",")}
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return _azure
    if {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        return _burstgpt
    raise FmsimError(
        f"{path}, line 1: neither Mooncake JSON lines ('timestamp', 'input_length',"
        " 'output_length') nor a CSV with Azure's columns"
        " (TIMESTAMP,ContextTokens,GeneratedTokens) or BurstGPT's (Timestamp,Request"
        " tokens,Response tokens)"
    )


def _mooncake(path: Path, text: str) -> Iterator[Arrival]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _arrival(path, number, partial(_mooncake_row, line))


def _mooncake_row(line: str) -> Arrival:
    row = json.loads(line)
    return Arrival(
        float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"])
    )


def _azure(path: Path, text: str) -> Iterator[Arrival]:
    yield from _csv(
        path,
        text,
        lambda row: Arrival(
            _time_s(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])
        ),
    )


def _burstgpt(path: Path, text: str) -> Iterator[Arrival]:
    yield from _csv(
        path,
        text,
        lambda row: Arrival(
            float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"])
        ),
    )


def _csv(path: Path, text: str, parse: Callable[[dict[str, str]], Arrival]) -> Iterator[Arrival]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    for row in reader:
        yield _arrival(path, reader.line_num, partial(parse, row))


def _time_s(text: str) -> float:
    """Azure writes seven digits after the second; Python reads six, so the fraction is read
    apart.
    """
    whole, _, fraction = text.strip().removesuffix("+00:00").partition(".")
    return (datetime.fromisoformat(whole) - datetime(2023, 1, 1)).total_seconds() + float(
        f"0.{fraction or 0}"
    )


def _arrival(path: Path, number: int, parse: Callable[[], Arrival]) -> Arrival:
    try:
        return parse()
    except (KeyError, ValueError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise FmsimError(f"{path}, line {number}: not a request ({what})") from None
