"""Recorded requests: Mooncake's JSON lines, and the CSV of Azure's and of BurstGPT's traces.

Formats: kvcache-ai/Mooncake FAST25-release (`timestamp` in ms, `input_length`, `output_length`,
`hash_ids` of 512-token prefix blocks); Azure/AzurePublicDataset LLM inference traces
(`TIMESTAMP,ContextTokens,GeneratedTokens`); HPMLL/BurstGPT (`Timestamp` in s, `Model`, `Request
tokens`, `Response tokens`, `Total tokens`, `Log Type`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fmsim.errors import FmsimError, short, shown
from fmsim.files import strict_json
from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, read_text
from fmsim.sim.serving.spec import MOST_TOKENS

MOST_SECONDS = 1e12  # of a recorded time, from any origin
MOONCAKE_BLOCK = 512  # tokens


class Arrival(NamedTuple):
    """One request: when it comes, how long its prompt is, and how many tokens it wants."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # ids of its tokens' blocks, as far as they are known
    session: int = 0
    turn: int = 0  # of the session


def read_requests(path: Path) -> list[Arrival]:
    """All requests of a file by arrival, the first at 0 s.

    Those without a prompt or an output (failed ones) are left out.

    Raises FmsimError that names file, line and what is wrong.
    """
    text = _text(path)
    rows = sorted(
        row
        for row in _reader(path, text)(path, text)
        if row.prompt_tokens > 0 and row.output_tokens > 0
    )
    if not rows:
        raise FmsimError(f"{shown(path)}: no request with a prompt and an output in it")
    return [row._replace(arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows]


def repeated_share(requests: list[Arrival]) -> float | None:
    """Share of prompt blocks that an earlier request had as well; None where no block has an id."""
    seen: set[int] = set()
    repeated = total = 0
    for request in requests:
        total += len(request.blocks)
        repeated += sum(block in seen for block in request.blocks)
        seen.update(request.blocks)
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
        f"{shown(path)}, line 1: neither Mooncake JSON lines ('timestamp', 'input_length',"
        " 'output_length') nor a CSV with Azure's columns"
        " (TIMESTAMP,ContextTokens,GeneratedTokens) or BurstGPT's (Timestamp,Request"
        " tokens,Response tokens)"
    )


def _mooncake(path: Path, text: str) -> Iterator[Arrival]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _object(path, number, line)
            yield _arrival(path, number, partial(_mooncake_row, row))


def _mooncake_row(row: dict[str, Any]) -> Arrival:
    for key in ("timestamp", "input_length", "output_length"):
        kinds = (int, float) if key == "timestamp" else (int,)
        if type(row[key]) not in kinds:
            raise ValueError(f"'{key}' is {short(row[key])}, no {' or '.join(map(_name, kinds))}")
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise ValueError("'hash_ids' is no list of whole numbers")
    return Arrival(
        float(row["timestamp"]) / 1e3, row["input_length"], row["output_length"], tuple(blocks)
    )


def _name(kind: type) -> str:
    return "whole number" if kind is int else "number"


def _azure(path: Path, text: str) -> Iterator[Arrival]:
    yield from _csv(
        path,
        text,
        lambda row: Arrival(
            _time_s(row["TIMESTAMP"]), _count(row["ContextTokens"]), _count(row["GeneratedTokens"])
        ),
    )


def _burstgpt(path: Path, text: str) -> Iterator[Arrival]:
    yield from _csv(
        path,
        text,
        lambda row: Arrival(
            float(row["Timestamp"]), _count(row["Request tokens"]), _count(row["Response tokens"])
        ),
    )


def _csv(path: Path, text: str, parse: Callable[[dict[str, str]], Arrival]) -> Iterator[Arrival]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or []]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise FmsimError(f"{shown(path)}, line 1: the column {short(twice)} stands there twice")
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():
                raise FmsimError(
                    f"{shown(path)}, line {reader.line_num}: not a request (it has more or fewer"
                    f" values than the {len(names)} columns of line 1)"
                )
            yield _arrival(path, reader.line_num, partial(parse, row))
    except csv.Error as error:
        line = reader.reader.line_num  # the other one counts what was read whole
        raise FmsimError(f"{shown(path)}, line {line}: not CSV ({error})") from None


def _count(text: str) -> int:
    """Tokens, in ASCII digits alone: int() would read 1_000 and other scripts' digits too."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text.strip()):
        raise ValueError(f"{short(text)} is no whole number")
    return int(text)


def _time_s(text: str) -> float:
    """Azure writes seven digits after the second; Python reads six, so the fraction is read
    apart.
    """
    whole, _, fraction = text.strip().removesuffix("+00:00").partition(".")
    if fraction and not re.fullmatch(r"[0-9]{1,12}", fraction):
        raise ValueError(f"{short(text)} is no time")
    at = datetime.fromisoformat(whole)
    if at.tzinfo is not None:
        raise ValueError(f"{short(text)} has a time zone; write UTC")
    return (at - datetime(2023, 1, 1)).total_seconds() + float(f"0.{fraction or 0}")


def _arrival(path: Path, number: int, parse: Callable[[], Arrival]) -> Arrival:
    try:
        row = parse()
        if not abs(row.arrival_s) <= MOST_SECONDS:
            raise ValueError("its time is no finite number of seconds, or too large")
        if max(row.prompt_tokens, row.output_tokens) > MOST_TOKENS:
            raise ValueError(f"more than {MOST_TOKENS:,} tokens")
        return row
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else shown(error)
        raise FmsimError(f"{shown(path)}, line {number}: not a request ({what})") from None


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    """One line of a JSON-lines file."""
    row = strict_json.parse(line, f"{path}, line {number}")
    if not isinstance(row, dict):
        raise FmsimError(f"{shown(path)}, line {number}: not a request (no JSON object)")
    return row


def _text(path: Path) -> str:
    try:
        return read_text(path, MOST_BYTES_OF_RESULTS)
    except FileNotFoundError:
        raise FmsimError(
            f"{shown(path)}: no such request file; name one in the Mooncake, Azure or BurstGPT"
            " format"
        ) from None
