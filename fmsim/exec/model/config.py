"""Read a DeepSeek-V4 `config.json`: every field that changes the result is computed, or refused.

transformers is the reference. A field that it computes and this package does not is refused by its
name, so that no other model is decoded in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import DeepseekV4Config

from fmsim.errors import FmsimError
from fmsim.exec.model.kinds import SLIDING
from fmsim.files.inputs import read_json

MODEL_TYPE = "deepseek_v4"
# What is computed here, by field. Any other value is another model.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sqrtsoftplus",),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "topk_method": ("noaux_tc", None),
}
ROPE_TYPES = ("default", "yarn")
LONGEST_RATE = 65536  # tokens an entry; more than any context that is decoded here


def read_config(directory: Path) -> DeepseekV4Config:
    """The configuration of a model directory; FmsimError names the file, the field and what is
    computed instead.
    """
    path = directory / "config.json"
    try:
        fields = read_json(path)
    except FileNotFoundError:
        raise FmsimError(
            f"{path}: no such file; name a model directory in Hugging Face layout"
        ) from None
    if not isinstance(fields, dict):
        raise FmsimError(f"{path}: is not a JSON object")
    if fields.get("model_type") != MODEL_TYPE:
        raise FmsimError(
            f"{path}: model_type is {fields.get('model_type')!r}, and the GPU backend decodes"
            f" {MODEL_TYPE!r} only; `fmsim run` and `fmsim plan` take other families"
        )
    quantised = fields.get("quantization_config") or {}
    method = quantised.get("quant_method", "fp8") if isinstance(quantised, dict) else quantised
    if method != "fp8":
        raise FmsimError(
            f"{path}: quantization_config: quant_method {method!r} cannot be loaded; known is 'fp8'"
            " (with 4-bit experts or without)"
        )
    for name, values in COMPUTED.items():
        if name in fields and fields[name] not in values:
            _refuse(path, name, fields[name], values[0])
    _check_nested_yarn(path, fields)
    try:
        config = DeepseekV4Config.from_pretrained(directory)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise FmsimError(f"{path}: is no DeepSeek-V4 configuration ({_line(error)})") from None
    check_config(config, str(path))
    return config


def check_config(config: DeepseekV4Config, where: str) -> None:
    """Raise FmsimError, led by ``where``, for a field whose value is not computed here."""
    for name, values in COMPUTED.items():
        if getattr(config, name, values[0]) not in values:
            _refuse(where, name, getattr(config, name), values[0])
    for kind in sorted(set(config.layer_types) - {SLIDING}):
        rate = config.compress_rates.get(kind)
        if type(rate) is not int or not 1 <= rate <= LONGEST_RATE:
            _refuse(where, f"compress_rates.{kind}", rate, "a whole number of tokens, 1 or more")
    for kind, parameters in config.rope_parameters.items():
        name = f"rope_parameters.{kind}"
        if parameters["rope_type"] not in ROPE_TYPES:
            _refuse(where, f"{name}.rope_type", parameters["rope_type"], " or ".join(ROPE_TYPES))
        if parameters["rope_type"] == "yarn" and parameters.get("attention_factor") != 1:
            factor = parameters.get("attention_factor", "missing, so not 1")
            _refuse(where, f"{name}.attention_factor", factor, 1.0)


def _check_nested_yarn(path: Path, fields: dict[str, Any]) -> None:
    """A factor of attention that stands in the published spelling; transformers applies it."""
    scaling = fields.get("rope_scaling") or {}
    factor = scaling.get("attention_factor", 1) if isinstance(scaling, dict) else 1
    if factor not in (1, None):
        _refuse(path, "rope_scaling.attention_factor", factor, 1.0)


def _refuse(where: Path | str, name: str, value: Any, computed: Any) -> None:
    raise FmsimError(f"{where}: {name} is {value!r}, which is not computed here; only {computed!r}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
