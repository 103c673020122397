"""Reading a `config.json`: a field, or an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def need(config: Mapping[str, Any], key: str) -> int:
    """The whole number at ``key``, above zero; ValueError names the key."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"'{key}' is missing or no whole number above 0")
    return value


def weight_bytes_of(config: Mapping[str, Any], parameters: int) -> float:
    """Bytes of all weights: one a parameter where the config says fp8, else two (bfloat16)."""
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    if quantised not in (None, "fp8"):
        raise ValueError(f"'quantization_config' has quant_method {quantised!r}; known is fp8")
    return float(parameters if quantised == "fp8" else 2 * parameters)
