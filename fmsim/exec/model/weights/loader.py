"""Load a DeepSeek-V4 directory in Hugging Face layout into `DeepseekV4`.

Names are transformers' or the official release's. Weights may be floats, float8 with a scale a
block (128 x 128), or pairs of 4-bit e2m1 values with a power-of-two scale for every 32 of a row. A
bfloat16 model keeps the released float8; all else is widened to the model's type. Tensors are read
one at a time, into a model that is allocated once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import DeepseekV4Config

from fmsim.errors import FmsimError
from fmsim.exec.kernels import weights
from fmsim.exec.kernels.weights import BLOCK, FP4_BLOCK, scale_shape
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.config import read_config
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.experts import Experts
from fmsim.exec.model.norm_rope import inverse_frequencies
from fmsim.exec.model.weights.quantised import has_float8_rows, hold_float8, published_float8
from fmsim.exec.model.weights.shards import FP8_BLOCK, Shards, scale_names

# transformers writes most tensors under the names of the official release; in order, first the
# longer patterns.
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
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(?:w([123])|(gate|up|down)_proj)\.weight$")
EXPERT_PARTS = {"gate": "1", "down": "2", "up": "3"}
MTP = re.compile(r"(^|.*\.)mtp\.")
LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# As transformers keeps them (`_keep_in_fp32_modules_strict`): small, and added, multiplied or
# compared in float32.
KEPT_FLOAT32 = re.compile(
    r"(_hc\.|hc_head\.|norm\.weight$|sinks$|position_bias$|e_score_correction_bias$|inv_freq$)"
)


def load_model(
    directory: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    widen: bool = False,
) -> DeepseekV4:
    """The model of ``directory`` with its weights as ``dtype``, ready for inference.

    In bfloat16, float8 weights with scales for 128 x 128 stay as they are: half the memory; unless
    ``widen``, for a long prompt is read at once with wide weights alone. Raises
    FmsimError naming the file and the tensor where the directory holds no DeepSeek-V4 that can be
    loaded.
    """
    model = meta_model(read_config(directory), dtype) if widen else empty_model(directory, dtype)
    shards = Shards(directory)
    allocate(model, device)
    slots = dict(model.state_dict())
    extra = set(extra_names(shards, model.config))
    filled: set[str] = set()
    for name in shards.names:
        if name not in extra:
            filled |= _place(slots, shards, name)
    if model.config.tie_word_embeddings:
        slots["lm_head.weight"].copy_(slots["model.embed_tokens.weight"])
        filled.add("lm_head.weight")
    missing = sorted(expected_parts(slots) - filled)
    if missing:
        raise FmsimError(
            f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    return model.eval().requires_grad_(False)


def empty_model(directory: Path, dtype: torch.dtype) -> DeepseekV4:
    """The model that `load_model` fills, without memory: its shapes and types are those that it
    will have.
    """
    config = read_config(directory)
    model = meta_model(config, dtype)
    if dtype == torch.bfloat16:
        hold_float8(model, _float8_modules(model, Shards(directory)), has_float8_rows(config))
    return model


def extra_names(shards: Shards, config: DeepseekV4Config) -> list[str]:
    """Tensors of multi-token prediction, which no decode here uses: under mtp, or in layers beyond
    the model's own.
    """
    found = []
    for name in shards.names:
        layer = LAYER.match(name)
        beyond = layer is not None and int(layer[1]) >= config.num_hidden_layers
        if beyond or MTP.match(name):
            found.append(name)
    return found


def meta_model(config: DeepseekV4Config, dtype: torch.dtype) -> DeepseekV4:
    """A model of the right shapes and types without memory; ``dtype`` is that of what is not
    KEPT_FLOAT32.
    """
    with torch.device("meta"):
        model = DeepseekV4(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if KEPT_FLOAT32.search(name) else dtype)
    return model


def allocate(model: DeepseekV4, device: str) -> DeepseekV4:
    """Give a `meta_model` its memory, once, on ``device``; weights are not yet filled. -> the same
    model.
    """
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, Attention):  # no weight, and in no file
            module.inv_freq = inverse_frequencies(model.config, module.rope_kind).to(device)
    return model


def _float8_modules(model: DeepseekV4, shards: Shards) -> list[str]:
    """Names of the modules of ``model`` that the release has in float8 and this directory too,
    every matrix with scales for 128 x 128.
    """
    held: dict[str, bool] = {}
    for name in shards.names:
        target = target_of(name)
        module = target.slot.rpartition(".")[0]
        whole = ".experts." in target.slot and target.expert is None  # its scales do not stack
        float8 = shards.stored_dtype(name) == "F8_E4M3" and shards.has_scale(name) and not whole
        held[module] = held.get(module, True) and float8
    return [
        name
        for name in published_float8(model)
        if shards.block == FP8_BLOCK and held.get(name) and _stacks(model.get_submodule(name))
    ]


def _stacks(module: torch.nn.Module) -> bool:
    """Whether its parts' scales stack as the parts do: those of experts whose gate ends with a
    block.
    """
    return not isinstance(module, Experts) or module.down_proj.shape[2] % BLOCK == 0


def dequantise(
    weight: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int], where: str
) -> torch.Tensor:
    """float32 of a quantised weight [..., out, in]; a weight of floats as it is.

    ``where`` is for the message of an FmsimError.

    float8 has a scale for each ``block``; 4-bit values come in pairs, the even one in a byte's low
    half, with a scale for each 32 of a row.
    """
    if weight.dtype in PLAIN:
        if scale is not None:
            raise FmsimError(
                f"{where} is {_name_of(weight.dtype)} with scales beside it, so it is not said what"
                " it means"
            )
        return weight
    if weight.dtype not in (*FLOAT8, torch.int8, torch.uint8):
        raise FmsimError(f"{where} is {_name_of(weight.dtype)}, which cannot be loaded")
    if scale is None:
        raise FmsimError(
            f"{where} is {_name_of(weight.dtype)} but has no scales beside it"
            f" ({' or '.join(scale_names(where.split()[-1]))})"
        )
    if weight.dtype not in FLOAT8:
        weight, block = weights.four_bit_values(weight), (1, FP4_BLOCK)
    return weights.dequantise(weight, checked_scale(weight, scale, block, where), block)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checked_scale(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], where: str
) -> torch.Tensor:
    """``scale`` as float32.

    Raises FmsimError where it is not one for each ``block`` of the weight.
    """
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    if scale.shape[-2:] != scale_shape(weight.shape, block)[-2:]:
        needed = list(scale_shape(weight.shape, block)[-2:])
        raise FmsimError(
            f"{where}: its scales are {list(scale.shape)}, blocks of {block[0]} x {block[1]} need"
            f" {needed}"
        )
    return scale.float()


def expected_parts(slots: dict[str, torch.Tensor]) -> set[str]:
    """Names of everything a directory must hold: tensors, and of stacked experts each matrix.

    Scales come with their weights.
    """
    parts = set()
    scales = {
        scale_slot(name) for name, tensor in slots.items() if tensor.dtype == torch.float8_e4m3fn
    }
    for name, tensor in slots.items():
        numbers = range(len(tensor)) if ".experts." in name else [None]
        stacked = {"gate_up_proj": "13", "down_proj": "2"}.get(name.rsplit(".", 1)[-1], "")
        parts |= (
            {name}
            if numbers == [None]
            else {f"{name} of expert {n} (w{w})" for n in numbers for w in stacked}
        )
    return parts - scales


def scale_slot(slot: str) -> str:
    """Where a model holds the scales of its float8 weight ``slot``: `Float8Linear`'s and `Experts`'
    names.
    """
    return slot.removesuffix("weight").removesuffix("proj") + "scale"


class Target(NamedTuple):
    """Where in the model a stored tensor belongs: a name of its state, and of stacked experts which
    one and which of its matrices.
    """

    slot: str
    expert: int | None = None
    part: str = ""

    def of(self, slots: dict[str, torch.Tensor], scale: bool = False) -> torch.Tensor:
        """The tensor to copy it into, or that of its scales."""
        tensor = slots[scale_slot(self.slot) if scale else self.slot]
        if self.expert is None:
            return tensor
        return (
            tensor[self.expert]
            if self.part == "2"
            else tensor[self.expert].chunk(2)[self.part == "3"]
        )

    def __str__(self) -> str:
        return (
            self.slot
            if self.expert is None
            else f"{self.slot} of expert {self.expert} (w{self.part})"
        )


def target_of(name: str) -> Target:
    """The place of a stored tensor, by its name in any of the spellings."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    expert = EXPERT.match(name)
    if expert is None:
        return Target(name)
    part = expert[3] or EXPERT_PARTS[expert[4]]
    return Target(
        expert[1] + (".down_proj" if part == "2" else ".gate_up_proj"), int(expert[2]), part
    )


def _place(slots: dict[str, torch.Tensor], shards: Shards, name: str) -> set[str]:
    """Copy one stored tensor into the model's slot of it; returns its names in
    ``expected_parts``.
    """
    target, path = target_of(name), shards.where[name]
    if target.slot not in slots:
        raise FmsimError(
            f"{path}: tensor {name} has no place in the model that config.json describes"
        )
    slot = target.of(slots)
    tensor = shards.read(name)
    scale = shards.scale_of(name)
    where = f"{path}: tensor {name}"
    held = slot.dtype == torch.float8_e4m3fn
    if slot.dtype == torch.int64:
        _check_whole(tensor, where)
    elif not held:
        tensor = dequantise(tensor, scale, shards.block, where)
    if slot.shape != tensor.shape:
        raise FmsimError(
            f"{path}: tensor {name} is {list(tensor.shape)}, config.json asks for"
            f" {list(slot.shape)}"
        )
    slot.copy_(tensor)
    if held:
        target.of(slots, scale=True).copy_(checked_scale(tensor, scale, shards.block, where))
    if target.expert is None:
        return expected_parts({target.slot: slots[target.slot]})
    return {str(target)}


def _check_whole(tensor: torch.Tensor, where: str) -> None:
    """A table of numbers, such as the experts of each token of a hash layer."""
    if tensor.is_floating_point() or tensor.is_complex():
        raise FmsimError(f"{where} is {_name_of(tensor.dtype)}, not whole numbers")
