"""Load a DeepSeek-V4 directory in Hugging Face layout into ``fmsim.exec.model``.

Names are transformers' or the official release's. Weights may be floats, float8 with a scale a block (128 x 128), or pairs of 4-bit e2m1
values with a power-of-two scale for every 32 of a row; all are widened to one type. Tensors are read one at a time, into a model that is
allocated once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import DeepseekV4Config

from fmsim.errors import FmsimError
from fmsim.exec.model import Attention, DeepseekV4, inverse_frequencies

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


# As transformers keeps them (`_keep_in_fp32_modules_strict`): small, and added, multiplied or compared in float32.
KEPT_FLOAT32 = re.compile(r"(_hc\.|hc_head\.|norm\.weight$|sinks$|position_bias$|e_score_correction_bias$|inv_freq$)")
FP8_BLOCK = (128, 128)
FP4_BLOCK = 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))


def load_model(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DeepseekV4:
    """The model of ``directory`` with its weights as ``dtype``, ready for inference.

    Raises FmsimError naming the file and the tensor where the directory holds no DeepSeek-V4 that can be loaded.
    """
    model = empty_model(read_config(directory), device, dtype)
    slots = dict(model.state_dict())
    filled = set()
    for name, tensor, path in tensors(directory):
        if not name.startswith("mtp."):
            filled.add(_place(slots, name, tensor, path))
    missing = sorted(expected_parts(slots) - filled)
    if missing:
        raise FmsimError(f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return model.eval().requires_grad_(False)


def empty_model(config: DeepseekV4Config, device: str, dtype: torch.dtype) -> DeepseekV4:
    """A model whose weights are allocated once, on ``device``, and not yet filled."""
    model = meta_model(config, dtype).to_empty(device=device)
    for module in model.modules():
        if isinstance(module, Attention):  # no weight, and in no file
            module.inv_freq = inverse_frequencies(config, module.rope_kind).to(device)
    return model


def meta_model(config: DeepseekV4Config, dtype: torch.dtype) -> DeepseekV4:
    """A model of the right shapes and types without memory; ``dtype`` is that of what is not KEPT_FLOAT32."""
    with torch.device("meta"):
        model = DeepseekV4(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if KEPT_FLOAT32.search(name) else dtype)
    return model


def tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Every weight of a directory by its stored name, with its file, widened where it is quantised."""
    path, files = directory, {}
    try:
        for path in weight_files(directory):
            files[path] = safe_open(path, framework="pt")
        where = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118
        scales = {scale for name in where for scale in scale_names(name) if scale in where}
        block = _fp8_block(directory)
        for name, path in where.items():
            if name not in scales:
                tensor = files[path].get_tensor(name)
                scale = next((files[where[s]].get_tensor(s) for s in scale_names(name) if s in where), None)
                yield name, dequantise(tensor, scale, block, f"{path}: tensor {name}"), path
    except SafetensorError as error:
        raise FmsimError(f"{path}: not a readable safetensors file ({error}); copy it again") from error


def scale_names(name: str) -> tuple[str, ...]:
    """Where the scales of a weight may be: transformers' name for them, and the official release's."""
    official = (name.removesuffix("weight") + "scale",) if name.endswith(".weight") else ()
    return (name + "_scale_inv", *official)


def dequantise(weight: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int], where: str) -> torch.Tensor:
    """float32 of a quantised weight [..., out, in]; a weight of floats as it is. ``where`` is for the message of an FmsimError.

    float8 has a scale for each ``block``; 4-bit values come in pairs, the even one in a byte's low half, with a scale for each 32 of a row.
    """
    quantised = weight.dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8)
    if not quantised:
        return weight
    if scale is None:
        raise FmsimError(f"{where} is {str(weight.dtype).removeprefix('torch.')} but has no scales beside it ({' or '.join(scale_names(where.split()[-1]))})")
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    if weight.dtype != torch.float8_e4m3fn:
        codes = weight.view(torch.uint8)
        weight, block = E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()], (1, FP4_BLOCK)
    counts = tuple(-(-size // step) for size, step in zip(weight.shape[-2:], block))
    if scale.shape[-2:] != counts:
        raise FmsimError(f"{where}: its scales are {list(scale.shape)}, blocks of {block[0]} x {block[1]} need {list(counts)}")
    wide = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return weight.float() * wide[..., : weight.shape[-2], : weight.shape[-1]]


def _fp8_block(directory: Path) -> tuple[int, int]:
    quantised = json.loads((directory / "config.json").read_text()).get("quantization_config") or {}
    return tuple(quantised.get("weight_block_size") or FP8_BLOCK)


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
    method = (fields.get("quantization_config") or {}).get("quant_method", "fp8")
    if method != "fp8":
        raise FmsimError(f"{path}: quantization_config: quant_method {method!r} cannot be loaded; known is 'fp8' (with 4-bit experts or without)")
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
