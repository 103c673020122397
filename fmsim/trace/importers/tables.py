"""Plain arrays and tables of selections: .npy, CSV, and the dumps of the miles trainer."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.files import inputs
from fmsim.trace.importers import array_pickle
from fmsim.trace.importers.capture import Capture, Watched

COLUMNS = ("time", "layer", "ids")
MILES_FIELD = "rollout_indexer_topk"


def read_npy(path: Path, model: Watched, prompt_tokens: int | None) -> list[Capture]:
    """Integers [steps, layers, top-k] of the decode steps alone."""
    prompt = _needed(path, prompt_tokens)
    return [Capture(path, inputs.read_npy(path), prompt, prompt, "npy")]


def read_csv(path: Path, model: Watched, prompt_tokens: int | None) -> list[Capture]:
    """A table with the columns time, layer and ids, a line a decode step and layer.

    Times and layers are whole numbers without a gap; ids are set apart by blanks or semicolons.
    """
    prompt = _needed(path, prompt_tokens)
    cells: dict[tuple[int, int], list[int]] = {}
    text = inputs.read_text(path, inputs.MOST_BYTES_OF_CAPTURE)
    try:
        lines = csv.DictReader(io.StringIO(text, newline=""))
        if tuple(lines.fieldnames or ()) != COLUMNS:
            raise FmsimError(f"{path}: its first line must be {','.join(COLUMNS)}")
        for number, line in enumerate(lines, 2):
            key, ids = _cell(path, number, line)
            if key in cells:
                raise FmsimError(f"{path}, line {number}: the step and layer stand there twice")
            cells[key] = ids
    except csv.Error as error:
        raise FmsimError(f"{path}: cannot be read as CSV ({error})") from None
    if not cells:
        raise FmsimError(f"{path}: holds no step")
    times, layers = (sorted(set(part)) for part in zip(*cells, strict=True))
    if len(cells) != len(times) * len(layers) or times[-1] - times[0] != len(times) - 1:
        raise FmsimError(
            f"{path}: {len(cells)} lines are not every layer of every step: {len(times)} steps"
            f" from {times[0]} to {times[-1]}, {len(layers)} layers"
        )
    rows = np.full((len(times), len(layers), max(map(len, cells.values())) or 1), -1, np.int32)
    for (time, layer), ids in cells.items():
        rows[time - times[0], layers.index(layer), : len(ids)] = ids
    return [Capture(path, rows, prompt, prompt, "csv")]


def _cell(path: Path, number: int, line: dict[str, Any]) -> tuple[tuple[int, int], list[int]]:
    try:
        ids = [int(part) for part in re.split(r"[;\s]+", line["ids"].strip()) if part]
        key = (int(line["time"]), int(line["layer"]))
    except (TypeError, ValueError, AttributeError, KeyError):
        raise FmsimError(f"{path}, line {number}: give time, layer and ids as numbers") from None
    if any(not 0 <= found < 2**31 for found in (*ids, *key)):
        raise FmsimError(f"{path}, line {number}: a number is negative or too large")
    return key, ids


def read_miles(path: Path, model: Watched, prompt_tokens: int | None) -> list[Capture]:
    """Every sample of a rollout dump, .pt or .parquet, that has `rollout_indexer_topk`.

    A sample's array is int32 [tokens - 1, layers, top-k] with the prompt's rows; its `tokens` and
    `response_length` say how long the prompt was.
    """
    samples = _parquet_samples(path) if path.suffix == ".parquet" else _torch_samples(path)
    found = []
    for number, sample in enumerate(samples):
        where = f"sample {number}"
        rows = sample.get(MILES_FIELD)
        if rows is None:
            continue
        rows = _miles_rows(path, where, rows, model)
        prompt, tokens = prompt_tokens, sample.get("tokens")
        response = sample.get("response_length")
        if tokens is not None and type(response) is int:
            prompt = len(tokens) - response
            if len(rows) != len(tokens) - 1:
                raise FmsimError(
                    f"{path} ({where}): {len(rows)} rows, but {len(tokens)} tokens make"
                    f" {len(tokens) - 1}"
                )
        found.append(Capture(path, rows, 0, _needed(path, prompt), "miles", where))
    if not found:
        raise FmsimError(
            f"{path}: no sample has {MILES_FIELD}; run the rollout with"
            " --use-rollout-indexer-replay"
        )
    return found


def _miles_rows(path: Path, where: str, rows: Any, model: Watched) -> np.ndarray:
    """As [tokens, layers, top-k], from an array, nested lists or raw int32s."""
    try:
        found = np.frombuffer(rows, "<i4") if isinstance(rows, bytes) else np.array(rows)
        if found.ndim == 1:
            found = found.reshape(-1, len(model.layers), model.topk)
    except ValueError as error:
        raise FmsimError(
            f"{path} ({where}): {MILES_FIELD} is no array of {len(model.layers)} layers x"
            f" {model.topk} ({error}); give the --model that was captured"
        ) from None
    return found


def _torch_samples(path: Path) -> list[dict[str, Any]]:
    found = array_pickle.load(path)
    samples = found.get("samples") if isinstance(found, dict) else None
    if not isinstance(samples, list) or not all(isinstance(one, dict) for one in samples):
        raise FmsimError(f"{path}: has no list of samples, so it is no rollout dump")
    return samples


def _parquet_samples(path: Path) -> list[dict[str, Any]]:
    """Rows of the table; or, where it has one column `samples`, what that holds."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise FmsimError(
            f"{path}: reading .parquet needs pyarrow: pip install 'fmsim[parquet]'"
        ) from None
    inputs.check_regular(path, inputs.MOST_BYTES_OF_CAPTURE)
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise FmsimError(f"{path}: is no parquet table ({error})") from None
    if rows and isinstance(rows[0].get("samples"), list):
        return [sample for row in rows for sample in row["samples"]]
    return rows


def _needed(path: Path, prompt_tokens: int | None) -> int:
    if not prompt_tokens:
        raise FmsimError(f"{path}: does not say how long the prompt was; give --prompt-tokens")
    return prompt_tokens
