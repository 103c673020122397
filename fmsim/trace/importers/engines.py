"""Responses of serving engines that captured their indexer's selections: SGLang's and vLLM's."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.files import inputs, strict_json
from fmsim.trace.importers.capture import Capture, Watched

NO_CAPTURE = {
    "sglang": "start the server with --enable-return-indexer-topk, and send return_indexer_topk",
    "vllm": "start the server with its indexer capture on, and ask for it in the request",
}


def read_sglang(path: Path, model: Watched, prompt_tokens: int | None) -> list[Capture]:
    """Every response of a JSON or JSONL file of `/generate`, or one array in a .npy file.

    `meta_info.indexer_topk` is base64 of little-endian int32 without a header, [prompt + generated
    - 1, layers, top-k]; row t is the query at position t.
    """
    if path.suffix == ".npy":
        rows = inputs.read_npy(path)
        if rows.ndim == 1:
            rows = _shaped(path, "", rows, len(model.layers), model.topk)
        return [Capture(path, rows, 0, _given(path, "", prompt_tokens), "sglang")]
    found = []
    for where, response in _responses(path):
        given = response.get("meta_info")
        meta = given if isinstance(given, dict) else {}
        text = meta.get("indexer_topk")
        data = _base64(path, where, "meta_info.indexer_topk", text, "sglang")
        if len(data) % 4:
            raise FmsimError(
                f"{_at(path, where)}: meta_info.indexer_topk: {len(data)} bytes are no int32s"
            )
        layers = _count(meta.get("indexer_topk_num_layers")) or len(model.layers)
        flat = np.frombuffer(data, "<i4")
        rows = _shaped(path, where, flat, layers, model.topk)
        prompt = _count(meta.get("prompt_tokens")) or prompt_tokens
        generated = _count(meta.get("completion_tokens"))
        prompt = _given(path, where, prompt)
        if generated and len(rows) != prompt + generated - 1:
            raise FmsimError(
                f"{_at(path, where)}: {len(rows)} rows of {layers} layers x {model.topk}, but"
                f" {prompt} prompt and {generated} generated tokens make"
                f" {prompt + generated - 1}; check --model, --topk and --layers"
            )
        found.append(Capture(path, rows, 0, prompt, "sglang", where))
    return found


def read_vllm(path: Path, model: Watched, prompt_tokens: int | None) -> list[Capture]:
    """Every choice of every completion in a JSON or JSONL file.

    `choices[].indexer_topk` is base64 of a .npy file: int32 [tokens, layers that run an indexer,
    top-k], from position `indexer_topk_prompt_start` on (0 where the choice does not say).
    """
    found = []
    for where, response in _responses(path):
        choices = response.get("choices")
        usage = response.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        if not isinstance(choices, list) or not choices:
            raise FmsimError(f"{_at(path, where)}: has no choices, so it is no completion of vLLM")
        for number, choice in enumerate(choices):
            place = ", ".join(filter(None, [where, f"choice {number}" * (len(choices) > 1)]))
            choice = choice if isinstance(choice, dict) else {}
            text = choice.get("indexer_topk")
            data = _base64(path, place, "indexer_topk", text, "vllm")
            rows = _npy(path, place, data)
            first = _count(choice.get("indexer_topk_prompt_start")) or 0
            prompt = _given(path, place, _count(usage.get("prompt_tokens")) or prompt_tokens)
            generated = _count(usage.get("completion_tokens"))
            wanted = prompt + (generated or 0) - first
            if generated and len(choices) == 1 and len(rows) not in (wanted - 1, wanted):
                raise FmsimError(
                    f"{_at(path, place)}: {len(rows)} rows from position {first}, but {prompt}"
                    f" prompt and {generated} generated tokens make {wanted - 1}; where the request"
                    " left out the prompt's first rows, write its indexer_topk_prompt_start into"
                    " the choice"
                )
            found.append(Capture(path, rows, first, prompt, "vllm", place))
    return found


def _responses(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in the file, response): of one JSON object, a list of them, or one a line."""
    text = inputs.read_text(path, inputs.MOST_BYTES_OF_CAPTURE)
    if path.suffix == ".jsonl":
        values = [
            strict_json.parse(line, f"{path}, line {number}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    else:
        value = strict_json.parse(text, str(path))
        values = value if isinstance(value, list) else [value]
    if not values:
        raise FmsimError(f"{path}: holds no response")
    for number, value in enumerate(values):
        where = f"response {number}" if len(values) > 1 else ""
        if not isinstance(value, dict):
            raise FmsimError(f"{_at(path, where)}: is no JSON object, so no response")
        yield where, value


def _base64(path: Path, where: str, field: str, text: Any, engine: str) -> bytes:
    if not isinstance(text, str) or not text:
        raise FmsimError(
            f"{_at(path, where)}: {field} is missing, so nothing was captured;"
            f" {NO_CAPTURE[engine]} (docs/how-to/capture-from-an-engine.md)"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FmsimError(f"{_at(path, where)}: {field} is not base64 ({error})") from None


def _npy(path: Path, where: str, data: bytes) -> np.ndarray:
    try:
        return inputs.npy(data)
    except (ValueError, EOFError) as error:
        raise FmsimError(f"{_at(path, where)}: indexer_topk is no .npy array ({error})") from None


def _shaped(path: Path, where: str, flat: np.ndarray, layers: int, topk: int) -> np.ndarray:
    """int32s without a shape -> [rows, layers, topk]."""
    if not len(flat) or len(flat) % (layers * topk):
        raise FmsimError(
            f"{_at(path, where)}: {len(flat)} ids are not whole rows of {layers} layers x {topk};"
            " give the --model that was captured, or --layers and --topk"
        )
    return flat.reshape(-1, layers, topk)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _given(path: Path, where: str, prompt_tokens: int | None) -> int:
    if not prompt_tokens:
        raise FmsimError(
            f"{_at(path, where)}: does not say how long the prompt was; give --prompt-tokens"
        )
    return prompt_tokens


def _at(path: Path, where: str) -> str:
    return f"{path} ({where})" if where else str(path)
