"""Load a DeepSeek-V4 directory in Hugging Face layout into ``fmsim.exec.model``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import DeepseekV4Config

from fmsim.errors import FmsimError
from fmsim.exec.model import DeepseekV4

# transformers writes most tensors under the names of the official release; in order, first the longer patterns.
RENAMES = [
    (r"^(layers|norm|hc_head|embed)", r"model.\1"),
    (r"^model\.embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"hc_head_(fn|base|scale)$", r"hc_head.hc_\1"),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.indexer\.compressor\.", ".compressor.indexer."),
    (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.self_attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.ape$", ".position_bias"),
    (r"(self_attn|compressor|indexer)\.norm\.", r"\1.kv_norm."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
]
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.w([123])\.weight$")


def load_model(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DeepseekV4:
    """The model of ``directory`` with its weights as ``dtype``, ready for inference.

    Raises FmsimError naming the file and the tensor where the directory holds no DeepSeek-V4 that can be loaded.
    """
    model = DeepseekV4(read_config(directory)).to(dtype)
    slots = dict(model.state_dict())
    filled = set()
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if not name.startswith("mtp."):
                        filled.add(_place(slots, name, file.get_tensor(name), path))
        except SafetensorError as error:
            raise FmsimError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    missing = sorted(expected_parts(slots) - filled)
    if missing:
        raise FmsimError(f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}")
    model.load_state_dict(slots)  # `slots` are the model's own tensors: this checks shapes, and copies nothing anew
    return model.to(device).eval().requires_grad_(False)


def read_config(directory: Path) -> DeepseekV4Config:
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise FmsimError(f"{path}: no such file; name a model directory in Hugging Face layout") from None
    except json.JSONDecodeError as error:
        raise FmsimError(f"{path}: not JSON ({error})") from None
    if fields.get("model_type") != "deepseek_v4":
        raise FmsimError(f"{path}: model_type is {fields.get('model_type')!r}, and only 'deepseek_v4' can be run here")
    if "quantization_config" in fields:
        raise FmsimError(f"{path}: quantization_config: quantised weights cannot be loaded yet; convert them to bfloat16")
    return DeepseekV4Config.from_pretrained(directory)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors shards of a directory: those its index names, or the single file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (directory / name).exists():
            raise FmsimError(f"{directory / name}: no such file; the directory's weights are incomplete")
    return [directory / name for name in names]


def expected_parts(slots: dict[str, torch.Tensor]) -> set[str]:
    """Names of everything a directory must hold: tensors, and of stacked experts each matrix."""
    parts = set()
    for name, tensor in slots.items():
        numbers = range(len(tensor)) if ".experts." in name else [None]
        stacked = {"gate_up_proj": "13", "down_proj": "2"}.get(name.rsplit(".", 1)[-1], "")
        parts |= {name} if numbers == [None] else {f"{name} of expert {n} (w{w})" for n in numbers for w in stacked}
    return parts


def _place(slots: dict, name: str, tensor: torch.Tensor, path: Path) -> str:
    """Copy one stored tensor into the model's slot of it; returns its name in ``expected_parts``."""
    target = name
    for pattern, replacement in RENAMES:
        target = re.sub(pattern, replacement, target)
    expert = EXPERT.match(target)
    if expert:
        target, number, part = expert[1] + (".down_proj" if expert[3] == "2" else ".gate_up_proj"), int(expert[2]), expert[3]
    if target not in slots:
        raise FmsimError(f"{path}: tensor {name} has no place in the model that config.json describes")
    slot = slots[target]
    if expert:
        slot = slot[number]
        if part != "2":
            slot = slot.chunk(2)[part == "3"]
    if slot.shape != tensor.shape:
        raise FmsimError(f"{path}: tensor {name} is {list(tensor.shape)}, config.json asks for {list(slot.shape)}")
    slot.copy_(tensor)
    return f"{target} of expert {number} (w{part})" if expert else target
