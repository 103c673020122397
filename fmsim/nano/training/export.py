"""Write a training checkpoint as a Hugging Face directory: ``python -m fmsim.nano.training.export
CHECKPOINT OUT``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DeepseekV4ForCausalLM

from fmsim.exec.model.loader import KEPT_FLOAT32
from fmsim.nano.config import nano_config


def export(checkpoint: Path, out: Path) -> None:
    """``checkpoint/weights.safetensors`` -> config.json and model.safetensors in bfloat16."""
    model = DeepseekV4ForCausalLM(nano_config())
    model.load_state_dict(load_file(checkpoint / "weights.safetensors"))
    for name, parameter in model.named_parameters():
        if not KEPT_FLOAT32.search(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder with weights.safetensors, written by fmsim.nano.training.train",
    )
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    export(args.checkpoint, args.out)


if __name__ == "__main__":
    main()
