"""Write a model in training as a Hugging Face directory in bfloat16, in files that a git host
takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.loader import KEPT_FLOAT32

MOST_BYTES = 13_000_000  # of a file


def export(model: DeepseekV4, folder: Path) -> None:
    """``folder``: config.json, and safetensors of at most ``MOST_BYTES`` each with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        given: _stored(name, tensor)
        for name, whole in model.state_dict().items()
        for given, tensor in _matrices(name, whole)
    }
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if sum(part.nbytes for part in shards[-1].values()) + tensor.nbytes > MOST_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    model.config.architectures, model.config.dtype = ["DeepseekV4ForCausalLM"], torch.bfloat16
    model.config.save_pretrained(folder)


def _matrices(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor under its own name; stacked experts one by one, as the release names them."""
    layer, found, which = name.partition(".mlp.experts.")
    if not found:
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        parts = (
            {"w2": matrix}
            if which == "down_proj"
            else dict(zip(("w1", "w3"), matrix.chunk(2), strict=True))
        )
        for part, weight in parts.items():
            yield f"{layer}.ffn.experts.{expert}.{part}.weight", weight


def _stored(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not KEPT_FLOAT32.search(name):
        tensor = tensor.to(torch.bfloat16)
    return tensor.detach().cpu().contiguous()
