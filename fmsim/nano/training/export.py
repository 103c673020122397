"""Write a model in training as a Hugging Face directory, in files that a git host takes:
``python -m fmsim.nano.training.export MODEL OUT`` writes one in float8.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fmsim.exec.kernels.weights import quantise
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.weights.loader import KEPT_FLOAT32, load_model
from fmsim.exec.model.weights.quantised import published_float8

MOST_BYTES = 13_000_000  # of a file
FLOAT8_BLOCK = 32  # the largest power of two that divides every size of nano's matrices


def export(model: DeepseekV4, folder: Path, float8: bool = False) -> None:
    """``folder``: config.json, and safetensors of at most ``MOST_BYTES`` each with their index.

    Matrices that the release has in float8 are so with ``float8``, with a scale for each block of
    ``FLOAT8_BLOCK``; all else is bfloat16, or float32 where it is kept so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quantised = {f"{name}." for name in published_float8(model)} if float8 else set()
    state = {}
    for name, whole in model.state_dict().items():
        narrow = any(name.startswith(module) for module in quantised)
        for given, tensor in _matrices(name, whole):
            if narrow:
                codes, scale = quantise(tensor.detach().cpu(), (FLOAT8_BLOCK, FLOAT8_BLOCK), True)
                state |= {given: codes, f"{given}_scale_inv": scale}
            else:
                state[given] = _stored(name, tensor)
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
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = ["DeepseekV4ForCausalLM"], torch.bfloat16
    if float8:
        config.quantization_config = {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": [FLOAT8_BLOCK, FLOAT8_BLOCK],
        }  # fmt: skip
    config.save_pretrained(folder)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="directory to read")
    parser.add_argument("out", type=Path, help="directory to write")
    args = parser.parse_args()
    export(load_model(args.model), args.out, float8=True)


if __name__ == "__main__":
    main()
